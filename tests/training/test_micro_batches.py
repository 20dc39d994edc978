"""Rows in a forward pass when nobody says: as many as fit a GPU, of which a CPU plays the part here. What is tried leaves nothing behind, and a run that resumes keeps to what was found."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from finetune_crds.resolved import ResolvedJob
from finetune_crds.verdict import ExitCode
from finetune_trainer import micro_batches, train
from finetune_trainer.errors import Stopped
from finetune_trainer.modelling import footprint, masters, partition
from finetune_trainer.ranks import Ranks
from finetune_trainer.results.outputs import Record
from finetune_trainer.results.state import MicroBatch
from finetune_trainer.setup import Setup

from . import tiny
from .runs import journal, loaded, published, run
from .spawn import run_ranks

GPU = 10**9
"""Tokens that fit the largest device here. A token is a byte of it."""
METHODS: dict[str, dict[str, Any]] = {
    "full": {"full": {}},
    "lora": {"lora": {"rank": 4}},
    "gradualUnfreezing": {"gradualUnfreezing": {"everySteps": 1, "blocksPerStage": 1}},
}


def job(folder: Path, model: Path, method: str = "full", **training: Any) -> ResolvedJob:
    data = tiny.write_rows(folder / "train.jsonl", tiny.chat_rows(48))
    given = {"sequenceLength": 256, "batchSize": 12, "maxSteps": 4, "dropout": "0.1", **training}
    return tiny.job(
        folder, model, data, method=METHODS[method], training=given,
        dataset={"evaluation": {"fraction": "0.2"}}, evaluation={"everySteps": 2},
    )  # fmt: skip


def pairs_job(folder: Path, model: Path, **training: Any) -> ResolvedJob:
    """Rows that are not packed, of unlike lengths, with numbers that losses add up."""
    rows = [
        {"prompt": "red " * (1 + 40 * (i % 7 == 0)), "chosen": "lamp " * (1 + i % 5), "rejected": "one"}
        for i in range(48)
    ]
    given = {"sequenceLength": 256, "batchSize": 16, "epochs": "3", "learningRate": "1e-3", **training}
    return tiny.job(
        folder, model, tiny.write_rows(folder / "train.jsonl", rows), method={"lora": {"rank": 4}}, training=given,
        objective={"orpo": {}}, dataset={"evaluation": {"fraction": "0.2"}}, evaluation={"everySteps": 2},
    )  # fmt: skip


@contextmanager
def gpu(
    tokens: int,
    fails: int | None = None,
    error: Callable[[], Exception] = lambda: torch.OutOfMemoryError("none is left"),
    size: int = GPU,
    seen: Callable[[Setup], None] = lambda setup: None,
) -> Iterator[list[int]]:
    """A device of that size of which so many bytes may be filled; the backward pass of more tokens than `fails` fails in its middle, on the last rank. What was tried."""
    tried: list[int] = []
    fits = micro_batches._fits

    def full(gradient: torch.Tensor) -> torch.Tensor:
        if fails and tried[-1] > fails:
            raise error()
        return gradient

    def watched(setup: Setup, batch: Any, device: torch.device, part: float) -> bool:
        tried.append(footprint.extent(setup, batch))
        seen(setup)
        weights = setup.model.inner.model.layers[1].parameters()
        last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        hooks = [weight.register_hook(full) for weight in weights if weight.requires_grad and last]
        found = fits(setup, batch, device, part)
        for hook in hooks:
            hook.remove()
        assert found or not any(weight.grad is not None for weight in setup.model.outer.parameters())
        return found

    with ExitStack() as patches:
        for name, stand_in in (
            ("memory", lambda device: size),
            ("available", lambda device: int(tokens / micro_batches.FILLED) + 1),
            ("peak", lambda device: tried[-1]),
            ("_fits", watched),
        ):
            patches.enter_context(mock.patch.object(micro_batches, name, stand_in))
        yield tried


def found(folder: Path) -> int | None:
    """What a run says that it took."""
    return Record.model_validate_json((folder / "output/finetune.json").read_bytes()).micro_batch


def result(folder: Path) -> dict[str, str]:
    """Digests of all that is published but the card, which has what the job said."""
    return {name: digest for name, digest in published(folder).items() if name != "README.md"}


def needed(made: Setup, *sizes: int) -> dict[int, int]:
    """Tokens of the largest micro-batch of each size."""
    return {size: footprint.extent(made, batch) for size, batch in micro_batches._largest(made, sizes, 1).items()}


def fitting(made: Setup, kept: MicroBatch | None = None) -> int | None:
    taken = micro_batches.fitting(made, Ranks(), kept)
    return taken and taken.size


def test_as_many_fit_as_there_is_memory_for(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loaded(job(tmp_path, llama), tmp_path)
    tokens = needed(made, 1, 2, 4, 8, 12)
    for size in tokens:
        with gpu(tokens[size]):
            assert fitting(made) == size
    with gpu(1):
        assert fitting(made) == 1, "what is usual is what training begins with, come what may"
    monkeypatch.setattr(micro_batches, "ENOUGH", tokens[4])
    with gpu(GPU):
        assert fitting(made) == 4
        kept = MicroBatch(size=12, world=1, memory=GPU)
        assert fitting(made, kept) == 12, "what is enough now changes nothing for a run that has begun"
    assert fitting(made) is None, "there is no GPU"


def test_what_is_on_its_way_to_other_ranks_counts(tmp_path: Path, llama: Path) -> None:
    made = loaded(job(tmp_path, llama), tmp_path)
    tokens = needed(made, 2)
    with gpu(tokens[2] + 10), mock.patch.object(type(made.masters.gradient), "in_flight", 11):
        assert fitting(made) == 1


@pytest.mark.parametrize("training", [{"microBatchSize": 3}, {"accumulationSteps": 2}], ids=["size", "steps"])
def test_what_the_job_says_counts(tmp_path: Path, llama: Path, training: dict[str, Any]) -> None:
    made = loaded(job(tmp_path, llama, **training), tmp_path)
    with gpu(GPU):
        assert fitting(made) is None


def test_later_epochs_count(tmp_path: Path, llama: Path) -> None:
    """Long rows meet in another one."""
    made = loaded(pairs_job(tmp_path, llama), tmp_path)
    epochs = [
        max(
            sum(made.objective.extent(made.rows, sequence) for sequence in step[i : i + 8])
            for step in made.order.epoch(epoch)
            for i in range(0, len(step), 8)
        )
        for epoch in range(3)
    ]
    assert max(epochs) > epochs[0]
    assert needed(made, 8)[8] == max(epochs)


def test_all_stages_count(tmp_path: Path, llama: Path) -> None:
    """A stage that begins later needs more: its blocks are trained when it is tried."""
    made = loaded(job(tmp_path, llama, "gradualUnfreezing"), tmp_path)
    trained: list[set[str]] = []

    def note(setup: Setup) -> None:
        trained.append({name for name, weight in setup.model.outer.named_parameters() if weight.requires_grad})

    made.masters.begin(0)
    with gpu(GPU, seen=note):
        assert fitting(made) == 12
    assert trained[0] == set(made.masters.names)


def test_a_stop_is_heard(tmp_path: Path, llama: Path) -> None:
    made = loaded(job(tmp_path, llama), tmp_path)
    with gpu(GPU) as tried, pytest.raises(Stopped):
        micro_batches.fitting(made, Ranks(), None, lambda: bool(tried))
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("method", "world", "divided"),
    [
        ("full", 1, False), ("lora", 1, False), ("gradualUnfreezing", 1, False),
        ("full", 2, False), ("full", 2, True), ("gradualUnfreezing", 2, True),
    ],
)  # fmt: skip
def test_what_is_tried_leaves_nothing(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, method: str, world: int, divided: bool
) -> None:
    """The same bytes as of a job that says so itself, also where a pass has failed in its middle on one rank only."""
    if divided:
        monkeypatch.setattr(masters, "WHOLE_GRADIENT", 0)
        monkeypatch.setattr(partition, "CHUNK", 1 << 12)
    place, told = tmp_path / "job", tmp_path / "told"
    with gpu(GPU, fails=600):
        verdict = run_ranks(job(place, llama, method), place, world)
    assert verdict.code == 0, verdict.message
    size = found(place)
    assert size and 1 < size < 12 / world
    place.rename(told)
    verdict = run_ranks(job(place, llama, method, microBatchSize=size), place, world)
    assert verdict.code == 0, verdict.message
    assert found(place) is None and result(place) == result(told)


def test_rows_that_are_not_packed_are_evaluated_as_usual(tmp_path: Path, llama: Path) -> None:
    """And what the losses add up besides is not that of what was tried."""
    place, usual = tmp_path / "job", tmp_path / "usual"
    with gpu(GPU):
        assert run(pairs_job(place, llama), place).code == 0
    assert run(pairs_job(usual, llama), usual).code == 0
    assert (found(place), found(usual)) == (16, None)
    (before, first), (usual_before, usual_first) = (journal(one)[:2] for one in (place, usual))
    assert before == usual_before
    for name in ("accuracy", "margin"):
        assert first[name] == pytest.approx(usual_first[name], rel=1e-4)


@pytest.mark.parametrize(
    "says", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDA error: out of memory"]
)
def test_memory_that_torch_does_not_allocate_counts(tmp_path: Path, llama: Path, says: str) -> None:
    made = loaded(job(tmp_path, llama), tmp_path)
    with gpu(GPU, fails=600, error=lambda: RuntimeError(says)):
        assert fitting(made) == 2
    with gpu(GPU, fails=600, error=lambda: RuntimeError("another")), pytest.raises(RuntimeError, match="another"):
        fitting(made)


def test_a_run_that_resumes_takes_what_was_taken(tmp_path: Path, llama: Path) -> None:
    """On a GPU with a little less that is free, too, where it would have begun otherwise."""
    place = tmp_path / "job"
    made = loaded(job(tmp_path / "probe", llama), tmp_path / "probe")
    tokens = needed(made, 12)[12]
    with gpu(tokens):
        assert run(job(place, llama), place).code == 0
        place.rename(tmp_path / "whole")
        assert run(job(place, llama), place, run_id="first", reporter=tiny.Recorder(stop_at=2)).code == ExitCode.STOPPED
    with gpu(int(0.92 * tokens)):
        assert fitting(made) == 8
        assert run(job(place, llama), place, run_id="second").code == 0
    assert found(place) == found(tmp_path / "whole") == 12
    assert published(place) == published(tmp_path / "whole")
    usual = tmp_path / "usual"
    assert run(job(usual, llama), usual).code == 0
    assert result(usual) != result(place)


def test_on_other_gpus_it_is_found_anew(tmp_path: Path, llama: Path) -> None:
    made = loaded(job(tmp_path, llama), tmp_path)
    tokens = needed(made, 8, 12)
    with gpu(tokens[8], size=GPU // 2):
        assert fitting(made, MicroBatch(size=12, world=1, memory=GPU)) == 8, "with less memory"
    with gpu(GPU):
        assert fitting(made, MicroBatch(size=2, world=1, memory=GPU)) == 2
        assert fitting(made, MicroBatch(size=2, world=1, memory=GPU // 2)) == 12, "with more memory"
        assert fitting(made, MicroBatch(size=2, world=6, memory=GPU)) == 12, "where fewer share a step"
    with gpu(GPU, fails=800):
        assert fitting(made, MicroBatch(size=12, world=1, memory=GPU)) == 3, "where it does not fit any more"


def test_a_checkpoint_of_before_keeps_to_what_was_usual(tmp_path: Path, llama: Path) -> None:
    place = tmp_path / "job"
    stopped = run(job(place, llama), place, run_id="first", reporter=tiny.Recorder(stop_at=2))
    assert stopped.code == ExitCode.STOPPED
    with gpu(GPU) as tried:
        assert run(job(place, llama), place, run_id="second").code == 0
    assert not tried and found(place) is None


def test_a_number_that_did_not_fit_after_all_is_named(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("none is left")

    monkeypatch.setattr(train, "train", full)
    with gpu(GPU):
        verdict = run(job(tmp_path, llama), tmp_path)
    assert verdict.code == ExitCode.OUT_OF_GPU_MEMORY
    assert "12 sequences in a forward pass" in verdict.message and "training.microBatchSize" in verdict.message
