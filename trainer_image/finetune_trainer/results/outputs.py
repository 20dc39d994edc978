"""The place of an output: what is there already, and putting a new one in its place whole. Called by train and publish.

finetune.json says what the folder is and holds the sha256 of every other file. It names no time and no run, so two runs of one job write
the same bytes. On volumes a folder is written beside its place and exchanged for what is there; on S3 finetune.json is written last, and
until then finetune.part.json lists what belongs to the unfinished output.

An output of a FineTuneJob is replaced once the new one is whole. Files that none wrote are never touched: the job is refused before it
trains.
"""

import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel

from finetune_crds.v1alpha1 import Location, OutputStatus

from ..errors import UserError
from ..storage.stores import FolderStore, make_folder, settle
from .state import Metrics

RECORD: Final = "finetune.json"
PART: Final = "finetune.part.json"
DATA_REPORT: Final = "data-report.html"
_TAG: Final = 12
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


class Record(BaseModel):
    """finetune.json."""

    version: int = 1
    job: str
    """Outcome digest of the job."""
    dataset: str
    """Dataset digest."""
    model: str
    """Digest of the model, with that of the adapter that was continued."""
    base: str
    """URI of the model."""
    model_type: str
    """Its family."""
    task: str
    objective: str | None = None
    """None for a task with a loss of its own."""
    method: str
    classes: list[str]
    """Names of the classes in the order of the head's outputs; empty where there are none."""
    format: Literal["peft", "transformers", "bottleneck"]
    servable_by: list[str]
    step: int
    """Step of the weights."""
    total_steps: int
    """Steps that were trained."""
    epochs: float
    rows: int
    evaluation_rows: int
    tokens: int
    before: Metrics | None
    after: Metrics | None
    versions: dict[str, str]
    files: dict[str, str] = {}
    """sha256 of each other file, hex, by name; a tokenizer with several templates has a folder of them."""

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return (json.dumps(self.model_dump(), sort_keys=True, indent=1) + "\n").encode()

    def status(self, uri: str, *, reused: bool = False) -> OutputStatus:
        """As status tells it. The digest is that of finetune.json, which holds those of the files."""
        return OutputStatus(
            uri=uri,
            digest="sha256:" + hashlib.sha256(self.to_bytes()).hexdigest(),
            format=self.format,
            servable_by=self.servable_by,
            reused=reused or None,
            step=self.step,
            data_report=f"{uri}/{DATA_REPORT}" if DATA_REPORT in self.files else None,
        )


def existing(store: FolderStore) -> Record | None:
    """The record of the output that is there, if one is.

    Raises:
        UserError: there is a finetune.json of somebody else.
    """
    try:
        return Record.model_validate_json(store.read(RECORD))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(
            f"spec.output: {store.uri}/{RECORD} is not what a FineTuneJob writes; choose a path of its own"
        ) from None


def is_whole(store: FolderStore, there: Record) -> bool:
    """Whether every file that the record names is still there."""
    return there.files.keys() <= set(store.names())


def check_free(store: FolderStore, there: Record | None, checkpoints: Location) -> None:
    """Makes sure that what will be replaced is ours.

    Args:
        store: the output's place.
        there: the record of the output that is there.
        checkpoints: where checkpoints will lie.

    Raises:
        UserError: files that no FineTuneJob wrote, or checkpoints inside of the output.
    """
    if f"{checkpoints.uri.rstrip('/')}/".startswith(f"{store.uri}/"):
        raise UserError(
            "checkpoints.storage lies inside spec.output, which is replaced as a whole; choose a path beside it"
        )
    ours = {RECORD, PART, *(there.files if there else ()), *_part(store)}
    foreign = [name for name in store.names() if name not in ours]
    if foreign:
        raise UserError(
            f"spec.output: {store.uri} holds files that no FineTuneJob wrote (such as {foreign[0]}); choose a path of its own"
        )


@contextmanager
def staging(store: FolderStore, scratch: Path) -> Iterator[Path]:
    """An empty folder, beside the output's place on a volume (where a rename can move it), else on scratch."""
    if store.local is None:
        folder = scratch / "output"
        shutil.rmtree(folder, ignore_errors=True)
    else:
        make_folder(store.local.parent)
        stem = f".{glob.escape(store.local.name)}"  # `bot` must not take the live folder of its neighbour `bot.v2`
        for left_over in store.local.parent.glob(f"{stem}.{'[0-9a-f]' * _TAG}.part"):  # by a killed run
            shutil.rmtree(left_over, ignore_errors=True)
        folder = store.local.with_name(f".{store.local.name}.{uuid.uuid4().hex[:_TAG]}.part")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put(store: FolderStore, folder: Path, what: Record, confirm: Callable[[], None]) -> OutputStatus:
    """Puts a staged folder into the output's place.

    Args:
        store: the place.
        folder: holds every file but the record.
        what: the record; its files are filled in.
        confirm: called last, when all is written that nobody sees; raises to leave what is there.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    what = what.model_copy(update={"files": {name: _sha256(path) for name, path in files.items()}})
    if store.local is not None:
        (folder / RECORD).write_bytes(what.to_bytes())
        settle(folder)
        confirm()
        _put_in_place(folder, store.local)
    else:
        there = existing(store)
        old = {*(there.files if there else ()), *_part(store)}
        confirm()
        store.replace(PART, json.dumps(sorted({*old, *what.files})).encode())
        store.delete(RECORD)
        for name in what.files:
            store.write_file(name, folder / name)
        for name in old - what.files.keys():
            store.delete(name)
        store.replace(RECORD, what.to_bytes())
        store.delete(PART)
    return what.status(store.uri)


def _part(store: FolderStore) -> list[str]:
    """Names of an unfinished output's files."""
    try:
        names: list[str] = json.loads(store.read(PART))
    except FileNotFoundError:
        return []
    return names


def _put_in_place(folder: Path, target: Path) -> None:
    """Gives a folder the name of another in one step where the file system can, else in two."""
    if not target.exists():
        folder.rename(target)
    elif not _exchange(folder, target):
        old = folder.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        folder.rename(target)
        shutil.rmtree(old)
    descriptor = os.open(target.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    done: int = libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
