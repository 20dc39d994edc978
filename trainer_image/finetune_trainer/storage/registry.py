"""A client of one repository in an OCI registry, by the distribution specification 1.1. Called by images.

Every request is tried again after trouble that passes, and a large upload goes on where it broke off. Credentials are read from the
mounted Secret at each sign-in: a Secret of type kubernetes.io/dockerconfigjson, or the keys username and password. They, and the
addresses that a registry signs, appear in no log and no error.
"""

import base64
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, NoReturn, TypeVar
from urllib.parse import quote

from finetune_crds import locations
from finetune_crds.v1alpha1 import Location

from ..errors import UserError
from . import credentials
from .patience import TryAgain, patiently
from .roots import Roots

if TYPE_CHECKING:
    import httpx

CHUNK = 64 * 1024 * 1024
"""Bytes of one request of a large upload."""
_READ: Final = 1024 * 1024
_DOCKER_CONFIG: Final = ".dockerconfigjson"
_DOCKER_HUB: Final = ("docker.io", "index.docker.io", "registry-1.docker.io")
_LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
_NO_CHUNKS: Final = (404, 405, 415, 416)
"""Answers to the first part of an upload by registries that want it whole."""

T = TypeVar("T")


class Manifest(NamedTuple):
    """A manifest as the registry has it."""

    digest: str
    media_type: str
    content: dict[str, Any]


class _Gone(Exception):
    """The registry has forgotten an upload, or takes none in parts."""


class Registry:
    """One repository, with what may be done in it: `pull`, or `pull,push`."""

    def __init__(self, location: Location, roots: Roots, *, actions: str) -> None:
        import httpx

        place = locations.parse(location.uri)
        self._location, self._roots, self._actions = location, roots, actions
        self._host, self._repository = place.root, place.path
        if self._host in _DOCKER_HUB and "/" not in self._repository:
            self._repository = f"library/{self._repository}"
        self._base = httpx.URL(location.endpoint.rstrip("/") if location.endpoint else _address(self._host))
        self._client = httpx.Client(timeout=httpx.Timeout(120, connect=10), headers={"User-Agent": "finetune-trainer"})
        self._authorization = ""
        credentials.read(location, "username", roots)  # a Secret that is not mounted is told as such, at once

    def manifest(self, reference: str) -> Manifest | None:
        """The manifest of a tag or digest; None when there is none.

        Raises:
            TryAgain: in its place comes something else than was asked for.
        """
        kinds = ("oci.image.index.v1", "oci.image.manifest.v1")
        docker = ("distribution.manifest.list.v2", "distribution.manifest.v2")
        accept = ", ".join(
            [f"application/vnd.{kind}+json" for kind in kinds]
            + [f"application/vnd.docker.{kind}+json" for kind in docker]
        )

        def get() -> Manifest | None:
            answer = self._ask("GET", self._url(f"manifests/{reference}"), headers={"Accept": accept})
            if answer.status_code == 404:
                return None
            self._expect(answer, 200)
            digest = _sha256(answer.content)
            if reference.startswith("sha256:") and digest != reference:
                raise TryAgain("the registry sent another manifest than was asked for")
            return Manifest(digest, answer.headers.get("Content-Type", "").partition(";")[0], answer.json())

        return self._patiently(get, "read")

    def blob(self, digest: str) -> bytes:
        """A small blob."""

        def get() -> bytes:
            answer = self._ask("GET", self._url(f"blobs/{digest}"), follow=True)
            self._expect(answer, 200)
            if _sha256(answer.content) != digest:
                raise TryAgain("a blob arrived damaged")
            return answer.content

        return self._patiently(get, "read")

    def download(self, digest: str, target: Path) -> None:
        """A blob of any size, continued where an earlier try stopped, and verified."""
        target.parent.mkdir(parents=True, exist_ok=True)

        def get() -> None:
            with target.open("ab") as out:
                start = out.tell()
                headers = {"Range": f"bytes={start}-"} if start else {}
                with self._stream("GET", self._url(f"blobs/{digest}"), headers) as answer:
                    if answer.status_code == 401 and self._authorization:
                        self._authorization = ""
                        raise TryAgain("the sign-in had run out")
                    self._check(answer)
                    if answer.status_code != 416:  # else all of it is there
                        self._expect(answer, 200, 206)
                        if start and answer.status_code == 200:
                            out.truncate(0)
                        for chunk in answer.iter_bytes():
                            out.write(chunk)
            with target.open("rb") as file:
                if f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" != digest:
                    target.unlink()
                    raise TryAgain("a blob arrived damaged")

        self._patiently(get, "read")

    def has(self, digest: str) -> bool:
        """Whether a blob is there."""

        def head() -> bool:
            answer = self._ask("HEAD", self._url(f"blobs/{digest}"), follow=True)
            if answer.status_code == 404:
                return False
            self._expect(answer, 200)
            return True

        return self._patiently(head, "read")

    def check_writable(self) -> None:
        """Begins an upload and takes it back.

        Raises:
            UserError: the registry will take nothing.
        """
        place = self._patiently(self._begin, "written")
        self._patiently(lambda: self._ask("DELETE", place), "written")  # a registry that cannot lets it expire

    def upload(self, source: Path) -> str:
        """Uploads a blob unless it is there; its digest."""
        with source.open("rb") as file:
            digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        if self.has(digest):
            return digest
        if source.stat().st_size > CHUNK:
            try:
                self._upload_in_parts(source, digest)
                return digest
            except _Gone:
                if self.has(digest):  # it was done, and the answer lost
                    return digest
        self._patiently(lambda: self._upload_whole(source, digest), "written")
        return digest

    def put_manifest(self, reference: str, media_type: str, content: bytes) -> str:
        """Puts a manifest in the place of a tag or digest; its digest."""

        def put() -> None:
            answer = self._ask(
                "PUT", self._url(f"manifests/{reference}"), headers={"Content-Type": media_type}, content=content
            )
            self._expect(answer, 201, 200, 202)

        self._patiently(put, "written")
        return _sha256(content)

    def close(self) -> None:
        """Ends its connections."""
        self._client.close()

    def _begin(self) -> str:
        """Begins an upload; where it goes."""
        answer = self._ask("POST", self._url("blobs/uploads/"), content=b"")
        self._expect(answer, 202)
        return self._next(answer)

    def _upload_whole(self, source: Path, digest: str) -> None:
        place = self._begin()
        with source.open("rb") as file:
            length = source.stat().st_size
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(length)}
            answer = self._ask("PUT", _with_digest(place, digest), headers=headers, content=_part(file, 0, length))
        self._expect(answer, 201)

    def _upload_in_parts(self, source: Path, digest: str) -> None:
        """After a failure the registry is asked how much it has.

        Raises:
            _Gone: it has forgotten, or takes no parts.
        """
        size, sent, unsure = source.stat().st_size, 0, False
        place = self._patiently(self._begin, "written")

        def put() -> None:
            nonlocal place, sent, unsure
            if unsure:
                answer = self._ask("GET", place)
                if answer.status_code not in (200, 202, 204):
                    raise _Gone
                place, sent = self._next(answer), _received(answer)
                if sent >= size:
                    return
            unsure = True
            end = min(sent + CHUNK, size)
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(end - sent),
                "Content-Range": f"{sent}-{end - 1}",
            }
            with source.open("rb") as file:
                answer = self._ask("PATCH", place, headers=headers, content=_part(file, sent, end))
            if answer.status_code in _NO_CHUNKS:
                raise _Gone
            self._expect(answer, 202, 204)
            place, sent, unsure = self._next(answer), end, False

        while sent < size:
            self._patiently(put, "written")

        def finish() -> None:
            answer = self._ask("PUT", _with_digest(place, digest), content=b"")
            if answer.status_code == 404:
                raise _Gone
            self._expect(answer, 201)

        self._patiently(finish, "written")

    def _ask(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        content: "bytes | Iterator[bytes] | None" = None,
        follow: bool = False,
    ) -> "httpx.Response":
        """One request; signs in when asked to, unless the body cannot be sent again (every upload begins with a request that can)."""
        answer = self._send(method, url, headers, content, follow)
        if answer.status_code == 401 and self._sign_in(answer):
            if content is not None and not isinstance(content, bytes):
                raise TryAgain("the sign-in had run out")
            answer = self._send(method, url, headers, content, follow)
        self._check(answer)
        return answer

    def _send(
        self, method: str, url: str, headers: dict[str, str] | None, content: Any, follow: bool
    ) -> "httpx.Response":
        request = self._client.build_request(
            method, url, headers={**self._signed(url), **(headers or {})}, content=content
        )
        return self._client.send(request, follow_redirects=follow)

    def _stream(self, method: str, url: str, headers: dict[str, str]) -> Any:
        if not self._authorization:
            self._ask("HEAD", url, follow=True)
        return self._client.stream(method, url, headers={**self._signed(url), **headers}, follow_redirects=True)

    def _signed(self, url: str) -> dict[str, str]:
        """The sign-in is for the registry alone: uploads may go to a store of its own."""
        import httpx

        there = httpx.URL(url)
        ours = (there.scheme, there.host, there.port) == (self._base.scheme, self._base.host, self._base.port)
        return {"Authorization": self._authorization} if ours and self._authorization else {}

    def _sign_in(self, refused: "httpx.Response") -> bool:
        """Does what a refusal asks for; False when there is nothing left to try."""
        before = self._authorization
        challenges = refused.headers.get("WWW-Authenticate", "")
        fields = dict(re.findall(r'(\w+)="([^"]*)"', challenges))
        user = self._user()
        if re.search(r"\bBearer\b", challenges, re.IGNORECASE) and "realm" in fields:
            self._authorization = f"Bearer {self._token(fields['realm'], fields.get('service', ''), user)}"
        elif re.search(r"\bBasic\b", challenges, re.IGNORECASE) and user.basic:
            self._authorization = user.basic
        return self._authorization not in ("", before)

    def _token(self, realm: str, service: str, user: "_User") -> str:
        if user.token:
            return user.token
        if self._base.scheme == "https" and not realm.startswith("https://"):
            raise UserError(
                f"{self._location.uri}: the registry asks for its password over plain http; it was not sent"
            )
        scope = f"repository:{self._repository}:{self._actions}"
        if user.identity:
            form = {"grant_type": "refresh_token", "refresh_token": user.identity, "service": service, "scope": scope}
            answer = self._client.post(realm, data={**form, "client_id": "finetune-trainer"})
        else:
            headers = {"Authorization": user.basic} if user.basic else {}
            answer = self._client.get(realm, params={"service": service, "scope": scope}, headers=headers)
        self._check(answer)
        self._expect(answer, 200)
        content = answer.json()
        return str(content.get("token") or content.get("access_token") or "")

    def _user(self) -> "_User":
        found = credentials.read(self._location, _DOCKER_CONFIG, self._roots)
        if found is not None:
            return _docker_user(self._location, self._host, found)
        if self._location.secret_ref is None:
            return _User()
        name = credentials.require(self._location, "username", self._roots)
        return _User(_basic(name, credentials.require(self._location, "password", self._roots)))

    def _url(self, path: str) -> str:
        return f"{str(self._base).rstrip('/')}/v2/{self._repository}/{path}"

    def _next(self, answer: "httpx.Response") -> str:
        """Where an upload goes on."""
        place = answer.headers.get("Location")
        if not place:
            raise TryAgain("the registry did not say where an upload goes")
        return str(answer.url.join(place))

    def _patiently(self, action: Callable[[], T], verb: str) -> T:
        import httpx

        return patiently(self._location.uri, action, (httpx.TransportError, TryAgain), verb=verb)

    def _check(self, answer: "httpx.Response") -> None:
        """
        Raises:
            UserError: the credentials will not do.
            TryAgain: the registry may answer otherwise next time.
        """
        status = answer.status_code
        if status in (401, 403):
            action = "push to" if "push" in self._actions else "pull from"
            if self._location.secret_ref is None:
                raise UserError(
                    f"{self._location.uri}: the registry refused to let nobody in particular {action} it ({status}); name a Secret in secretRef"
                )
            raise UserError(
                f"{self._location.uri}: the credentials in Secret {self._location.secret_ref.name} may not {action} it ({status}); check them"
            )
        if status in (408, 425, 429) or status >= 500:
            raise TryAgain(f"the registry answered {status}")

    def _expect(self, answer: "httpx.Response", *statuses: int) -> None:
        if answer.status_code not in statuses:
            self._refuse(answer)

    def _refuse(self, answer: "httpx.Response") -> NoReturn:
        status = answer.status_code
        if status == 404:
            raise UserError(
                f"{self._location.uri}: there is no such repository or image ({_code(answer) or status}); correct the uri, or create the repository"
            )
        raise UserError(
            f"{self._location.uri}: the registry refused the request ({_code(answer) or status}); correct the uri"
        )


class _User(NamedTuple):
    """Ways to sign in; empty where there is none."""

    basic: str = ""
    identity: str = ""
    """A refresh token."""
    token: str = ""
    """A bearer token as it is."""


def _docker_user(location: Location, host: str, config: str) -> _User:
    """The entry of a docker config file for a host; none is no error, since reading may need none."""
    assert location.secret_ref
    try:
        entries: dict[str, dict[str, str]] = json.loads(config)["auths"]
        for name, entry in entries.items():
            if not _is_for(name, host):
                continue
            if entry.get("identitytoken") or entry.get("registrytoken"):
                return _User("", entry.get("identitytoken", ""), entry.get("registrytoken", ""))
            if entry.get("auth"):
                user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
                return _User(_basic(user, password))
            return _User(_basic(entry["username"], entry["password"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"secretRef of {location.uri}: {_DOCKER_CONFIG} of Secret {location.secret_ref.name} is no docker config file; make it by kubectl create secret docker-registry"
        ) from None
    return _User()


def _is_for(entry: str, host: str) -> bool:
    """Whether an entry of a docker config file is for a host: it may have a scheme, a path and, as for a kubelet, a *."""
    named = re.sub(r"^https?://", "", entry).partition("/")[0]
    return fnmatch.fnmatchcase(host, named) or (host in _DOCKER_HUB and named in _DOCKER_HUB)


def _address(host: str) -> str:
    if host in _DOCKER_HUB:
        return "https://registry-1.docker.io"
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return f"{'http' if name in _LOOPBACK else 'https'}://{host}"


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _part(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    while start < end:
        block = file.read(min(_READ, end - start))
        start += len(block)
        yield block


def _received(answer: "httpx.Response") -> int:
    """Bytes of an upload that the registry has: `Range: 0-99` are 100, and so that there is a way to say 0, `0-0` is none."""
    last = answer.headers.get("Range", "").rpartition("-")[2]
    return int(last) + 1 if last.isdigit() and int(last) > 0 else 0


def _with_digest(place: str, digest: str) -> str:
    return f"{place}{'&' if '?' in place else '?'}digest={quote(digest, safe='')}"


def _code(answer: "httpx.Response") -> str:
    """The registry's own word, one of the specification's: nothing else of an answer is told."""
    try:
        code = str(answer.json()["errors"][0]["code"])
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
    return code if re.fullmatch(r"[A-Z_]{1,40}", code) else ""


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
