"""Files to rows: every format and compression gives the same rows; damage is named by file and row, and never quoted."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from finetune_trainer.data.rows import read_rows
from finetune_trainer.errors import DataError

ROWS = [{"text": "zwei\nZeilen, mit Komma", "label": "a"}, {"text": 'ein "Zitat" — ü', "label": "b"}]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def csv(delimiter: str = ",") -> bytes:
    lines = [delimiter.join(["text", "label"])]
    for row in ROWS:
        quoted = row["text"].replace('"', '""')
        lines.append(f'"{quoted}"{delimiter}{row["label"]}')
    return "\r\n".join(lines).encode()


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


FILES: dict[str, bytes] = {
    "a.jsonl": jsonl(ROWS),
    "a.ndjson": b"\xef\xbb\xbf" + jsonl(ROWS) + b"\n",
    "a.json": json.dumps(ROWS).encode(),
    "lines.json": jsonl(ROWS),
    "a.csv": csv(),
    "a.tsv": csv("\t"),
    "a.parquet": parquet(),
    "a.jsonl.gz": gzip.compress(jsonl(ROWS)),
    "a.csv.zst": zstandard.compress(csv()),
    "two-frames.jsonl.zst": zstandard.compress(jsonl(ROWS[:1]) + b"\n") + zstandard.compress(jsonl(ROWS[1:])),
    "a.parquet.gz": gzip.compress(parquet()),
    "UPPER.JSONL": jsonl(ROWS),
    "v1.2.jsonl": jsonl(ROWS),
}


def test_a_revision_of_the_hub_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "content").write_bytes(FILES["a.parquet"])
    assert len(list(read_rows(tmp_path / "content", "hf://org/name/data/a.parquet@v1.0"))) == 2
    with pytest.raises(DataError, match="the format is told from the name"):
        list(read_rows(tmp_path / "content", "pvc://data/a.parquet@v1.0"))


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / "content"
    path.write_bytes(FILES[name])
    assert list(read_rows(path, f"pvc://data/{name}")) == [(1, ROWS[0]), (2, ROWS[1])]


def test_lines_of_text_are_rows_and_numbers_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "content"
    path.write_bytes(b"one\n\n  two  \r\n")
    assert list(read_rows(path, "a.txt")) == [(1, {"text": "one"}), (3, {"text": "  two  "})]


DAMAGE: dict[str, tuple[str, bytes, str]] = {
    "no format": ("secret", b"x", "the format is told from the name"),
    "not json": ("a.jsonl", b'{"a": 1}\n\n{"a": secret}\n', "a.jsonl row 3: not JSON: Expecting value at line 1 column 7"),
    "no object": ("a.jsonl", b'["secret"]\n', "a.jsonl row 1: a row must be an object"),
    "list of lists": ("a.json", b'[["secret"]]', "a.json row 1: a row must be an object"),
    "too many fields": ("a.csv", b"a,b\n1,2\nsecret,2,3\n", "a.csv row 2: 3 fields, but the header names 2 columns"),
    "open quote": ("a.csv", b'a,b\n"secret,2\n', "a.csv: line 2 is not CSV"),
    "not utf-8": ("a.jsonl", b'{"a": "\xff secret"}', "not UTF-8"),
    "no parquet": ("a.parquet", b"secret, nothing but", "not a Parquet file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(jsonl(ROWS * 99))[:-20], "damaged or cut off gzip"),
    "no gzip": ("a.jsonl.gz", b"secret", "damaged or cut off gzip"),
    "no zstd": ("a.jsonl.zst", b"secret", "damaged or cut off zstd"),
    "cut zstd": ("a.jsonl.zst", zstandard.compress(b'{"a": 1}\n' * 99_999)[:-2], "damaged or cut off zstd"),
    "cut in the second frame": ("a.jsonl.zst", zstandard.compress(b'{"a": 1}\n') * 2 + zstandard.compress(b'{"a": 1}')[:9], "damaged or cut off zstd"),
    "deep": ("a.jsonl", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_not_quoted(tmp_path: Path, case: str) -> None:
    name, content, sentence = DAMAGE[case]
    path = tmp_path / "content"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        list(read_rows(path, name))
    assert sentence in str(raised.value)
    assert "secret" not in str(raised.value).removeprefix(name)
