"""Cells of the support table, family x task x method, each a small job that learns."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from finetune_crds import support
from finetune_crds.resolved import ResolvedJob

from . import pictures, tiny
from .variants import FIRST, LLAMA, method_of, spec_of

WHOLE = ("llama", "bert", "t5", "vit", "resnet")
"""Families of which every task is tried with every method, always, and images with augmentation."""


class Cell(NamedTuple):
    """What a job is made of."""

    family: str
    task: str
    """Or a problem of text-classification."""
    variant: str
    always: bool = True
    """Whether it is tried at each run of the tests, or by `make soak` alone."""

    def __str__(self) -> str:
        return f"{self.family}-{self.task}-{self.variant}"


def _table() -> Iterator[Cell]:
    """Of most families each method and each task is always tried, and both together over the families."""
    for number, (name, family) in enumerate(support.FAMILIES.items()):
        for i, method in enumerate(family.methods):
            for j, task in enumerate(family.tasks):
                yield Cell(name, task, FIRST[method], name in WHOLE or (number + i) % len(family.tasks) == j)


_MORE = [
    *(("llama", task, variant) for task in ("text-generation", "text-classification") for variant in LLAMA),
    *(("bert", "text-classification", variant) for variant in LLAMA if variant != "lora-modules" and method_of(variant) in support.FAMILIES["bert"].methods),
    *(("gpt2", "text-generation", variant) for variant in ("freeze-biases", "lora-pissa", "lora-dora", "adapter-houlsby", "prefix-text")),
    *((family, "text-generation", "lora-experts") for family in ("mixtral", "olmoe")),
    ("gpt2", "text-classification", "qlora"),
    ("qwen3_moe", "text-classification", "lora-experts"),
    *(("bert", problem, variant) for problem in ("multiLabel", "regression") for variant in ("full", "lora")),
    *(("t5-gated", "summarization", variant) for variant in ("full", "gradualUnfreezing", "qlora")),
    *((family, "image-classification", variant) for family in pictures.TIMM for variant in ("full", "freeze", "gradualUnfreezing")),
    *((family, "image-classification", variant) for family in pictures.PERCEIVERS for variant in ("full", "freeze", "gradualUnfreezing", "lora")),
    ("timm_wrapper convnext_tiny", "image-classification", "lora"),
]  # fmt: skip
"""Variants of methods, problems of classification, and T5 whose head is not its embedding."""
CELLS = list({cell[:3]: cell for cell in (*_table(), *(Cell(*one) for one in _MORE))}.values())


def _labelled(told: Callable[[list[str]], Any]) -> list[dict[str, Any]]:
    """Texts, and what is told of their words."""
    return [{"text": row["source"], "label": told(row["source"].split())} for row in tiny.pair_rows(8)]


_ROWS: dict[str, Callable[[], Any]] = {
    "text-generation": lambda: tiny.chat_rows(4),
    "text-classification": lambda: _labelled(lambda words: "long" if len(words) > 3 else "short"),
    "multiLabel": lambda: _labelled(lambda words: [word for word in ("red", "one", "lamp") if word in words]),
    "regression": lambda: _labelled(lambda words: len(words) / 3),
    "token-classification": lambda: tiny.tagged_rows(8),
    "question-answering": lambda: tiny.question_rows(8),
    "summarization": lambda: tiny.pair_rows(8),
    "translation": lambda: tiny.pair_rows(8),
}
_RATES = {
    "full": 3e-3,
    "freeze": 3e-3,
    "gradualUnfreezing": 3e-3,
    "lora": 3e-3,
    "adapter": 3e-3,
    "prefix": 3e-2,
    "prompt": 1e-1,
    "ia3": 1e-1,
}
_AUGMENTED = {"randomResizedCrop": {"minScale": "0.8"}, "randAugment": {"magnitude": 4}, "mixup": "0.2"}


def make_job(
    folder: Path, cell: Cell, *, plain: bool = False, saving: bool = False, **more: Any
) -> tuple[ResolvedJob, int]:
    """A few steps on the same few rows, with a checkpoint on the way, and the step of it. The head of a classifier is fresh, whatever the method.

    Args:
        folder: of the model, the rows and all that is written.
        cell: what of.
        plain: without augmentation and the dropout that a cell sets.
        saving: with gradient checkpointing, where the family has it.
        more: fields of the spec; those of training are added to the cell's own.
    """
    family, task, variant, _ = cell
    images = task == "image-classification"
    spec: dict[str, Any] = {"task": task}
    if task in ("multiLabel", "regression"):
        spec = {"task": "text-classification", "objective": {"classification": {"problem": task}}}
    rate = _RATES.get(method_of(variant), 1e-2) / (1 if task == "text-generation" else 3)
    steps = 4 if images else 6
    training = {"maxSteps": steps, "batchSize": 8, "learningRate": f"{rate:.0e}", "schedule": "constant"}
    if images:
        model = pictures.make_model(folder / "model", family)
        data = pictures.write_folder(folder / "train", 3 if family in WHOLE else 2)
        spec["dataset"] = {"augmentation": _AUGMENTED} if family in WHOLE and not plain else {}
    else:
        drops = not plain and (family in tiny.ENCODERS or family in tiny.ENCODER_DECODERS)
        model = tiny.make_model(folder / "model", family, **({"dropout": 0.1} if drops else {}))
        data = tiny.write_rows(folder / "train.jsonl", _ROWS[task]())
        training["sequenceLength"] = 256
    ((name, fields),) = spec_of(variant, plain=plain).items()
    if variant == "gradualUnfreezing" and family in pictures.PER_STAGE:
        fields = fields | {"blocksPerStage": pictures.PER_STAGE[family]}
    if (
        saving
        and family.partition(" ")[0] not in pictures.NO_CHECKPOINTING
        and (family not in pictures.COUNTING or variant == "lora")
    ):
        training["gradientCheckpointing"] = True
    training |= more.pop("training", {})
    saved = steps // 2 + 1
    job = tiny.job(
        folder, model, data, method={name: fields}, training=training, checkpoints={"everySteps": saved}, **spec, **more
    )
    return job, saved
