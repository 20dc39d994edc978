"""What lies behind the URI of a dataset source, listed: a folder or a file, on this machine or elsewhere. Called by sources."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from finetune_crds import locations
from finetune_crds.v1alpha1 import Location

from ..errors import UserError
from . import downloads, places
from .kinds import is_data
from .layouts import shown
from .remote_files import RemoteFile
from .roots import Roots


@dataclass(frozen=True)
class SourceFile:
    """A file of a source."""

    uri: str
    version: str
    """Differs between contents, as far as a listing tells; empty where it does not tell."""
    size: int | None
    """Bytes."""
    fetch: Callable[[], Path]
    """Brings it to this machine. Raises UserError, StorageError."""
    into: Path | None = None
    """Folder of what is fetched and goes when it has been read."""
    arrive: Callable[[], RemoteFile] | None = None
    """Opens it where it lies, to be read as it arrives in place of being fetched. Raises UserError, StorageError."""

    def release(self, path: Path) -> None:
        """Removes what was fetched; what lies elsewhere stays."""
        if self.into and path.is_relative_to(self.into):
            downloads.forget(path)


class LocalTree:
    """A folder or file on this machine. The file's own name is empty."""

    def __init__(
        self, uri: str, path: Path, address: Callable[[str], str] | None = None, *, is_repository: bool = False
    ) -> None:
        """Args: address: the URI of a name below; default: below `uri`; is_repository: the whole of one."""
        self.uri, self._path, self.is_repository = uri.rstrip("/"), path, is_repository
        self._address = address or (lambda name: f"{self.uri}/{name}" if name else uri)

    def has(self, name: str) -> bool:
        """Whether it is a file there."""
        return (self._path / name).is_file()

    def top(self, depth: int) -> list[str]:
        """Files at most so deep."""
        patterns = ("*" + "/*" * i for i in range(depth))
        return [
            path.relative_to(self._path).as_posix()
            for one in patterns
            for path in self._path.glob(one)
            if path.is_file()
        ]

    def names(self) -> list[str]:
        """All files below."""
        return self._names

    def read(self, name: str) -> bytes:
        """The content of a small one."""
        return (self._path / name).read_bytes()

    def file(self, name: str) -> SourceFile:
        """One of them."""
        path = self._path / name
        stat = path.stat()
        return SourceFile(self._address(name), f"{stat.st_mtime_ns}", stat.st_size, lambda: path)

    @cached_property
    def _names(self) -> list[str]:
        return sorted(path.relative_to(self._path).as_posix() for path in self._path.rglob("*") if path.is_file())


class RemoteTree:
    """Objects below a prefix, files of a repository, or one file of a server. The file's own name is empty."""

    def __init__(
        self,
        uri: str,
        files: Mapping[str, tuple[int | None, str]],
        fetch: Callable[[str], Path],
        into: Path,
        address: Callable[[str], str],
        arrive: Callable[[str, int], RemoteFile] | None,
        *,
        is_repository: bool = False,
    ) -> None:
        """
        Args:
            files: size and version by name.
            fetch: brings one below `into`, or finds it.
            address: its URI.
            arrive: opens one of such a size where it lies; None where that cannot be done, or no change of it would be noticed.
            is_repository: the whole of one.
        """
        self.uri, self._files, self._fetch, self._into = uri.rstrip("/"), files, fetch, into
        self._address, self._arrive, self.is_repository = address, arrive, is_repository

    def has(self, name: str) -> bool:
        """Whether it is a file there."""
        return name in self._files

    def top(self, depth: int) -> list[str]:
        """Files at most so deep."""
        return [name for name in self._files if name.count("/") < depth]

    def names(self) -> list[str]:
        """All files below."""
        return sorted(self._files)

    def read(self, name: str) -> bytes:
        """The content of a small one."""
        file = self.file(name)
        path = file.fetch()
        content = path.read_bytes()
        file.release(path)
        return content

    def file(self, name: str) -> SourceFile:
        """One of them."""
        size, version = self._files[name]
        arrive = partial(self._arrive, name, size) if self._arrive and size is not None else None
        return SourceFile(self._address(name), version, size, partial(self._fetch, name), self._into, arrive)


def tree(source: Location, folder: str, into: Path, roots: Roots) -> LocalTree | RemoteTree:
    """What there is at a source, or below its folder if it ends in a pattern.

    Raises:
        UserError: the place is wrong.
        StorageError: it could not be reached.
    """
    place = locations.parse(source.uri)
    pattern = "*" in place.path
    base = source.uri.rpartition("/")[0] if pattern else source.uri
    into.mkdir(parents=True, exist_ok=True)
    if place.scheme in ("pvc", "file", "configmap"):
        path = places.local_path(source, roots)
        path = path.parent if pattern else path
        if not path.exists():
            raise UserError(places.missing(source, path))
        return LocalTree(base, path)
    if place.scheme == "https":
        address = named(source.uri)
        if pattern:
            raise UserError(f"{address}: https:// cannot be listed, so * does not work there; name each file")
        length, version, in_parts = downloads.describe_https(source, roots)
        return RemoteTree(
            address,
            {"": (length, version)},
            lambda _: downloads.from_https(source, into, roots),
            into,
            lambda _: address,
            (lambda _, size: downloads.open_https(source, roots, size, version)) if in_parts and version else None,
        )
    if place.scheme == "s3":
        objects = {_below(item["path"], folder): item for item in downloads.list_objects(source, roots, folder)}
        last = Path(folder).name

        def uri(name: str) -> str:
            return f"s3://{place.root}/{'/'.join(filter(None, (folder, name)))}"

        def arrive(name: str, _: int) -> RemoteFile:
            return downloads.open_object(_at(source, uri(name)), roots, objects[name])

        return RemoteTree(
            base,
            {name: (int(item["size"]), str(item["e_tag"] or item["last_modified"])) for name, item in objects.items()},
            lambda name: downloads.fetch_object(source, roots, objects[name], into / (name or last)),
            into,
            uri,
            arrive if all(item["e_tag"] for item in objects.values()) else None,
        )
    return _repository(source, folder, into, roots)


def named(uri: str) -> str:
    """An https address without its query, but with a file's ending that only the query has (?file=rows.jsonl)."""
    address, _, query = uri.partition("?")
    ending = re.search(r"(\.[a-z]+){1,2}$", query)
    return address + ending[0] if ending and is_data(f"rows{ending[0]}") and not is_data(address) else address


def _repository(source: Location, folder: str, into: Path, roots: Roots) -> LocalTree | RemoteTree:
    from huggingface_hub import constants

    place = locations.parse(source.uri)
    revision = f"@{place.revision}" if place.revision else ""

    def address(name: str) -> str:
        return f"hf://{'/'.join(filter(None, (place.root, folder, name)))}{revision}"

    if constants.HF_HUB_OFFLINE:
        snapshot = downloads.snapshot(source, roots, "dataset", [])
        return LocalTree(source.uri, snapshot / folder, address, is_repository=not folder)
    commit, files = downloads.describe_repository(source, roots)
    below = {_below(path, folder): each for path, each in files.items() if path == folder or _is_below(path, folder)}
    if not below:
        raise UserError(f"{source.uri}: no file matches; there is {shown(files)}")

    def fetch(name: str) -> Path:
        return downloads.from_repository(source, roots, commit, "/".join(filter(None, (folder, name))), into)

    def arrive(name: str, size: int) -> RemoteFile:
        path = "/".join(filter(None, (folder, name)))
        return downloads.open_in_repository(_at(source, address(name)), roots, commit, path, size)

    return RemoteTree(source.uri, below, fetch, into, address, arrive, is_repository=not folder)


def _at(source: Location, uri: str) -> Location:
    """One file of it, which messages about that file name."""
    return source.model_copy(update={"uri": uri})


def _is_below(path: str, folder: str) -> bool:
    return not folder or path.startswith(f"{folder}/")


def _below(path: str, folder: str) -> str:
    return path[len(folder) :].lstrip("/")
