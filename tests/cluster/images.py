"""Builds the project's images from its Dockerfiles without Docker, and pushes them to a cluster's registry.

Called by the fixtures of tests/e2e and by the demo. Layers are kept in the cache: the dependencies of the trainer
(torch with its CUDA libraries, 5.7 GB) are one layer that changes with the lock file only, so that a change of our
code builds in seconds and moves kilobytes. On a machine with a public registry the Dockerfiles' default base does;
here the base is made of Debian packages.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .commands import unmount_below
from .console import say
from .errors import ImageBuildError
from .packages import IMAGES, find_program, install_missing, require_root
from .paths import PROJECT, cache_root

BASE = "localhost/finetune-base:bookworm"
"""Debian 12 with Python 3.11: what the Dockerfiles take in place of python:3.11-slim-bookworm."""

_BASE_PACKAGES = "python3,python3-venv,ca-certificates"
_MIRROR = "http://deb.debian.org/debian"


@dataclass(frozen=True)
class Image:
    """One image of the project."""

    name: str
    dockerfile: str
    target: str | None
    usually: str
    """How long a first build takes on two cores."""
    space: int
    """GB of disk that a first build and its push take at their peak."""

    @property
    def local(self) -> str:
        return f"localhost/{self.name}:dev"


OPERATOR = Image("finetune-operator", "Dockerfile", None, "1 min", 1)
TRAINER = Image("finetune-trainer", "trainer_image/Dockerfile", "trainer", "4 min, 6 GB", 26)


def build(image: Image, older: Sequence[str] = ()) -> str:
    """Builds an image from the working tree; what did not change comes from the layers in the cache.

    Args:
        image: of the project.
        older: ids of earlier builds. Those that no name is left of go where the disk could not take a whole build.

    Returns:
        Its id, the hash of its content and configuration. Another checkout may give the name to its own image any moment.

    Raises:
        ImageBuildError: too little disk, or what buildah says.
    """
    with _storage():
        _ensure_base()
        known = bool(_buildah("images", "--quiet", "--filter", f"reference={image.local}", check=False))
        say(
            f"building the image {image.name} " + ("(layers are cached)" if known else f"(first time: {image.usually})")
        )
        _make_room(image, older, first=not known)
        command = [
            "build",
            "--isolation",
            "chroot",
            "--layers",
            "--force-rm",
            "--build-arg",
            f"BASE={BASE}",
            "--tag",
            image.local,
        ]
        command += ["--file", str(PROJECT / image.dockerfile), *_certificates()]
        if image.target:
            command += ["--target", image.target]
        with tempfile.NamedTemporaryFile("r", prefix="image-id-") as written:
            _buildah(*command, "--iidfile", written.name, str(PROJECT))
            return written.read().strip().removeprefix("sha256:")


def push(image: Image, built: str, registry: str, tag: str) -> None:
    """Pushes the image of that id to `registry` (host:port, plain HTTP); layers that it has already are not sent."""
    with _storage():
        say(f"pushing {image.name} to the cluster's registry")
        # zstd: gzip takes 90 s for the trainer's dependencies, this 20 s.
        _buildah(
            *("push", "--quiet", "--tls-verify=false", "--compression-format", "zstd", "--compression-level", "1"),
            built,
            f"docker://{registry}/{image.name}:{tag}",
        )


def kept() -> list[str]:
    """Ids of all images that are still there, each with twelve digits."""
    with _storage():
        return _buildah("images", "--quiet").split()


def _make_room(image: Image, older: Sequence[str], *, first: bool) -> None:
    """What fails on a full disk says anything but that."""
    place = cache_root()

    def free() -> int:
        return shutil.disk_usage(place).free // 10**9

    if free() < image.space:
        superseded = set(older) & set(_buildah("images", "--quiet", "--filter", "dangling=true").split())
        if superseded:
            say(f"removing {len(superseded)} older builds of the image {image.name}: little disk is left")
            _buildah("rmi", *superseded)
    if first and free() < image.space:
        raise ImageBuildError(
            f"building the image {image.name} for the first time takes {image.space} GB of disk, and {free()} are free below {place}; free some, or name a folder on a larger disk in FINETUNE_CACHE"
        )


def _ensure_base() -> None:
    if _buildah("images", "--quiet", "--filter", f"reference={BASE}", check=False):
        return
    say("making a base image of Debian packages (usually 75 s, once a machine)")
    with tempfile.TemporaryDirectory(dir=cache_root(), prefix=".base-") as scratch:
        root = Path(scratch, "root")
        _run(
            [
                find_program("debootstrap"),
                "--variant=minbase",
                f"--include={_BASE_PACKAGES}",
                "bookworm",
                str(root),
                _MIRROR,
            ]
        )
        for name in ("var/cache/apt/archives", "var/lib/apt/lists"):
            for file in (root / name).rglob("*"):
                if file.is_file():
                    file.unlink()
        container = _buildah("from", "scratch")
        try:
            _buildah("add", "--quiet", container, str(root), "/")
            _buildah("config", "--cmd", "python3", container)
            _buildah("commit", "--quiet", container, BASE)
        finally:
            _buildah("rm", container)


def _certificates() -> list[str]:
    """Build options that hand a private CA of this machine (a corporate proxy's) on to the build, if it has one."""
    file = os.environ.get("SSL_CERT_FILE")
    if not file:
        return []
    folder = Path(file).resolve().parent
    return [
        f"--volume={folder}:{Path(file).parent}:ro",
        f"--build-arg=SSL_CERT_FILE={file}",
        "--build-arg=UV_SYSTEM_CERTS=1",
    ]


@contextmanager
def _storage() -> Iterator[None]:
    """The image storage, for one process at a time."""
    require_root("building images")
    install_missing(IMAGES)
    cache_root().mkdir(parents=True, exist_ok=True)
    with (cache_root() / ".images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            unmount_below(_root())


def _root() -> Path:
    return cache_root() / "images"


def _buildah(*arguments: str, check: bool = True) -> str:
    places = ["--root", str(_root()), "--runroot", "/run/finetune-operator/images"]
    return _run([find_program("buildah"), *places, "--storage-driver", "overlay", *arguments], check=check)


def _run(command: list[str], check: bool = True) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and run.returncode:
        tail = "\n".join((run.stdout + run.stderr).strip().splitlines()[-25:])
        raise ImageBuildError(f"{' '.join(command)} failed:\n{tail}")
    return run.stdout.strip()
