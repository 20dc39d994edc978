"""The cluster's image registry: Debian's docker-registry on the host's end of the node's link.

Its layers lie in the cache, so an image that was pushed for one cluster is there for the next.
"""

import fcntl
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from .commands import run
from .health import answers
from .images import Image, build, kept, push
from .packages import find_program
from .paths import cache_root
from .processes import Process
from .settings import Settings

REGISTRY: Final = "finetune.test"
"""The name under which every cluster's containerd knows its own registry."""
_TAG: Final = "dev-"
"""Before the first twelve digits of the image's id."""
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
    with (cache_root() / ".registry.lock").open("w") as lock, tempfile.TemporaryDirectory() as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)  # nobody removes what is built here before it is pushed
        in_use = any((cache_root() / "run").glob("*/cluster.json"))  # a cluster, which may pull an older one yet
        built = build(image, () if in_use else [tag.name.removeprefix(_TAG) for tag in _pushed(image.name)])
        pushed = PushedImage(f"{REGISTRY}/{image.name}", f"{_TAG}{built[:12]}")
        if not in_use:
            _forget(image.name, Path(folder))
        if not (_tags(image.name) / pushed.tag).exists():
            registry = _process(Path(folder), _PUSHED_THROUGH)
            try:
                registry.start()
                push(image, built, _PUSHED_THROUGH, pushed.tag)
            finally:
                registry.stop()
    return pushed


def is_forgotten(reference: str) -> bool:
    """Whether an image by that reference was pushed once, and removed since. A node that has it needs it no longer."""
    repository, _, tag = reference.removeprefix(f"{REGISTRY}/").rpartition(":")
    return (
        reference.startswith(f"{REGISTRY}/{repository}:{_TAG}")
        and _tags(repository).exists()
        and not (_tags(repository) / tag).exists()
    )


def _forget(name: str, folder: Path) -> None:
    """Removes what was pushed of images that are no longer there."""
    there, unswept = kept(), _storage() / ".unswept"
    gone = [tag for tag in _pushed(name) if tag.name.removeprefix(_TAG) not in there]
    if gone:
        unswept.touch()
    for tag in gone:
        shutil.rmtree(tag)
    if unswept.exists():  # it may be that of a run that was killed
        run(find_program("docker-registry"), "garbage-collect", "--delete-untagged", _configuration(folder))
        unswept.unlink()


def _pushed(name: str) -> list[Path]:
    return list(_tags(name).glob(f"{_TAG}*"))


def _tags(name: str) -> Path:
    return _storage() / "docker/registry/v2/repositories" / name / "_manifests/tags"


def _storage() -> Path:
    return cache_root() / "registry"


def _process(folder: Path, address: str) -> Process:
    def command() -> list[str | Path]:
        return [find_program("docker-registry"), "serve", _configuration(folder, address)]

    return Process("registry", folder, command, lambda: answers(f"http://{address}/"))


def _configuration(folder: Path, address: str = "") -> Path:
    settings = {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(_storage())}},
        "http": {"addr": address},
    }
    file = folder / "registry.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file
