"""Finds or builds the programs that the cluster is made of; `controlplane`, `node`, `kwok` and `s3` call it by name.

A program is taken from `KUBEBUILDER_ASSETS` or `PATH` when its minor version is ours, else from the cache, else it is
built from its Go module (no download but Go modules is needed). The first build of everything takes about 14 minutes
on two cores, and each later call some milliseconds.
"""

import fcntl
import functools
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .console import say
from .errors import BuildError
from .golang import go_command
from .paths import cache_dir, cache_root

KUBERNETES = "v1.34.4"
"""The newest minor version whose kubelet still accepts the cgroup v1 hierarchy and containerd 1.6 of Debian 12."""

GO_MODULES = Path(__file__).parent / "go"

_KUBERNETES_LDFLAGS = " ".join(
    ["-s", "-w"]
    + [
        f"-X k8s.io/component-base/version.{key}={value}"
        for key, value in {
            "gitVersion": KUBERNETES,
            "gitMajor": KUBERNETES[1:].split(".")[0],
            "gitMinor": KUBERNETES.split(".")[1],
        }.items()
    ]
)


@dataclass(frozen=True)
class Binary:
    """One program: where its source is and how to tell its version."""

    name: str
    version: str
    package: str
    """Go import path of its main package."""
    seconds: int
    """Usual build time on two cores after those before it in `BINARIES`."""
    module: str | None = None
    """Folder under go/ whose go.mod pins it; None: `go install package@version`."""
    ldflags: str = "-s -w"
    version_args: tuple[str, ...] = ("--version",)
    """How to ask it for its version; nothing: it does not say, and only our own build is taken."""

    @property
    def cached(self) -> Path:
        return cache_dir(self.name, self.version) / self.name


def _kubernetes(name: str, seconds: int, version_args: tuple[str, ...] = ("--version",)) -> Binary:
    return Binary(
        name, KUBERNETES, f"k8s.io/kubernetes/cmd/{name}", seconds, "kubernetes", _KUBERNETES_LDFLAGS, version_args
    )


BINARIES: dict[str, Binary] = {
    binary.name: binary
    for binary in (
        _kubernetes("kube-apiserver", 275),
        Binary("etcd", "v3.6.4", "go.etcd.io/etcd/server/v3", 15, "kubernetes"),
        _kubernetes("kube-controller-manager", 65),
        _kubernetes("kube-scheduler", 10),
        _kubernetes("kubectl", 30, ("version", "--client")),
        Binary("kwok", "v0.8.0", "sigs.k8s.io/kwok/cmd/kwok", 120),
        _kubernetes("kubelet", 25),
        _kubernetes("kube-proxy", 15),
        Binary("coredns", "v1.15.0", "finetune.dev/tests/cluster/coredns", 85, "coredns", version_args=("-version",)),
        Binary("pause", "v1", "finetune.dev/tests/cluster/pause", 2, "pause", version_args=()),
        Binary("helm", "v4.3.1", "helm.sh/helm/v4/cmd/helm", 140, version_args=("version", "--short")),
        Binary("oras", "v1.3.0", "oras.land/oras/cmd/oras", 30, version_args=("version",)),
        Binary("versitygw", "v1.8.0", "github.com/versity/versitygw/cmd/versitygw", 70),
    )
}

API_PROFILE = ("kube-apiserver", "etcd", "kube-controller-manager", "kube-scheduler", "kubectl", "kwok")
"""What the api tier needs: a control plane and simulated nodes."""

FULL_PROFILE = (*API_PROFILE, "kubelet", "kube-proxy", "coredns", "pause", "helm", "versitygw")
"""What the e2e tier and the demo need: a node that runs containers, Helm, and an object store."""

TOOLS = ("oras", "versitygw")
"""What the trainer's own tests need: a registry's client and an object store."""


@functools.cache
def find(name: str) -> Path:
    """The path of a program, building it first if this machine has none of the right version."""
    binary = BINARIES[name]
    return _prebuilt(binary) or (binary.cached if binary.cached.exists() else _build(binary))


def find_all(names: Iterable[str]) -> dict[str, Path]:
    """The paths of several programs; says beforehand what must be built and how long that usually takes."""
    wanted = list(names)
    missing = [BINARIES[n] for n in wanted if not BINARIES[n].cached.exists() and _prebuilt(BINARIES[n]) is None]
    if missing:
        minutes = max(1, round(sum(b.seconds for b in missing) / 60))
        say(
            f"building {', '.join(b.name for b in missing)}: about {minutes} min on two cores, once a machine "
            f"(kept in {cache_root()})"
        )
    return {name: find(name) for name in wanted}


def _prebuilt(binary: Binary) -> Path | None:
    for folder in (os.environ.get("KUBEBUILDER_ASSETS"), os.environ.get("PATH")):
        found = shutil.which(binary.name, path=folder) if folder and binary.version_args else None
        if found and _minor(_reported_version(binary, found)) == _minor(binary.version):
            return Path(found)
    return None


def _reported_version(binary: Binary, path: str) -> str:
    try:
        run = subprocess.run([path, *binary.version_args], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout + run.stderr


def _minor(text: str) -> str | None:
    match = re.search(r"v?(\d+\.\d+)\.\d+", text)
    return match.group(1) if match else None


def _build(binary: Binary) -> Path:
    with _build_lock():
        if binary.cached.exists():  # another process built it while this one waited
            return binary.cached
        go = go_command()
        say(f"building {binary.name} {binary.version} (usually {binary.seconds} s on two cores)")
        started = time.monotonic()
        binary.cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=binary.cached.parent, prefix=".build-") as out:
            # A module's own go.mod and go.sum pin every dependency; a workspace or flags of the user's must not change them.
            env = os.environ | {"CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": "-mod=readonly", "GOBIN": out}
            if binary.module:
                command = [*go, "build", "-C", str(GO_MODULES / binary.module), "-o", f"{out}/{binary.name}"]
                command += ["-trimpath", "-ldflags", binary.ldflags, binary.package]
            else:
                command = [
                    *go,
                    "install",
                    "-trimpath",
                    "-ldflags",
                    binary.ldflags,
                    f"{binary.package}@{binary.version}",
                ]
            run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if run.returncode:
                tail = "\n".join(run.stderr.strip().splitlines()[-15:])
                raise BuildError(f"building {binary.name} {binary.version} failed: {' '.join(command)}\n{tail}")
            Path(out, binary.name).rename(binary.cached)
        say(f"built {binary.name} in {time.monotonic() - started:.0f} s")
        return binary.cached


@contextmanager
def _build_lock() -> Iterator[None]:
    """One build at a time a machine: two would only share the cores, and write the same files."""
    cache_root().mkdir(parents=True, exist_ok=True)
    with (cache_root() / ".build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
