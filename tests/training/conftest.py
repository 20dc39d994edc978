"""Fixtures of the training tests: one tiny model a session, one thread so that the machine's other work does not matter."""

import os
import re
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _as_a_worker() -> None:
    """One thread, and no progress bars: their lock is one with that of forks, and a fork that is killed would hold it for ever."""
    import torch  # not where pytest-xdist only hands tests out
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _power_stays_on() -> None:
    """Nothing here cuts the power, and a killed process loses nothing that it has written: there is no disk to wait for."""
    os.fsync = lambda _: None


@pytest.fixture(scope="session", autouse=True)
def _compiled_once() -> None:
    """transformers makes a regular expression of each weight's name, for each model that is read or written; Python remembers 512."""
    re._MAXCACHE = 1 << 16  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama."""
    from . import tiny

    return tiny.make_model(tmp_path_factory.mktemp("llama"))
