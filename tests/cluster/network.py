"""A network namespace for the node, so that its bridge, routes and kube-proxy's rules never touch those of the machine.

The host and the node meet on a pair of virtual interfaces: the API server, registry and object store listen on the
host's end. The host has routes to pods and services through it, so a test may call either directly. There is no way
from a pod to anywhere else.
"""

from pathlib import Path

from .commands import run
from .packages import find_program
from .settings import Settings


class Network:
    """The namespace of one cluster's node."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.namespace = f"finetune-{settings.name}"
        self._host_link = f"finetune{settings.network}"

    def create(self) -> None:
        """Makes the namespace, its link and the routes, unless they are there."""
        ip = find_program("ip")
        settings = self._settings
        if run(ip, "route", "show", settings.service_network):  # the last thing that is made
            return
        self.delete()
        run(ip, "netns", "add", self.namespace)
        run(ip, "link", "add", self._host_link, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        run(ip, "address", "add", f"{settings.host_address}/24", "dev", self._host_link)
        run(ip, "link", "set", self._host_link, "up")
        inside = (ip, "-n", self.namespace)
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "address", "add", f"{settings.node_address}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        run(*self.enter("sysctl", "-q", "-w", "net.ipv4.ip_forward=1"))
        for network in (settings.pod_network, settings.service_network):
            run(ip, "route", "add", network, "via", settings.node_address)

    def enter(self, *command: str | Path) -> list[str | Path]:
        """A command line inside. Not by `ip netns exec`: that hides the control groups behind a /sys of its own."""
        return ["nsenter", f"--net={self._path}", *command]

    def delete(self) -> None:
        """The link and the routes go with the namespace."""
        if self._path.exists():
            run(find_program("ip"), "netns", "delete", self.namespace)

    @property
    def _path(self) -> Path:
        return Path("/run/netns", self.namespace)
