"""The operator as tests run it: a process of its own, with the rights that the chart gives and no others."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from cluster.binaries import find
from cluster.cluster import Cluster
from cluster.ports import free_ports
from cluster.processes import Process

NAMESPACE = "finetune-system"
USER = f"system:serviceaccount:{NAMESPACE}:finetune-operator"
CHART = Path(__file__).parents[2] / "charts" / "finetune-operator"
_GROUPS = ("system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}", "system:authenticated")
_NEEDED = {"CustomResourceDefinition", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"}


def install(cluster: Cluster) -> None:
    """CRD, service account and rights as the chart makes them; the operator itself runs outside the cluster."""
    rendered = subprocess.run(
        [
            *(find("helm"), "template", "finetune-operator", CHART, "--namespace", NAMESPACE),
            *("--set", "image.reference=unused,trainer.image=unused"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    wanted = [each for each in yaml.safe_load_all(rendered) if each and each["kind"] in _NEEDED]
    namespace: dict[str, Any] = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all([namespace, *wanted]))
    cluster.kubectl("wait", "--for=condition=Established", "crd/finetunejobs.finetune.dev", "--timeout=30s")


def shared(cluster: Cluster) -> "Operator":
    """The replica that leads for all workers of a session: the first that asks starts it, and it ends with the cluster."""
    folder = cluster.settings.folder
    replica = Operator(
        cluster,
        folder / "logs" / "operator.log",
        ports=_ports(folder / "operator-ports.json"),
        progress_host="127.0.0.1",
    )
    Process("operator", folder, lambda: replica.command, replica.leads).start()
    return replica


class Operator:
    """One replica."""

    def __init__(
        self,
        cluster: Cluster,
        log: Path,
        identity: str = "operator-0",
        *,
        ports: list[int] | None = None,
        **options: object,
    ) -> None:
        self.identity = identity
        self.log = log
        self.metrics_port, self.progress_port, liveness_port = ports or free_ports(3)
        given = {
            "trainer_image": "trainer.test/finetune-trainer:1",
            "namespace": NAMESPACE,
            "identity": identity,
            "kubeconfig": cluster.kubeconfig_for(USER, *_GROUPS),
            "metrics_port": self.metrics_port,
            "progress_port": self.progress_port,
            "liveness_port": liveness_port,
            **options,
        }
        self.command = [sys.executable, "-m", "finetune_operator"]
        self.command += [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> "Operator":
        """Starts it and waits until it leads (a standby: `wait=False`)."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self.command, stdout=log, stderr=log, env=dict(os.environ))
        if wait:
            self.wait_until(self.leads, seconds=120)
        return self

    def wait_until(self, holds: Any, seconds: float = 90.0) -> None:
        """Polls; AssertionError with the operator's log when it takes longer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process is not None and self._process.poll() is not None:
                raise AssertionError(f"{self.identity} ended with {self._process.returncode}:\n{self.log.read_text()}")
            try:
                if holds():
                    return
            except (OSError, StopIteration):  # nothing serves yet, or no such series
                pass
            time.sleep(0.1)
        raise AssertionError(f"waited {seconds} s for {self.identity}:\n{self.log.read_text()}")

    def leads(self) -> bool:
        """Whether it reconciles."""
        return self.metric("finetune_leader") == 1.0

    def stands_by(self) -> bool:
        """Whether it takes reports while another replica leads; OSError while nothing listens."""
        socket.create_connection(("127.0.0.1", self.progress_port), timeout=2).close()
        return not self.leads()

    def metric(self, name: str) -> float:
        """Value of a metric without labels; OSError while nothing serves."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=2) as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> int:
        """Ends it by SIGTERM, as a kubelet does; its exit code."""
        if self._process is None:
            return 0
        if self.is_running:
            self.signal(signal.SIGTERM)
        return self._process.wait(timeout=30)

    def kill(self) -> None:
        """Ends it by SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def _ports(file: Path) -> list[int]:
    if not file.exists():
        file.write_text(json.dumps(free_ports(3)))
    return list(json.loads(file.read_text()))
