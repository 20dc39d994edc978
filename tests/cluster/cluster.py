"""One test cluster as an object: bring it up, take it down, reach its parts.

    cluster = Cluster.up("api-tests", profile="api", kwok_nodes=10)
    cluster.kubectl("get", "nodes")
    with cluster.apiserver.stopped(): ...

Used by the pytest fixtures of tests/api and tests/e2e, by the demo, by benchmarks and by `python -m cluster`.
"""

import shutil
import subprocess
from pathlib import Path

from .api import Api
from .audit import AuditLog
from .binaries import API_PROFILE, FULL_PROFILE, find, find_all
from .controlplane import ControlPlane
from .errors import KubectlError, Refused
from .kwok import Kwok
from .node import Node
from .packages import require_root
from .pki import Authority
from .processes import Process
from .registry import PushedImage, Registry
from .s3 import ObjectStore
from .settings import Profile, Settings, load, load_or_choose
from .volumes import Volumes

__all__ = ["Cluster", "KubectlError", "Refused"]


class Cluster:
    """A cluster of this machine, running or not."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        authority = Authority(settings.folder / "pki")
        self._control_plane = ControlPlane(settings, authority)
        self.api = Api(settings, authority)
        self.audit = AuditLog(self._control_plane.audit_log)
        self.kwok = Kwok(settings, lambda: self.kubeconfig_for("kwok", "system:masters"), self.kubectl)
        self.volumes = Volumes(settings, lambda: self.kubeconfig_for("provisioner", "system:masters"), self.kubectl)
        self.s3 = ObjectStore(settings)
        self.registry = Registry(settings)
        self.node = Node(settings, self._control_plane, authority, self.kubectl) if settings.profile == "full" else None

    @classmethod
    def up(cls, name: str, profile: Profile = "api", kwok_nodes: int = 0) -> "Cluster":
        """Starts what is not running of the cluster `name`; quick when everything is."""
        if profile == "full":
            require_root("a cluster of profile full")
        find_all(FULL_PROFILE if profile == "full" else API_PROFILE)
        cluster = cls(load_or_choose(name, profile, kwok_nodes))
        cluster._start(kwok_nodes)
        return cluster

    @classmethod
    def attach(cls, name: str) -> "Cluster | None":
        """The cluster of that name, if there is one; starts nothing."""
        settings = load(name)
        return cls(settings) if settings else None

    def down(self) -> None:
        """Ends every process and removes everything of this cluster but the cache."""
        if self.node:
            self.node.remove()
        for process in reversed(self.processes):
            process.kill()  # nothing of it is needed any more
        self.end_guests()
        shutil.rmtree(self.settings.folder)

    def end_guests(self) -> None:
        """Ends what tests have started beside the cluster's own parts, with a pid file in its folder."""
        own = {process.name for process in self.processes}
        for file in (self.settings.folder / "pids").glob("*.json"):
            if file.stem not in own:
                Process(file.stem, self.settings.folder, lambda: ()).stop()

    @property
    def processes(self) -> tuple[Process, ...]:
        """All that may run, in the order of their start."""
        parts = (*self._control_plane.processes, self.volumes.process, self.kwok.process, self.s3.process)
        return (*parts, self.registry.process, *self.node.processes) if self.node else parts

    @property
    def etcd(self) -> Process:
        return self._control_plane.etcd

    @property
    def apiserver(self) -> Process:
        return self._control_plane.apiserver

    @property
    def controller_manager(self) -> Process:
        return self._control_plane.controller_manager

    @property
    def scheduler(self) -> Process:
        return self._control_plane.scheduler

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.kubeconfig_for("admin", "system:masters")

    def kubeconfig_for(self, user: str, *groups: str) -> Path:
        """A kubeconfig of any user in any groups, with no rights but those that RBAC gives him."""
        return self._control_plane.kubeconfig(user, groups)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Runs kubectl as administrator; its output. Raises KubectlError with what it wrote on stderr."""
        run = subprocess.run(
            [find("kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {run.stderr.strip()}")
        return run.stdout

    def pull(self, image: PushedImage) -> None:
        """Brings an image onto the node by a pod that does nothing, so that no test's clock runs while it is unpacked."""
        pod = f"pull-{image.tag}"
        options = ("--restart=Never", f"--image={image.reference}", "--namespace=kube-system", "--command")
        self.kubectl("delete", "pod", pod, "--namespace=kube-system", "--ignore-not-found")  # of an interrupted run
        self.kubectl("run", pod, *options, "--", "/bin/true")
        try:
            done = "--for=jsonpath={.status.phase}=Succeeded"
            self.kubectl("wait", "--namespace=kube-system", done, "--timeout=1500s", f"pod/{pod}")
        except KubectlError as error:
            events = self.kubectl("events", "--namespace=kube-system", "--for", f"pod/{pod}")
            raise KubectlError(f"the node could not pull {image.reference} ({error}):\n{events}") from error
        finally:
            self.kubectl("delete", "pod", pod, "--namespace=kube-system", "--wait=false")

    def _start(self, kwok_nodes: int) -> None:
        if self.node:
            self.node.prepare()
        self._control_plane.start()
        if self.node:
            self.volumes.start()
            self.registry.process.start()
            self.node.start()
        nodes = max(kwok_nodes, self.settings.kwok_nodes)
        if nodes:
            self.kwok.start(nodes)
