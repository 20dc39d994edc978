"""The cluster's image registry: Debian's docker-registry on the host's end of the node's link.

Its layers lie in the cache, so an image that was pushed for one cluster is there for the next.
"""

import fcntl
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from .health import answers
from .images import Image, build, push
from .packages import find_program
from .paths import cache_root
from .processes import Process
from .runtime import REGISTRY
from .settings import Settings

_PUSHED_THROUGH: Final = "127.77.0.1:5000"
"""Always this address: of a registry at another, buildah does not remember which layers are there, and compresses all of them anew (minutes)."""


@dataclass(frozen=True)
class PushedImage:
    """An image that the node can pull. The tag names the content, so an image of that tag never changes."""

    repository: str
    tag: str

    @property
    def reference(self) -> str:
        return f"{self.repository}:{self.tag}"


class Registry:
    """The registry of one cluster."""

    def __init__(self, settings: Settings) -> None:
        self.address = f"{settings.host_address}:{settings.ports['registry']}"
        self.process = _process(settings.folder, self.address)


def publish(image: Image) -> PushedImage:
    """Builds an image from the working tree, and pushes it to where the registries of all clusters find it; quick when nothing has changed."""
    built = build(image)
    pushed = PushedImage(f"{REGISTRY}/{image.name}", f"dev-{built[:12]}")
    with (cache_root() / ".registry.lock").open("w") as lock, tempfile.TemporaryDirectory() as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _has(image.name, pushed.tag):
            registry = _process(Path(folder), _PUSHED_THROUGH)
            try:
                registry.start()
                push(image, built, _PUSHED_THROUGH, pushed.tag)
            finally:
                registry.stop()
    return pushed


def _has(name: str, tag: str) -> bool:
    return (_storage() / "docker/registry/v2/repositories" / name / "_manifests/tags" / tag).exists()


def _storage() -> Path:
    return cache_root() / "registry"


def _process(folder: Path, address: str) -> Process:
    def command() -> list[str | Path]:
        config = folder / "registry.yaml"
        settings = {
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(_storage())}},
            "http": {"addr": address},
        }
        config.write_text(yaml.safe_dump(settings))
        return [find_program("docker-registry"), "serve", config]

    return Process("registry", folder, command, lambda: answers(f"http://{address}/"))
