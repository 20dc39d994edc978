"""The cluster that the demo runs on: one of its own, or (DEMO_CLUSTER=current) that of the kubeconfig."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster import images, registry
from cluster.binaries import find
from cluster.cluster import Cluster

NAME = "demo"


class TargetError(RuntimeError):
    """The demo cannot go on; says what to do."""


@dataclass(frozen=True)
class Target:
    """Where the demo runs. Commands raise TargetError with what the program wrote."""

    kubectl_path: str
    helm_path: str
    kubeconfig: Path | None
    images: Callable[[], tuple[str, str]]
    """Builds and publishes (operator image, trainer image); their references as the cluster pulls them."""
    remove: Callable[[], None]
    """Takes the cluster away, if it is the demo's own."""
    is_own: bool

    def kubectl(self, *arguments: str, stdin: str | bytes | None = None) -> str:
        """Runs kubectl; its output."""
        return self._run([self.kubectl_path, *arguments], stdin)

    def helm(self, *arguments: str) -> str:
        """Runs helm; its output."""
        return self._run([self.helm_path, *arguments], None)

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get ... -o json`; empty when it is not there."""
        text = self.kubectl("get", *arguments, "--ignore-not-found", "-o", "json")
        found: dict[str, Any] = json.loads(text) if text.strip() else {}
        return found

    @property
    def environment(self) -> dict[str, str]:
        """The environment of kubectl and helm."""
        return {**os.environ, **({"KUBECONFIG": str(self.kubeconfig)} if self.kubeconfig else {})}

    def _run(self, command: list[str], stdin: str | bytes | None) -> str:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(command, input=data, capture_output=True, env=self.environment, check=False)
        if done.returncode:
            raise TargetError(f"{Path(command[0]).name} {' '.join(command[1:4])}: {done.stderr.decode().strip()}")
        return done.stdout.decode()


def own_cluster(console: Console, *, start: bool) -> Target | None:
    """A cluster of the demo's own, started if asked for; None where none is and none shall be."""
    if start:
        console.print(
            "[bold]1/6[/] cluster: etcd, API server, scheduler, kubelet, containerd (first time: 15 minutes to build; then under a minute)"
        )
        running = Cluster.up(NAME, "full")
    else:
        attached = Cluster.attach(NAME)
        if attached is None:
            return None
        running = attached

    def publish() -> tuple[str, str]:
        pushed = [registry.publish(image) for image in (images.OPERATOR, images.TRAINER)]
        for image in pushed:
            running.pull(image)
        return pushed[0].reference, pushed[1].reference

    return Target(
        kubectl_path=str(find("kubectl")),
        helm_path=str(find("helm")),
        kubeconfig=running.kubeconfig,
        images=publish,
        remove=running.down,
        is_own=True,
    )


def current_cluster(console: Console) -> Target:
    """The cluster of the kubeconfig. DEMO_OPERATOR_IMAGE and DEMO_TRAINER_IMAGE name images that it can pull."""
    kubectl, helm = shutil.which("kubectl"), shutil.which("helm")
    if not kubectl:
        raise TargetError("DEMO_CLUSTER=current needs kubectl on PATH")

    def given() -> tuple[str, str]:
        pair = os.environ.get("DEMO_OPERATOR_IMAGE"), os.environ.get("DEMO_TRAINER_IMAGE")
        if not (pair[0] and pair[1]):
            raise TargetError(
                "DEMO_CLUSTER=current needs images that the cluster can pull: build Dockerfile and trainer_image/Dockerfile, push them, "
                "and set DEMO_OPERATOR_IMAGE and DEMO_TRAINER_IMAGE"
            )
        return pair[0], pair[1]

    console.print("[bold]1/6[/] cluster: that of the current kubeconfig")
    return Target(kubectl, helm or str(find("helm")), None, given, lambda: None, is_own=False)
