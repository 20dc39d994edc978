"""Checkpoints: safetensors shards and a JSON index, committed as one. Called by train.

    <storage>/<uid>/<digest>/owner.json                                 the run that may commit
    <storage>/<uid>/<digest>/evaluation.html, data-report.html          of a result that a gate kept from being published
    <storage>/<uid>/<digest>/step-00000120/weights-000-00.<tag>.safetensors
    <storage>/<uid>/<digest>/step-00000120/metrics.jsonl.<tag>
    <storage>/<uid>/<digest>/step-00000120/index.json                   written last, exclusively: the commit

A folder without an index is what a killed run left, and is removed by the next. The index holds the sha256 of every file, and a
checkpoint whose files do not match is skipped with a warning. Each save tags its files anew: a run that lives on after it was replaced
can neither overwrite a file of its successor nor, since owner.json names another, commit.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel
from torch import Tensor

from finetune_crds.resolved import ResolvedJob
from finetune_crds.v1alpha1 import Checkpoint, Metric

from ..errors import AlreadyExists, DataError, Fenced, PeerLost, StorageError, UserError
from ..modelling.masters import Masters
from ..ranks import Ranks
from ..storage.stores import FolderStore, make_folder, settle
from .state import TrainingState

INDEX = "index.json"
OWNER = "owner.json"
SHARD_BYTES = 1 << 30

log = logging.getLogger("finetune.checkpoints")


class File(BaseModel):
    """One file of a checkpoint."""

    name: str
    """Relative to the checkpoint's folder."""
    size: int
    sha256: str


class Index(BaseModel):
    """index.json."""

    version: int = 1
    state: TrainingState
    job: str
    """Outcome digest of the job."""
    dataset: str
    """Dataset digest."""
    model: str
    """Digest of the model, with that of the adapter that was continued."""
    shards: list[File]
    """Weights, first and second moments by name."""
    journal: dict[str, File]
    """metrics.jsonl and samples.jsonl as they were, and what the objective took down before the first step."""
    time: str
    """When it was committed."""
    previous: str | None = None
    """Digest of the index before it."""

    @property
    def files(self) -> list[File]:
        """All files."""
        return [*self.shards, *self.journal.values()]

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Committed:
    """A checkpoint that is there whole."""

    name: str
    """Its folder below the job's."""
    index: Index
    digest: str
    """`sha256:<hex>` of its index."""
    uri: str

    def status(self, metric: str | None = None) -> Checkpoint:
        """As status tells it; with a metric, the evaluation that made it the best."""
        last = self.index.state.last
        value = Metric(name=metric, value=f"{last.metrics[metric]:.6g}") if metric and last else None
        return Checkpoint(
            step=self.index.state.step, uri=self.uri, digest=self.digest, time=self.index.time, metric=value
        )


class Checkpoints:
    """The checkpoints of one job, seen by one run."""

    def __init__(
        self, store: FolderStore, job: ResolvedJob, ranks: Ranks, *, attempt: int, run_id: str, keep: int, scratch: Path
    ) -> None:
        self._store = store
        self._root = f"{job.uid}/{job.digest.removeprefix('sha256:')[:16]}"
        self._job = job.digest
        self._ranks = ranks
        self._attempt = attempt
        self._run_id = run_id
        self._keep = keep
        self._scratch = scratch / "checkpoint"
        self.latest: Committed | None = None
        self.best: Committed | None = None

    def claim(self) -> None:
        """Takes the folder over for this run and clears what a killed one left. First rank only.

        Raises:
            Fenced: a later attempt has it.
        """
        owner = self._owner()
        if owner and int(owner["attempt"]) > self._attempt:
            raise Fenced(
                f"{self._store.uri}: attempt {owner['attempt']} has taken the place of attempt {self._attempt}"
            )
        self._store.replace(
            self._path(OWNER), json.dumps({"attempt": self._attempt, "runId": self._run_id}, sort_keys=True).encode()
        )
        listed = self._folders()
        for folder, files in listed.items():
            if INDEX not in files:
                self._store.delete(self._path(folder))

    def newest(self, dataset: str, model: str) -> Committed | None:
        """The newest checkpoint whose files are all there and unharmed. First rank only; the others `adopt` what it found.

        Raises:
            DataError: it was made from another dataset.
            UserError: from another model.
        """
        found: list[Committed] = []
        for folder in sorted(self._folders(), reverse=True):
            committed = self._verified(folder)
            if committed is None:
                self._store.delete(self._path(folder))
                continue
            if committed.index.dataset != dataset:
                raise DataError(
                    f"DatasetChanged: the dataset is no longer the one that {committed.uri} was trained on; "
                    "restore it, or create another FineTuneJob"
                )
            if committed.index.model != model:
                raise UserError(
                    f"ModelChanged: the model is no longer the one that {committed.uri} was trained from; "
                    "restore it, or create another FineTuneJob"
                )
            found.append(committed)
        steps = {one.index.state.step: one for one in found}
        for committed in found:
            best = committed.index.state.best
            if best is None or best.step in steps:
                self.latest = committed
                self.best = steps[best.step] if best else None
                return committed
            log.warning("%s is skipped: its best checkpoint, step %d, is gone", committed.uri, best.step)
            self._store.delete(self._path(committed.name))
        return None

    def restore(self, committed: Committed, masters: Masters) -> None:
        """Loads weights and optimizer. All ranks: each reads the shards whatever rank wrote them.

        Raises:
            UserError: another version of the trainer wrote other tensors.
        """
        try:
            masters.load(self._tensors(committed))
        except KeyError as error:
            raise UserError(
                f"{committed.uri} was written by a trainer of another version, which kept other tensors ({error}); create another FineTuneJob"
            ) from None

    def weights(self, committed: Committed) -> Iterator[tuple[str, Tensor]]:
        """The trained weights of a checkpoint by name, running statistics among them. All ranks."""
        for name, tensor in self._tensors(committed, ("weight/", "buffer/")):
            yield name.partition("/")[2], tensor

    def _tensors(self, committed: Committed, parts: tuple[str, ...] = ("",)) -> Iterator[tuple[str, Tensor]]:
        """Those whose names begin so, one after the other: all of them are as much memory as training takes."""
        from safetensors import safe_open

        for shard in committed.index.shards:
            with (
                self._on_disk(self._path(committed.name, shard.name)) as path,
                safe_open(path, framework="pt") as file,
            ):
                for name in file.keys():  # noqa: SIM118  # it is no dict
                    if name.startswith(parts):
                        yield name, file.get_tensor(name)

    def journal(self, committed: Committed) -> dict[str, bytes]:
        """The journal's files as they were."""
        return {
            name: self._store.read(self._path(committed.name, file.name))
            for name, file in committed.index.journal.items()
        }

    def save(
        self,
        masters: Masters,
        state: TrainingState,
        journal: dict[str, bytes],
        *,
        dataset: str,
        model: str,
        is_best: bool,
    ) -> Committed:
        """Writes and commits. All ranks: each writes its share of the tensors and hashes it.

        Raises:
            Fenced: another run has the folder.
            StorageError: it could not be written.
        """
        folder = f"step-{state.step:08d}"
        tag = uuid.uuid4().hex[:12]
        again = self.latest is not None and self.latest.index.state.step == state.step
        shards = self._write_shards(folder, tag, masters)

        def commit() -> Committed:
            index = Index(
                state=state.model_copy(deep=True),  # the loop goes on with its own
                job=self._job,
                dataset=dataset,
                model=model,
                shards=shards,
                journal={
                    name: self._write_bytes(folder, f"{name}.{tag}", content) for name, content in journal.items()
                },
                time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                previous=self.latest.digest if self.latest else None,
            )
            self.check_owner()
            data = index.to_bytes()
            if again:  # it was saved in mid-evaluation when it was asked to stop, and now knows more
                self._store.replace(self._path(folder, INDEX), data)
                return self._committed(folder, index, data)
            try:
                self._store.create_exclusive(self._path(folder, INDEX), data)
            except AlreadyExists:
                raise Fenced(f"{self._store.uri}: step {state.step} was committed by another run") from None
            return self._committed(folder, index, data)

        committed = self._ranks.once(commit)
        self.latest = committed
        if is_best:
            self.best = committed
        if self._ranks.first:
            self._prune()
        return committed

    def put_reports(self, files: dict[str, bytes]) -> str:
        """Writes what tells of a result that was not published beside the checkpoints; returns the place. First rank only."""
        self.check_owner()
        for name, content in files.items():
            self._store.replace(self._path(name), content)
        return f"{self._store.uri}/{self._root}"

    def check_owner(self) -> None:
        """Raises Fenced if another run has taken the folder over."""
        owner = self._owner()
        if owner is None or owner["runId"] != self._run_id:
            raise Fenced(f"{self._store.uri}: another run has taken this one's place; nothing was committed")

    def _write_shards(self, folder: str, tag: str, masters: Masters) -> list[File]:
        """Those of all ranks, each of which writes its share of the tensors while they exchange the next.

        One file is being written and one gathered at a time, so a rank holds some three of them: one is in memory twice while it is written.
        A rank that cannot write drops the rest and goes on with the exchange, which others wait for.
        """
        written: list[Future[File]] = []
        with ThreadPoolExecutor(1) as writer:
            for number, group in enumerate(_grouped(masters.state())):
                if written and written[-1].exception():  # waits for it
                    continue
                written.append(writer.submit(self._write_shard, folder, tag, number, group))
        error = next((found for one in written if (found := one.exception())), None)
        failed = self._ranks.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise PeerLost("another rank of this job could not write its part of a checkpoint, and says why")
        return [file for files in self._ranks.gather([one.result() for one in written]) for file in files]

    def _write_shard(self, folder: str, tag: str, number: int, tensors: dict[str, Tensor]) -> File:
        from safetensors.numpy import save_file

        name = f"weights-{self._ranks.rank:03d}-{number:02d}.{tag}.safetensors"
        local = self._place(self._path(folder, name))
        save_file({key: tensor.cpu().numpy() for key, tensor in tensors.items()}, local)
        file = File(name=name, size=local.stat().st_size, sha256=_sha256(local))
        if self._store.local is None:
            self._store.write_file(self._path(folder, name), local)
            local.unlink()
        else:
            settle(local)
        return file

    def _place(self, name: str) -> Path:
        """Where a large file is written: in place on a volume, else on scratch."""
        path = (self._store.local or self._scratch) / name
        make_folder(path.parent)
        return path

    def _write_bytes(self, folder: str, name: str, content: bytes) -> File:
        file = File(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        self._store.write_file(self._path(folder, file.name), content)
        return file

    @contextmanager
    def _on_disk(self, name: str) -> Iterator[Path]:
        """A file of the storage, for a while. All ranks: what is no volume is fetched once a node, and one file at a time takes its disk."""
        if self._store.local is not None:
            yield self._store.local / name
            return

        def fetch() -> Path:
            path = self._scratch / name
            make_folder(path.parent)
            path.write_bytes(self._store.read(name))
            return path

        path = self._ranks.once(fetch, each_node=True)
        yield path
        self._ranks.any(False)  # all have read it
        if self._ranks.local_rank == 0:
            path.unlink()

    def _verified(self, folder: str) -> Committed | None:
        try:
            data = self._store.read(self._path(folder, INDEX))
            index = Index.model_validate_json(data)
            for file in index.files:
                if self._digest_of(self._path(folder, file.name)) != (file.size, file.sha256):
                    raise ValueError(f"{file.name} is not what was written")
        except (FileNotFoundError, ValueError) as error:
            log.warning("%s/%s is damaged and skipped: %s", self._store.uri, self._path(folder), type(error).__name__)
            return None
        return self._committed(folder, index, data)

    def _digest_of(self, name: str) -> tuple[int, str]:
        if self._store.local is not None:
            path = self._store.local / name
            return path.stat().st_size, _sha256(path)
        content = self._store.read(name)
        return len(content), hashlib.sha256(content).hexdigest()

    def _committed(self, folder: str, index: Index, data: bytes) -> Committed:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        return Committed(folder, index, digest, f"{self._store.uri}/{self._path(folder)}")

    def _prune(self) -> None:
        """Removes all but the newest ones and the best. Index first: what is half removed is no checkpoint."""
        assert self.latest
        kept = set(sorted(self._folders(), reverse=True)[: self._keep]) | {self.latest.name}
        if self.best:
            kept.add(self.best.name)
        for folder in self._folders():
            if folder not in kept:
                try:
                    self._store.delete(self._path(folder, INDEX))
                    self._store.delete(self._path(folder))
                except StorageError as error:
                    log.warning("an old checkpoint could not be removed: %s", error)

    def _folders(self) -> dict[str, set[str]]:
        """Names of files by checkpoint folder."""
        found: dict[str, set[str]] = {}
        start = len(self._root) + 1
        for name in self._store.names(self._root):
            folder, _, file = name[start:].partition("/")
            if folder.startswith("step-") and file:
                found.setdefault(folder, set()).add(file)
        return found

    def _owner(self) -> dict[str, str] | None:
        try:
            owner: dict[str, str] = json.loads(self._store.read(self._path(OWNER)))
        except FileNotFoundError:
            return None
        return owner

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))


def _grouped(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Tensors by file, each of bounded size."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > SHARD_BYTES:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    if group:
        yield group


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
