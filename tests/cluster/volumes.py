"""Volumes of the cluster: a default StorageClass that provisions, claims on folders of this machine, and the way back.

Tests put models and data into a claim with `publish`, and read what a job has written through `folder_of`.
"""

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from .kwok import Kubectl
from .paths import PROJECT
from .processes import Process
from .provisioner import PROVISIONER, STORAGE_CLASS
from .settings import Settings


class Volumes:
    """The StorageClass `local` of one cluster and its provisioner."""

    def __init__(self, settings: Settings, kubeconfig: Callable[[], Path], kubectl: Kubectl) -> None:
        self._folder = settings.folder / "volumes"
        self._ready = settings.folder / "provisioner-ready"
        self._kubeconfig = kubeconfig
        self._kubectl = kubectl
        self.process = Process(
            "provisioner",
            settings.folder,
            self._command,
            lambda: self._ready.read_text() == str(self.process.pid),
            {"PYTHONPATH": f"{PROJECT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"},
        )

    def start(self) -> None:
        self._apply(
            {
                "apiVersion": "storage.k8s.io/v1",
                "kind": "StorageClass",
                "metadata": {
                    "name": STORAGE_CLASS,
                    "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
                },
                "provisioner": PROVISIONER,
                "volumeBindingMode": "WaitForFirstConsumer",
            }
        )
        self.process.start()

    def publish(self, namespace: str, claim: str, folder: Path, read_only: bool = True) -> None:
        """Makes a folder of this machine a claim, bound at once and shared by any number of pods.

        Its files keep their owners and modes: they must be readable (writable) for the uid of the pods.
        """
        needed = 0o005 if read_only else 0o007
        if folder.stat().st_mode & needed != needed:
            actual = stat.S_IMODE(folder.stat().st_mode)
            raise PermissionError(
                f"pods run as another user and cannot use {folder} (mode {actual:04o}): chmod o+rx (o+w)"
            )
        mode = "ReadOnlyMany" if read_only else "ReadWriteMany"
        common = {"accessModes": [mode], "storageClassName": ""}
        self._apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"{namespace}-{claim}"},
                "spec": common
                | {
                    "capacity": {"storage": "10Gi"},
                    "hostPath": {"path": str(folder), "type": "Directory"},
                    "claimRef": {"namespace": namespace, "name": claim},
                },
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": claim, "namespace": namespace},
                "spec": common | {"volumeName": f"{namespace}-{claim}", "resources": {"requests": {"storage": "10Gi"}}},
            },
        )
        bound = "--for=jsonpath={.status.phase}=Bound"
        self._kubectl("-n", namespace, "wait", bound, "--timeout=30s", f"pvc/{claim}")

    def folder_of(self, namespace: str, claim: str) -> Path:
        """Where the files of a bound claim lie on this machine."""
        name = self._kubectl("-n", namespace, "get", "pvc", claim, "-o", "jsonpath={.spec.volumeName}")
        if not name:
            raise FileNotFoundError(f"claim {claim} in {namespace} is not bound yet: no pod has used it")
        spec = json.loads(self._kubectl("get", "pv", name, "-o", "json"))["spec"]
        return Path((spec.get("local") or spec["hostPath"])["path"])

    def _apply(self, *objects: object) -> None:
        self._kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def _command(self) -> list[str | Path]:
        return [
            *(sys.executable, "-m", "cluster.provisioner"),
            *("--kubeconfig", self._kubeconfig(), "--folder", self._folder, "--ready", self._ready),
        ]
