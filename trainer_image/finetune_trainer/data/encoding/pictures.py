"""Images and their classes. An image stays in the format of its file: it is decoded here only to know that it can be."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, cast

from ...errors import DataError
from ..formats import Example, Picture
from ..pictures import Unreadable, opened
from .row import EncodedRow

_THREADS: Final = min(8, os.cpu_count() or 1)
"""Decoders let go of Python's lock."""


class Pictures:
    """Each row is an image without tokens."""

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[EncodedRow]]:
        """See Encoder."""
        with ThreadPoolExecutor(_THREADS) as threads:
            return list(threads.map(_row, cast(Sequence[Picture], examples), places))


def _row(example: Picture, place: str) -> list[EncodedRow]:
    try:
        opened(example.image, "RGB")
    except Unreadable as error:
        raise DataError(f"{place}: {error}; correct or remove it") from error
    return [EncodedRow((), labels=[example.label], note=example.image)]
