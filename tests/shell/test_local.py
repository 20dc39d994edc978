"""`finetune local` as a user runs it: real processes, a model of random weights, Ctrl-C and going on."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.model import TINY_LLAMA, model_path
from finetune_crds.verdict import ExitCode
from finetune_trainer import cli
from finetune_trainer.local.manifests import Dumper

FINETUNE = [sys.executable, "-m", "finetune_trainer.cli"]
ROWS = [{"prompt": f"What is {i} and {i}?", "completion": f"{i} and {i} is {2 * i}."} for i in range(40)]


def manifest(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "sums"},
        "spec": {
            "model": {"uri": "pvc://models/tiny-llama"},
            "dataset": {
                "train": [{"uri": "configmap://rows/train.jsonl"}],
                "evaluation": {"sources": [{"uri": "configmap://rows/held-out.jsonl"}]},
            },
            "training": {
                "epochs": "2",
                "batchSize": 8,
                "sequenceLength": 256,
                "learningRate": "5e-3",
                "packing": False,
            },
            "evaluation": {"prompts": ["What is 41 and 41?"], "maxNewTokens": 8},
            "output": {"uri": "pvc://results/sums"},
            "resources": {"gpusPerNode": 0},
            **spec,
        },
    }


LINES = {
    "train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS[4:]),
    "held-out.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS[:4]),
}


@functools.cache
def claim() -> tuple[str, str]:
    """The option that says where the model lies, in the cache of this machine."""
    return "--claim", f"models={model_path(TINY_LLAMA).parent}"


def written(folder: Path, job: dict[str, Any]) -> Path:
    """The job and its rows in a file."""
    data = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "rows"}, "data": LINES}
    (folder / "job.yaml").write_text(yaml.dump_all([job, data], Dumper=Dumper))
    return folder / "job.yaml"


@pytest.fixture
def finetune(tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Starts `finetune local` in an empty folder, with the model on a claim."""

    def start(*options: str, job: dict[str, Any] | None = None, command: str = "local") -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*FINETUNE, command, "-f", str(written(tmp_path, job or manifest())), *(options or claim())],
            cwd=tmp_path,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs the command in this process, which has imported everything; exit code and what it printed."""
    claim()  # before the cache of this test takes the place of the machine's
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(command: str, *options: str, job: dict[str, Any]) -> tuple[int, str, str]:
        try:
            code = cli.main([command, "-f", str(written(tmp_path, job)), *options])
        except SystemExit as ended:  # of argparse
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run


def test_a_manifest_trains_without_a_cluster_stops_goes_on_and_is_not_trained_twice(
    finetune: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    """The rows are looked at first; Ctrl-C saves; the same command goes on to the end; once more, it finds the output."""
    job = manifest(
        training={"maxSteps": 400, "batchSize": 4, "sequenceLength": 256, "learningRate": "1e-3", "packing": False}
    )
    out, err = (run := finetune(job=job, command="data")).communicate(timeout=300)
    assert run.returncode == 0, err
    inputs = yaml.safe_load(out.split("note:")[0].split("report:")[0])["inputs"]
    assert (inputs["rows"], inputs["evaluationRows"], inputs["leakedRows"]) == (36, 4, 0)
    assert out.endswith(f"report: {tmp_path}/data-report.html\n")
    assert not list((tmp_path / "finetune-volumes/results").iterdir()), "nothing is trained"
    (prepared,) = tmp_path.glob("cache/finetune/*/**/prepared/*/index.json")
    made = prepared.stat().st_mtime_ns

    run = finetune(job=job)
    assert run.stderr is not None
    lines = []
    for line in run.stderr:
        lines.append(line)
        if re.match(r"Training [1-9]", line):
            break
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=120)
    assert run.returncode == ExitCode.STOPPED, "".join(lines) + err
    assert "saving a checkpoint" in err
    step = int(re.findall(r"goes on from step (\d+) of 400", out)[0])
    assert step > 0

    out, err = (run := finetune(job=job)).communicate(timeout=300)
    assert run.returncode == 0, err
    assert "Finished 400/400" in err
    assert "> What is 41 and 41?\n  before:" in out
    before, after = map(float, re.findall(r"eval_loss: (\S+) before, (\S+) after", out)[0])
    assert after < before
    adapter = tmp_path / "finetune-volumes/results/sums"
    assert f"adapter: {adapter}" in out
    assert (adapter / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    steps = {json.loads(line)["step"] for line in (adapter / "metrics.jsonl").open()}
    assert steps == set(range(min(steps), 401))
    (message,) = tmp_path.glob("cache/finetune/*/termination-log")
    assert json.loads(message.read_text())["firstStep"] == step
    assert prepared.stat().st_mtime_ns == made
    for name in ("data-report.html", "data-report.json"):
        assert (adapter / name).read_text() == (tmp_path / name).read_text()

    again, err = (run := finetune(job=job)).communicate(timeout=300)
    assert run.returncode == 0, err
    assert "its output was reused" in again
    assert "Training" not in err


def test_preflight_tells_what_training_would_do_and_what_is_wrong(
    finetune: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    out, err = (run := finetune(command="preflight")).communicate(timeout=300)
    assert run.returncode == 0, err
    found = yaml.safe_load(out.split("passed:")[0])
    assert (found["preflight"]["rows"], found["preflight"]["steps"]) == (36, 10)
    assert "memory" not in found["preflight"], "the manifest asks for no GPU"
    assert not list((tmp_path / "finetune-volumes/results").iterdir()), "nothing is trained"

    wrong = manifest(dataset={"train": [{"uri": "configmap://rows/train.jsonl"}], "columns": {"completion": "answer"}})
    out, err = (run := finetune(job=wrong, command="preflight")).communicate(timeout=300)
    assert run.returncode == ExitCode.DATA_ERROR
    assert "no column 'answer' (completion), which dataset.columns names (columns: prompt, completion)" in err


def test_one_job_does_not_run_twice_at_once(finetune: Callable[..., "subprocess.Popen[str]"]) -> None:
    job = manifest(training={"maxSteps": 10_000})
    first = finetune(job=job)
    assert first.stderr is not None
    assert any(line.startswith("log:") for line in first.stderr)
    _, err = (second := finetune(job=job)).communicate(timeout=60)
    first.send_signal(signal.SIGINT)
    assert any("Ctrl-C again" in line for line in first.stderr)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert second.returncode == ExitCode.USER_ERROR
    assert "this job runs already" in err


def test_options_take_the_place_of_what_the_manifest_says(
    finetune: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    job = manifest(
        resources={"nodes": 2, "gpusPerNode": 8}, output={"uri": "s3://bucket/out", "secretRef": {"name": "store"}}
    )
    options = ("--model", str(model_path(TINY_LLAMA)), "--output", "adapter", "--gpus", "0", "--scratch", "scratch")
    out, err = (run := finetune(*options, job=job)).communicate(timeout=300)
    assert run.returncode == 0, err
    assert f"model: pvc://models/tiny-llama is read from {model_path(TINY_LLAMA)}" in err
    assert f"output: s3://bucket/out is written to {tmp_path / 'adapter'}" in err
    assert "resources.nodes: 2 is 1 here" in err
    assert "resources.gpusPerNode: 8 is 0 here" in err
    assert f"adapter: {tmp_path / 'adapter'}" in out
    assert (tmp_path / "scratch/log").exists()


@pytest.mark.parametrize(
    ("spec", "options", "sentence"),
    [
        pytest.param({}, ["--gpus", "0"], "error: pvc://models: say where the files of this claim lie: --claim models=DIR", id="claim"),
        pytest.param(
            {"model": {"uri": "pvc://results/base"}}, [],
            "error: model: pvc://results/base: there is no such file or folder; results holds nothing; "
            "put it there, or name a model that is on this disk: --model DIR", id="model",
        ),
        pytest.param({}, ["--claim", "models=absent"], "error: --claim models: absent is no folder", id="no folder"),
        pytest.param({}, ["--claim", "models"], "'models' must be NAME=DIR", id="no pair"),
        pytest.param({"trainng": {}}, [], "error: spec.trainng: there is no such field; did you mean training?", id="typo"),
        pytest.param({"training": {"epochs": "3", "maxSteps": 5}}, [], "training takes epochs or maxSteps, not both", id="rule"),
        pytest.param(
            {"output": {"uri": "s3://bucket/out", "secretRef": {"name": "store"}}}, [],
            "error: secretRef store: say where its keys lie, one file each: --secret store=DIR", id="secret",
        ),
        pytest.param(
            {"training": None, "evaluation": None, "runtime": {"image": "x", "command": ["y"]}}, [],
            "error: runtime.command: a program of your own runs in its own image", id="program",
        ),
        pytest.param(
            {"dataset": {"train": [{"uri": "configmap://rows/absent.jsonl"}]}}, [],
            "error: dataset.train[0]: configmap://rows/absent.jsonl: there is no such key; rows holds held-out.jsonl, train.jsonl", id="key",
        ),
        pytest.param(
            {"model": {"uri": "pvc://models/tiny-llama", "adapter": {"job": "first"}}}, [],
            "error: model.adapter.job: finetune local knows no other jobs; say where the output of first lies by model.adapter.uri", id="job",
        ),
        pytest.param(
            {"objective": {"grpo": {"rewards": [{"name": "liked", "model": {"job": "first"}}]}}, "evaluation": None}, [],
            "error: objective.grpo.rewards[0].model.job: finetune local knows no other jobs; say where the output of first lies by", id="judge",
        ),
        pytest.param(
            {"resources": {"gpusPerNode": 1}, "runtime": {"env": [{"name": "CUDA_VISIBLE_DEVICES", "value": ""}]}}, [],
            "set it to 0 (finetune local: --gpus 0)\nCorrect what the message names, and run the same command again.\n", id="no GPU",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_a_sentence_without_a_traceback(
    here: Here, spec: dict[str, Any], options: list[str], sentence: str
) -> None:
    job = manifest(**spec)
    job["spec"] = {key: value for key, value in job["spec"].items() if value is not None}
    code, _, err = here("local", *(options or claim()), job=job)
    assert code in (ExitCode.USER_ERROR, 2)
    assert sentence in err
    assert "Traceback" not in err


def test_check_prints_what_a_manifest_amounts_to(here: Here) -> None:
    _, out, _ = here("check", job=manifest())
    assert out.startswith("# sums: valid.")
    assert yaml.safe_load(out)["spec"]["method"]["lora"]["rank"] == 16
    code, _, err = here("check", "--cluster", job=manifest(output={"uri": "file:///tmp/x"}))
    assert code == ExitCode.USER_ERROR
    assert err.startswith("error: spec.output: file:// works with 'finetune local' only")


def test_check_reads_and_writes_numbers_as_kubectl_does(here: Here) -> None:
    _, out, _ = here("check", job=manifest(training={"learningRate": "2e-4"}))
    assert "learningRate: '2e-4'" in out
    _, _, err = here("check", job=manifest(training={"learningRate": 2e-4}))
    assert err == 'error: spec.training.learningRate: must be a string: write it in quotes, "0.0002"\n'
