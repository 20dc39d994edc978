"""Finds a Go toolchain new enough for the cluster's programs, or fetches one; `binaries` and `kwok` call it.

Debian's Go is too old. The toolchain is itself a Go module, so it comes from the same proxy as the sources that it
compiles, and is checked against the hash of Go's checksum database.
"""

import base64
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from .console import say
from .errors import ToolchainError
from .paths import cache_dir

VERSION = "1.26.8"
_OLDEST = (1, 26)
"""What go.mod of CoreDNS asks for."""

_HASHES = {
    "amd64": "ZOmGe1OnfREDMIdb1Qi4G9JSuDPBLGExZMQ4nis1RXM=",
    "arm64": "sYL/O6MqS68ML0kjsQ36WoYIpJqkw60TxizWUYUKQMc=",
}
"""`h1:` hashes of golang.org/toolchain@v0.0.1-go1.26.8.linux-ARCH."""


@functools.cache
def go_command() -> tuple[str, ...]:
    """The start of a command line that runs Go at low priority: builds take both cores for minutes."""
    installed = shutil.which("go")
    go = installed if installed and _version(installed) >= _OLDEST else str(_fetched())
    return ("nice", "-n", "5", go)


def architecture() -> str:
    """This machine's, in the word that Go, Kubernetes and images use."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def _version(go: str) -> tuple[int, ...]:
    answer = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=False).stdout
    match = re.match(r"go(\d+)\.(\d+)", answer)
    return tuple(int(part) for part in match.groups()) if match else (0,)


def _fetched() -> Path:
    target = cache_dir("go", VERSION)
    if not target.exists():
        say(f"fetching Go {VERSION} (70 MB; usually a minute, once a machine)")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".go-") as scratch:
            archive = Path(scratch, "toolchain.zip")
            _download(architecture(), archive)
            _check(architecture(), archive)
            _unpack(archive, Path(scratch)).rename(target)
    return target / "bin" / "go"


def _download(arch: str, archive: Path) -> None:
    proxy = os.environ.get("GOPROXY", "https://proxy.golang.org").split(",")[0].split("|")[0].rstrip("/")
    url = f"{proxy}/golang.org/toolchain/@v/v0.0.1-go{VERSION}.linux-{arch}.zip"
    try:
        with urllib.request.urlopen(url) as source, archive.open("wb") as file:
            shutil.copyfileobj(source, file)
    except OSError as error:
        raise ToolchainError(
            f"no Go {'.'.join(map(str, _OLDEST))} or newer on PATH, and fetching one failed ({url}: {error}): "
            "install Go from https://go.dev/dl, or set GOPROXY to a proxy that this machine reaches"
        ) from error


def _check(arch: str, archive: Path) -> None:
    """Compares the archive with its `h1:` hash: the SHA-256 of the sorted `SHA-256  name` lines of its files."""
    with zipfile.ZipFile(archive) as files:
        lines = (f"{hashlib.sha256(files.read(name)).hexdigest()}  {name}\n" for name in sorted(files.namelist()))
        found = base64.b64encode(hashlib.sha256("".join(lines).encode()).digest()).decode()
    if found != _HASHES.get(arch):
        raise ToolchainError(f"the Go {VERSION} toolchain for {arch} has an unexpected hash: h1:{found}")


def _unpack(archive: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(archive) as files:
        files.extractall(scratch)
    root = next((scratch / "golang.org").iterdir())
    for folder in (root / "bin", root / "pkg" / "tool"):
        for path in folder.rglob("*"):
            path.chmod(0o755)
    # A module may not contain another's go.mod, so the archive carries them under this name.
    for path in root.rglob("_go.mod"):
        path.rename(path.with_name("go.mod"))
    return root
