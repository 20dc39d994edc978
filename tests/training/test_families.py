"""Families that are built otherwise: GPT-2, whose linear layers lie the other way round, mixtures, whose experts are no layers, and T5, whose attention has a mask of its own."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from finetune_crds.verdict import ExitCode

from . import cells, reference, tiny
from .runs import assert_same_logits, finish, journal, loaded, opened_as_its_card_says, prepared, run, trained
from .test_methods import CHATS, FEW, make
from .test_parity import lora, order_of
from .variants import VARIANTS

STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""GPT-2 without dropout, which two programs draw differently."""
SHORT = {"rank": 4, "alpha": 8}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
"""All linear layers of a mixture. Of "all-linear" peft itself makes experts of twice the rank, as adapters of older releases had."""
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def ia3(model: Any) -> Any:
    return peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True))


PARITY: dict[str, tuple[str, dict[str, Any], Callable[[Any], Any]]] = {
    "gpt2-full": ("gpt2", {"full": {}}, lambda model: model),
    "gpt2-lora": ("gpt2", {"lora": SHORT}, lora(fan_in_fan_out=True)),
    "gpt2-ia3": ("gpt2", {"ia3": {}}, ia3),
    "mixtral-full": ("mixtral", {"full": {}}, lambda model: model),
    "mixtral-experts": (
        "mixtral",
        {"lora": SHORT | {"experts": True}},
        lora(target_modules=ATTENTION, target_parameters=EXPERTS),
    ),
    "qwen3_moe-lora": ("qwen3_moe", {"lora": SHORT}, lora(target_modules=ATTENTION)),
    "olmoe-experts": (
        "olmoe",
        {"lora": SHORT | {"experts": True}},
        lora(target_modules=ATTENTION, target_parameters=EXPERTS),
    ),
}


@pytest.mark.parametrize("case", PARITY)
def test_losses_are_those_of_transformers_and_peft(tmp_path: Path, case: str) -> None:
    """Without the routers' auxiliary loss, which the library adds only where config.json asks for it."""
    family, method, adapt = PARITY[case]
    rate = "5e-2" if "ia3" in method else "3e-3"
    folder = tiny.make_model(tmp_path / "model", family, **(STILL if family == "gpt2" else {}))
    rows = tiny.chat_rows(24)
    training = {"epochs": "2", "batchSize": 6, "microBatchSize": 4, "learningRate": rate, "sequenceLength": 512,
                "packing": False, "warmupSteps": 2, "weightDecay": "0.1", "maxGradNorm": "0.5"}  # fmt: skip
    job = tiny.job(tmp_path, folder, tiny.write_rows(tmp_path / "rows.jsonl", rows), method=method, training=training)
    finish(job, tmp_path)
    order = order_of(prepared(tmp_path), 6, seed=42)
    steps = [[int(i) for sequence in step for i in sequence] for epoch in (0, 1) for step in order.epoch(epoch)]
    losses, norms, _ = reference.train(
        folder, [row["messages"] for row in rows], steps, adapt=adapt, seed=42, rate=float(rate), decay=0.1, clip=0.5, micro_batch=4
    )  # fmt: skip
    lines = journal(tmp_path)
    assert len(lines) == len(steps) == 8 and losses[-1] < losses[0] - 0.02
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], norms, rtol=2e-4)


MERGED = [
    *(("gpt2", variant) for variant in ("lora", "lora-pissa", "lora-dora", "qlora", "ia3")),
    ("mixtral", "lora-experts"),
    ("olmoe", "lora-experts"),
]


@pytest.mark.parametrize(("family", "variant"), MERGED)
def test_a_merged_model_computes_what_was_trained(tmp_path: Path, family: str, variant: str) -> None:
    output = {"uri": f"file://{tmp_path}/output", "merged": True}
    folder = tiny.make_model(tmp_path / "model", family)
    job = make(tmp_path, folder, "text-generation", VARIANTS[variant], output=output, **FEW)
    made = trained(job, tmp_path)
    assert_same_logits(made, opened_as_its_card_says(tmp_path / "output"), tmp_path)
    assert load_file(tmp_path / "output/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


@pytest.mark.parametrize(("family", "variant"), [("gpt2", "lora"), ("gpt2", "prefix"), ("mixtral", "lora-experts")])
def test_a_changed_neighbour_changes_nothing(tmp_path: Path, family: str, variant: str) -> None:
    """No bit of GPT-2; experts multiply all tokens that are sent to them at once, and round as many as those are."""
    folder = tiny.make_model(tmp_path / "model", family)
    made = loaded(make(tmp_path, folder, "text-generation", VARIANTS[variant]), tmp_path)
    made.masters.weights.add_(0.1 * torch.randn(made.masters.weights.shape, generator=torch.Generator().manual_seed(5)))
    made.masters.refresh()
    made.model.outer.eval()
    *_, long, other, row = sorted(range(CHATS), key=lambda i: int(made.rows.lengths[i]))
    hidden = []
    for sequence in ([long, row], [other, row], [row]):
        batch = made.objective.batch(made.rows, [np.array(sequence)], torch.device("cpu"))
        with torch.no_grad():
            hidden.append(made.model.hidden(batch)[-int(made.rows.targets[row]) :])
    torch.testing.assert_close(hidden[0], hidden[1], rtol=0, atol=0 if family == "gpt2" else 2e-5)
    torch.testing.assert_close(hidden[0], hidden[2], rtol=0, atol=2e-5)


@pytest.mark.parametrize("experts", [True, False])
def test_the_card_says_what_is_adapted(tmp_path: Path, experts: bool) -> None:
    folder = tiny.make_model(tmp_path / "model", "mixtral")
    made = loaded(make(tmp_path, folder, "text-generation", {"lora": {"experts": experts}}), tmp_path)
    summary = made.method.summary(made.model)
    assert summary.startswith("The adapter stands beside 8 layers (k_proj, o_proj, q_proj, v_proj)")
    whole = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    share = 2 * 4 * 3 * 32 * 64 / whole
    assert f"{share:.0%} of the model's weights" in summary
    assert ("Experts and routers are frozen" in summary) == (not experts)
    trained = {name for name in made.masters.names if ".experts." in name}
    assert len(trained) == (8 if experts else 0)


def test_an_adapter_of_experts_is_continued(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "model", "mixtral")
    first = make(tmp_path / "first", folder, "text-generation", VARIANTS["lora-experts"])
    finish(first, tmp_path / "first")
    job = make(
        tmp_path / "second", folder, "text-generation", {"lora": {}}, model={"adapter": {"uri": f"file://{tmp_path}/first/output"}},
        training={"learningRate": "0"},
    )  # fmt: skip
    finish(job, tmp_path / "second")
    ended, begun = (tiny.losses(tmp_path / name / "output", "eval_loss_hex") for name in ("first", "second"))
    assert math.isclose(float.fromhex(ended[-1]), float.fromhex(begun[0]), abs_tol=1e-5)
    assert "method.lora.experts" not in (tmp_path / "second/output/README.md").read_text()


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_with_gradient_checkpointing_no_mask_has_a_gradient(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else GPUs fail in the backward pass of a frozen block: their kernel keeps nothing for it where no query has one."""
    masks: list[bool] = []
    attends = torch.nn.functional.scaled_dot_product_attention

    def spied(*arguments: Any, attn_mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and attn_mask is not None:
            masks.append(attn_mask.requires_grad)
        return attends(*arguments, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
    cell = cells.Cell(family, "summarization", "freeze")
    job, _ = cells.make_job(tmp_path / "job", cell, training={"gradientCheckpointing": True, "maxSteps": 1})
    assert run(job, tmp_path / "job").code == ExitCode.FINISHED
    assert masks and not any(masks)


MISTAKES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "experts of a dense model": ("llama", {}, {"lora": {"experts": True}}, "method.lora.experts: file://"),
    "quantised experts": ("mixtral", {}, {"qlora": {}}, "'mixtral' are supported with method full, freeze"),
    "auxiliary loss": ("mixtral", {"output_router_logits": True}, {"lora": {}}, "sets output_router_logits"),
    "dense blocks between": ("qwen3_moe", {"mlp_only_layers": [0]}, {"lora": {}}, "sets mlp_only_layers"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(tmp_path: Path, case: str) -> None:
    family, overrides, method, sentence = MISTAKES[case]
    folder = tiny.make_model(tmp_path / "model", family, **overrides)
    job = make(tmp_path, folder, "text-generation", method)
    verdict = run(job, tmp_path)
    assert (verdict.code, sentence in verdict.message) == (ExitCode.USER_ERROR, True), verdict.message
