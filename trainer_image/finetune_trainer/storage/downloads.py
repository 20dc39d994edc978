"""Files from S3, https and the Hugging Face hub. A file has its name only once it is whole: till then it is `.part` beside it.

A partial file is continued if the server's version tag (ETag) is still the same, and thrown away if not.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from finetune_crds import locations
from finetune_crds.v1alpha1 import Location

from ..errors import UserError
from . import credentials, s3
from .patience import TryAgain, patiently
from .roots import Roots

if TYPE_CHECKING:
    import httpx

    from .places import Wanted

_RANGE = 16 * 1024 * 1024
_AHEAD = 8
_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_OTHER_FORMATS = ["*consolidated*"]
"""The same weights once more, as their authors' own programs read them."""


def from_s3(location: Location, into: Path, roots: Roots) -> Path:
    """An object, or every object below a prefix as a folder."""
    path = locations.parse(location.uri).path
    objects = _objects(location, roots, path)
    exact = [item for item in objects if item["path"] == path]
    if exact:
        return _fetch_object(location, roots, exact[0], into / Path(path).name)
    if not objects:
        raise UserError(f"{location.uri}: there is no object of this name or below it; correct the uri")
    for item in objects:
        _fetch_object(location, roots, item, into / item["path"][len(path) :].lstrip("/"))
    return into


def files_from_s3(source: Location, into: Path, roots: Roots, wanted: "Wanted") -> dict[str, Path]:
    """The objects that a source means, by URI."""
    bucket = locations.parse(source.uri).root
    items = [item for item in _objects(source, roots, wanted.folder) if wanted.needs(item["path"])]
    start = len(wanted.folder)

    def fetch(item: Any) -> Path:
        below = item["path"][start:].lstrip("/")
        return _fetch_object(source, roots, item, into / (below or Path(item["path"]).name))

    small = all(
        int(item["size"]) <= _RANGE for item in items
    )  # of images there are many; a large file has threads of its own
    with ThreadPoolExecutor(_AHEAD if small else 1) as threads:
        found = dict(zip((item["path"] for item in items), threads.map(fetch, items), strict=True))
    return {f"s3://{bucket}/{path}": file for path, file in found.items() if wanted.matches(path)}


def from_https(location: Location, into: Path, roots: Roots) -> Path:
    """One file."""
    import httpx

    name = Path(locations.parse(location.uri).path.partition("?")[0]).name or "download"
    target = into / name
    token = credentials.require(location, "token", roots) if location.secret_ref else None
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
    with httpx.Client(follow_redirects=True, timeout=httpx.Timeout(60, connect=10), headers=headers) as client:
        patiently(location.uri, lambda: _download(client, location, target), (httpx.TransportError, TryAgain))
    return target


def from_hub(location: Location, roots: Roots, *, repository: Literal["model", "dataset"]) -> Path:
    """A repository's folder, or a folder or file in it."""
    path = locations.parse(location.uri).path
    patterns = [f"{path}/{pattern}" for pattern in _MODEL_FILES] + [path] if path else _MODEL_FILES
    folder = _snapshot(location, roots, repository, patterns)
    found = folder / path
    if not found.exists() or not any(folder.iterdir()):
        raise UserError(f"{location.uri}: the repository has no {path or 'model files'}; correct the uri")
    return found


def files_from_hub(source: Location, roots: Roots, wanted: "Wanted") -> dict[str, Path]:
    """The files of a dataset repository that a source means, by URI."""
    place = locations.parse(source.uri)
    if not place.path:
        raise UserError(f"{source.uri}: name the files in the repository, such as {source.uri}/data/train-*.parquet")
    folder = _snapshot(source, roots, "dataset", [place.path, f"{place.path}/*"])
    revision = f"@{place.revision}" if place.revision else ""
    return {
        f"hf://{place.root}/{relative}{revision}": path
        for path in folder.rglob("*")
        if path.is_file() and wanted.matches(relative := path.relative_to(folder).as_posix())
    }


def _objects(location: Location, roots: Roots, folder: str) -> list[Any]:
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


def _fetch_object(location: Location, roots: Roots, item: Any, target: Path) -> Path:
    """Range by range, each for one version of the object, so that a change in between is noticed."""
    import obstore

    client = s3.client(location, roots)
    size, tag = int(item["size"]), str(item["e_tag"] or item["last_modified"])

    def fetch(offset: int) -> Any:
        options: dict[str, Any] = {"range": (offset, min(offset + _RANGE, size))}
        if item["e_tag"]:
            options["if_match"] = item["e_tag"]
        return obstore.get(client, item["path"], options=options).bytes()

    with s3.errors(location):
        if not _is_whole(target, tag, size):
            with _partial(target, tag, size) as (out, start), ThreadPoolExecutor(_AHEAD) as threads:
                pending: deque[Future[Any]] = deque()
                for offset in range(start, size, _RANGE):
                    pending.append(threads.submit(fetch, offset))
                    if len(pending) == _AHEAD:
                        out.write(pending.popleft().result())
                for last in pending:
                    out.write(last.result())
    return target


def _download(client: "httpx.Client", location: Location, target: Path) -> None:
    tag, size = _describe(client, location)
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


def _describe(client: "httpx.Client", location: Location) -> tuple[str, int | None]:
    """Version tag and size of a file; empty and None where the server does not tell."""
    answer = client.head(location.uri)
    if not answer.is_success:
        # Some servers know no HEAD, and an address that was signed for GET is good for nothing else.
        with client.stream("GET", location.uri, headers={"Range": "bytes=0-0"}) as answer:
            _check(answer, location)
    total = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers.get("Content-Length", "")
    tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    return tag, int(total) if total.isdigit() else None


def _check(answer: "httpx.Response", location: Location) -> None:
    status = answer.status_code
    if status in (401, 403):
        if location.secret_ref:
            raise UserError(
                f"{location.uri}: the token in Secret {location.secret_ref.name} was refused ({status}); renew it"
            )
        raise UserError(
            f"{location.uri}: refused without credentials ({status}); name a Secret with the key token in secretRef"
        )
    if status in (404, 410):
        raise UserError(f"{location.uri}: not found ({status}); correct the uri")
    if status in (408, 425, 429) or status >= 500:
        raise TryAgain(f"the server answered {status}")
    if status >= 400:
        raise UserError(f"{location.uri}: the server refused the request ({status}); correct the uri")


def _snapshot(location: Location, roots: Roots, kind: str, patterns: list[str]) -> Path:
    """A repository's matching files, in the hub client's own cache below HF_HOME: it resumes, verifies, and shares with other tools."""
    import httpx2
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    place = locations.parse(location.uri)
    token: str | bool | None = credentials.require(location, "token", roots) if location.secret_ref else None

    def fetch() -> Path:
        try:
            found = snapshot_download(
                place.root,
                repo_type=kind,
                revision=place.revision,
                allow_patterns=patterns,
                ignore_patterns=_OTHER_FORMATS if kind == "model" else None,
                endpoint=location.endpoint,
                token=token,
                max_workers=4,
            )
        except errors.GatedRepoError as error:
            raise UserError(
                f"{location.uri}: the repository is gated; ask for access on its page, and name a Secret with the key token in secretRef"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise UserError(
                f"{location.uri}: the repository has no revision {place.revision}; correct what follows @"
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
        return Path(found)

    return patiently(
        location.uri,
        fetch,
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
