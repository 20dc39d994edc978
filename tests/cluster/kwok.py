"""Simulated nodes with GPUs: kwok keeps them Ready and plays the life of every pod scheduled to them.

Pods of a Job obey these annotations (stages/job-pods.yaml); without any they run at once and end with 0:

| annotation `kwok.finetune.dev/...` | meaning |
|---|---|
| `run-for: 5s` | how long they run |
| `hold: "true"` | they run until deleted |
| `exit-code`, `message` | how they end: exit code (0) and termination message (empty) |
| `stop-for: 2s` | how long they take to stop when deleted |
| `stop-exit-code`, `stop-message` | how they end when deleted (143) |
| `never-stops: "true"` | deleted, they stay Terminating, as on a lost node |
| `preflight-run-for`, `preflight-hold`, `preflight-exit-code`, `preflight-message` | the same of a preflight's pod; it passes with a record of 100 rows |
"""

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import yaml

from .binaries import BINARIES, find
from .golang import architecture, go_command
from .health import answers
from .paths import cache_dir
from .processes import Process
from .settings import Settings

_STOCK_STAGES = (
    "node/fast/node-initialize.yaml",
    "node/heartbeat-with-lease/node-heartbeat-with-lease.yaml",
    "pod/fast/pod-ready.yaml",
)
_JOB_STAGES = Path(__file__).parent / "stages" / "job-pods.yaml"

SIMULATED = {"kwok.x-k8s.io/node": "fake"}
"""Annotation, label and (beside a real node) taint of a simulated node."""


class Kubectl(Protocol):
    def __call__(self, *arguments: str, stdin: str | None = None) -> str: ...


class Kwok:
    """The kwok process of one cluster and the nodes that it simulates."""

    def __init__(self, settings: Settings, kubeconfig: Callable[[], Path], kubectl: Kubectl) -> None:
        self._settings = settings
        self._kubeconfig = kubeconfig
        self._kubectl = kubectl
        self.process = Process(
            "kwok",
            settings.folder,
            self._command,
            lambda: answers(f"http://127.0.0.1:{settings.ports['kwok']}/healthz"),
        )

    def start(self, nodes: int) -> None:
        """Simulates at least `nodes` nodes of 8 GPUs."""
        if not self._config.exists():
            self._write_stages([])
        self.process.start()
        self.add_nodes(f"kwok-{number}" for number in range(nodes))

    def add_nodes(
        self, names: Iterable[str], gpus: int = 8, labels: dict[str, str] | None = None, *, taint: str = ""
    ) -> None:
        """Adds nodes (those that exist stay as they are) and waits until they are Ready. Only what tolerates `taint` lands there."""
        wanted = {name: self._node(name, gpus, labels or {}, taint) for name in names}
        existing = self._kubectl("get", "nodes", "-o", "name").split()
        missing = [node for name, node in wanted.items() if f"node/{name}" not in existing]
        if missing:
            self._kubectl("create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": missing}))
            names_missing = [f"node/{node['metadata']['name']}" for node in missing]
            self._kubectl("wait", "--for=condition=Ready", "--timeout=60s", *names_missing)

    def remove_node(self, name: str) -> None:
        """Takes a node away as a cloud does that lost the machine: the object goes, its pods are orphaned."""
        self._kubectl("delete", "node", name, "--wait=true")

    @contextmanager
    def stages(self, stages: Iterable[dict[str, Any]]) -> Iterator[None]:
        """Plays additional Stages (kwok.x-k8s.io/v1alpha1) inside the block; one of a known name replaces that one."""
        self._write_stages(list(stages))
        self.process.restart()
        try:
            yield
        finally:
            self._write_stages([])
            self.process.restart()

    @property
    def _config(self) -> Path:
        return self._settings.folder / "kwok.yaml"

    def _command(self) -> list[str | Path]:
        return [
            find("kwok"),
            f"--kubeconfig={self._kubeconfig()}",
            f"--config={self._config}",
            f"--server-address=127.0.0.1:{self._settings.ports['kwok']}",
            "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
            "--node-lease-duration-seconds=40",
            "--cidr=198.19.0.0/16",
        ]

    def _write_stages(self, extra: list[dict[str, Any]]) -> None:
        folder = _stock_stages()
        stages: dict[str, dict[str, Any]] = {}
        for file in (*(folder / name for name in _STOCK_STAGES), _JOB_STAGES):
            stages |= {stage["metadata"]["name"]: stage for stage in yaml.safe_load_all(file.read_text())}
        stages |= {stage["metadata"]["name"]: stage for stage in extra}
        self._config.write_text(yaml.safe_dump_all(stages.values()))

    def _node(self, name: str, gpus: int, labels: dict[str, str], taint: str) -> dict[str, Any]:
        size = {"cpu": "96", "memory": "1Ti", "ephemeral-storage": "4Ti", "pods": "1000", "nvidia.com/gpu": str(gpus)}
        standard = {
            "kubernetes.io/hostname": name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": architecture(),
            "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
        }
        node: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": standard | SIMULATED | labels, "annotations": dict(SIMULATED)},
            "status": {"capacity": size, "allocatable": size},
        }
        taints = {taint: ""} if taint else {}
        if self._settings.profile == "full":  # containers that are meant to run must not land here
            taints |= SIMULATED
        node["spec"] = {"taints": [{"key": k, "value": v, "effect": "NoSchedule"} for k, v in taints.items()]}
        return node


def _stock_stages() -> Path:
    """kwok's own stage files of our version, copied out of its Go module once."""
    version = BINARIES["kwok"].version
    folder = cache_dir("kwok-stages", version)
    if not folder.exists():
        download = [*go_command(), "mod", "download", "-json", f"sigs.k8s.io/kwok@{version}"]
        answer = subprocess.run(download, capture_output=True, text=True, check=True)
        module = Path(json.loads(answer.stdout)["Dir"], "kustomize", "stage")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".kwok-") as scratch:
            copy = Path(scratch, "stages")
            for name in _STOCK_STAGES:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes((module / name).read_bytes())
            copy.rename(folder)
    return folder
