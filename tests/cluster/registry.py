"""The cluster's image registry: Debian's docker-registry on the host's end of the node's link.

Its layers lie in the cache, so an image that was pushed for one cluster is there for the next.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from .health import answers
from .images import Image, build, push
from .packages import find_program
from .paths import cache_root
from .processes import Process
from .runtime import REGISTRY
from .settings import Settings


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
        self._settings = settings
        self.address = f"{settings.host_address}:{settings.ports['registry']}"
        self.process = Process("registry", settings.folder, self._command, lambda: answers(f"http://{self.address}/"))

    def publish(self, image: Image) -> PushedImage:
        """Builds an image from the working tree and pushes it; quick when nothing has changed."""
        built = build(image)
        pushed = PushedImage(f"{REGISTRY}/{image.name}", f"dev-{built[:12]}")
        if not self._has(image.name, pushed.tag):
            push(image, built, self.address, pushed.tag)
        return pushed

    def _has(self, name: str, tag: str) -> bool:
        return (self._storage / "docker/registry/v2/repositories" / name / "_manifests/tags" / tag).exists()

    @property
    def _storage(self) -> Path:
        return cache_root() / "registry"

    def _command(self) -> list[str | Path]:
        config = self._settings.folder / "registry.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "version": 0.1,
                    "log": {"level": "warn", "accesslog": {"disabled": True}},
                    "storage": {"filesystem": {"rootdirectory": str(self._storage)}},
                    "http": {"addr": self.address},
                }
            )
        )
        return [find_program("docker-registry"), "serve", config]
