"""Files of dataset sources: which they are is told by listing, and each is on this machine only while it is read. Called by setup, prepare and few_shot.

Files of claims, ConfigMaps and this machine are read where they are. Those of s3://, hf:// and https:// are fetched when their turn comes and
removed behind it, so that a set may be larger than the disk; one that alone is too large for it is read as it arrives.
"""

import hashlib
import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from finetune_crds import locations
from finetune_crds.quantities import amount
from finetune_crds.v1alpha1 import Location
from finetune_crds.v1alpha1.dataset import Source

from ..errors import UserError
from . import layouts
from .kinds import DATA_SUFFIXES, IMAGE_SUFFIXES, holding_rows, is_data, is_image, is_own
from .layouts import Asked
from .remote_files import RemoteFile
from .roots import Roots
from .trees import LocalTree, RemoteTree, SourceFile, tree

AHEAD: Final = 64 * 1024 * 1024
"""Bytes of small files that are fetched together."""
_TOGETHER: Final = 256
_THREADS: Final = 8


@dataclass(frozen=True)
class ReadFile:
    """A file that was read."""

    uri: str
    size: int
    """Bytes."""
    sha256: str
    """Hex."""


@dataclass(frozen=True)
class LocalFile(ReadFile):
    """One that was on this machine."""

    path: Path


def room_for_file(scratch: int | str) -> int:
    """Bytes that one file may take of a job's `resources.scratch`: half, since what is prepared of it needs the other."""
    return int(amount(str(scratch))) // 2


def source_files(
    source: Location,
    into: Path,
    roots: Roots | None = None,
    *,
    images: bool = False,
    evaluation: bool = False,
    room: int | None = None,
) -> list[SourceFile]:
    """The files of a dataset source, sorted by URI. `*` matches within a folder; a folder stands for the data files in it, or for those
    of a split of it.

    hf:// is a dataset repository here.

    Args:
        source: where.
        into: folder that downloads go to.
        roots: where claims, ConfigMaps and Secrets lie; default: what this process was started with.
        images: whether a folder stands for the images in its sub-folders, and `*` for sub-folders, too. Beside a table they are
            what its rows name, and no rows of their own; they are fetched at once, and stay.
        evaluation: whether the rows are evaluated on.
        room: bytes of which a larger file is read as it arrives, where its place allows that; default: each is fetched. So is a table
            whose rows may name images, since those lie beside it.

    Raises:
        UserError: the place is wrong, or nothing matches.
        StorageError: it could not be reached.
    """
    roots = roots or Roots.from_environment()
    which = wanted(source.uri, images=images)
    split, config = (source.split, source.config) if isinstance(source, Source) else (None, None)
    there = tree(source, which.folder, into, roots)
    names = _meant(there, which, Asked(split, config, evaluation, images))
    beside: list[str] = []
    if images and any(is_data(name or which.folder) for name in names):
        names = [name for name in names if not is_image(name)]
        beside = [] if which.pattern or "" in names else [name for name in there.names() if is_image(name)]
    if not names:
        also = f", and images ({', '.join(IMAGE_SUFFIXES)}) lie in sub-folders named by class" if images else ""
        raise UserError(
            f"{locations.public(source.uri)}: no file matches; a data file ends in {', '.join(DATA_SUFFIXES)}, also with .gz or .zst{also}; "
            f"there is {layouts.shown(there.names())}"
        )
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(lambda name: there.file(name).fetch(), beside))
    files = sorted((there.file(name) for name in names), key=lambda file: file.uri)
    largest = math.inf if room is None or images else room
    return [file if (file.size or 0) > largest else replace(file, arrive=None) for file in files]


def fetched(
    files: Iterable[SourceFile], check_stop: Callable[[], None] = lambda: None
) -> Generator[tuple[SourceFile, Path | RemoteFile]]:
    """Each file in turn, with its place on this machine, or opened if it is read as it arrives. What was fetched is removed, and what was opened
    closed, when the next is asked for. `check_stop` is called while what was opened is waited for; raises to stop."""
    with ThreadPoolExecutor(_THREADS) as threads:
        for group in _groups(files):
            if arrive := group[0].arrive:
                with arrive() as content:
                    content.check_stop = check_stop
                    yield group[0], content
                continue
            pending = [(file, threads.submit(file.fetch)) for file in group] if group[0].into else []
            try:
                for file in group if not pending else []:
                    yield file, file.fetch()
                while pending:
                    file, place = pending[0]
                    yield file, place.result()
                    pending.pop(0)
                    file.release(place.result())
            finally:
                for file, place in [one for one in pending if not one[1].cancel()]:
                    if place.exception() is None:
                        file.release(place.result())


def local_file(uri: str, path: Path) -> LocalFile:
    """A file on this machine, with its size and digest."""
    with path.open("rb") as file:
        return LocalFile(uri, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest(), path)


@dataclass(frozen=True)
class Wanted:
    """Which files of a listing a source means."""

    folder: str
    """Path below the root in which they lie."""
    pattern: str
    """Pattern of their names; empty: the URI is a file or a folder of data files."""
    images: bool = False
    """Whether images in sub-folders are meant, too; the pattern is then one of sub-folders as well."""

    def matches(self, name: str) -> bool:
        """Whether a file, by its path below the folder, is meant."""
        parent, _, last = name.rpartition("/")
        if self.images and is_image(last) and name:
            return bool(parent) and "/" not in parent and fits(parent, self.pattern or "*")
        if self.pattern:
            return not parent and fits(last, self.pattern)
        return not parent and (not name or is_data(last))


def wanted(uri: str, *, images: bool = False) -> Wanted:
    """Takes a source's URI apart.

    Raises:
        UserError: a * before the last part.
    """
    path = locations.parse(uri).path
    if "*" not in path:
        return Wanted(path.rstrip("/") or path, "", images)
    folder, _, pattern = path.rpartition("/")
    if "*" in folder:
        raise UserError(f"{locations.public(uri)}: * matches within a folder only; write one source for each folder")
    return Wanted(folder, pattern, images)


def fits(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern in which * stands for anything, and no other character for another. Hidden files do not."""
    expression = ".*".join(re.escape(part) for part in pattern.split("*"))
    return re.fullmatch(expression, name) is not None and name.startswith(".") == pattern.startswith(".")


def _groups(files: Iterable[SourceFile]) -> Iterator[list[SourceFile]]:
    """Small remote files together; others by themselves."""
    group: list[SourceFile] = []
    for file in files:
        small = file.into is not None and file.size is not None and file.arrive is None
        if group and not (
            small and sum(one.size or 0 for one in group) + (file.size or 0) <= AHEAD and len(group) < _TOGETHER
        ):
            yield group
            group = []
        group.append(file)
        if not small:
            yield group
            group = []
    if group:
        yield group


def _meant(there: LocalTree | RemoteTree, which: Wanted, asked: Asked) -> list[str]:
    if there.has(""):
        if asked.split or asked.config:
            raise UserError(
                f"{there.uri}: split and config choose among the files of a folder, and this is a file; remove them"
            )
        return [""]
    if which.pattern:
        return [name for name in there.top(2 if which.images else 1) if which.matches(name)]
    if (found := layouts.declared(there, asked)) is not None:
        return found
    asks = asked.split or asked.config
    if not asks and not there.is_repository:
        plain = [name for name in there.top(2 if which.images else 1) if which.matches(name) and not is_own(name)]
        rows = holding_rows(plain, images=True) if which.images else plain
        if rows and (all(map(is_image, rows)) or len(layouts.told(rows)) < 2):
            return rows
        if rows:
            return layouts.by_name(there, holding_rows(rows), asked)
    below = [name for name in holding_rows(there.names(), images=which.images) if "/" in name or is_data(name)]
    return layouts.by_name(there, below, asked) if below else []
