"""Fixtures of the training tests: one tiny model a session, one thread so that the machine's other work does not matter."""

from pathlib import Path

import pytest
import torch

from . import tiny


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama."""
    return tiny.make_model(tmp_path_factory.mktemp("llama"))
