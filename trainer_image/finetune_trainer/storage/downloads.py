"""Files from S3, https and the Hugging Face hub. A file has its name only once it is whole: till then it is `.part` beside it.

A partial file is continued if the server's version tag (ETag) is still the same, and thrown away if not. What is too large for scratch is opened
where it lies; of that, every range must be of the same version.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from finetune_crds import locations
from finetune_crds.v1alpha1 import Location

from ..errors import StorageError, UserError
from . import credentials, s3
from .patience import TryAgain, patiently
from .remote_files import RemoteFile
from .roots import Roots

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

_RANGE = 16 * 1024 * 1024
_AHEAD = 8
_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_OTHER_FORMATS = ["*consolidated*"]
"""The same weights once more, as their authors' own programs read them."""


def from_s3(location: Location, into: Path, roots: Roots) -> Path:
    """An object, or every object below a prefix as a folder."""
    path = locations.parse(location.uri).path
    objects = list_objects(location, roots, path)
    exact = [item for item in objects if item["path"] == path]
    if exact:
        return fetch_object(location, roots, exact[0], into / Path(path).name)
    if not objects:
        raise UserError(f"{location.uri}: there is no object of this name or below it; correct the uri")
    for item in objects:
        fetch_object(location, roots, item, into / item["path"][len(path) :].lstrip("/"))
    return into


def from_https(location: Location, into: Path, roots: Roots) -> Path:
    """One file."""
    target = into / (Path(locations.parse(location.uri).path).name or "download")
    _over_https(location, roots, lambda client: _download(client, location, target))
    return target


def describe_https(location: Location, roots: Roots) -> tuple[int | None, str, bool]:
    """Size and version of a file, None and empty where the server does not tell; and whether it says that it gives parts of it."""
    tag, size, in_parts = _over_https(location, roots, lambda client: _describe(client, location))
    return size, tag, in_parts


def open_https(location: Location, roots: Roots, size: int, tag: str) -> RemoteFile:
    """A file where it lies, in the version of that tag."""
    return _opened(location, location.uri, lambda: _headers(location, roots), size, tag)


def from_hub(location: Location, roots: Roots, *, repository: Literal["model", "dataset"]) -> Path:
    """A repository's folder, or a folder or file in it."""
    path = locations.parse(location.uri).path
    patterns = [f"{path}/{pattern}" for pattern in _MODEL_FILES] + [path] if path else _MODEL_FILES
    folder = snapshot(location, roots, repository, patterns)
    found = folder / path
    if not found.exists() or not any(folder.iterdir()):
        raise UserError(f"{location.uri}: the repository has no {path or 'model files'}; correct the uri")
    return found


def describe_repository(source: Location, roots: Roots) -> tuple[str, dict[str, tuple[int | None, str]]]:
    """The commit of a dataset repository's revision, and its files: size and version by path."""
    from huggingface_hub import HfApi

    place = locations.parse(source.uri)
    api = HfApi(endpoint=source.endpoint, token=_token(source, roots))
    info = _from_hub(
        source,
        "dataset",
        lambda: api.dataset_info(place.root, revision=place.revision or "main", files_metadata=True),
    )
    commit = str(info.sha)
    files = info.siblings or []
    return commit, {
        file.rfilename: (file.size, file.lfs.sha256 if file.lfs else file.blob_id or commit) for file in files
    }


def from_repository(source: Location, roots: Roots, commit: str, path: str, into: Path) -> Path:
    """One file of a dataset repository: below `into`, unless the hub client's own cache has it."""
    from huggingface_hub import hf_hub_download

    if cached := _cached(source, commit, path):
        return cached
    root, token = locations.parse(source.uri).root, _token(source, roots)
    return Path(
        _from_hub(
            source,
            "dataset",
            lambda: hf_hub_download(
                root, path, repo_type="dataset", revision=commit, endpoint=source.endpoint, token=token, local_dir=into
            ),
        )
    )


def open_in_repository(source: Location, roots: Roots, commit: str, path: str, size: int) -> RemoteFile:
    """A file of a dataset repository where it lies: on the hub, or in the hub client's own cache. What a commit has does not change."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented there, not in its __all__

    if cached := _cached(source, commit, path):
        return RemoteFile(source.uri, size, lambda start, end, _: _part(cached, start, end))
    root = locations.parse(source.uri).root
    address = hf_hub_url(root, path, repo_type="dataset", revision=commit, endpoint=source.endpoint)
    return _opened(source, address, lambda: build_hf_headers(token=_token(source, roots)), size)


def _cached(source: Location, commit: str, path: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(locations.parse(source.uri).root, path, repo_type="dataset", revision=commit)
    return Path(found) if isinstance(found, str) else None


def _part(path: Path, start: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


def forget(path: Path) -> None:
    """Removes a file that was fetched, and what was noted about it."""
    path.unlink(missing_ok=True)
    _note(path).unlink(missing_ok=True)


def list_objects(location: Location, roots: Roots, folder: str) -> list[Any]:
    """The object of that name and all below it. A listing by prefix alone leaves the object itself out."""
    import obstore

    client = s3.client(location, roots)
    with s3.errors(location):
        found = [item for batch in obstore.list(client, prefix=folder or None) for item in batch]
        if not found and folder:
            found = [obstore.head(client, folder)]
    return _without_folders(found)


def _without_folders(items: list[Any]) -> list[Any]:
    """Leaves out the empty objects that consoles make to stand for folders."""
    folders = {str(parent) for item in items for parent in PurePosixPath(item["path"]).parents}
    return [item for item in items if item["path"] not in folders]


def fetch_object(location: Location, roots: Roots, item: Any, target: Path) -> Path:
    """An object as a file: range by range, each for one version of the object, so that a change in between is noticed."""
    size, tag = int(item["size"]), str(item["e_tag"] or item["last_modified"])
    fetch = _ranges(location, roots, item)
    if not _is_whole(target, tag, size):
        with _partial(target, tag, size) as (out, start), ThreadPoolExecutor(_AHEAD) as threads:
            pending: deque[Future[Any]] = deque()
            for offset in range(start, size, _RANGE):
                pending.append(threads.submit(fetch, offset, min(offset + _RANGE, size)))
                if len(pending) == _AHEAD:
                    out.write(pending.popleft().result())
            for last in pending:
                out.write(last.result())
    return target


def open_object(location: Location, roots: Roots, item: Any) -> RemoteFile:
    """An object where it lies. It must have an ETag."""
    fetch = _ranges(location, roots, item)
    return RemoteFile(location.uri, int(item["size"]), lambda start, end, _: fetch(start, end))


def _ranges(location: Location, roots: Roots, item: Any) -> Callable[[int, int], Any]:
    import obstore

    client = s3.client(location, roots)

    def fetch(start: int, end: int) -> Any:
        options: dict[str, Any] = {"range": (start, end)}
        if item["e_tag"]:
            options["if_match"] = item["e_tag"]
        with s3.errors(location):
            return obstore.get(client, item["path"], options=options).bytes()

    return fetch


def _headers(location: Location, roots: Roots) -> dict[str, str]:
    return {"Authorization": f"Bearer {_token(location, roots)}"} if location.secret_ref else {}


def _client(headers: dict[str, str]) -> "httpx.Client":
    import httpx

    headers = {**headers, "Accept-Encoding": "identity"}
    return httpx.Client(follow_redirects=True, timeout=httpx.Timeout(60, connect=10), headers=headers)


def _over_https(location: Location, roots: Roots, action: Callable[["httpx.Client"], T]) -> T:
    import httpx

    with _client(_headers(location, roots)) as client:
        return patiently(locations.public(location.uri), lambda: action(client), (httpx.TransportError, TryAgain))


def _opened(
    location: Location, address: str, headers: Callable[[], dict[str, str]], size: int, tag: str = ""
) -> RemoteFile:
    """What lies at an address. Without a tag the address stands for one version. Headers are made anew for each request, since tokens are rotated."""
    import httpx

    client, place = _client({}), locations.public(location.uri)

    def fetch(start: int, end: int, wanted: Callable[[], bool]) -> bytearray:
        got = bytearray()

        def go_on() -> None:
            """Returns if anything came."""
            if not wanted():
                raise CancelledError
            before = len(got)
            asked = {**headers(), "Range": f"bytes={start + before}-{end - 1}"}
            try:
                with client.stream("GET", address, headers=asked) as answer:
                    _check_part(answer, location, start + before, size, tag)
                    # Read to its end, so that the next request goes over the same connection; but a server may give more than it was asked for.
                    for chunk in answer.iter_raw():
                        got.extend(chunk)
                        if len(got) > end - start or not wanted():
                            return
            except httpx.TransportError:
                if len(got) == before:
                    raise
            if len(got) == before:
                raise TryAgain(f"{before} bytes arrived instead of {end - start}")

        while len(got) < end - start:
            patiently(place, go_on, (httpx.TransportError, TryAgain))
        del got[end - start :]
        return got

    return RemoteFile(place, size, fetch, client.close)


def _check_part(answer: "httpx.Response", location: Location, start: int, size: int, tag: str) -> None:
    if answer.status_code not in (412, 416):
        _check(answer, location)
    place, _, whole = answer.headers.get("Content-Range", "").partition("/")
    other = tag and _tag(answer) not in (tag, "")
    if answer.status_code >= 400 or other or (whole.isdigit() and int(whole) != size):
        raise StorageError(s3.changed(location))
    mistake = ""
    if answer.status_code != 206 or not place.startswith(f"bytes {start}-"):
        mistake = "the server says that it gives parts of the file, but does not give those that it is asked for"
    elif tag and not _tag(answer):
        mistake = "the server names no version (ETag or Last-Modified) with the parts that it gives, so that a change would not be noticed"
    if mistake:
        raise UserError(
            f"{locations.public(location.uri)}: {mistake}; set resources.scratch to at least {2 * size} bytes, twice the file, so that it is fetched whole, or put the file elsewhere"
        )


def _download(client: "httpx.Client", location: Location, target: Path) -> None:
    tag, size, _ = _describe(client, location)
    if tag and size is not None and _is_whole(target, tag, size):
        return
    with _partial(target, tag, size) as (out, start):
        headers = {"Range": f"bytes={start}-", "If-Range": tag} if start else {}
        with client.stream("GET", location.uri, headers=headers) as answer:
            _check(answer, location)
            if start and answer.status_code != 206:
                out.seek(0)
                out.truncate()
            for chunk in answer.iter_bytes():
                out.write(chunk)


def _describe(client: "httpx.Client", location: Location) -> tuple[str, int | None, bool]:
    """Version tag and size of a file, empty and None where the server does not tell; and whether it says that it gives parts of it."""
    answer = client.head(location.uri)
    if not answer.is_success:
        # Some servers know no HEAD, and an address that was signed for GET is good for nothing else.
        with client.stream("GET", location.uri, headers={"Range": "bytes=0-0"}) as answer:
            _check(answer, location)
    total = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers.get("Content-Length", "")
    in_parts = answer.status_code == 206 or answer.headers.get("Accept-Ranges", "").lower() == "bytes"
    return _tag(answer), int(total) if total.isdigit() else None, in_parts


def _tag(answer: "httpx.Response") -> str:
    return str(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")


def _check(answer: "httpx.Response", location: Location) -> None:
    status, place = answer.status_code, locations.public(location.uri)
    if status in (401, 403):
        if location.secret_ref:
            raise UserError(f"{place}: the token in Secret {location.secret_ref.name} was refused ({status}); renew it")
        signed = "sign the address anew if what follows its ? is a signature, or " if "?" in location.uri else ""
        raise UserError(
            f"{place}: refused without credentials ({status}); {signed}name a Secret with the key token in secretRef"
        )
    if status in (404, 410):
        raise UserError(f"{place}: not found ({status}); correct the uri")
    if status in (408, 425, 429) or status >= 500:
        raise TryAgain(f"the server answered {status}")
    if status >= 400:
        raise UserError(f"{place}: the server refused the request ({status}); correct the uri")


def snapshot(location: Location, roots: Roots, kind: str, patterns: list[str]) -> Path:
    """A repository's matching files, all if none is named, in the hub client's own cache below HF_HOME: it resumes, verifies, and shares with other tools."""
    from huggingface_hub import snapshot_download

    place = locations.parse(location.uri)
    token = _token(location, roots)
    return Path(
        _from_hub(
            location,
            kind,
            lambda: snapshot_download(
                place.root,
                repo_type=kind,
                revision=place.revision,
                allow_patterns=patterns or None,
                ignore_patterns=_OTHER_FORMATS if kind == "model" else None,
                endpoint=location.endpoint,
                token=token,
                max_workers=4,
            ),
        )
    )


def _token(location: Location, roots: Roots) -> str | None:
    return credentials.require(location, "token", roots) if location.secret_ref else None


def _from_hub(location: Location, kind: str, action: Callable[[], T]) -> T:
    """Asks the hub, again after trouble that passes; what it refuses in our words."""
    import httpx2
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()

    def ask() -> T:
        try:
            return action()
        except errors.GatedRepoError as error:
            raise UserError(
                f"{location.uri}: the repository is gated; ask for access on its page, and name a Secret with the key token in secretRef"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise UserError(
                f"{location.uri}: the repository has no revision {locations.parse(location.uri).revision}; correct what follows @"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise UserError(
                f"{location.uri}: no {kind} repository of this name"
                + (
                    f" that the token in Secret {location.secret_ref.name} may read"
                    if location.secret_ref
                    else "; if it is private, name a Secret with the key token in secretRef"
                )
            ) from error

    return patiently(
        location.uri,
        ask,
        (
            httpx2.TransportError,
            errors.LocalEntryNotFoundError,
            errors.HfHubHTTPError,
            errors.IncompleteSnapshotError,
            OSError,
        ),
    )


@contextmanager
def _partial(target: Path, tag: str, size: int | None) -> Iterator[tuple[Any, int]]:
    """A file to append to, and how much of it is there. Takes its name when the block ends and the size is right."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{_short(tag)}.part")
    if not tag:
        part.unlink(missing_ok=True)
    with part.open("ab") as out:
        yield out, out.tell()
    if size is not None and part.stat().st_size != size:
        got = part.stat().st_size
        part.unlink()
        raise TryAgain(f"{got} bytes arrived instead of {size}")
    part.replace(target)
    _note(target).write_text(tag, encoding="utf-8")


def _is_whole(target: Path, tag: str, size: int) -> bool:
    """Whether an earlier run has this very version."""
    note = _note(target)
    return target.is_file() and target.stat().st_size == size and note.is_file() and note.read_text() == tag


def _note(target: Path) -> Path:
    return target.with_name(f".{target.name}.tag")


def _short(tag: str) -> str:
    return hashlib.sha256(tag.encode()).hexdigest()[:12]
