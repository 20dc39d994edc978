"""The prepared set: every row's tokens and mask in flat files that all ranks map, written once by prepare.

Nothing here depends on order, packing or the number of ranks, so runs that differ in those share one set.
"""

import json
from array import array
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
    "numbers": np.int64,  # row number in its file, from 1; 0 where the file is the row
    "content": np.uint64,  # hash of the row's content
    "groups": np.uint64,  # hash of what is held out together: the row's content, or its value of dataset.evaluation.groupBy
    "slices": np.int32,  # bit i: whether the row is in evaluation.slices[i]
    "truncated": np.bool_,  # whether something was cut off
}
_FLAT: Any = {"tokens": np.int32, "learned": np.bool_, "labels": np.float64, "notes": np.uint8}
"""All rows' behind each other."""
SIGNATURES: Final = "signatures.bin"
"""MinHash signatures (near_duplicates), one of each row of the files; empty where nobody asked for them."""
_AT_ONCE: Final = 1 << 20
NOTHING: Final = -1
"""Label of what is not learned."""


class Tally(BaseModel):
    """What became of the rows of one source."""

    read: int = 0
    """Rows of its files."""
    too_long: int = 0
    """Left out for dataset.tooLong: drop."""
    too_short: int = 0
    """Left out for dataset.minTokens."""

    @property
    def dropped(self) -> int:
        """All that were left out."""
        return self.too_long + self.too_short


class Index(BaseModel):
    """What a prepared folder holds."""

    digest: str
    """Dataset digest: sha256 over the files' contents and the preparation's configuration."""
    files: list[str]
    """URIs."""
    classes: list[str]
    """Names of the classes; empty where there are none."""
    tallies: dict[int, Tally] = {}
    """By source, as the column has it."""
    shares: dict[int, float] = {}
    """Part of a source that was read, where that was not all."""
    digests: dict[int, str] = {}
    """By source, of the files that were read: the sha256 of a single one, else that over theirs; of one whose beginning was read, that over its rows."""
    synonyms: dict[str, list[str]] = {}
    """What dataset.augmentation.synonyms says, by folded word."""


class RowWriter:
    """Writes a prepared folder. Rows stream to disk: the set may be larger than memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._flat = {name: (folder / f"{name}.bin").open("wb") for name in _FLAT}
        self._signatures = (folder / SIGNATURES).open("wb")
        self._columns = {name: array(np.dtype(kind).char.replace("?", "b")) for name, kind in _COLUMNS.items()}
        self._names: dict[str, int] = {}
        for name in ("offsets", "label_offsets", "note_offsets"):
            self._columns[name].append(0)

    def __len__(self) -> int:
        return len(self._columns["targets"])

    @property
    def tokens(self) -> int:
        """Of all rows so far."""
        return int(self._columns["offsets"][-1])

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
        self._columns["truncated"].append(row.truncated)
        for name, value in columns.items():
            self._columns[name].append(value)

    def sign(self, signature: NDArray[np.uint32]) -> None:
        """Adds the signature of a row of the files, before what becomes of it is added."""
        self._signatures.write(signature.tobytes())

    def finish(self, index: Index) -> None:
        """Writes columns and index, classes by their place in it; the folder is complete only with its index."""
        for file in (*self._flat.values(), self._signatures):
            file.close()
        if self._names and len(labels := np.memmap(self._folder / "labels.bin", dtype=_FLAT["labels"], mode="r+")):
            place = {name: i for i, name in enumerate(index.classes)}
            places = np.array([place[name] for name in self._names] + [NOTHING], dtype=_FLAT["labels"])
            for start in range(0, len(labels), _AT_ONCE):
                part = labels[start : start + _AT_ONCE]
                part[:] = places[part.astype(np.int64)]
            labels.flush()
        for name, values in self._columns.items():
            np.save(self._folder / f"{name}.npy", np.frombuffer(values, dtype=_COLUMNS[name]))
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

    folder: Path
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
    truncated: NDArray[np.bool_]
    signatures: NDArray[np.uint32]

    @classmethod
    def open(cls, folder: Path) -> "RowSet":
        """Maps a finished folder."""
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS}
        index = Index.model_validate(json.loads((folder / INDEX).read_text()))
        return cls(
            folder=folder,
            index=index,
            **{name: _mapped(folder / f"{name}.bin", dtype) for name, dtype in _FLAT.items()},
            **columns,
            signatures=_mapped(folder / SIGNATURES, np.uint32),
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @property
    def examples(self) -> NDArray[np.int64]:
        """For each row which row of the files it is made from, counted from 0: a long text, or a question, may be several."""
        return (
            np.cumsum(
                np.diff(self.files, prepend=0).astype(np.bool_) | np.diff(self.numbers, prepend=-1).astype(np.bool_)
            )
            - 1
        )

    def labels_of(self, row: int) -> NDArray[np.float64]:
        """Labels of one row: indices of classes, NOTHING where there is nothing to learn, or numbers."""
        return self.labels[self.label_offsets[row] : self.label_offsets[row + 1]]

    def note(self, row: int) -> bytes:
        """What is needed of one row besides: for evaluation, a text that is changed in training, or an image."""
        return self.notes[self.note_offsets[row] : self.note_offsets[row + 1]].tobytes()

    def place(self, row: int) -> str:
        """What messages call a row: its file and number."""
        return place(self.index.files[self.files[row]], int(self.numbers[row]))


def place(file: str, number: int) -> str:
    """What messages call a row: its file, and its number there unless the file is the row."""
    return f"{file} row {number}" if number else file


def _mapped(path: Path, dtype: Any) -> Any:
    """A file, mapped; an empty one cannot be."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)
