"""Supervisor and the real worker, two ranks on one machine: a stopped pair, and a killed rank in the run that goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.model import TINY_LLAMA, model_path
from cluster.ports import free_port
from finetune_crds import names
from finetune_crds.verdict import ExitCode, Verdict
from finetune_trainer.local.run import check
from finetune_trainer.storage.roots import ENV_ROOT, Roots
from finetune_trainer.supervisor import ENV_TERMINATION_FILE

STEPS = 2000
"""More than are done before it is stopped and killed."""


class Pair:
    """A pod of two processes with a claim on disk."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.claim = Roots.below(folder).volumes / "work"
        self.claim.mkdir(parents=True)
        rows = ({"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."} for i in range(64))
        (self.claim / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        manifest = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "pair"},
            "spec": {
                "model": {"uri": model_path(TINY_LLAMA).as_uri()},
                "dataset": {"train": [{"uri": "pvc://work/rows.jsonl"}]},
                "training": {"maxSteps": STEPS, "batchSize": 8, "sequenceLength": 128, "packing": False},
                "checkpoints": {"everySteps": 5},
                "output": {"uri": "pvc://work/out"},
                "resources": {"gpusPerNode": 0},
            },
        }
        (folder / "job.json").write_text(
            check(manifest, cluster=False).model_dump_json(by_alias=True, exclude_none=True)
        )

    def start(self) -> "subprocess.Popen[str]":
        environment = {
            ENV_ROOT: str(self.root),
            ENV_TERMINATION_FILE: str(self.root / "message"),
            names.ENV_JOB_FILE: str(self.root / "job.json"),
            names.ENV_PROCESSES_PER_NODE: "2",
            names.ENV_MASTER_PORT: str(free_port()),
            names.ENV_RUN_ID: str(time.monotonic_ns()),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-m", "finetune_trainer.supervisor"],
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def saved(self) -> int:
        """Step of the newest committed checkpoint."""
        found = self.claim.glob("out.checkpoints/*/*/step-*/index.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)

    def wait_checkpoint(self, process: "subprocess.Popen[str]") -> None:
        before, deadline = self.saved(), time.monotonic() + 120
        while self.saved() <= before:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)

    def end(self, process: "subprocess.Popen[str]") -> Verdict:
        _, log = process.communicate(timeout=240)
        verdict = Verdict.model_validate_json((self.root / "message").read_bytes())
        assert process.returncode == verdict.code, log
        return verdict


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def workers(process: "subprocess.Popen[str]") -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_two_ranks_stop_at_one_step_and_a_killed_one_is_told_apart_from_its_peer(pair: Pair) -> None:
    process = pair.start()
    pair.wait_checkpoint(process)
    process.send_signal(signal.SIGTERM)
    stopped = pair.end(process)
    assert stopped.code == ExitCode.STOPPED, stopped.message
    assert 0 < stopped.step < STEPS
    assert stopped.checkpoints is not None and stopped.checkpoints.latest is not None
    assert stopped.checkpoints.latest.step == stopped.step == pair.saved()

    process = pair.start()
    pair.wait_checkpoint(process)
    pair.wait_checkpoint(process)  # a rank that is killed may leave a verdict one commit behind
    _, second = workers(process)
    os.kill(second, signal.SIGKILL)
    killed = pair.end(process)
    assert killed.code == 128 + signal.SIGKILL
    assert "rank 1 was killed" in killed.message
    assert killed.first_step == stopped.step
    assert killed.checkpoints is not None and killed.checkpoints.latest is not None
    assert stopped.step < killed.checkpoints.latest.step <= pair.saved()
