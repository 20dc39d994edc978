"""Whatever stops a run, at any moment: nothing is lost, nothing runs twice, no success that did not happen."""

import signal
import time

import pytest

from finetune_crds.verdict import ExitCode

from .workbench import CLAIM, Json, Workbench

LONG = {"learningRate": "1e-3", "sequenceLength": 128, "batchSize": 4}
OPERATOR = ("-n", "finetune-system")


def start(workbench: Workbench, name: str, *, steps: int = 600, **spec: object) -> Json:
    """A job with a checkpoint each 100 steps, once there is one. 600 steps are some ten seconds."""
    workbench.job(
        name,
        training={**LONG, "maxSteps": steps},
        checkpoints={"everySteps": 100, "gracePeriodSeconds": 60},
        **spec,
    )
    return workbench.training_past(name, 100)


@pytest.mark.timeout(1800)
def test_one_job_through_an_eviction_a_suspension_a_killed_rank_and_an_outage(workbench: Workbench) -> None:
    name = "story"
    start(workbench, name, steps=1500)

    with workbench.kept(name):
        workbench.evict(name)
        workbench.until(name, lambda s: s["attempts"][0]["runs"] == 2, what="a second run")
        assert workbench.exit_codes(name) == [ExitCode.STOPPED]
    _on_from_the_last_checkpoint(workbench, name, 100)

    workbench.patch(name, {"suspend": True})
    status = workbench.wait(name, "Suspended")
    assert status["phase"] == "Suspended"
    assert workbench.running(name) == [], "no pod holds anything"
    (attempt,) = status["attempts"]
    assert attempt["firstStep"] >= 100
    assert status["causeCounts"] == [{"cause": "Disruption", "count": 1}, {"cause": "Suspended", "count": 1}]
    assert status.get("countedFailures", 0) == 0
    assert len(workbench.jobs(name)) == 1, "exactly one Job was made"
    saved = status["checkpoints"]["latest"]["step"]
    workbench.patch(name, {"suspend": False})
    saved = _on_from_the_last_checkpoint(workbench, name, saved)

    (pod,) = workbench.up(name)
    kill = (
        "import os,signal,pathlib\n"
        "for p in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
        " if b'finetune_trainer.worker' in p.read_bytes().split(b'\\0'): os.kill(int(p.parent.name), signal.SIGKILL)"
    )
    workbench.kubectl("exec", pod["metadata"]["name"], "--", "python3", "-c", kill)
    status = workbench.until(name, lambda s: len(s["attempts"]) == 2, what="a second attempt")
    assert (status["attempts"][0]["outcome"], status["attempts"][0]["cause"]) == ("Failed", "Killed")
    assert workbench.exit_codes(name) == [128 + signal.SIGKILL]
    _on_from_the_last_checkpoint(workbench, name, saved)

    for replica in workbench.cluster.api.list("pods", "finetune-system"):
        killed = ("delete", "pod", replica["metadata"]["name"], "--grace-period=0", "--force")
        workbench.cluster.kubectl(*OPERATOR, *killed)
    with workbench.cluster.apiserver.stopped():
        time.sleep(5)
    status = workbench.wait(name, "Complete")
    second = status["attempts"][1]
    assert (len(status["attempts"]), second["runs"]) == (2, 1)
    assert second["firstStep"] >= saved
    assert status["countedFailures"] == 1
    assert status["progress"]["step"] == 1500
    assert len(workbench.jobs(name)) <= 2


def _on_from_the_last_checkpoint(workbench: Workbench, name: str, step: int) -> int:
    """Waits until the next pod has gone on behind `step` or a later one, and has saved another checkpoint; its step."""

    def resumed() -> list[int]:
        lines = [line for pod in workbench.up(name) for line in workbench.log_of(pod).splitlines()]
        return [int(line.split("resuming behind step ")[1].split()[0]) for line in lines if "resuming behind" in line]

    workbench.until(name, lambda _: bool(resumed()), what="a pod that resumes")
    (behind,) = resumed()
    assert behind >= step
    return int(workbench.training_past(name, behind + 1)["checkpoints"]["latest"]["step"])


def test_a_program_that_exits_0_when_stopped_is_never_complete(workbench: Workbench) -> None:
    program = "import signal,sys,time\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit(0))\nprint('up', flush=True)\ntime.sleep(600)"
    workbench.job(
        "polite", model=None, dataset=None, output=None, training=None, checkpoints={"gracePeriodSeconds": 60},
        runtime={"image": workbench.trainer_image, "command": ["python", "-c", program]},
    )  # fmt: skip
    workbench.wait("polite", "Running")
    for run in (1, 2):
        _is_up(workbench, "polite")
        workbench.evict("polite")
        workbench.until("polite", lambda s, run=run: s["attempts"][0]["runs"] == run + 1, what="another run")  # type: ignore[misc]
    status = workbench.status("polite")
    assert status["phase"] == "Running"
    assert {"cause": "Disruption", "count": 2} in status["causeCounts"]
    workbench.delete("polite")


def test_a_save_longer_than_the_usual_30_seconds_survives_a_stop_and_a_deadline_saves_first(
    workbench: Workbench,
) -> None:
    """At the same time, as both take most of a minute."""
    workbench.job(
        "late",
        training={**LONG, "maxSteps": 100_000},
        checkpoints={"everySteps": 50, "gracePeriodSeconds": 60},
    )
    program = (
        "import signal,sys,time,pathlib\n"
        "place=pathlib.Path('/finetune/volumes/work/slow')\n"
        "def save(*a):\n time.sleep(35); place.write_text('saved'); sys.exit(0)\n"
        "if place.exists(): sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('up', flush=True)\ntime.sleep(600)"
    )
    workbench.job(
        "slow-save", model={"uri": f"pvc://{CLAIM}/tiny-llama"}, dataset=None, output={"uri": f"pvc://{CLAIM}/slow-out"}, training=None,
        checkpoints={"gracePeriodSeconds": 90},
        runtime={"image": workbench.trainer_image, "command": ["python", "-c", program]},
    )  # fmt: skip
    workbench.wait("slow-save", "Running")
    _is_up(workbench, "slow-save")
    workbench.evict("slow-save")
    workbench.training_past("late", 50)
    workbench.patch("late", {"activeDeadlineSeconds": 1})
    late = workbench.wait("late", "Failed")
    assert late["failure"]["cause"] == "DeadlineExceeded"
    assert late["checkpoints"]["latest"]["step"] > 0
    assert workbench.running("late") == []
    status = workbench.wait("slow-save", "Complete")
    assert workbench.read("slow") == "saved"
    assert status["attempts"][0]["runs"] == 2


def test_more_than_the_scratch_that_was_asked_for_fails_once_and_says_so(workbench: Workbench) -> None:
    """Without this the Job would take each pod, which has saved and left, for one that was disrupted."""
    program = (
        "import signal,sys,time,pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *a: sys.exit(0))\n"
        "pathlib.Path('/finetune/scratch/large').write_bytes(bytes(32 << 20))\n"
        "time.sleep(600)"
    )
    resources = {"gpusPerNode": 0, "cpu": "100m", "memory": "500Mi", "scratch": "16Mi", "sharedMemory": "64Mi"}
    workbench.job(
        "large", model=None, dataset=None, output=None, training=None, resources=resources,
        checkpoints={"gracePeriodSeconds": 60},
        runtime={"image": workbench.trainer_image, "command": ["python", "-c", program]},
    )  # fmt: skip
    failed = workbench.wait("large", "Failed")
    assert failed["failure"]["cause"] == "UserError"
    assert 'EmptyDir volume "scratch" exceeds the limit "16Mi"' in failed["failure"]["message"]
    assert "resources.scratch" in failed["failure"]["nextStep"]
    assert (len(failed["attempts"]), failed["attempts"][0]["runs"]) == (1, 1)
    workbench.until("large", lambda _: not workbench.running("large"), what="nothing runs")


def _is_up(workbench: Workbench, name: str) -> None:
    """Waits until the program of the pod that runs listens for signals."""

    def said(_: Json) -> bool:
        return ["up" in workbench.log_of(pod).split() for pod in workbench.up(name)] == [True]

    workbench.until(name, said, what="its program has started")


def test_deletion_without_the_operator_leaves_no_child_and_the_same_name_again_adopts_nothing(
    workbench: Workbench,
) -> None:
    start(workbench, "twin")
    before = workbench.object("twin")["metadata"]["uid"]
    deployment = (*OPERATOR, "scale", "deployment", "finetune-operator")
    workbench.cluster.kubectl(*deployment, "--replicas=0")
    workbench.cluster.kubectl(*OPERATOR, "wait", "--for=delete", "pods", "--all", "--timeout=90s")
    try:
        workbench.kubectl("delete", "finetunejob", "twin", "--wait=true", "--timeout=60s")
        workbench.job("twin")
        workbench.until("twin", lambda _: workbench.children("twin") == [], 90, "no child of the first one")
    finally:
        workbench.cluster.kubectl(*deployment, "--replicas=2")
    status = workbench.wait("twin", "Complete")
    assert workbench.object("twin")["metadata"]["uid"] != before
    (attempt,) = status["attempts"]
    assert attempt["firstStep"] == 0
    assert before not in status["checkpoints"]["latest"]["uri"]
    rollout = ("rollout", "status", "deployment/finetune-operator", "--timeout=120s")
    workbench.cluster.kubectl(*OPERATOR, *rollout)


def test_a_missing_secret_is_waited_for_and_named(workbench: Workbench) -> None:
    """In the kubelet's words; claims, nodes and quotas, of which a control plane tells, are in tests/api."""
    env = [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "k"}}}]
    workbench.job("no-secret", runtime={"env": env})
    workbench.wait("no-secret", "Waiting", seconds=60)

    def named(status: Json) -> bool:
        return any(c["type"] == "Waiting" and "absent" in c["message"] for c in status["conditions"])

    assert workbench.until("no-secret", named, 60, "the Secret is named")["phase"] == "Waiting"
    workbench.delete("no-secret")
