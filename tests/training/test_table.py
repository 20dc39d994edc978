"""The support table, cell by cell: what is trained learns, resumes exactly, and opens with the plain library."""

from pathlib import Path
from typing import get_args

import pytest

from finetune_crds import support
from finetune_crds.support import Task
from finetune_crds.v1alpha1.methods import METHODS

from .cells import CELLS, Cell, make_job
from .runs import assert_same_logits, mean_loss, opened_as_its_card_says, resumed
from .variants import VARIANTS, method_of


def test_no_pair_is_left_to_the_soak() -> None:
    """Of a family and a task, a family and a method, or a task and a method, of all that the table supports."""
    tried = {(cell.family, cell.task, method_of(cell.variant)) for cell in CELLS if cell.always}
    meant = {(name, task, method) for name, one in support.FAMILIES.items() for task in one.tasks for method in one.methods}  # fmt: skip
    for chosen in (lambda one: one[:2], lambda one: one[::2], lambda one: one[1:]):
        assert {chosen(cell) for cell in meant} <= {chosen(cell) for cell in tried}
    assert {one[1:] for one in tried} >= {
        (task, method) for task in get_args(Task) for method in support.methods_of(task)
    }
    assert {method for spec in VARIANTS.values() for method in spec} == set(METHODS)


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=str(cell), marks=() if cell.always else pytest.mark.soak) for cell in CELLS]
)
def test_it_learns_resumes_and_opens_as_its_card_says(tmp_path: Path, cell: Cell) -> None:
    """With dropout where the family has it; and the resumed run with gradient checkpointing, of which no bit may depend."""
    job, saved = make_job(tmp_path, cell)
    before: list[float] = []
    again, _ = make_job(tmp_path, cell, saving=True)
    made = resumed(job, tmp_path, saved, begins=lambda made: before.append(mean_loss(made)), again=again)
    assert mean_loss(made) < before[0] - 0.003
    assert_same_logits(made, opened_as_its_card_says(tmp_path / "output"), tmp_path)
