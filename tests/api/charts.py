"""The project's chart in the hands of the real helm."""

import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

from cluster.binaries import find
from cluster.cluster import Cluster

from .jobs import Json
from .operators import CHART

IMAGES = ("--set", "image.reference=operator.test/finetune-operator:1", "--set", "trainer.image=trainer.test/trainer:1")
FULL_VALUES = CHART / "ci" / "full-values.yaml"


_RENDERED: dict[tuple[str, ...], str] = {}
"""What the chart makes of arguments, once a process: many tests look at the same."""


class HelmError(RuntimeError):
    """helm refused; the message is what it wrote."""


class Helm:
    """helm against one cluster, or against none (template, lint)."""

    def __init__(self, home: Path, cluster: Cluster | None = None) -> None:
        self._environment = os.environ | {f"HELM_{kind}_HOME": str(home / kind) for kind in ("CACHE", "CONFIG", "DATA")}
        if cluster:
            self._environment["KUBECONFIG"] = str(cluster.kubeconfig)

    def __call__(self, *arguments: object) -> str:
        run = subprocess.run(
            [find("helm"), *map(str, arguments)], env=self._environment, capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise HelmError(run.stderr.strip())
        return run.stdout

    def template(self, *arguments: object, namespace: str = "finetune-system") -> list[Json]:
        """The objects that an installation makes."""
        known = (namespace, *map(str, arguments))
        if known not in _RENDERED:
            _RENDERED[known] = self("template", "finetune-operator", CHART, "--namespace", namespace, *arguments)
        return [document for document in yaml.load_all(_RENDERED[known], yaml.CSafeLoader) if document]


def one(documents: list[Json], kind: str, name: str = "") -> Json:
    """The only object of a kind, or of a kind and name."""
    (found,) = (d for d in documents if d["kind"] == kind and name in ("", d["metadata"]["name"]))
    return found


def environment(deployment: Json) -> dict[str, Any]:
    """Variables of the operator's container."""
    return {
        each["name"]: each.get("value", each) for each in deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    }
