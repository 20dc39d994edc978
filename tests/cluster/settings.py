"""What one cluster was started with: its profile, addresses and ports. Chosen at the first `up`, kept in its run folder.

Every later `up`, `down` or attaching test reads it back, so that each can restart any part with the same command line.
"""

import fcntl
import ipaddress
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from .errors import WrongProfile
from .paths import cache_root, run_dir
from .ports import free_ports

Profile = Literal["api", "full"]
"""`api`: control plane and simulated nodes, no root needed. `full`: also a node that runs containers, as root."""

_PORTS = ("etcd", "etcd_peer", "apiserver", "controller_manager", "scheduler", "kwok", "registry", "s3")
_NETWORKS = ipaddress.ip_network("198.18.0.0/15")
"""Set aside by RFC 2544 for tests: no real network uses it."""


@dataclass(frozen=True)
class Settings:
    """Addresses are functions of `network`, a number that no other full cluster on this machine has."""

    name: str
    profile: Profile
    network: int
    ports: dict[str, int]
    kwok_nodes: int = 0

    @property
    def folder(self) -> Path:
        return run_dir(self.name)

    @property
    def host_address(self) -> str:
        """Where the API server, registry and object store listen."""
        return f"198.18.{self.network}.1" if self.profile == "full" else "127.0.0.1"

    @property
    def node_address(self) -> str:
        return f"198.18.{self.network}.2"

    @property
    def pod_network(self) -> str:
        return f"198.19.{self.network}.0/24"

    @property
    def service_network(self) -> str:
        return f"198.18.{100 + self.network}.0/24"

    @property
    def kubernetes_service(self) -> str:
        """The ClusterIP of `kubernetes.default`."""
        return f"198.18.{100 + self.network}.1"

    @property
    def server(self) -> str:
        return f"https://{self.host_address}:{self.ports['apiserver']}"

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / "cluster.json.new"  # others read it at any time
        beside.write_text(json.dumps(asdict(self), indent=1))
        beside.rename(self.folder / "cluster.json")


def load(name: str) -> Settings | None:
    """The settings of a cluster that exists."""
    try:
        return Settings(**json.loads((run_dir(name) / "cluster.json").read_text()))
    except FileNotFoundError:
        return None


def load_or_choose(name: str, profile: Profile, kwok_nodes: int) -> Settings:
    """The settings of an existing cluster, else new ones with free ports and a free network."""
    existing = load(name)
    if existing is not None:
        if existing.profile != profile:
            raise WrongProfile(
                f"cluster {name!r} exists with profile {existing.profile!r}, not {profile!r}: "
                f"give another --name, or take it down first (python -m cluster down --name {name})"
            )
        return existing
    cache_root().mkdir(parents=True, exist_ok=True)
    with (cache_root() / ".networks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        network = _free_network() if profile == "full" else 0
        ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        chosen = Settings(name, profile, network, ports, kwok_nodes)
        chosen.save()
    return chosen


def _free_network() -> int:
    names = [file.parent.name for file in (cache_root() / "run").glob("*/cluster.json")]
    taken = {settings.network for settings in map(load, names) if settings and settings.profile == "full"}
    routes = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=False).stdout
    for number in range(1, 100):
        if number not in taken and f"198.18.{number}." not in routes:
            return number
    raise RuntimeError(f"99 test clusters use {_NETWORKS} already: take some down")
