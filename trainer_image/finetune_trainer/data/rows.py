"""Rows of the files that users train on: JSON lines, JSON, CSV, TSV, Parquet, Arrow or text, plain or compressed (.gz, .zst), or one image.

Called by prepare. A row is a dict of columns with its number in the file, counted from 1 (in JSON lines and text: the line).
Errors name the file and the row; they never quote it.
"""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from ..errors import DataError
from ..storage.kinds import IMAGE_SUFFIXES
from ..storage.remote_files import RemoteFile
from .features import decoder

Row = tuple[int, dict[str, Any]]

_FIELD_MAX = 1 << 30
_ARROW_FILE: Final = b"ARROW1"
_COMPRESSIONS: Final = {".gz": "gzip", ".zst": "zstd"}
_ZSTD_BYTES: Final = 16 * 1024
"""Read at a time, before decompression."""
BATCH_ROWS = 128
"""Rows that are taken from a Parquet or Arrow file at a time: they may hold images."""


def read_rows(content: Path | RemoteFile, name: str) -> Iterator[Row]:
    """Rows of one file, in order.

    Args:
        content: where it lies on this disk, or what arrives of it.
        name: what messages call it, and what its format is told from: the end of its URI.

    Raises:
        DataError: unknown format, or a row that cannot be read.
        StorageError: it does not arrive.
    """
    named = name.partition("@")[0] if name.startswith("hf://") else name
    suffixes = [suffix.lower() for suffix in Path(named.rsplit("/", 1)[-1]).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else ""
    reader = (_READERS | _IMAGES).get(suffixes[-1] if suffixes else "")
    if reader is None:
        raise DataError(
            f"{name}: the format is told from the name, which must end in {', '.join(_READERS)} (with .gz or .zst)"
        )
    try:
        with _opened(content, compression) as file:
            yield from reader(file, name)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text (at byte {error.start} of a block); save it as UTF-8") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{name}: damaged or cut off {_COMPRESSIONS[compression]} data; upload it again") from error


@contextmanager
def _opened(content: Path | RemoteFile, compression: str) -> Iterator[BinaryIO]:
    with content.open("rb") as file:
        if compression == ".gz":
            with gzip.open(file) as plain:
                yield plain  # type: ignore[misc]  # GzipFile reads like any binary file
        elif compression == ".zst":
            yield io.BufferedReader(_Zstd(file))
        else:
            yield file


class _Zstd(io.RawIOBase):
    """What the frames of a file hold. Raises EOFError where one is damaged or does not end."""

    def __init__(self, file: BinaryIO) -> None:
        self._parts, self._part = _decompressed(file), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._part:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._part = memoryview(part)
        count = min(len(buffer), len(self._part))
        buffer[:count], self._part = self._part[:count], self._part[count:]
        return count


def _decompressed(file: BinaryIO) -> Iterator[bytes]:
    import zstandard

    frame = None
    try:
        while block := file.read(_ZSTD_BYTES):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise EOFError from error
    if frame:
        raise EOFError


def _text(file: BinaryIO) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _json_lines(file: BinaryIO, name: str) -> Iterator[Row]:
    for number, line in enumerate(_text(file), start=1):
        if line.strip():
            yield number, _columns(_parsed(line, f"{name} row {number}"), f"{name} row {number}")


def _json(file: BinaryIO, name: str) -> Iterator[Row]:
    """One list of objects; a file of JSON lines that is called .json is taken too."""
    text = _text(file).read()
    if not text.lstrip().startswith("["):
        yield from _json_lines(io.BytesIO(text.encode()), name)
        return
    for number, value in enumerate(_parsed(text, name), start=1):
        yield number, _columns(value, f"{name} row {number}")


def _csv(file: BinaryIO, name: str, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(_FIELD_MAX)
    reader = csv.reader(_text(file), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        for number, fields in enumerate(reader, start=1):
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{name} row {number}: {len(fields)} fields, but the header names {len(header)} columns"
                )
            yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{name}: line {reader.line_num} is not CSV: {error}") from error


def _tsv(file: BinaryIO, name: str) -> Iterator[Row]:
    return _csv(file, name, delimiter="\t")


def _parquet(file: BinaryIO, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Buffered before, a file would be in memory as a whole; and without threads its columns are read as they follow each other.
        source = pyarrow.parquet.ParquetFile(file if _seeks(file) else io.BytesIO(file.read()), pre_buffer=False)
        # Group by group: a batch of two groups would be read from both in turn, here and there.
        parts = (
            batch
            for i in range(source.num_row_groups)
            for batch in source.iter_batches(BATCH_ROWS, row_groups=[i], use_threads=False)
        )
        yield from _batches(parts, source.schema_arrow, name)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{name}: not a Parquet file, or a damaged one") from error


def _arrow(file: BinaryIO, name: str) -> Iterator[Row]:
    """A stream, as save_to_disk writes it, or a file (Feather); mapped where it is not compressed."""
    import pyarrow

    here = isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)
    try:
        source = pyarrow.memory_map(str(file.name)) if here else pyarrow.PythonFile(file, "r")
        is_file = _seeks(file) and source.size() > len(_ARROW_FILE) and source.read(len(_ARROW_FILE)) == _ARROW_FILE
        if _seeks(file):
            source.seek(0)
        opened = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        found = (opened.get_batch(i) for i in range(opened.num_record_batches)) if is_file else opened
        parts = (batch.slice(start, BATCH_ROWS) for batch in found for start in range(0, len(batch), BATCH_ROWS))
        yield from _batches(parts, opened.schema, name)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{name}: not an Arrow file, or a damaged one; copy it again") from error


def _seeks(file: BinaryIO) -> bool:
    """Whether it can be read from anywhere; what is compressed would be decompressed from its beginning each time."""
    return isinstance(file, io.BufferedReader) and file.seekable()


def _batches(batches: Iterable[Any], schema: Any, name: str) -> Iterator[Row]:
    decode, number = decoder(schema, name), 0
    for batch in batches:
        for row in decode(batch):
            number += 1
            yield number, row


def _lines(file: BinaryIO, name: str) -> Iterator[Row]:
    for number, line in enumerate(_text(file), start=1):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}


def _image(file: BinaryIO, name: str) -> Iterator[Row]:
    """The file is the row, and has no number; its folder is named by its class."""
    yield 0, {"image": file.read(), "label": name.rstrip("/").split("/")[-2]}


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{place}: JSON nested too deep") from None


def _columns(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a row must be an object with named columns")
    return value


_READERS: dict[str, Callable[[BinaryIO, str], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _lines,
}
_IMAGES = dict.fromkeys(IMAGE_SUFFIXES, _image)
