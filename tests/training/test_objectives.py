"""Every objective with every method that the support table gives it."""

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from finetune_crds import support
from finetune_crds.resolved import ResolvedJob

from . import tiny
from .runs import finish, journal, published, trained
from .test_grpo import VOWELS, prompts
from .test_preference import feedback, pairs
from .variants import FIRST, spec_of

ROWS: dict[str, list[dict[str, Any]]] = {
    "pretrain": [{"text": row["source"]} for row in tiny.pair_rows(6)],
    "dpo": pairs(6),
    "orpo": pairs(6),
    "kto": feedback(6),
    "reward": pairs(6),
    "grpo": prompts(4),
}
"""Of all but sft, which test_table has."""
SETTINGS: dict[str, dict[str, Any]] = {"grpo": {"rewards": [VOWELS], "generations": 4, "maxCompletionLength": 6}}
CELLS = [
    (objective, method)
    for objective in ROWS
    for method in support.OBJECTIVE_METHODS.get(objective, get_args(support.MethodName))
]


def make_job(
    folder: Path, objective: str, method: str, *, plain: bool = False, saving: bool = False, **more: Any
) -> tuple[ResolvedJob, int]:
    """Four steps with a checkpoint on the way, and the step of it; the rest as in cells.make_job."""
    model = tiny.make_model(folder / "model")
    data = tiny.write_rows(folder / "train.jsonl", ROWS[objective])
    training = {"maxSteps": 4, "batchSize": 6, "learningRate": "1e-2", "schedule": "constant", "warmupSteps": 0}
    training["gradientCheckpointing"] = saving
    job = tiny.job(
        folder, model, data, task="text-generation", objective={objective: SETTINGS.get(objective, {})},
        method=spec_of(FIRST[method], plain=plain), training=training | more.pop("training", {}), checkpoints={"everySteps": 2}, **more,
    )  # fmt: skip
    return job, 2


def test_every_objective_is_tried() -> None:
    assert {*ROWS, "sft"} == {name for name, tasks in support.OBJECTIVES.items() if "text-generation" in tasks}


@pytest.mark.parametrize(("objective", "method"), CELLS)
def test_it_trains_what_the_method_trains_and_nothing_else(tmp_path: Path, objective: str, method: str) -> None:
    """Four steps, in which every number is finite; what is frozen and not quantised keeps each bit, and what is trained moves."""
    job, _ = make_job(tmp_path, objective, method)
    made = trained(job, tmp_path)
    steps = journal(tmp_path)
    assert len(steps) == 4
    assert all(math.isfinite(value) for step in steps for value in step.values() if isinstance(value, float))
    assert max(step["grad_norm"] for step in steps) > 0

    base = load_file(tmp_path / "model/model.safetensors")
    now = {name.replace(".base_layer", ""): tensor for name, tensor in made.model.inner.named_parameters()}
    own = {name for name in base if now[name].is_floating_point()}
    moved = {name for name in own if not torch.equal(now[name].detach(), base[name])}
    assert moved == own & set(made.masters.names)
    learns_the_model = method in ("full", "freeze", "gradualUnfreezing")
    assert bool(moved) == learns_the_model


@pytest.mark.parametrize(
    ("objective", "method"), [cell for cell in CELLS if cell[1] == "lora" or cell == ("dpo", "full")]
)
def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, objective: str, method: str) -> None:
    """Also where the adapter is off in between, or answers are written."""
    found = []
    for saving in (False, True):
        job, _ = make_job(tmp_path / "job", objective, method, saving=saving)
        finish(job, tmp_path / "job")
        found.append(published(tmp_path / "job"))
        (tmp_path / "job").rename(tmp_path / str(saving))
    assert found[0] == found[1]
