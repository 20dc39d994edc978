"""An unmodified transformers.Trainer script, with no code of ours, shows its progress: three variables are all it needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cluster import Cluster
from finetune_crds import names

from .jobs import FineTuneJob
from .reporting import reporter

pytestmark = [pytest.mark.usefixtures("operator"), pytest.mark.xdist_group("progress")]

SCRIPT = """
import sys, time

import torch
from transformers import Trainer, TrainingArguments


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels):
        return {"loss": ((self.w * x - labels) ** 2).mean()}


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, i):
        time.sleep(0.3)
        return {"x": torch.ones(1), "labels": torch.ones(1)}


arguments = TrainingArguments(
    sys.argv[1], num_train_epochs=1, per_device_train_batch_size=1, logging_steps=1, learning_rate=0.1,
    save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
)
Trainer(Line(), arguments, train_dataset=Slow()).train()
"""
"""Thirty steps in nine seconds; the callback reports at the start, every five seconds and at the end."""


def test_stock_script_reports_from_begin_to_end(installed_cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    cluster = installed_cluster
    job = FineTuneJob("own-script", namespace).holds()
    job.spec.update({"model": None, "dataset": None, "output": None})
    job.having(runtime={"image": "none", "command": ["python", "train.py"], "annotations": job.annotations})
    job.body["spec"] = {key: value for key, value in job.spec.items() if value is not None}
    pod = reporter(cluster, job.apply(cluster))
    # The files that the operator mounts into the pod.
    (tmp_path / "ca.crt").write_text(pod.ca)
    (tmp_path / "token").write_text(pod.token)
    (tmp_path / "train.py").write_text(SCRIPT)
    given = {
        names.ENV_PROGRESS_URL: pod.url,
        names.ENV_PROGRESS_CA: str(tmp_path / "ca.crt"),
        names.ENV_PROGRESS_TOKEN: str(tmp_path / "token"),
        "OMP_NUM_THREADS": "1",
    }
    script = subprocess.Popen(
        [sys.executable, tmp_path / "train.py", tmp_path / "out"],
        env=os.environ | given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        begun = job.until(cluster, lambda s: s.get("progress"), seconds=90)["progress"]
        assert (begun["percentage"], begun["totalSteps"], begun["display"]) == (0, 30, "0 %")
        output, _ = script.communicate(timeout=90)
        assert script.returncode == 0, output
    finally:
        script.kill()
    status = job.until(cluster, lambda s: s["progress"]["percentage"] == 100)
    progress = status["progress"]
    assert progress["display"] == "100 %"
    assert progress["totalSteps"] == 30
    assert 10 <= progress["step"] < 30, "the last one that a report told"
    assert progress["pod"] == pod.pod
    metrics = {metric["name"]: float(metric["value"]) for metric in status["metrics"]}
    assert 0 < metrics["loss"] < 1
    assert metrics.keys() >= {"loss", "grad_norm", "learning_rate"}
    assert not {"current_step", "total_steps", "current_epoch"} & metrics.keys()
