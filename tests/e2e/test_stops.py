"""Whatever stops a run, at any moment: nothing is lost, nothing runs twice, no success that did not happen."""

import json
import time

import pytest

from .workbench import CLAIM, Json, Workbench

LONG = {"maxSteps": 600, "learningRate": "1e-3", "sequenceLength": 128, "batchSize": 4}
"""Some ten seconds of steps after the first checkpoint: long enough to be stopped in between."""


def terminated(pod: Json) -> Json:
    """How the training container of a pod ended."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        if container["name"] == "trainer" and "terminated" in container["state"]:
            return dict(container["state"]["terminated"])
    return {}


def start(workbench: Workbench, name: str, *, steps: int = 600, **spec: object) -> Json:
    workbench.job(
        name, training={**LONG, "maxSteps": steps}, checkpoints={"everySteps": 100, "gracePeriodSeconds": 60}, **spec
    )
    return workbench.training_past(name, 100)


def one_job_of(workbench: Workbench, name: str) -> None:
    assert len(workbench.jobs(name)) == 1, "exactly one Job was made"


def test_a_deleted_pod_is_replaced_and_resumes(workbench: Workbench) -> None:
    start(workbench, "evicted")
    (pod,) = workbench.pods("evicted")
    workbench.kubectl("delete", "pod", pod["metadata"]["name"])
    status = workbench.wait("evicted", "Complete")
    (attempt,) = status["attempts"]
    assert attempt["runs"] == 2
    assert attempt["firstStep"] >= 100
    assert status["causeCounts"] == [{"cause": "Disruption", "count": 1}]
    assert status.get("countedFailures", 0) == 0
    one_job_of(workbench, "evicted")


def test_a_killed_rank_counts_and_is_retried_from_the_checkpoint(workbench: Workbench) -> None:
    start(workbench, "killed")
    (pod,) = workbench.pods("killed")
    kill = (
        "import os,signal,pathlib\n"
        "for p in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
        " if b'finetune_trainer.worker' in p.read_bytes().split(b'\\0'): os.kill(int(p.parent.name), signal.SIGKILL)"
    )
    workbench.kubectl("exec", pod["metadata"]["name"], "--", "python3", "-c", kill)
    status = workbench.wait("killed", "Complete")
    first, second = status["attempts"]
    assert (first["outcome"], first["cause"]) == ("Failed", "Killed")
    assert second["firstStep"] >= 100
    assert status["countedFailures"] == 1
    codes = [terminated(p).get("exitCode") for p in workbench.pods("killed")]
    assert 137 in codes or len(codes) == 1


def test_suspend_saves_frees_and_resumes(workbench: Workbench) -> None:
    start(workbench, "paused")
    workbench.patch("paused", {"suspend": True})
    status = workbench.wait("paused", "Suspended")
    assert status["phase"] == "Suspended"
    live = [pod for pod in workbench.pods("paused") if pod["status"]["phase"] in ("Running", "Pending")]
    assert live == [], "no pod holds anything"
    saved = status["checkpoints"]["latest"]["step"]
    assert saved >= 100
    workbench.patch("paused", {"suspend": False})
    done = workbench.wait("paused", "Complete")
    assert done["attempts"][-1]["firstStep"] == workbench_saved(done, saved)
    assert done["progress"]["step"] == LONG["maxSteps"]


def workbench_saved(status: Json, at_least: int) -> int:
    first = int(status["attempts"][-1]["firstStep"])
    assert first >= at_least
    return first


def test_a_deadline_saves_first_and_then_fails(workbench: Workbench) -> None:
    workbench.job(
        "late",
        training={**LONG, "maxSteps": 100_000},
        checkpoints={"everySteps": 50, "gracePeriodSeconds": 60},
        activeDeadlineSeconds=45,
    )
    status = workbench.wait("late", "Failed")
    assert status["failure"]["cause"] == "DeadlineExceeded"
    assert status["checkpoints"]["latest"]["step"] > 0
    assert not [pod for pod in workbench.pods("late") if pod["status"]["phase"] == "Running"]


def test_a_program_that_exits_0_when_stopped_is_never_complete(workbench: Workbench) -> None:
    program = "import signal,sys,time\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit(0))\nprint('up', flush=True)\ntime.sleep(600)"
    workbench.job(
        "polite", model=None, dataset=None, output=None, training=None,
        runtime={"image": workbench.trainer_image, "command": ["python", "-c", program]},
    )  # fmt: skip
    workbench.wait("polite", "Running")
    for _ in range(2):
        (pod,) = [
            p
            for p in workbench.pods("polite")
            if p["status"]["phase"] == "Running" and not p["metadata"].get("deletionTimestamp")
        ]
        time.sleep(2)
        workbench.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=true")
        workbench.until(
            "polite",
            lambda _: any(p["status"]["phase"] == "Running" for p in workbench.pods("polite")),
            what="a replacement",
        )
    status = workbench.status("polite")
    assert status["phase"] == "Running"
    assert {"cause": "Disruption", "count": 2} in status["causeCounts"]
    workbench.kubectl("delete", "finetunejob", "polite")


def test_a_save_longer_than_the_usual_30_seconds_survives_a_stop(workbench: Workbench) -> None:
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
    (pod,) = workbench.pods("slow-save")
    time.sleep(2)
    workbench.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
    status = workbench.wait("slow-save", "Complete", seconds=180)
    assert workbench.read("slow") == "saved"
    assert status["attempts"][0]["runs"] == 2


def test_the_same_name_again_adopts_nothing_of_its_predecessor(workbench: Workbench) -> None:
    start(workbench, "twin")
    before = workbench.get("finetunejob", "twin")["metadata"]["uid"]
    workbench.kubectl("delete", "finetunejob", "twin", "--wait=true")
    workbench.job("twin")
    status = workbench.wait("twin", "Complete")
    assert workbench.get("finetunejob", "twin")["metadata"]["uid"] != before
    (attempt,) = status["attempts"]
    assert attempt["firstStep"] == 0
    assert before not in status["checkpoints"]["latest"]["uri"]
    owners = {job["metadata"]["ownerReferences"][0]["uid"] for job in workbench.jobs("twin")}
    assert before not in owners or len(owners) == 1


def test_a_dead_operator_and_an_api_server_away_change_nothing(workbench: Workbench) -> None:
    start(workbench, "outage", steps=1500)  # it trains through all of it
    namespace = "finetune-system"
    for pod in json.loads(workbench.cluster.kubectl("-n", namespace, "get", "pods", "-o", "json"))["items"]:
        workbench.cluster.kubectl(
            "-n", namespace, "delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force"
        )
    with workbench.cluster.apiserver.stopped():
        time.sleep(5)
    status = workbench.wait("outage", "Complete")
    (attempt,) = status["attempts"]
    assert attempt["runs"] == 1
    one_job_of(workbench, "outage")


def test_deletion_leaves_no_child_also_without_the_operator(workbench: Workbench) -> None:
    start(workbench, "orphan")
    deployment = ("-n", "finetune-system", "scale", "deployment", "finetune-operator")
    workbench.cluster.kubectl(*deployment, "--replicas=0")
    try:
        workbench.kubectl("delete", "finetunejob", "orphan", "--wait=true", "--timeout=60s")
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            left = workbench.get("jobs,pods,services,configmaps", "-l", "finetune.dev/job=orphan")["items"]
            if not left:
                break
            time.sleep(1)
        assert left == []
    finally:
        workbench.cluster.kubectl(*deployment, "--replicas=2")
        workbench.cluster.kubectl(
            "-n", "finetune-system", "rollout", "status", "deployment/finetune-operator", "--timeout=120s"
        )


def test_cleanup_removes_the_children_and_keeps_the_record(workbench: Workbench) -> None:
    workbench.job("tidy", cleanup={"afterSeconds": 1})
    workbench.wait("tidy", "Complete")
    workbench.until(
        "tidy",
        lambda _: not workbench.get("jobs,pods,services,configmaps", "-l", "finetune.dev/job=tidy")["items"],
        what="no child",
    )
    workbench.job("tidy", cleanup={"afterSeconds": 1})
    time.sleep(5)
    assert workbench.status("tidy")["phase"] == "Complete"
    assert workbench.pods("tidy") == []


@pytest.mark.parametrize(
    ("name", "spec", "words"),
    [
        ("no-claim", {"output": {"uri": "pvc://absent/out"}}, "absent"),
        (
            "no-secret",
            {"runtime": {"env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "k"}}}]}},
            "absent",
        ),
        (
            "no-gpu",
            {"preflight": "Skip", "resources": {"gpusPerNode": 64, "cpu": "100m", "memory": "1500Mi"}},
            "nvidia.com/gpu",
        ),
    ],
)
def test_what_is_missing_is_waited_for_and_named(workbench: Workbench, name: str, spec: Json, words: str) -> None:
    workbench.job(name, **spec)
    status = workbench.wait(name, "Waiting", seconds=60)
    (waiting,) = [c for c in status["conditions"] if c["type"] == "Waiting"]
    assert words in waiting["message"]
    assert status["phase"] == "Waiting"
    workbench.kubectl("delete", "finetunejob", name)
