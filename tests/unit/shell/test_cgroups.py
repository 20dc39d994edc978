"""What is read from files laid out as the kernel lays them out, versions 1 and 2."""

import os
from pathlib import Path

import pytest

from finetune_trainer import cgroups

ALL = len(os.sched_getaffinity(0))


def laid_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ALL),
        ({"cpu.max": "max 100000\n"}, ALL),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "99900000 100000\n"}, ALL),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, ALL),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
    ids=lambda value: str(value)[:60],
)
def test_cpus(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert cgroups.cpus(laid_out(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 0),
        ({"memory.events": "low 0\nhigh 0\nmax 12\noom 2\noom_kill 3\noom_group_kill 0\n"}, 3),
        ({"memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"}, 2),
    ],
    ids=["no cgroup", "version 2", "version 1"],
)
def test_memory_kills(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert cgroups.memory_kills(laid_out(tmp_path, files)) == expected
