"""The prepared set: every row's tokens and mask in flat files that all ranks map, written once by prepare.

Nothing here depends on order, packing or the number of ranks, so runs that differ in those share one set.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from .encoding.row import EncodedRow, Label

INDEX = "index.json"
_COLUMNS: dict[str, Any] = {
    "offsets": np.int64,  # rows + 1; where each row's tokens begin
    "targets": np.int32,  # what there is to learn in the row, as the loss counts it
    "splits": np.int32,  # where in the row its second part begins; its length where there is one part
    "label_offsets": np.int64,  # rows + 1; where each row's labels begin
    "note_offsets": np.int64,  # rows + 1; where each row's note begins
    "sources": np.int32,  # index into dataset.train; -1 for rows of dataset.evaluation.sources, -2 - i for those of its set i
    "files": np.int32,  # index into Index.files
    "numbers": np.int64,  # row number in its file, from 1
    "content": np.uint64,  # hash of the row's content
    "groups": np.uint64,  # hash of what is held out together: the row's content, or its value of dataset.evaluation.groupBy
    "slices": np.int32,  # bit i: whether the row is in evaluation.slices[i]
}
_FLAT: Any = {"tokens": np.int32, "learned": np.bool_, "labels": np.float64, "notes": np.uint8}
"""All rows' behind each other."""
NOTHING: Final = -1
"""Label of what is not learned."""


class Index(BaseModel):
    """What a prepared folder holds."""

    digest: str
    """Dataset digest: sha256 over the files' contents and the preparation's configuration."""
    files: list[str]
    """URIs."""
    classes: list[str]
    """Names of the classes; empty where there are none."""
    truncated: int
    """Rows cut at sequenceLength."""


class RowWriter:
    """Writes a prepared folder. Rows stream to disk: the set may be larger than memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._flat = {name: (folder / f"{name}.bin").open("wb") for name in _FLAT}
        self._columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
        self._names: dict[str, int] = {}
        for name in ("offsets", "label_offsets", "note_offsets"):
            self._columns[name].append(0)

    def __len__(self) -> int:
        return len(self._columns["targets"])

    @property
    def names(self) -> list[str]:
        """Names of the classes seen."""
        return list(self._names)

    def add(self, row: EncodedRow, **columns: int) -> None:
        """Appends one row; `columns` says where it comes from."""
        learned = row.learned or [False] * len(row.tokens)
        self._write("tokens", row.tokens, "offsets")
        self._flat["learned"].write(np.asarray(learned, dtype=np.bool_).tobytes())
        self._write("labels", [self._number(label) for label in row.labels], "label_offsets")
        self._write("notes", np.frombuffer(row.note, dtype=np.uint8), "note_offsets")
        self._columns["targets"].append(row.targets)
        self._columns["splits"].append(len(row.tokens) if row.split is None else row.split)
        for name, value in columns.items():
            self._columns[name].append(value)

    def finish(self, index: Index) -> None:
        """Writes columns and index, classes by their place in it; the folder is complete only with its index."""
        for file in self._flat.values():
            file.close()
        if self._names and len(labels := np.memmap(self._folder / "labels.bin", dtype=_FLAT["labels"], mode="r+")):
            place = {name: i for i, name in enumerate(index.classes)}
            places = np.array([place[name] for name in self._names] + [NOTHING], dtype=_FLAT["labels"])
            labels[:] = places[labels.astype(np.int64)]
            labels.flush()
        for name, values in self._columns.items():
            np.save(self._folder / f"{name}.npy", np.asarray(values, dtype=_COLUMNS[name]))
        (self._folder / INDEX).write_text(index.model_dump_json())

    def _write(self, name: str, values: Any, offsets: str) -> None:
        self._flat[name].write(np.asarray(values, dtype=_FLAT[name]).tobytes())
        self._columns[offsets].append(self._columns[offsets][-1] + len(values))

    def _number(self, label: Label) -> float:
        if label is None:
            return NOTHING
        return self._names.setdefault(label, len(self._names)) if isinstance(label, str) else label


@dataclass(frozen=True)
class RowSet:
    """A mapped prepared folder."""

    index: Index
    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    labels: NDArray[np.float64]
    notes: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    label_offsets: NDArray[np.int64]
    note_offsets: NDArray[np.int64]
    targets: NDArray[np.int32]
    splits: NDArray[np.int32]
    sources: NDArray[np.int32]
    files: NDArray[np.int32]
    numbers: NDArray[np.int64]
    content: NDArray[np.uint64]
    groups: NDArray[np.uint64]
    slices: NDArray[np.int32]

    @classmethod
    def open(cls, folder: Path) -> "RowSet":
        """Maps a finished folder."""
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS}
        index = Index.model_validate(json.loads((folder / INDEX).read_text()))
        return cls(
            index=index,
            **{name: _mapped(folder / f"{name}.bin", dtype) for name, dtype in _FLAT.items()},
            **columns,
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def labels_of(self, row: int) -> NDArray[np.float64]:
        """Labels of one row: indices of classes, NOTHING where there is nothing to learn, or numbers."""
        return self.labels[self.label_offsets[row] : self.label_offsets[row + 1]]

    def note(self, row: int) -> bytes:
        """What evaluation needs of one row besides."""
        return self.notes[self.note_offsets[row] : self.note_offsets[row + 1]].tobytes()

    def place(self, row: int) -> str:
        """What messages call a row: its file and number."""
        return f"{self.index.files[self.files[row]]} row {self.numbers[row]}"


def _mapped(path: Path, dtype: Any) -> Any:
    """A file, mapped; an empty one cannot be."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)
