"""Rows in a forward pass when nobody says: as many as fit a GPU, of which a CPU plays the part here. What is tried leaves nothing behind, and a run that resumes keeps to what was found."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from finetune_crds.resolved import ResolvedJob
from finetune_crds.verdict import ExitCode
from finetune_trainer import micro_batches
from finetune_trainer.modelling import footprint, masters, partition
from finetune_trainer.ranks import Ranks
from finetune_trainer.results.outputs import Record
from finetune_trainer.setup import Setup

from . import tiny
from .runs import loaded, published, run
from .spawn import run_ranks

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


@contextmanager
def gpu(tokens: int, fails: int | None = None) -> Iterator[None]:
    """A device on which so many tokens fit, of which one is a byte; the backward pass of more than `fails` fails in its middle, on the last rank."""
    tried = [0]
    extent = footprint.extent

    def noted(setup: Setup, batch: Any) -> int:
        tried[0] = extent(setup, batch)
        return tried[0]

    def full(gradient: torch.Tensor) -> torch.Tensor:
        if fails and tried[0] > fails:
            raise torch.OutOfMemoryError("none is left")
        return gradient

    fits = micro_batches._fits

    def watched(setup: Setup, batch: Any, device: torch.device, part: float) -> bool:
        block = setup.model.inner.model.layers[1]
        weight = next(weight for weight in block.parameters() if weight.requires_grad)
        last = Ranks.rank if not torch.distributed.is_initialized() else torch.distributed.get_rank()
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        hook = weight.register_hook(full) if last == world - 1 else None
        found = fits(setup, batch, device, part)
        if hook:
            hook.remove()
        return found

    with ExitStack() as patches:
        for name, stand_in in (
            ("available", lambda device: int(tokens / micro_batches.FILLED) + 1),
            ("peak", lambda device: tried[0]),
            ("_fits", watched),
        ):
            patches.enter_context(mock.patch.object(micro_batches, name, stand_in))
        patches.enter_context(mock.patch.object(footprint, "extent", noted))
        yield


def found(folder: Path) -> int:
    """What a run says that it took."""
    record = Record.model_validate_json((folder / "output/finetune.json").read_bytes())
    size = record.configuration["training"]["microBatchSize"]
    assert isinstance(size, int)
    return size


def test_as_many_fit_as_there_is_memory_for(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loaded(job(tmp_path, llama), tmp_path)
    needed = {
        size: footprint.extent(made, footprint.largest(made.of_micro_batch(size), 1)[1]) for size in (1, 2, 4, 8, 12)
    }
    for size, tokens in needed.items():
        with gpu(tokens):
            assert micro_batches.fitting(made, Ranks()) == size
    with gpu(1):
        assert micro_batches.fitting(made, Ranks()) == 1, "what is usual is what training begins with, come what may"
    monkeypatch.setattr(micro_batches, "ENOUGH", needed[4])
    with gpu(10**9):
        assert micro_batches.fitting(made, Ranks()) == 4
    assert micro_batches.fitting(made, Ranks()) is None, "there is no GPU"


@pytest.mark.parametrize("training", [{"microBatchSize": 3}, {"accumulationSteps": 2}], ids=["size", "steps"])
def test_what_the_job_says_counts(tmp_path: Path, llama: Path, training: dict[str, Any]) -> None:
    made = loaded(job(tmp_path, llama, **training), tmp_path)
    with gpu(10**9):
        assert micro_batches.fitting(made, Ranks()) is None


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
    with gpu(10**9, fails=600):
        verdict = run_ranks(job(place, llama, method), place, world)
    assert verdict.code == 0, verdict.message
    size = found(place)
    assert 1 < size < 12 / world
    place.rename(told)
    verdict = run_ranks(job(place, llama, method, microBatchSize=size), place, world)
    assert verdict.code == 0, verdict.message
    assert published(place) == published(told)


def test_a_run_that_resumes_takes_what_was_taken(tmp_path: Path, llama: Path) -> None:
    """On a GPU with a little less memory, too, where it would have begun otherwise."""
    place = tmp_path / "job"
    made = loaded(job(tmp_path / "probe", llama), tmp_path / "probe")
    all_of_them = footprint.extent(made, footprint.largest(made.of_micro_batch(12), 1)[1])
    with gpu(all_of_them):
        assert run(job(place, llama), place).code == 0
        place.rename(tmp_path / "whole")
        assert run(job(place, llama), place, run_id="first", reporter=tiny.Recorder(stop_at=2)).code == ExitCode.STOPPED
    with gpu(int(0.92 * all_of_them)):
        assert micro_batches.fitting(made, Ranks()) == 8
        assert run(job(place, llama), place, run_id="second").code == 0
    assert found(place) == found(tmp_path / "whole") == 12
    assert published(place) == published(tmp_path / "whole")
    usual = tmp_path / "usual"
    assert run(job(usual, llama), usual).code == 0
    assert published(usual) != published(place)


def test_a_run_that_resumes_where_that_does_not_fit_takes_fewer(tmp_path: Path, llama: Path) -> None:
    place = tmp_path / "job"
    with gpu(10**9):
        stopped = run(job(place, llama), place, run_id="first", reporter=tiny.Recorder(stop_at=2))
    assert stopped.code == ExitCode.STOPPED
    with gpu(10**9, fails=800):
        verdict = run(job(place, llama), place, run_id="second")
    assert (verdict.code, verdict.first_step, found(place)) == (0, stopped.step, 3)
