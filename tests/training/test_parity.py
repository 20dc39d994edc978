"""Our loop against the reference script, step by step; evaluation and training against themselves over batch sizes, packing and ranks."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from finetune_trainer.data.order import Batching, Order
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.train import run

from . import reference, tiny
from .spawn import run_ranks

ROWS = tiny.chat_rows(40)


def order_of(rows: RowSet, batch_size: int, seed: int) -> Order:
    return Order(np.arange(len(rows.targets)), rows.lengths, rows.sources, None, seed, Batching(512, False, batch_size))


class Case(NamedTuple):
    """A method, and how one puts it on by hand."""

    method: dict[str, Any]
    adapt: Callable[[Any], Any] = lambda model: model
    multiple: Callable[[str], float] = lambda name: 1.0
    rate: str = "5e-3"
    quantization: Any = None


def adapter(kind: type[peft.PeftConfig], **options: Any) -> Callable[[Any], Any]:
    return lambda model: peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **options))


def lora(**options: Any) -> Callable[[Any], Any]:
    return adapter(peft.LoraConfig, **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options)


def only(*parts: str) -> Callable[[Any], Any]:
    """All but the weights whose names hold one of these is frozen."""

    def freeze(model: Any) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))
        return model

    return freeze


def by_block(name: str) -> float:
    """Of two blocks with an embedding below: half from each to the next."""
    return 0.25 if "embed" in name else 0.5 if "layers.0." in name else 1.0


SHORT = {"rank": 4, "alpha": 8}
TEXT = "red blue stone"
CASES = {
    "lora": Case({"lora": SHORT}, lora()),
    "full": Case({"full": {}}),
    "full, by layer": Case({"full": {"layerDecay": "0.5"}}, multiple=by_block),
    "freeze, last block": Case({"freeze": {"trainLastBlocks": 1}}, only("layers.1.")),
    "freeze, modules": Case({"freeze": {"trainModules": ["mlp.down_proj", "layers.0.self_attn.*"]}}, only("down_proj", "layers.0.self_attn")),
    "lora, dora": Case({"lora": SHORT | {"useDora": True}}, lora(use_dora=True)),
    "lora, rslora": Case({"lora": SHORT | {"useRslora": True}}, lora(use_rslora=True)),
    "lora, pissa": Case({"lora": SHORT | {"initialization": "pissa"}}, lora(init_lora_weights="pissa_niter_16")),
    "lora, olora": Case({"lora": SHORT | {"initialization": "olora"}}, lora(init_lora_weights="olora")),
    "lora, plus": Case({"lora": SHORT | {"loraPlusRatio": "16"}}, lora(), lambda name: 16.0 if "lora_B" in name else 1.0, "1e-3"),
    "lora, patterns": Case(
        {"lora": SHORT | {"targets": ["q_proj", "up_proj"], "rankPattern": {"layers.0.*q_proj": 6}, "alphaPattern": {"up_proj": 20}}},
        lora(target_modules=["q_proj", "up_proj"], rank_pattern={"layers.0.*q_proj": 6}, alpha_pattern={"up_proj": 20}),
    ),
    "lora, modules to save": Case(
        {"lora": SHORT | {"targets": ["q_proj"], "modulesToSave": ["down_proj"]}}, lora(target_modules=["q_proj"], modules_to_save=["down_proj"])
    ),
    "qlora": Case(
        {"qlora": SHORT}, lora(), quantization=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
        ),
    ),
    "qlora, 8 bits": Case({"qlora": SHORT | {"bits": 8}}, lora(), quantization=BitsAndBytesConfig(load_in_8bit=True)),
    "prefix": Case({"prefix": {"length": 5}}, adapter(peft.PrefixTuningConfig, num_virtual_tokens=5), rate="3e-2"),
    "prefix, projection": Case(
        {"prefix": {"length": 5, "projection": True, "projectionSize": 32}},
        adapter(peft.PrefixTuningConfig, num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=32),
    ),
    "prompt": Case({"prompt": {"length": 5}}, adapter(peft.PromptTuningConfig, num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB")),
    "prompt, text": Case(
        {"prompt": {"length": 20, "initialText": TEXT}},
        lambda model: adapter(
            peft.PromptTuningConfig, num_virtual_tokens=20, prompt_tuning_init="TEXT", prompt_tuning_init_text=TEXT, tokenizer_name_or_path=model.name_or_path
        )(model),
    ),
    "p-tuning": Case({"pTuning": {"length": 5, "hiddenSize": 32}}, adapter(peft.PromptEncoderConfig, num_virtual_tokens=5, encoder_hidden_size=32)),
    "p-tuning, lstm": Case(
        {"pTuning": {"length": 5, "encoder": "lstm"}},
        adapter(peft.PromptEncoderConfig, num_virtual_tokens=5, encoder_hidden_size=64, encoder_reparameterization_type="LSTM"),
    ),
    "ia3": Case({"ia3": {}}, adapter(peft.IA3Config), rate="3e-2"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "micro_batch"), [*((name, 3) for name in CASES), *((name, n) for name in ("lora", "full") for n in (2, 8))]
)
def test_losses_equal_those_of_the_reference(tmp_path: Path, llama: Path, case: str, micro_batch: int) -> None:
    """Ragged rows, masked labels, accumulation (8 rows a step in micro-batches that do not divide it), clipping, decay, warm-up."""
    method, adapt, multiple, rate, quantization = CASES[case]
    data = tiny.write_rows(tmp_path / "train.jsonl", ROWS)
    training = {"epochs": "2", "batchSize": 8, "microBatchSize": micro_batch, "learningRate": rate, "sequenceLength": 512,
                "packing": False, "warmupSteps": 2, "weightDecay": "0.1", "maxGradNorm": "0.5"}  # fmt: skip
    job = tiny.job(tmp_path, llama, data, method=method, training=training)
    verdict = run(job, tiny.context(job, tmp_path / "scratch"))
    assert verdict.code == 0, verdict.message

    prepared = RowSet.open(next((tmp_path / "scratch/prepared").iterdir()))
    order = order_of(prepared, 8, seed=42)
    steps = [[int(i) for sequence in step for i in sequence] for epoch in (0, 1) for step in order.epoch(epoch)]
    losses, norms, trained = reference.train(
        llama, [row["messages"] for row in ROWS], steps, adapt=adapt, seed=42, rate=float(rate), decay=0.1, clip=0.5,
        micro_batch=micro_batch, multiple=multiple, quantization=quantization,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "output/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(steps) == 10
    assert losses[-1] < losses[0] - 0.02, "the reference itself must learn, or equality says little"
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], norms, rtol=2e-4)
    if case in ("lora", "full"):
        file = "adapter_model.safetensors" if case == "lora" else "model.safetensors"
        ours = load_file(tmp_path / "output" / file)
        for name, tensor in trained.items():
            torch.testing.assert_close(ours[name.replace(".default", "")], tensor.detach(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("packing", [True, False])
def test_pretraining_losses_equal_those_of_the_reference(tmp_path: Path, llama: Path, packing: bool) -> None:
    """Plain text, every token of it learned; rows packed into one sequence are apart in the reference."""
    texts = [row["source"] for row in tiny.pair_rows(24)]
    data = tiny.write_rows(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    training = {"epochs": "2", "batchSize": 2 if packing else 6, "microBatchSize": 1 if packing else 4, "learningRate": "5e-3",
                "sequenceLength": 96, "packing": packing, "warmupSteps": 2, "weightDecay": "0.1", "maxGradNorm": "0.5"}  # fmt: skip
    job = tiny.job(tmp_path, llama, data, objective={"pretrain": {}}, method={"lora": SHORT}, training=training)
    verdict = run(job, tiny.context(job, tmp_path / "scratch"))
    assert verdict.code == 0, verdict.message
    lines = [json.loads(line) for line in (tmp_path / "output/metrics.jsonl").read_text().splitlines()]

    rows = RowSet.open(next((tmp_path / "scratch/prepared").iterdir()))
    batching = Batching(96, packing, int(training["batchSize"]))  # type: ignore[call-overload]
    order = Order(np.arange(len(texts)), rows.lengths, rows.sources, None, 42, batching)
    taken = [step for _, step in islice(order.walk(0), len(lines))]
    assert packing == any(len(sequence) > 1 for step in taken for sequence in step)
    steps = [[int(i) for sequence in step for i in sequence] for step in taken]
    losses, norms, _ = reference.train(
        llama, texts, steps, adapt=lora(), seed=42, rate=5e-3, decay=0.1, clip=0.5, micro_batch=3, kind=reference.TEXTS
    )
    assert len(losses) >= 6 and losses[-1] < losses[0] - 0.02
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], norms, rtol=2e-4)


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
