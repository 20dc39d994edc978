"""A trainer killed at any time, and run again, ends as one that was never killed: same losses to the last bit, same files.

Children are forks of this process, which has torch, transformers and the model's code loaded, so a life costs no start-up.
"""

import hashlib
import json
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_crds.progress import RunReport
from finetune_crds.resolved import ResolvedJob
from finetune_crds.verdict import Verdict
from finetune_trainer.train import run

from . import tiny

STEPS = 24
STAGES = ["Saving"] * 4 + ["Publishing"] * 2 + ["Training"] * 2 + ["Evaluating", "Loading"]
"""By seed: in a checkpoint's write, while publishing, in a step, in an evaluation, before the first step."""
MOMENTS: dict[str, tuple[Sequence[int], float]] = {
    "Saving": ([8, 12, 18], 0.006),
    "Publishing": ([STEPS], 0.006),
    "Training": (range(5, STEPS), 0.05),
    "Evaluating": ([6, 12, 18], 0.05),
    "Loading": ([0], 0.05),
}
"""Steps from which on a life is killed in a stage, and the longest time in seconds after it began."""


def make_job(folder: Path, llama: Path) -> ResolvedJob:
    """Everything that has state is on: dropout, packing, evaluation, best, samples, keeping of checkpoints."""
    data = llama.parent / "kill.jsonl"  # one path for all jobs: it is part of their digest
    if not data.exists():
        tiny.write_rows(data, tiny.chat_rows(60))
    return tiny.job(
        folder,
        llama,
        data,
        dataset={"evaluation": {"fraction": "0.2"}},
        method={"lora": {"rank": 4, "dropout": "0.1"}},
        training={"maxSteps": STEPS, "batchSize": 2, "learningRate": "5e-3", "sequenceLength": 256, "packing": True},
        evaluation={"everySteps": 6, "prompts": ["red blue"]},
        checkpoints={"everySteps": 4, "keep": 2},
    )


@dataclass
class Mortal(tiny.Recorder):
    """Kills its process some time after a stage begins, and at the latest when it ends: the kill is sure to hit it."""

    stage: str = ""
    step: int = 0
    seconds: float = 0.0
    _dying: bool = False

    def update(self, report: RunReport, metrics: dict[str, float]) -> None:
        """Called at each step and each change of stage."""
        if self._dying and report.stage != self.stage:
            self._die()
        super().update(report, metrics)
        if report.stage == self.stage and report.step >= self.step and not self._dying:
            self._dying = True
            threading.Timer(self.seconds, self._die).start()

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def start(job: ResolvedJob, folder: Path, life: int, **death: Any) -> int:
    """Forks a life of the trainer; it leaves its verdict, and on the way a line for each report."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        reporter = Mortal(file=folder / f"reports-{life}.jsonl", **death)
        verdict = run(job, tiny.context(job, folder / f"scratch-{life}", run_id=f"life-{life}", reporter=reporter))
        (folder / f"verdict-{life}.json").write_text(verdict.model_dump_json(by_alias=True))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def reports(folder: Path, life: int) -> list[dict[str, Any]]:
    """What a life reported before it ended; a last line may be cut off."""
    path = folder / f"reports-{life}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def committed_steps(folder: Path) -> list[int]:
    return sorted(
        int(path.parent.name.split("-")[1]) for path in folder.glob("output.checkpoints/*/*/step-*/index.json")
    )


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """The folder of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("unharmed") / "job"
    folder.mkdir()
    job = make_job(folder, llama)
    verdict = run(job, tiny.context(job, folder / "scratch"))  # in this process: it also loads what the forks will need
    assert verdict.code == 0, verdict.message
    return folder


def kill_in(stage: str, job: ResolvedJob, folder: Path, rng: random.Random) -> None:
    """Starts a life that ends with SIGKILL."""
    steps, longest = MOMENTS[stage]
    child = start(job, folder, 0, stage=stage, step=rng.choice(steps), seconds=rng.random() * longest)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and reports(folder, 0)[-1]["stage"] == stage


@pytest.mark.parametrize(("seed", "stage"), enumerate(STAGES))
def test_a_killed_run_ends_as_if_it_had_not_been(
    tmp_path: Path, llama: Path, unharmed: Path, seed: int, stage: str
) -> None:
    job = make_job(tmp_path, llama)
    kill_in(stage, job, tmp_path, random.Random(seed))
    last = max(committed_steps(tmp_path), default=0)
    assert last > 0 or stage == "Loading"
    assert last == STEPS or stage != "Publishing"

    os.waitpid(start(job, tmp_path, 1), 0)
    verdict = Verdict.model_validate_json((tmp_path / "verdict-1.json").read_bytes())
    assert verdict.code == 0, verdict.message
    done = [
        report["step"] for report in reports(tmp_path, 1) if report["stage"] == "Training" and report["step"] > last
    ]
    assert verdict.first_step == last
    assert not [report for report in reports(tmp_path, 1) if report["stage"] == "Training" and report["step"] < last]
    assert sorted(set(done)) == list(range(last + 1, STEPS + 1)), "each step from the next on, and no earlier one"

    assert tiny.losses(tmp_path / "output") == tiny.losses(unharmed / "output")
    assert len(tiny.losses(tmp_path / "output")) == STEPS
    assert digests(tmp_path / "output") == digests(unharmed / "output")
