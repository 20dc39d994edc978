"""The place of an output: what is there already, and putting a new one in its place whole. Called by train and publish.

finetune.json says what the folder is and holds the sha256 of every other file. It names no time and no run, so two runs of one job write
the same bytes. On volumes a folder is written beside its place and exchanged for what is there; on S3 finetune.json is written last, and
until then finetune.part.json lists what belongs to the unfinished output. An OCI tag or a repository
of the hub takes the folder as a whole.

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
from typing import Any, Final, Literal

from pydantic import BaseModel

from finetune_crds.resolved import ResolvedAdapter, ResolvedJob, ResolvedModel, ResolvedRewardModel
from finetune_crds.v1alpha1 import Inputs, JobOutput, Location, OutputStatus
from finetune_crds.v1alpha1.status import Baseline, FewShotStatus

from ..errors import UserError
from ..storage.stores import FolderStore, VolumeFolder, WholeStore, make_folder, settle
from .state import Metrics

RECORD: Final = "finetune.json"
PART: Final = "finetune.part.json"
PROBE: Final = ".tmp-preflight"
"""Written and removed by a preflight."""
DATA_REPORT: Final = "data-report.html"
DATA_NUMBERS: Final = "data-report.json"
EVALUATION_REPORT: Final = "evaluation.html"
EVALUATION_NUMBERS: Final = "evaluation.json"
_TAG: Final = 12
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


class RecordedSource(BaseModel):
    """Where rows came from."""

    use: str
    """train, evaluation, or the name of a set."""
    uris: list[str]
    rows: int
    """Of them trained or evaluated on, as they were prepared: a long text may be several."""
    tokens: int
    digest: str | None
    """sha256 of the file, or over those of the files."""


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
    sources: list[RecordedSource] = []
    """What was trained and evaluated on; rows that were held out of a source to train on are in evaluation_rows only."""
    configuration: dict[str, Any] = {}
    """Of the job's spec what decided the result, defaults included; see configuration."""
    micro_batch: int | None = None
    """Sequences in a forward pass at the end, where the job does not say and GPUs' memory decided."""
    before: Metrics | None
    after: Metrics | None
    baseline: Baseline = "model"
    """What before is of."""
    few_shot: FewShotStatus | None = None
    """Prompting in comparison."""
    versions: dict[str, str]
    files: dict[str, str] = {}
    """sha256 of each other file, hex, by name; a tokenizer with several templates has a folder of them."""

    def to_bytes(self) -> bytes:
        """Canonical JSON; what an earlier version did not know stays out, so that what was read is written as it was."""
        return (json.dumps(self.model_dump(exclude_unset=True), sort_keys=True, indent=1) + "\n").encode()


def status(store: FolderStore | WholeStore, there: Record, *, reused: bool = False) -> OutputStatus:
    """An output as status tells it. The digest is what the place's tools ask for it by, else that of finetune.json, which holds those of the files."""
    own = store.digest if isinstance(store, WholeStore) else None

    def place(name: str) -> str | None:
        return f"{store.uri}/{name}" if name in there.files else None

    return OutputStatus(
        uri=store.uri,
        digest=own or "sha256:" + hashlib.sha256(there.to_bytes()).hexdigest(),
        format=there.format,
        servable_by=there.servable_by,
        reused=reused or None,
        step=there.step,
        data_report=place(DATA_REPORT),
        data_report_json=place(DATA_NUMBERS),
        evaluation_report=place(EVALUATION_REPORT),
        evaluation_report_json=place(EVALUATION_NUMBERS),
    )


def existing(store: FolderStore | WholeStore) -> Record | None:
    """The record of the output that is there, if one is.

    Raises:
        UserError: there is a finetune.json of somebody else.
    """
    try:
        found = store.record() if isinstance(store, WholeStore) else store.read(RECORD)
        return Record.model_validate_json(found) if found is not None else None
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(
            f"spec.output: {store.uri}/{RECORD} is not what a FineTuneJob writes; choose a path of its own"
        ) from None


def verify(
    folder: Path, field: str, reference: ResolvedModel | ResolvedAdapter | ResolvedRewardModel
) -> JobOutput | None:
    """Makes sure that what was fetched is what another job had published; None when the reference names no job.

    Raises:
        UserError: something else is there now.
    """
    if reference.job is None or reference.digest is None:
        return None
    changed = UserError(
        f"spec.{field}: {reference.uri} no longer holds what FineTuneJob {reference.job} published ({reference.digest}); "
        "an edit, or another FineTuneJob, continues what is there now"
    )
    if not reference.uri.startswith("oci://"):  # else it was asked for by its digest
        try:
            record = (folder / RECORD).read_bytes()
        except FileNotFoundError:
            raise changed from None
        if f"sha256:{hashlib.sha256(record).hexdigest()}" != reference.digest:
            raise changed
        for name, sha256 in Record.model_validate_json(record).files.items():
            missing = not (folder / name).is_file()
            if missing and reference.uri.startswith("hf://"):
                continue  # of a repository only what a model is made of is fetched
            if missing or _sha256(folder / name) != sha256:
                raise changed
    return JobOutput(job=reference.job, digest=reference.digest)


def is_whole(store: FolderStore | WholeStore, there: Record) -> bool:
    """Whether every file that the record names is still there."""
    return there.files.keys() <= set(store.names())


def of_equal_job(store: FolderStore | WholeStore, job: ResolvedJob, inputs: Inputs) -> Record | None:
    """The record of the output that is there already, whole, from an equal job with equal inputs. If there is none, its place must be free for one.

    Raises:
        UserError: it is not.
    """
    there = existing(store)
    wanted = (job.digest, inputs.dataset_digest, inputs.model_digest)
    if there and (there.job, there.dataset, there.model) == wanted and is_whole(store, there):
        return there
    assert job.spec.checkpoints.storage
    check_free(store, there, job.spec.checkpoints.storage)
    return None


def check_writable(output: FolderStore | WholeStore, checkpoints: FolderStore) -> None:
    """Writes a file where each is to be written, and removes it. A place that takes an output as a whole was asked by check_free.

    Raises:
        StorageError: it cannot be written.
    """
    places = [checkpoints if checkpoints.local is None else _nearest(checkpoints.uri, checkpoints.local)]
    if not isinstance(output, WholeStore):  # on a volume it is put together beside its place
        places.append(output if output.local is None else _nearest(output.uri, output.local.parent))
    for place in places:
        place.write_file(PROBE, b"")
        place.delete(PROBE)


def _nearest(uri: str, folder: Path) -> VolumeFolder:
    """The folder, or the one that it will be made in."""
    while not folder.exists():
        folder = folder.parent
    return VolumeFolder(uri, folder)


def check_free(store: FolderStore | WholeStore, there: Record | None, checkpoints: Location) -> None:
    """Makes sure that what will be replaced is ours.

    Args:
        store: the output's place.
        there: the record of the output that is there.
        checkpoints: where checkpoints will lie.

    Raises:
        UserError: files that no FineTuneJob wrote, a place that takes nothing, or checkpoints inside of the output.
    """
    if f"{checkpoints.uri.rstrip('/')}/".startswith(f"{store.uri}/"):
        raise UserError(
            "checkpoints.storage lies inside spec.output, which is replaced as a whole; choose a path beside it"
        )
    part = [] if isinstance(store, WholeStore) else _part(store)
    ours = {RECORD, PART, PROBE, *(there.files if there else ()), *part}
    foreign = [name for name in store.names() if name not in ours]
    if foreign:
        raise UserError(
            f"spec.output: {store.uri} holds files that no FineTuneJob wrote (such as {foreign[0]}); choose a path of its own"
        )
    if isinstance(store, WholeStore):
        store.check_writable()


@contextmanager
def staging(store: FolderStore | WholeStore, scratch: Path) -> Iterator[Path]:
    """An empty folder, beside the output's place on a volume (where a rename can move it), else on scratch."""
    if isinstance(store, WholeStore) or store.local is None:
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


def put(store: FolderStore | WholeStore, folder: Path, what: Record, confirm: Callable[[], None]) -> OutputStatus:
    """Puts a staged folder into the output's place.

    Args:
        store: the place.
        folder: holds every file but the record.
        what: the record; its files are filled in.
        confirm: called last, when all is written that nobody sees; raises to leave what is there.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    what = what.model_copy(update={"files": {name: _sha256(path) for name, path in files.items()}})
    if isinstance(store, WholeStore):
        (folder / RECORD).write_bytes(what.to_bytes())
        confirm()
        store.publish(
            folder, what.to_bytes(), f"{what.base} after {what.total_steps} steps of {what.method}, for {what.task}"
        )
    elif store.local is not None:
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
    return status(store, what)


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
