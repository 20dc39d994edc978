"""Trying again after trouble that passes. Called by downloads, registry and hub."""

import time
from collections.abc import Callable
from typing import Final, TypeVar

from ..errors import StorageError

TRIES: Final = 6
FIRST_PAUSE = 0.5
"""Seconds, doubled after each try."""

T = TypeVar("T")


class TryAgain(Exception):
    """An answer that may be different next time."""


def patiently(uri: str, action: Callable[[], T], passing: tuple[type[Exception], ...], *, verb: str = "read") -> T:
    """Tries again after trouble that passes, with doubled pauses.

    Raises:
        StorageError: it did not pass.
    """
    for attempt in range(TRIES):
        try:
            return action()
        except passing as error:
            if attempt == TRIES - 1:
                raise StorageError(
                    f"{uri}: could not be {verb} after {TRIES} tries: {' '.join(str(error).split())[:300]}"
                ) from error
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise AssertionError("unreachable")
