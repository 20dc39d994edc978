"""A namespace to fine-tune in: a claim with the tiny model on it, data in a ConfigMap, and words to say what a test waits for."""

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.cluster import Cluster, KubectlError

Json = dict[str, Any]
CLAIM = "work"
SHELL = "shell"
MODEL = "tiny-llama"


@dataclass(frozen=True)
class Workbench:
    """One namespace of the cluster under test."""

    cluster: Cluster
    namespace: str
    trainer_image: str

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """kubectl in the namespace."""
        return self.cluster.kubectl("-n", self.namespace, *arguments, stdin=stdin)

    def objects(self, kinds: str, labels: str = "") -> list[Json]:
        """Objects of some kinds in the namespace."""
        return self.cluster.api.list(kinds, self.namespace, labels)

    def object(self, name: str) -> Json:
        """A FineTuneJob as it is."""
        return self.cluster.api.get("finetunejobs", name, self.namespace)

    def children(self, name: str) -> list[Json]:
        """All that the operator made for a FineTuneJob, and their pods."""
        return self.objects("jobs,pods,services,configmaps", f"finetune.dev/job={name}")

    def job(self, name: str, *, replace: bool = False, **spec: Any) -> Json:
        """Applies a FineTuneJob of the tiny model, some seconds long; fields of spec are replaced, or removed by None."""
        fields: Json = {
            "model": {"uri": f"pvc://{CLAIM}/{MODEL}"},
            "dataset": {"train": [{"uri": "configmap://rows/train.jsonl"}]},
            "training": {"maxSteps": 20, "learningRate": "1e-3", "sequenceLength": 128, "batchSize": 4},
            "output": {"uri": f"pvc://{CLAIM}/out/{name}"},
            "checkpoints": {"everySteps": 10, "gracePeriodSeconds": 60},
            "resources": {
                "gpusPerNode": 0,
                "cpu": "100m",
                "memory": "1500Mi",
                "scratch": "1Gi",
                "sharedMemory": "64Mi",
            },
            "runtime": {"env": [{"name": "OMP_NUM_THREADS", "value": "1"}]},
            **({} if replace else spec),
        }
        if replace:
            fields = spec
        manifest = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name},
            "spec": {key: value for key, value in fields.items() if value is not None},
        }
        self.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
        return manifest

    def patch(self, name: str, spec: Json) -> None:
        """Merges into the spec of a FineTuneJob."""
        self.cluster.api.patch("finetunejobs", name, {"spec": spec}, self.namespace)

    def delete(self, name: str) -> None:
        """Deletes a FineTuneJob and does not wait."""
        self.cluster.api.delete("finetunejobs", name, self.namespace)

    def evict(self, name: str) -> None:
        """Deletes the pod that a FineTuneJob runs in, as a drained node does, and does not wait."""
        (pod,) = self.up(name)
        self.cluster.api.delete("pods", pod["metadata"]["name"], self.namespace)

    @contextmanager
    def kept(self, name: str) -> Iterator[None]:
        """Inside, the pod that a FineTuneJob runs in can still be read after its deletion and its end."""
        (pod,) = self.up(name)
        place, ours = (pod["metadata"]["name"], self.namespace), "finetune.dev/kept"

        def patch(finalizers: list[str]) -> None:
            self.cluster.api.patch("pods", place[0], {"metadata": {"finalizers": finalizers}}, place[1])

        patch([*pod["metadata"].get("finalizers", []), ours])
        try:
            yield
        finally:
            there = self.cluster.api.get("pods", *place)["metadata"]["finalizers"]
            patch([one for one in there if one != ours])

    def status(self, name: str) -> Json:
        """status of a FineTuneJob."""
        return dict(self.object(name).get("status", {}))

    def pods(self, name: str) -> list[Json]:
        """Pods of a FineTuneJob, oldest first."""
        found = self.objects("pods", f"finetune.dev/job={name}")
        return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def running(self, name: str) -> list[Json]:
        """Those that run."""
        return [pod for pod in self.pods(name) if pod["status"]["phase"] == "Running"]

    def up(self, name: str) -> list[Json]:
        """Those that run and were not told to end."""
        return [pod for pod in self.running(name) if not pod["metadata"].get("deletionTimestamp")]

    def exit_codes(self, name: str) -> list[int]:
        """Of the containers that have ended and are still there, oldest pod first."""
        statuses = [status for pod in self.pods(name) for status in pod["status"].get("containerStatuses", [])]
        return [status["state"]["terminated"]["exitCode"] for status in statuses if "terminated" in status["state"]]

    def jobs(self, name: str) -> list[Json]:
        """batch/v1 Jobs of a FineTuneJob."""
        return self.objects("jobs", f"finetune.dev/job={name}")

    def log(self, name: str) -> str:
        """Logs of all its pods."""
        return "\n".join(map(self.log_of, self.pods(name)))

    def log_of(self, pod: Json) -> str:
        """Logs of one pod."""
        return self.kubectl("logs", pod["metadata"]["name"], "--all-containers")

    def wait(self, name: str, condition: str, seconds: float = 180) -> Json:
        """Status once the condition is True of the spec as it is. Fails at once when the job ended otherwise."""
        generation = self.object(name)["metadata"]["generation"]

        def reached(status: Json) -> bool:
            if status.get("observedGeneration", 0) < generation:
                return False
            holding = {c["type"]: c for c in status.get("conditions", []) if c["status"] == "True"}
            wrong = {"Complete": "Failed", "Failed": "Complete"}.get(condition)
            if wrong and wrong in holding:
                raise AssertionError(
                    f"{name} is {wrong}, not {condition}: {json.dumps(status, indent=1)}\n{self._logs(name)}"
                )
            return condition in holding

        return self.until(name, reached, seconds, f"condition {condition}")

    def until(self, name: str, holds: Callable[[Json], bool], seconds: float = 120, what: str = "") -> Json:
        """Status once something holds of it."""
        deadline = time.monotonic() + seconds
        status: Json = {}
        while time.monotonic() < deadline:
            status = self.status(name)
            if holds(status):
                return status
            time.sleep(0.2)
        raise AssertionError(
            f"{name}: {what or holds} not within {seconds} s: {json.dumps(status, indent=1)}\n"
            f"{self.kubectl('get', 'pods,jobs,events')}\n{self._logs(name)}"
        )

    def training_past(self, name: str, step: int, seconds: float = 120) -> Json:
        """Status once a checkpoint at or past a step is known."""
        return self.until(
            name,
            lambda s: (s.get("checkpoints", {}).get("latest") or {}).get("step", -1) >= step,
            seconds,
            f"checkpoint at step {step}",
        )

    def shell(self, command: str) -> str:
        """Runs a command in the pod that has the claim mounted."""
        return self.kubectl("exec", SHELL, "--", "sh", "-c", command)

    def files(self, path: str) -> set[str]:
        """Names in a folder of the claim."""
        return set(self.shell(f"ls '/{CLAIM}/{path}'").split())

    def read(self, path: str) -> str:
        """A file of the claim."""
        return self.shell(f"cat '/{CLAIM}/{path}'")

    def events(self, name: str) -> list[str]:
        """Reasons of the Events of a FineTuneJob, oldest first."""
        items = self.objects("events.events.k8s.io")
        mine = [
            e for e in items if e.get("regarding", {}).get("kind") == "FineTuneJob" and e["regarding"]["name"] == name
        ]
        return [
            e["reason"]
            for e in sorted(mine, key=lambda e: str(e.get("eventTime") or e["metadata"]["creationTimestamp"]))
        ]

    def prepare(self, model: Path, rows: dict[str, str]) -> None:
        """Claim, shell and data."""
        config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "rows"}, "data": rows}
        claim = {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": CLAIM},
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "5Gi"}}},
        }
        for document in (config_map, claim, _shell_pod(self.trainer_image)):
            self.kubectl("apply", "-f", "-", stdin=json.dumps(document))
        self.kubectl("wait", f"pod/{SHELL}", "--for=condition=Ready", "--timeout=5m")
        self.copy_folder(model, MODEL)

    def copy_folder(self, folder: Path, name: str) -> None:
        """Copies a folder onto the claim."""
        import subprocess

        from cluster.binaries import find

        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for file in sorted(folder.iterdir()):
                tar.add(file, arcname=f"{name}/{file.name}")
        command = [find("kubectl"), f"--kubeconfig={self.cluster.kubeconfig}", "-n", self.namespace]
        command += ["exec", "-i", SHELL, "--", "tar", "-x", "-C", f"/{CLAIM}", "-f", "-"]
        subprocess.run([str(part) for part in command], input=archive.getvalue(), check=True, capture_output=True)

    def _logs(self, name: str) -> str:
        try:
            return self.log(name)[-6000:]
        except KubectlError as error:
            return f"(no logs: {error})"


def _shell_pod(image: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": SHELL},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 20002,
                "fsGroup": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "shell",
                    "image": image,
                    "command": ["sleep", "infinity"],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": "claim", "mountPath": f"/{CLAIM}"}],
                }
            ],
            "volumes": [{"name": "claim", "persistentVolumeClaim": {"claimName": CLAIM}}],
        },
    }
