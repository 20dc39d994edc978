"""What the container's cgroup says: how many CPUs it may use, and whether the kernel killed for memory. Versions 1 and 2."""

import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def cpus(root: Path = _ROOT) -> int:
    """CPUs that this container may use, at least 1. Without a limit: those that the process may run on."""
    available = len(os.sched_getaffinity(0))
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return available
    if quota in ("max", "-1"):
        return available
    return max(1, min(available, int(quota) // int(period)))


def memory_kills(root: Path = _ROOT) -> int:
    """Processes of this container that the out-of-memory killer has ended so far; 0 where the kernel does not tell."""
    for name in ("memory.events", "memory/memory.oom_control"):
        try:
            lines = (root / name).read_text().splitlines()
        except OSError:
            continue
        counts = dict(line.split(maxsplit=1) for line in lines if " " in line)
        return int(counts.get("oom_kill", 0))
    return 0
