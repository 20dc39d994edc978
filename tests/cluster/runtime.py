"""containerd for one cluster: configuration, sandbox image, and the removal of everything that it started.

Its images are kept in the cache between clusters, so that a new cluster does not unpack the trainer's 6 GB again.
"""

import hashlib
import io
import json
import os
import signal
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

from .binaries import find
from .commands import run
from .golang import architecture
from .network import Network
from .packages import find_program
from .paths import cache_root
from .processes import Process
from .registry import REGISTRY, is_forgotten
from .settings import Settings

_SANDBOX_IMAGE = f"{REGISTRY}/pause:1"


class Runtime:
    """The containerd of one cluster's node."""

    def __init__(self, settings: Settings, network: Network) -> None:
        self._settings = settings
        self._network = network
        self.state = Path("/run/finetune-operator", settings.name)
        self.socket = self.state / "containerd.sock"
        self.process = Process("containerd", settings.folder, self._command, self._ready)

    def start(self) -> None:
        self.process.start()
        if _SANDBOX_IMAGE not in self._ctr("images", "ls", "--quiet"):
            with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
                archive.write(_image_archive(_SANDBOX_IMAGE, find("pause").read_bytes()))
                archive.flush()
                self._ctr("images", "import", archive.name)

        self._forget_images()

    def _forget_images(self) -> None:
        """Removes those that the registry has removed; each has several names."""
        lines = [line.split() for line in self._ctr("images", "ls").splitlines()[1:]]
        gone = {digest for name, _, digest, *_ in lines if is_forgotten(name)}
        names = [name for name, _, digest, *_ in lines if digest in gone]
        if names:
            self._ctr("images", "rm", "--sync", *names)

    def stop(self) -> None:
        """Ends and removes every container, then containerd. Its images stay."""
        if self.process.pid is not None:
            for container in self._ctr("containers", "ls", "--quiet").split():
                self._ctr("tasks", "delete", "--force", container, check=False)
                self._ctr("containers", "delete", container, check=False)
        self.process.stop()
        for shim in _processes_with(str(self.socket)):
            with suppress(ProcessLookupError):
                os.kill(shim, signal.SIGKILL)

    def _ready(self) -> bool:
        return self.socket.exists() and "Server" in self._ctr("version", check=False)

    def _ctr(self, *arguments: str, check: bool = True) -> str:
        return run(find_program("ctr"), "--address", self.socket, "--namespace", "k8s.io", *arguments, check=check)

    def _command(self) -> list[str | Path]:
        self.state.mkdir(parents=True, exist_ok=True)
        config = self._settings.folder / "containerd.toml"
        config.write_text(self._config())
        return self._network.enter(find_program("containerd"), "--config", config)

    def _config(self) -> str:
        settings = self._settings
        hosts = settings.folder / "registries" / REGISTRY / "hosts.toml"
        hosts.parent.mkdir(parents=True, exist_ok=True)
        address = f"http://{settings.host_address}:{settings.ports['registry']}"
        hosts.write_text(f'server = "{address}"\n[host."{address}"]\ncapabilities = ["pull", "resolve"]\n')
        network = settings.folder / "cni" / "10-bridge.conflist"
        network.parent.mkdir(exist_ok=True)
        network.write_text(json.dumps(self._cni()))
        # restrict_oom_score_adj: where CAP_SYS_RESOURCE is missing every sandbox dies without it.
        # discard_unpacked_layers: the compressed layers are in the registry already.
        return f"""version = 2
root = "{cache_root() / f"containerd-{settings.network}"}"
state = "{self.state / "containerd"}"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
address = "{self.socket}"
[plugins."io.containerd.internal.v1.opt"]
path = "{settings.folder / "opt"}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{_SANDBOX_IMAGE}"
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".containerd]
discard_unpacked_layers = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{network.parent}"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{hosts.parent.parent}"
"""

    def _cni(self) -> dict[str, object]:
        ipam = {
            "type": "host-local",
            "ranges": [[{"subnet": self._settings.pod_network}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(self._settings.folder / "cni" / "addresses"),
        }
        bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "hairpinMode": True, "ipam": ipam}
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, portmap]}


def _image_archive(name: str, program: bytes) -> bytes:
    """A docker archive of an image that is one static program."""
    layer = _tar({"pause": program})
    config = json.dumps(
        {
            "architecture": architecture(),
            "os": "linux",
            "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        }
    ).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
    return _tar({"manifest.json": manifest, "config.json": config, "layer.tar": layer})


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _processes_with(argument: str) -> list[int]:
    """Pids of the processes that have this argument: the shims of our own containerd, by its socket."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if argument.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found
