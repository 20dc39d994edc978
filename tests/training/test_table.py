"""The support table, cell by cell: what is trained learns, resumes exactly, and opens with the plain library."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from finetune_crds import support
from finetune_crds.support import Task
from finetune_crds.v1alpha1.methods import METHODS

from . import pictures, tiny
from .runs import assert_same_logits, mean_loss, opened_as_its_card_says, resumed
from .variants import FIRST, LLAMA, VARIANTS, method_of

WHOLE = ("llama", "bert", "t5", "vit", "resnet")
"""Families of which every task is tried with every method, always, and images with augmentation."""


def cells() -> Iterator[Any]:
    """Of the other families each method and each task is always tried, and both together over the families; the rest by `make soak`."""
    for number, (name, family) in enumerate(support.FAMILIES.items()):
        for i, method in enumerate(family.methods):
            for j, task in enumerate(family.tasks):
                always = name in WHOLE or (number + i) % len(family.tasks) == j
                marks = () if always else pytest.mark.soak
                yield pytest.param(name, task, FIRST[method], id=f"{name}-{task}-{method}", marks=marks)


CELLS = list(cells())
MORE = [
    *(("llama", task, variant) for task in ("text-generation", "text-classification") for variant in LLAMA),
    *(("bert", "text-classification", variant) for variant in LLAMA if variant != "lora-modules" and method_of(variant) in support.FAMILIES["bert"].methods),
    *(("gpt2", "text-generation", variant) for variant in ("freeze-biases", "lora-pissa", "lora-dora", "adapter-houlsby", "prefix-text")),
    *((family, "text-generation", "lora-experts") for family in ("mixtral", "olmoe")),
    ("gpt2", "text-classification", "qlora"),
    ("qwen3_moe", "text-classification", "lora-experts"),
    *(("bert", problem, variant) for problem in ("multiLabel", "regression") for variant in ("full", "lora")),
    *(("t5-gated", "summarization", variant) for variant in ("full", "gradualUnfreezing", "qlora")),
]  # fmt: skip
"""Variants of methods, problems of classification, and T5 whose head is not its embedding."""
CELLS += [
    pytest.param(*one, id="-".join(one)) for one in MORE if one not in {cell.values for cell in CELLS if not cell.marks}
]


def test_no_pair_is_left_to_the_soak() -> None:
    """Of a family and a task, a family and a method, or a task and a method, of all that the table supports."""
    tried = {(family, task, method_of(variant)) for family, task, variant in (c.values for c in CELLS if not c.marks)}
    meant = {(name, task, method) for name, one in support.FAMILIES.items() for task in one.tasks for method in one.methods}  # fmt: skip
    for chosen in (lambda one: one[:2], lambda one: one[::2], lambda one: one[1:]):
        assert {chosen(cell) for cell in meant} <= {chosen(cell) for cell in tried}
    assert {one[1:] for one in tried} >= {
        (task, method) for task in get_args(Task) for method in support.methods_of(task)
    }
    assert {method for spec in VARIANTS.values() for method in spec} == set(METHODS)


def labelled(told: Callable[[list[str]], Any]) -> list[dict[str, Any]]:
    """Texts, and what is told of their words."""
    return [{"text": row["source"], "label": told(row["source"].split())} for row in tiny.pair_rows(8)]


ROWS: dict[str, Callable[[], Any]] = {
    "text-generation": lambda: tiny.chat_rows(4),
    "text-classification": lambda: labelled(lambda words: "long" if len(words) > 3 else "short"),
    "multiLabel": lambda: labelled(lambda words: [word for word in ("red", "one", "lamp") if word in words]),
    "regression": lambda: labelled(lambda words: len(words) / 3),
    "token-classification": lambda: tiny.tagged_rows(8),
    "question-answering": lambda: tiny.question_rows(8),
    "summarization": lambda: tiny.pair_rows(8),
    "translation": lambda: tiny.pair_rows(8),
}
RATES = {
    "full": 3e-3,
    "freeze": 3e-3,
    "gradualUnfreezing": 3e-3,
    "lora": 3e-3,
    "adapter": 3e-3,
    "prefix": 3e-2,
    "prompt": 1e-1,
    "ia3": 1e-1,
}
AUGMENTED = {"randomResizedCrop": {"minScale": "0.8"}, "randAugment": {"magnitude": 4}, "mixup": "0.2"}


@pytest.mark.parametrize(("family", "task", "variant"), CELLS)
def test_it_learns_resumes_and_opens_as_its_card_says(tmp_path: Path, family: str, task: str, variant: str) -> None:
    """A few steps on the same few rows, with dropout where the family has it; the head of a classifier is fresh, whatever the method."""
    spec: dict[str, Any] = {"task": task}
    if task in ("multiLabel", "regression"):
        spec = {"task": "text-classification", "objective": {"classification": {"problem": task}}}
    rate = RATES.get(method_of(variant), 1e-2) / (1 if task == "text-generation" else 3)
    steps = 4 if task == "image-classification" else 6
    training = {"maxSteps": steps, "batchSize": 8, "learningRate": f"{rate:.0e}", "schedule": "constant"}
    if task == "image-classification":
        model, data = (
            pictures.make_model(tmp_path / "model", family),
            pictures.write_folder(tmp_path / "train", 3 if family in WHOLE else 2),
        )
        spec["dataset"] = {"augmentation": AUGMENTED} if family in WHOLE else {}
    else:
        dropout = {"dropout": 0.1} if family in tiny.ENCODERS or family in tiny.ENCODER_DECODERS else {}
        model = tiny.make_model(tmp_path / "model", family, **dropout)
        data = tiny.write_rows(tmp_path / "train.jsonl", ROWS[task]())
        training["sequenceLength"] = 256
    method = VARIANTS[variant]
    if variant == "gradualUnfreezing" and family in pictures.PER_STAGE:
        method = {variant: method[variant] | {"blocksPerStage": pictures.PER_STAGE[family]}}
    job = tiny.job(
        tmp_path, model, data, method=method, training=training, checkpoints={"everySteps": steps // 2 + 1}, **spec
    )
    before: list[float] = []
    made = resumed(job, tmp_path, steps // 2 + 1, begins=lambda made: before.append(mean_loss(made)))
    assert mean_loss(made) < before[0] - 0.003
    assert_same_logits(made, opened_as_its_card_says(tmp_path / "output"), tmp_path)
