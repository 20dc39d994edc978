"""Locations that are read: a URI becomes a file or folder on this machine. Called by preparation and loading.

Claims, ConfigMaps and local files are used where they are; s3://, https://, hf:// and oci:// are downloaded, resumed where an earlier try
stopped, and verified. A place that is wrong is a UserError that names the URI and says what to do; trouble on the way is tried again
with back-off and ends as StorageError.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from finetune_crds import locations
from finetune_crds.v1alpha1 import Location

from ..errors import UserError
from . import downloads, images
from .roots import Roots

DATA_SUFFIXES: Final = (".jsonl", ".json", ".csv", ".parquet", ".txt")
COMPRESSED: Final = (".gz", ".zst")
IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_LISTED = 8


@dataclass(frozen=True)
class SourceFile:
    """One file of a dataset source."""

    uri: str
    path: Path
    size: int
    """Bytes."""
    sha256: str
    """Hex."""


def materialise(location: Location, into: Path, roots: Roots | None = None) -> Path:
    """The file or folder behind a location, for reading only.

    Args:
        location: any scheme; hf:// is a model repository here.
        into: folder that downloads go to, one for each location; hf:// has a cache of its own.
        roots: where claims, ConfigMaps and Secrets lie; default: what this process was started with.

    Raises:
        UserError: the place is wrong.
        StorageError: it could not be reached.
    """
    roots = roots or Roots.from_environment()
    place = locations.parse(location.uri)
    if place.scheme in ("pvc", "file", "configmap"):
        path = local_path(location, roots)
        if not path.exists():
            raise UserError(_missing(location, path))
        return path
    into.mkdir(parents=True, exist_ok=True)
    if place.scheme == "s3":
        return downloads.from_s3(location, into, roots)
    if place.scheme == "https":
        return downloads.from_https(location, into, roots)
    if place.scheme == "oci":
        return images.fetch(location, into, roots)
    return downloads.from_hub(location, roots, repository="model")


def source_files(source: Location, into: Path, roots: Roots | None = None, *, images: bool = False) -> list[SourceFile]:
    """The files of a dataset source, sorted by URI. `*` matches within a folder; a folder stands for the data files in it.

    hf:// is a dataset repository here.

    Args:
        source: where.
        into: folder that downloads go to.
        roots: where claims, ConfigMaps and Secrets lie; default: what this process was started with.
        images: whether a folder stands for the images in its sub-folders, and `*` for sub-folders, too. Beside a table they are
            what its rows name, and no rows of their own.

    Raises:
        UserError: the place is wrong, or nothing matches.
        StorageError: it could not be reached.
    """
    roots = roots or Roots.from_environment()
    which = wanted(source.uri, images=images)
    place = locations.parse(source.uri)
    into.mkdir(parents=True, exist_ok=True)
    if place.scheme in ("pvc", "file", "configmap"):
        found = _local_files(source, which, roots)
    elif place.scheme == "s3":
        found = downloads.files_from_s3(source, into, roots, which)
    elif place.scheme == "https":
        if "*" in place.path:
            raise UserError(f"{source.uri}: https:// cannot be listed, so * does not work there; name each file")
        found = {source.uri: downloads.from_https(source, into, roots)}
    else:
        found = downloads.files_from_hub(source, roots, which)
    if images and any(is_data(path.name) for path in found.values()):
        found = {uri: path for uri, path in found.items() if not is_image(path.name)}
    if not found:
        also = f", and images ({', '.join(IMAGE_SUFFIXES)}) lie in sub-folders named by class" if images else ""
        raise UserError(
            f"{source.uri}: no file matches; a data file ends in {', '.join(DATA_SUFFIXES)}, also with .gz or .zst{also}"
        )
    return [source_file(uri, path) for uri, path in sorted(found.items())]


def source_file(uri: str, path: Path) -> SourceFile:
    """A file on this machine, with its size and digest."""
    return SourceFile(uri, path, path.stat().st_size, _sha256(path))


@dataclass(frozen=True)
class Wanted:
    """Which files of a listing a source means."""

    folder: str
    """Path below the root in which they lie."""
    pattern: str
    """Pattern of their names; empty: the URI is a file or a folder of data files."""
    images: bool = False
    """Whether images in sub-folders are meant, too; the pattern is then one of sub-folders as well."""

    def matches(self, path: str) -> bool:
        """Whether a file, by its path below the root, is meant."""
        parent, _, name = path.rpartition("/")
        if self.images and is_image(name) and path != self.folder:
            above, _, folder = parent.rpartition("/")
            return above == self.folder and fits(folder, self.pattern or "*")
        if self.pattern:
            return parent == self.folder and fits(name, self.pattern)
        return path == self.folder or (parent == self.folder and is_data(name))

    def needs(self, path: str) -> bool:
        """Whether a file is to be fetched: one that is meant, or an image that a table in the folder may name."""
        return self.matches(path) or (self.images and not self.pattern and is_image(path.rpartition("/")[2]))


def wanted(uri: str, *, images: bool = False) -> Wanted:
    """Takes a source's URI apart.

    Raises:
        UserError: a * before the last part.
    """
    path = locations.parse(uri).path
    if "*" not in path:
        return Wanted(path, "", images)
    folder, _, pattern = path.rpartition("/")
    if "*" in folder:
        raise UserError(f"{uri}: * matches within a folder only; write one source for each folder")
    return Wanted(folder, pattern, images)


def fits(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern in which * stands for anything, and no other character for another. Hidden files do not."""
    expression = ".*".join(re.escape(part) for part in pattern.split("*"))
    return re.fullmatch(expression, name) is not None and name.startswith(".") == pattern.startswith(".")


def is_data(name: str) -> bool:
    """Whether a file's name says that it holds rows."""
    stem = PurePosixPath(name.lower())
    if stem.suffix in COMPRESSED:
        stem = stem.with_suffix("")
    return stem.suffix in DATA_SUFFIXES and not name.startswith((".", "_"))


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return PurePosixPath(name.lower()).suffix in IMAGE_SUFFIXES and not name.startswith(".")


def local_path(location: Location, roots: Roots) -> Path:
    """Where a pvc://, configmap:// or file:// location lies, whether or not it is there.

    Raises:
        UserError: the claim or ConfigMap is not mounted.
    """
    place = locations.parse(location.uri)
    if place.scheme == "file":
        return Path(place.path)
    root = (roots.configmaps if place.scheme == "configmap" else roots.volumes) / place.root
    if not root.is_dir():
        kind = "ConfigMap" if place.scheme == "configmap" else "PersistentVolumeClaim"
        hint = "add it to the manifest's file" if place.scheme == "configmap" else f"--claim {place.root}=DIR"
        raise UserError(
            f"{location.uri}: {kind} {place.root} is not mounted; create it in the job's namespace (finetune local: {hint})"
        )
    return root / place.path


def _local_files(source: Location, which: Wanted, roots: Roots) -> dict[str, Path]:
    exact = local_path(source, roots)
    if not which.pattern and exact.is_file():
        return {source.uri: exact}
    folder = exact.parent if which.pattern else exact
    if not folder.is_dir():
        raise UserError(_missing(source, folder))
    base = source.uri.rpartition("/")[0] if which.pattern else source.uri.rstrip("/")
    found = {
        f"{base}/{path.name}": path
        for path in folder.iterdir()
        if path.is_file() and (fits(path.name, which.pattern) if which.pattern else is_data(path.name))
    }
    if which.images:
        found = {uri: path for uri, path in found.items() if not is_image(path.name)} | {
            f"{base}/{below.name}/{path.name}": path
            for below in folder.iterdir()
            if below.is_dir() and fits(below.name, which.pattern or "*")
            for path in below.iterdir()
            if path.is_file() and is_image(path.name)
        }
    return found


def _missing(location: Location, path: Path) -> str:
    """Says what is there instead, from the nearest folder that exists."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(child.name for child in folder.iterdir() if not child.name.startswith("."))
    listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    noun = "key" if locations.parse(location.uri).scheme == "configmap" else "file or folder"
    return f"{location.uri}: there is no such {noun}; {folder.name or folder} holds {listed or 'nothing'}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
