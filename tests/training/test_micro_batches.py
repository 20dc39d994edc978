"""Rows in a forward pass when nobody says: as many as fit what a GPU has free, counted without one; and a run that resumes keeps to them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from finetune_crds.verdict import ExitCode
from finetune_trainer import micro_batches, setup
from finetune_trainer.modelling import footprint
from finetune_trainer.ranks import Ranks
from finetune_trainer.results.outputs import Record

from . import tiny
from .runs import published, run

GIB = 2**30


def job(folder: Path, model: Path, **training: Any) -> Any:
    data = tiny.write_rows(folder / "train.jsonl", tiny.chat_rows(48))
    given = {"sequenceLength": 256, "batchSize": 12, "maxSteps": 4, "precision": "bf16", **training}
    return tiny.job(
        folder, model, data, method={"full": {}}, training=given,
        dataset={"evaluation": {"fraction": "0.2"}}, evaluation={"everySteps": 2},
    )  # fmt: skip


def test_as_many_fit_as_are_counted(tmp_path: Path, llama: Path) -> None:
    given = job(tmp_path, llama)
    context = tiny.context(given, tmp_path / "scratch")
    reading = setup.read(given.spec, context)
    counted = setup.load(reading, Ranks(device=footprint.META), world=1)
    needed = {size: footprint.of(dataclasses.replace(counted, micro_batch=size), 1).total for size in (1, 2, 4, 8, 12)}
    assert sorted(needed.values()) == list(needed.values()) and len(set(needed.values())) == 5
    for size, bytes_needed in needed.items():
        memory = int(bytes_needed / micro_batches.FILLED) + 1
        assert micro_batches.fitting(reading, Ranks(), memory) == size
        assert micro_batches.fitting(reading, Ranks(), memory - 512) == max([1, *(one for one in needed if one < size)])
    assert micro_batches.fitting(reading, Ranks(), 1) == 1, "what is usual is tried even where it is not said to fit"


def test_there_is_enough(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these sequences is nearly full."""
    given = job(tmp_path, llama)
    reading = setup.read(given.spec, tiny.context(given, tmp_path / "scratch"))
    monkeypatch.setattr(micro_batches, "ENOUGH", 4 * 256)
    assert micro_batches.fitting(reading, Ranks(), 999 * GIB) == 4


@pytest.mark.parametrize("training", [{"microBatchSize": 3}, {"accumulationSteps": 2}], ids=["size", "steps"])
def test_what_the_job_says_counts(tmp_path: Path, llama: Path, training: dict[str, Any]) -> None:
    given = job(tmp_path, llama, **training)
    reading = setup.read(given.spec, tiny.context(given, tmp_path / "scratch"))
    assert micro_batches.fitting(reading, Ranks(), 999 * GIB) is None
    assert setup.load(reading, Ranks(), micro_batch=7).micro_batch == training.get("microBatchSize")


def test_a_run_that_resumes_on_a_gpu_with_less_memory_computes_the_same(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number is in the checkpoint, and in what is published about the result."""

    def has(memory: int | None) -> None:
        monkeypatch.setattr(micro_batches, "free_memory", lambda ranks: memory)

    has(GIB)
    place = tmp_path / "job"
    assert run(job(place, llama), place).code == 0
    place.rename(tmp_path / "whole")
    assert run(job(place, llama), place, run_id="first", reporter=tiny.Recorder(stop_at=2)).code == ExitCode.STOPPED
    has(1)
    assert run(job(place, llama), place, run_id="second").code == 0
    assert published(place) == published(tmp_path / "whole")
    record = Record.model_validate_json((place / "output/finetune.json").read_bytes())
    assert record.configuration["training"]["microBatchSize"] == 12
    has(None)
    usual = tmp_path / "usual"
    assert run(job(usual, llama), usual).code == 0
    assert published(usual) != published(place)
