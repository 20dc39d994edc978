"""Runs the small system programs (ip, mount, ctr) that the node needs, with errors that say what was run."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from .errors import CommandFailed


def run(*command: str | Path, check: bool = True, stdin: str | None = None) -> str:
    """The output of a command. With `check=False` a failure gives what it wrote until then."""
    done = subprocess.run([str(part) for part in command], input=stdin, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise CommandFailed(
            f"{_line(command)} failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-3000:]}"
        )
    return done.stdout.strip()


def unmount_below(folder: Path) -> None:
    """Unmounts what lies in a folder, the innermost first."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    mounted = [Path(line.split(" ")[1].replace("\\040", " ")) for line in lines]
    for mount in reversed([path for path in mounted if path.is_relative_to(folder)]):
        run("umount", "--lazy", mount, check=False)


def _line(command: Sequence[str | Path]) -> str:
    return " ".join(str(part) for part in command)
