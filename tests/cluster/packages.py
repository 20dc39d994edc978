"""Debian packages that a node and image builds need: installed by apt-get where they are missing, as root."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .console import say
from .errors import MissingPackages, NotRoot
from .paths import cache_root

NODE = {
    "containerd": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "socat": "socat",
    "ethtool": "ethtool",
    "ip": "iproute2",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "docker-registry": "docker-registry",
}
"""What a node runs on: program -> package."""

IMAGES = {"buildah": "buildah", "debootstrap": "debootstrap"}
"""What builds images."""

_POLICY = Path("/usr/sbin/policy-rc.d")


def require_root(purpose: str) -> None:
    if os.geteuid() != 0:
        raise NotRoot(f"{purpose} needs root (namespaces, mounts, cgroups): run it with sudo, or as root")


def install_missing(programs: dict[str, str]) -> None:
    """Installs the packages of those programs that are not there. One process at a time: apt's own lock refuses a second."""
    if not _missing(programs):
        return
    cache_root().mkdir(parents=True, exist_ok=True)
    with (cache_root() / ".apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if missing := _missing(programs):
            _install(missing)


def _missing(programs: dict[str, str]) -> list[str]:
    return sorted({package for program, package in programs.items() if _path(program) is None})


def _install(missing: list[str]) -> None:
    command = f"apt-get install {' '.join(missing)}"
    if shutil.which("apt-get") is None:
        raise MissingPackages(
            f"this needs what Debian calls {', '.join(missing)}, and there is no apt-get to install it"
        )
    require_root(command)
    say(f"installing the Debian packages {', '.join(missing)} (usually a minute)")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with _no_services():
        _checked(["apt-get", "update", "-qq"], environment)
        _checked(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], environment)


def find_program(program: str) -> str:
    """The path of a program that `install_missing` has seen to; /usr/sbin is not on every PATH."""
    path = _path(program)
    if path is None:
        raise MissingPackages(f"{program} is not there: {(NODE | IMAGES)[program]} did not bring it")
    return path


def _path(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _checked(command: Iterable[str], environment: dict[str, str]) -> None:
    run = subprocess.run(list(command), env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise MissingPackages(f"{' '.join(command)} failed:\n{(run.stdout + run.stderr)[-2000:]}")


@contextmanager
def _no_services() -> Iterator[None]:
    """Keeps apt from starting the services of what it installs: the cluster runs its own, on its own sockets."""
    if _POLICY.exists():
        yield
        return
    with tempfile.NamedTemporaryFile("w", dir=_POLICY.parent, delete=False) as file:
        file.write("#!/bin/sh\nexit 101\n")
    Path(file.name).chmod(0o755)
    Path(file.name).rename(_POLICY)
    try:
        yield
    finally:
        _POLICY.unlink()
