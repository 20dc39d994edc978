"""Runs of a job in this process, and what they published: opened by the code on its card, and measured by the plain library."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch.nn.functional import cross_entropy

from finetune_crds.resolved import ResolvedJob
from finetune_crds.verdict import ExitCode, Verdict
from finetune_trainer import setup, train
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.methods import quantized
from finetune_trainer.setup import Setup

from . import tiny


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


def plain_loss(model: Any, rows: RowSet) -> float:
    """Mean over the held-out rows, each alone in a forward pass of the library's own."""
    total, count = 0.0, 0
    for row in np.flatnonzero(rows.sources < 0):
        span = slice(int(rows.offsets[row]), int(rows.offsets[row + 1]))
        tokens = torch.from_numpy(rows.tokens[span].astype(np.int64)).to(model.device)
        with torch.no_grad():
            logits = model(input_ids=tokens[None], attention_mask=torch.ones_like(tokens[None])).logits[0].float()
        if rows.index.classes:
            label = torch.tensor(int(rows.labels_of(int(row))[0]), device=model.device)
            total += float(cross_entropy(logits, label))
            count += 1
        else:
            learned = np.flatnonzero(rows.learned[span][1:]) + 1
            total += float(cross_entropy(logits[-len(tokens) :][learned - 1], tokens[learned], reduction="sum"))
            count += len(learned)
    return total / count
