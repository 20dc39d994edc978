"""Runs of a job in this process, and what they published: opened by the code on its card, and measured by the plain library."""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
import transformers
from PIL import Image
from transformers.image_utils import load_image

from finetune_crds import support
from finetune_crds.resolved import ResolvedJob
from finetune_crds.verdict import ExitCode, Verdict
from finetune_trainer import setup, train
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.methods import quantized
from finetune_trainer.setup import Setup

from . import tiny

EVERY_3 = {"everySteps": 3, "keep": 9}
"""Checkpoints of a run that `resumed` is to resume."""


def run(job: ResolvedJob, folder: Path, **options: Any) -> Verdict:
    """How a run ends that has its scratch in this folder."""
    return train.run(job, tiny.context(job, folder / "scratch", **options))


def finish(job: ResolvedJob, folder: Path, stops: Sequence[int] = ()) -> Verdict:
    """Runs to the end. It is asked to stop at each of `stops` (steps, ascending) and goes on as another run."""
    for step in stops:
        stopped = run(job, folder, reporter=tiny.Recorder(stop_at=step), run_id=f"stopped-at-{step}")
        assert stopped.code == ExitCode.STOPPED and stopped.step >= step, stopped.message
    verdict = run(job, folder, run_id="last")
    assert verdict.code == 0, verdict.message
    return verdict


def same_bytes_when_stopped(make: Callable[[Path], ResolvedJob], folder: Path, *stops: int) -> Path:
    """A job that runs whole, and again in the same place asked to stop on the way, publishes the same bytes. The folder of the whole run.

    Args:
        make: the job of a folder.
        folder: for both.
        stops: as in `finish`.
    """
    place, whole = folder / "job", folder / "whole"
    finish(make(place), place)
    place.rename(whole)
    finish(make(place), place, stops)
    assert published(whole) == published(place)
    return whole


def trained(job: ResolvedJob, folder: Path, begins: Callable[[Setup], object] = lambda made: None) -> Setup:
    """Runs to the end; the model then holds what was published. `begins` is shown it before the first step."""
    made: list[Setup] = []

    def kept(*arguments: Any) -> Setup:
        made.append(setup.load(*arguments))
        begins(made[-1])
        return made[-1]

    with mock.patch.object(train, "load", kept):
        finish(job, folder)
    made[0].model.outer.eval()
    return made[0]


def resumed(
    job: ResolvedJob,
    folder: Path,
    *steps: int,
    begins: Callable[[Setup], object] = lambda made: None,
    again: ResolvedJob | None = None,
) -> Setup:
    """Runs to the end, and once more from the checkpoint behind each of these steps (each must be saved): the same bytes are published.

    Args:
        job: what runs.
        folder: its own.
        steps: to resume behind.
        begins: is shown the model before the first step.
        again: what is resumed, where that is another job of the same outcome.
    """
    made = trained(job, folder, begins)
    whole = published(folder)
    for step in steps:
        shutil.rmtree(folder / "output")
        for later in folder.glob("output.checkpoints/*/*/step-*"):
            if int(later.name.removeprefix("step-")) > step:
                shutil.rmtree(later)
        assert finish(again or job, folder).first_step == step
        assert published(folder) == whole
    return made


def loaded(job: ResolvedJob, folder: Path) -> Setup:
    """Everything that training needs, before its first step."""
    context = tiny.context(job, folder / "scratch")
    return setup.load(setup.read(job.spec, context), context.ranks)  # type: ignore[arg-type]


def prepared(folder: Path) -> RowSet:
    """The rows of a run."""
    return RowSet.open(next((folder / "scratch/prepared").iterdir()))


def published(folder: Path) -> dict[str, str]:
    """Digests of the files of a run's output."""
    found: dict[str, str] = json.loads((folder / "output/finetune.json").read_text())["files"]
    return found


def journal(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "output/metrics.jsonl").read_text().splitlines()]


def held_out_losses(folder: Path) -> tuple[float, float]:
    """Of a run that was evaluated before and after."""
    before, after = (float.fromhex(loss) for loss in tiny.losses(folder / "output", "eval_loss_hex"))
    return before, after


def opened_as_its_card_says(output: Path) -> Any:
    """The model, loaded by the code in README.md, in evaluation mode; its quantised layers compute as they did in training."""
    code = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"transformers": transformers, "peft": peft}
    exec(code.replace("this folder", str(output)), names)
    quantized.settle(names["model"])
    return names["model"].eval()


def mean_loss(made: Setup) -> float:
    """Of the rows that are trained on, without dropout."""
    rows = made.division.train
    was_training = made.model.outer.training
    made.model.outer.eval()
    with torch.no_grad():
        batch = made.objective.batch(made.rows, [np.array([row]) for row in rows], torch.device("cpu"))
        total = float(made.objective.loss(made.model, batch))
    made.model.outer.train(was_training)
    return total / int(made.rows.targets[rows].sum())


def assert_same_logits(made: Setup, opened: Any, folder: Path, *, atol: float = 2e-5) -> None:
    """What was trained and what the plain library opened say the same of each row, each alone in a forward pass of the library's own."""
    ids = [int(row) for row in made.division.train]
    for row, ours in zip(ids, _own_logits(made, ids), strict=True):
        torch.testing.assert_close(_plain_logits(made, opened, row, folder), ours.cpu(), rtol=0, atol=atol)


def _own_logits(made: Setup, ids: Sequence[int]) -> Sequence[torch.Tensor]:
    """Of each row, all in one forward pass."""
    batch = made.objective.batch(made.rows, [np.array([row]) for row in ids], torch.device("cpu"))
    with torch.no_grad():
        if hasattr(made.objective, "logits"):
            found = made.objective.logits(made.model, batch)
        else:
            found = made.model.logits(made.model.hidden(batch))  # type: ignore[arg-type]
    return found if not isinstance(found, torch.Tensor) else found.split([int(made.rows.targets[row]) for row in ids])


def _plain_logits(made: Setup, opened: Any, row: int, folder: Path) -> torch.Tensor:
    rows, task = made.rows, made.spec.task
    span = slice(int(rows.offsets[row]), int(rows.offsets[row + 1]))
    tokens = torch.from_numpy(rows.tokens[span].astype(np.int64))[None]
    at = int(rows.splits[row])
    if task == "image-classification":
        processor = transformers.AutoImageProcessor.from_pretrained(folder / "output")
        given = dict(processor(load_image(Image.open(io.BytesIO(rows.note(row)))), return_tensors="pt"))
    elif task in support.PAIRS:
        given = {"input_ids": tokens[:, :at], "labels": tokens[:, at:]}
    else:
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if task == "question-answering" and getattr(opened.config, "type_vocab_size", 0) > 1:
            given["token_type_ids"] = (torch.arange(tokens.shape[1]) >= at).long()[None]
    with torch.no_grad():
        found = opened(**given)
    if task == "question-answering":
        return torch.stack([found.start_logits[0], found.end_logits[0]], dim=-1)
    logits: torch.Tensor = found.logits.float()
    if task == "text-generation":  # behind virtual tokens, if there are some
        return logits[0, -tokens.shape[1] :][np.flatnonzero(rows.learned[span][1:])]
    return (
        logits[0][rows.labels_of(row) >= 0]
        if task == "token-classification"
        else logits[0]
        if task in support.PAIRS
        else logits
    )
