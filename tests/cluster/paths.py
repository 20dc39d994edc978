"""Where the test cluster keeps things: what is built once a machine, and what one cluster owns while it runs."""

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def cache_root() -> Path:
    """The folder of everything that is built once a machine: `FINETUNE_CACHE`, else `finetune-operator` in the user's cache."""
    override = os.environ.get("FINETUNE_CACHE")
    if override:
        return Path(override).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "finetune-operator"


def cache_dir(name: str, version: str) -> Path:
    """The folder of one cached thing, keyed by its version."""
    return cache_root() / f"{name}-{version}"


def run_dir(cluster: str) -> Path:
    """The folder of one running cluster: keys, data, logs, pid files. `down` removes it whole."""
    return cache_root() / "run" / cluster
