"""The prepared set: every row's tokens and mask in flat files that all ranks map, written once by prepare.

Nothing here depends on order, packing or the number of ranks, so runs that differ in those share one set.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

INDEX = "index.json"
_COLUMNS: dict[str, Any] = {
    "offsets": np.int64,  # rows + 1; where each row's tokens begin
    "targets": np.int32,  # tokens of the row that are learned (a row's first token has nothing before it to be told from)
    "labels": np.int32,  # index into classes; -1 for text generation
    "sources": np.int32,  # index into dataset.train; -1 for rows of dataset.evaluation.sources
    "files": np.int32,  # index into Index.files
    "numbers": np.int64,  # row number in its file, from 1
    "content": np.uint64,  # hash of the row's content
}


class Index(BaseModel):
    """What a prepared folder holds."""

    digest: str
    """Dataset digest: sha256 over the files' contents and the preparation's configuration."""
    files: list[str]
    """URIs."""
    classes: list[str]
    """Names of the classes; empty for text generation."""
    truncated: int
    """Rows cut at sequenceLength."""


class RowWriter:
    """Writes a prepared folder. Rows stream to disk: the set may be larger than memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._tokens = (folder / "tokens.bin").open("wb")
        self._learned = (folder / "learned.bin").open("wb")
        self._columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
        self._columns["offsets"].append(0)

    def __len__(self) -> int:
        return len(self._columns["targets"])

    def add(self, tokens: Sequence[int], learned: Sequence[bool], **columns: int) -> None:
        """Appends one row; `columns` are those of the set but offsets and targets."""
        self._tokens.write(np.asarray(tokens, dtype=np.int32).tobytes())
        self._learned.write(np.asarray(learned, dtype=np.bool_).tobytes())
        self._columns["offsets"].append(self._columns["offsets"][-1] + len(tokens))
        self._columns["targets"].append(sum(learned[1:]))
        for name, value in columns.items():
            self._columns[name].append(value)

    def finish(self, index: Index, labels: Sequence[int] | None) -> None:
        """Writes columns and index; the folder is complete only with its index."""
        self._tokens.close()
        self._learned.close()
        if labels is not None:
            self._columns["labels"] = list(labels)
        for name, values in self._columns.items():
            np.save(self._folder / f"{name}.npy", np.asarray(values, dtype=_COLUMNS[name]))
        (self._folder / INDEX).write_text(index.model_dump_json())


@dataclass(frozen=True)
class RowSet:
    """A mapped prepared folder."""

    index: Index
    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    targets: NDArray[np.int32]
    labels: NDArray[np.int32]
    sources: NDArray[np.int32]
    files: NDArray[np.int32]
    numbers: NDArray[np.int64]
    content: NDArray[np.uint64]

    @classmethod
    def open(cls, folder: Path) -> "RowSet":
        """Maps a finished folder."""
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS}
        index = Index.model_validate(json.loads((folder / INDEX).read_text()))
        return cls(
            index=index,
            tokens=np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r"),
            learned=np.memmap(folder / "learned.bin", dtype=np.bool_, mode="r"),
            **columns,
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def place(self, row: int) -> str:
        """What messages call a row: its file and number."""
        return f"{self.index.files[self.files[row]]} row {self.numbers[row]}"

    def split(self, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows to train on and rows to evaluate on.

        Rows of evaluation sources are evaluated on. A fraction is held out by the hash of a row's content, so that equal rows
        stay on one side and a row stays on its side as the set grows; at least the row with the lowest hash is held out.
        """
        held_out = self.sources < 0
        if fraction > 0:
            threshold = np.uint64(min(int(fraction * 2**64), 2**64 - 1))
            chosen = self.content < threshold
            held_out = held_out | (chosen if chosen.any() else self.content == self.content.min())
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)
