"""What an example becomes, and who makes it so."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..formats import Example

Label = str | float | None
"""A class by its name, a number, or nothing to learn."""


@dataclass(frozen=True)
class EncodedRow:
    """One row of the prepared set."""

    tokens: Sequence[int]
    learned: Sequence[bool] = ()
    """For each token whether it is learned; nothing: none is."""
    labels: Sequence[Label] = ()
    targets: int = 1
    """What there is to learn here, as the loss counts it: a row without any is refused."""
    split: int | None = None
    """Where the second of a row's two parts begins."""
    note: bytes = b""
    """What is needed besides: for evaluation, a text that is changed in training, or the image itself, in the format of its file."""
    truncated: bool = False
    """Whether something was cut off."""


class Encoder(Protocol):
    """Encodes the examples of one task, a batch at a time, so that the tokenizer's threads have work."""

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[EncodedRow]]:
        """The rows that each example becomes, none longer than training.sequenceLength; `places` name the rows in messages."""
        ...
