"""The node that runs containers: network, containerd, kubelet, kube-proxy and DNS, as root on Debian 12.

Everything lies in the cluster's folder, its own network namespace and its own branch of the control groups, so that
clusters live side by side and `remove` leaves nothing. Eight GPUs are patched into the node's status: the scheduler
counts them, the kubelet keeps them, and no device is behind them.
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from .binaries import find
from .commands import run, unmount_below
from .controlplane import ControlPlane
from .health import answers
from .kwok import Kubectl
from .network import Network
from .packages import NODE, install_missing
from .pki import Authority
from .processes import Process, start_together
from .runtime import Runtime
from .settings import Settings

NAME = "node-0"
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


class Node:
    """The one real node of a cluster of profile `full`."""

    def __init__(self, settings: Settings, control_plane: ControlPlane, authority: Authority, kubectl: Kubectl) -> None:
        self._settings = settings
        self._control_plane = control_plane
        self._authority = authority
        self._kubectl = kubectl
        self._control_group = f"finetune-{settings.name}"
        self._logs = settings.folder / "pod-logs"
        address = settings.node_address
        self.network = Network(settings)
        self.runtime = Runtime(settings, self.network)
        self.kubelet = Process(
            "kubelet", settings.folder, self._kubelet, lambda: answers(f"http://{address}:10248/healthz")
        )
        self.proxy = Process(
            "kube-proxy", settings.folder, self._proxy, lambda: answers(f"http://{address}:10256/livez")
        )
        self.dns = Process("coredns", settings.folder, self._dns, lambda: answers(f"http://{address}:8181/ready"))
        self.processes = (self.runtime.process, self.kubelet, self.proxy, self.dns)

    def prepare(self) -> None:
        """What must be there before the API server starts: packages, and the address that it listens on."""
        install_missing(NODE)
        self.network.create()

    def start(self) -> None:
        """Starts what does not run and waits until pods can be scheduled."""
        self.runtime.start()
        for group in self._groups():
            _make_group(group)
        start_together(self.kubelet, self.proxy, self.dns)
        self._wait_registered()
        self._kubectl("wait", "--for=condition=Ready", "--timeout=90s", f"node/{NAME}")
        gpus = {"nvidia.com/gpu": "8"}
        patch = {"status": {"capacity": gpus, "allocatable": gpus}}
        self._kubectl("patch", "node", NAME, "--subresource=status", "--type=merge", "--patch", json.dumps(patch))

    def remove(self) -> None:
        """Ends everything of the node and takes away mounts, control groups, namespace and links."""
        for process in (self.dns, self.proxy, self.kubelet):
            process.stop()
        self.runtime.stop()
        unmount_below(self._settings.folder)
        unmount_below(self.runtime.state)
        run("rm", "-rf", "--one-file-system", self.runtime.state)
        for group in self._groups():
            _remove_group(group)
        # The kubelet links the log of each container here, whatever its own folder of logs is.
        for link in Path("/var/log/containers").glob("*.log"):
            with suppress(FileNotFoundError):  # another cluster's, which removes it meanwhile
                if link.is_symlink() and link.readlink().is_relative_to(self._logs):
                    link.unlink()
        self.network.delete()

    def _wait_registered(self) -> None:
        deadline = time.monotonic() + 60
        while f"node/{NAME}" not in self._kubectl("get", "nodes", "-o", "name").split():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the kubelet has not registered its node within 60 s: see {self.kubelet.log}")
            time.sleep(0.2)

    def _groups(self) -> list[Path]:
        """Its branch in each hierarchy of control groups: one of version 2, or one for each controller of version 1."""
        if (_CONTROL_GROUPS / "cgroup.controllers").exists():
            return [_CONTROL_GROUPS / self._control_group]
        hierarchies = {folder.resolve() for folder in _CONTROL_GROUPS.iterdir() if folder.is_dir()}
        return [folder / self._control_group for folder in sorted(hierarchies)]

    def _kubelet(self) -> list[str | Path]:
        settings = self._settings
        folder = settings.folder
        serving = self._authority.issue(f"kubelet-serving-{NAME}", names=[settings.node_address, NAME])
        resolver = folder / "resolv.conf"
        resolver.write_text(f"nameserver {settings.node_address}\n")
        config: dict[str, Any] = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": settings.node_address,
            "healthzBindAddress": settings.node_address,
            "authentication": {"x509": {"clientCAFile": str(self._authority.files.certificate)}},
            "tlsCertFile": str(serving.certificate),
            "tlsPrivateKeyFile": str(serving.key),
            "containerRuntimeEndpoint": f"unix://{self.runtime.socket}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._control_group}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "clusterDomain": "cluster.local",
            "clusterDNS": [settings.node_address],
            "resolvConf": str(resolver),
            "podLogsDir": str(self._logs),
            # The defaults would evict pods from a disk that is merely well used, and collect the trainer's image.
            "evictionHard": {
                "memory.available": "200Mi",
                "nodefs.available": "1%",
                "nodefs.inodesFree": "1%",
                "imagefs.available": "1%",
            },
            "volumeStatsAggPeriod": "5s",
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "serializeImagePulls": False,
        }
        path = folder / "kubelet.yaml"
        path.write_text(yaml.safe_dump(config))
        return self.network.enter(
            find("kubelet"),
            f"--config={path}",
            f"--kubeconfig={self._control_plane.kubeconfig(f'system:node:{NAME}', ('system:nodes',))}",
            f"--root-dir={folder / 'kubelet'}",
            f"--cert-dir={folder / 'kubelet' / 'pki'}",
            f"--hostname-override={NAME}",
            f"--node-ip={settings.node_address}",
        )

    def _proxy(self) -> list[str | Path]:
        config = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clientConnection": {"kubeconfig": str(self._control_plane.kubeconfig("system:kube-proxy"))},
            "clusterCIDR": self._settings.pod_network,
            "hostnameOverride": NAME,
            "healthzBindAddress": f"{self._settings.node_address}:10256",
            "conntrack": {"maxPerCore": 0},
        }
        path = self._settings.folder / "kube-proxy.yaml"
        path.write_text(yaml.safe_dump(config))
        return self.network.enter(find("kube-proxy"), f"--config={path}")

    def _dns(self) -> list[str | Path]:
        path = self._settings.folder / "Corefile"
        path.write_text(
            ".:53 {\n"
            "  errors\n"
            f"  ready {self._settings.node_address}:8181\n"
            "  kubernetes cluster.local in-addr.arpa {\n"
            f"    kubeconfig {self._control_plane.kubeconfig('coredns', ('system:masters',))}\n"
            "    ttl 5\n"
            "  }\n"
            "  cache 5\n"
            "}\n"
        )
        return self.network.enter(find("coredns"), "-conf", path)


def _make_group(group: Path) -> None:
    """Makes a control group. In version 2 its controllers must be passed down to it, which systemd does for some only."""
    controllers = group.parent / "cgroup.controllers"
    if controllers.exists():
        wanted = {"cpu", "cpuset", "memory", "pids", "hugetlb"} & set(controllers.read_text().split())
        (group.parent / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(wanted)))
    group.mkdir(exist_ok=True)


def _remove_group(group: Path) -> None:
    """Removes a control group and those in it; one that still ends its last process is tried again."""
    for _ in range(50):
        for folder in sorted(group.rglob("*/"), reverse=True):
            with suppress(OSError):
                folder.rmdir()
        with suppress(OSError):
            group.rmdir()
        if not group.exists():
            return
        time.sleep(0.1)
    raise OSError(f"the control group {group} is still in use")
