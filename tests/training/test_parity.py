"""Our loop against the reference script, step by step; evaluation and training against themselves over batch sizes, packing and ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune_trainer.data.order import Batching, Order
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.train import run

from . import reference, tiny
from .spawn import run_ranks

ROWS = tiny.chat_rows(40)


def order_of(rows: RowSet, batch_size: int, seed: int) -> Order:
    return Order(np.arange(len(rows.targets)), rows.lengths, rows.sources, None, seed, Batching(512, False, batch_size))


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4, "alpha": 8}},
    "full": {"full": {}},
}


@pytest.mark.parametrize("micro_batch", [2, 3, 8])
@pytest.mark.parametrize("method", METHODS)
def test_losses_equal_those_of_the_reference(tmp_path: Path, llama: Path, method: str, micro_batch: int) -> None:
    """Ragged rows, masked labels, accumulation (8 rows a step in micro-batches that do not divide it), clipping, decay, warm-up."""
    data = tiny.write_rows(tmp_path / "train.jsonl", ROWS)
    training = {"epochs": "2", "batchSize": 8, "microBatchSize": micro_batch, "learningRate": "5e-3", "sequenceLength": 512,
                "packing": False, "warmupSteps": 2, "weightDecay": "0.1", "maxGradNorm": "0.5"}  # fmt: skip
    job = tiny.job(tmp_path, llama, data, method=METHODS[method], training=training)
    verdict = run(job, tiny.context(job, tmp_path / "scratch"))
    assert verdict.code == 0, verdict.message

    prepared = RowSet.open(next((tmp_path / "scratch/prepared").iterdir()))
    order = order_of(prepared, 8, seed=42)
    steps = [[int(i) for sequence in step for i in sequence] for epoch in (0, 1) for step in order.epoch(epoch)]
    losses, norms, trained = reference.train(
        llama, [row["messages"] for row in ROWS], steps, lora=method == "lora", seed=42, rate=5e-3, decay=0.1, clip=0.5,
        micro_batch=micro_batch,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "output/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(steps) == 10
    assert losses[-1] < losses[0] - 0.2, "the reference itself must learn, or equality says little"
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], norms, rtol=1e-4)
    file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    ours = load_file(tmp_path / "output" / file)
    for name, tensor in trained.items():
        torch.testing.assert_close(ours[name.replace(".default", "")], tensor.detach(), rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def eval_loss(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[str, Any]:
    """eval_loss before and after two steps for every way to batch."""
    folder = tmp_path_factory.mktemp("evaluation")
    data = tiny.write_rows(folder / "train.jsonl", ROWS)
    found = {}
    for packing in (True, False):
        for size in (1, 3, 8):
            for world in (1, 2) if size == 3 else (1,):
                name = f"{'packed' if packing else 'rows'}-{size}-ranks{world}"
                training = {"maxSteps": 1, "batchSize": 40, "microBatchSize": size, "learningRate": "1e-2", "sequenceLength": 256,
                            "packing": packing, "warmupSteps": 0}  # fmt: skip
                job = tiny.job(
                    folder / name, llama, data, training=training, dataset={"evaluation": {"fraction": "0.3"}}
                )
                verdict = run_ranks(job, folder / name, world)
                assert verdict.code == 0, verdict.message
                lines = [json.loads(line) for line in (folder / name / "output/metrics.jsonl").read_text().splitlines()]
                found[name] = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return found


def test_evaluation_does_not_depend_on_batching(eval_loss: dict[str, Any]) -> None:
    """Batch sizes 1, 3 and 8, packed or not, one and two ranks; the one step takes every row, so the model is the same too."""
    assert len(eval_loss) == 8
    for name, (before, after) in eval_loss.items():
        expected_before, expected_after = eval_loss["rows-1-ranks1"]
        assert abs(before - expected_before) < 1e-6, name
        assert abs(after - expected_after) < 1e-6, name
        assert after < before - 0.01, name


@pytest.mark.parametrize("packing", [True, False])
def test_two_ranks_train_as_one_does(tmp_path: Path, llama: Path, packing: bool) -> None:
    """Steps of five sequences, so that ranks get unequal parts, and a last one that leaves a rank with nothing."""
    data = tiny.write_rows(tmp_path / "train.jsonl", ROWS[:21])
    found = []
    for world in (1, 2):
        training = {"epochs": "2", "batchSize": 5, "microBatchSize": 2, "learningRate": "5e-3", "sequenceLength": 256,
                    "packing": packing}  # fmt: skip
        job = tiny.job(tmp_path / str(world), llama, data, training=training)
        verdict = run_ranks(job, tmp_path / str(world), world)
        assert verdict.code == 0, verdict.message
        found.append([float.fromhex(loss) for loss in tiny.losses(tmp_path / str(world) / "output")])
    assert len(found[0]) >= 4
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-5)


def test_one_rank_goes_on_where_two_stopped(tmp_path: Path, llama: Path) -> None:
    """Only one of the two was asked to stop: they agree. Shards are read whatever rank wrote them."""
    data = tiny.write_rows(tmp_path / "train.jsonl", ROWS[:20])
    training = {"maxSteps": 8, "batchSize": 4, "learningRate": "5e-3", "sequenceLength": 256}
    whole = tiny.job(tmp_path / "whole", llama, data, training=training)
    assert run_ranks(whole, tmp_path / "whole", 1).code == 0
    job = tiny.job(tmp_path / "stopped", llama, data, training=training)
    stopped = run_ranks(job, tmp_path / "stopped", 2, stop_at=3)
    assert stopped.code == 75 and 3 <= stopped.step < 8, stopped.message
    assert len(list(tmp_path.glob(f"stopped/output.checkpoints/*/*/step-{stopped.step:08d}/*.safetensors"))) == 2
    verdict = run_ranks(job, tmp_path / "stopped", 1, run_id="second")
    assert (verdict.code, verdict.first_step) == (0, stopped.step), verdict.message
    ours, expected = (
        [float.fromhex(loss) for loss in tiny.losses(tmp_path / name / "output")] for name in ("stopped", "whole")
    )
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
