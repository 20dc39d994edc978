"""Folders that Hugging Face datasets itself wrote, and Parquet files with its features: rows as it would give them."""

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Json, List, Sequence, Value

from finetune_crds.v1alpha1 import Source
from finetune_trainer.data import rows as rows_module
from finetune_trainer.data.rows import read_rows
from finetune_trainer.errors import DataError, UserError
from finetune_trainer.storage.roots import Roots
from finetune_trainer.storage.sources import fetched, source_files

PNG = b"\x89PNG\r\n\x1a\n rest"
FEATURES = Features(
    {
        "text": Value("string"),
        "label": ClassLabel(names=["neg", "pos"]),
        "ner_tags": List(ClassLabel(names=["O", "B-X"])),
        "answers": Sequence({"text": Value("string"), "kind": ClassLabel(names=["short", "long"])}),
        "call": Json(),
        "image": Image(decode=False),
    }
)
ROWS: list[dict[str, Any]] = [
    {
        "text": f"row {i}",
        "label": i % 2,
        "ner_tags": [1, 0],
        "answers": {"text": ["a"], "kind": [i % 2]},
        "call": {"a": [i, "x"]},
        "image": {"bytes": PNG, "path": "a.png"},
    }
    for i in range(300)
]
READ: list[dict[str, Any]] = [
    row
    | {"label": ["neg", "pos"][row["label"]], "ner_tags": ["B-X", "O"]}
    | {"answers": {"text": ["a"], "kind": [["short", "long"][row["answers"]["kind"][0]]]}}
    for row in ROWS
]


def read(uri: str, into: Path, *, evaluation: bool = False, **asked: str) -> list[dict[str, Any]]:
    files = source_files(Source.model_validate({"uri": uri, **asked}), into, Roots(), evaluation=evaluation)
    return [row for file, path in fetched(files) for _, row in read_rows(path, file.uri)]


def test_a_set_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BATCH_ROWS", 7)
    whole = Dataset.from_list(ROWS, features=FEATURES)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    assert read(f"file://{tmp_path}/one", tmp_path) == READ
    assert read(f"file://{tmp_path}/one/data-00001-of-00003.arrow", tmp_path) == READ[100:200]
    assert read(f"file://{tmp_path}/one", tmp_path, evaluation=True) == READ, "its only split"
    whole.select(range(299, -1, -50)).save_to_disk(tmp_path / "chosen")
    assert read(f"file://{tmp_path}/chosen", tmp_path) == READ[299::-50]


def test_splits_that_were_saved(tmp_path: Path) -> None:
    whole = Dataset.from_list(ROWS, features=FEATURES)
    DatasetDict({"train": whole.select(range(9)), "validation": whole.select([9])}).save_to_disk(tmp_path / "set")
    place = f"file://{tmp_path}/set"
    assert read(place, tmp_path) == READ[:9]
    assert read(place, tmp_path, evaluation=True) == READ[9:10] == read(place, tmp_path, split="validation")
    with pytest.raises(UserError, match="there is no split test; there is train, validation"):
        read(place, tmp_path, split="test")
    with pytest.raises(UserError, match="a folder of save_to_disk has no configs; remove config main"):
        read(place, tmp_path, config="main")


def test_parquet_of_the_hub_and_arrow_that_is_compressed(tmp_path: Path) -> None:
    import gzip

    whole = Dataset.from_list(ROWS, features=FEATURES)
    whole.to_parquet(tmp_path / "a.parquet")
    assert [row for _, row in read_rows(tmp_path / "a.parquet", "a.parquet")] == READ
    whole.save_to_disk(tmp_path / "saved")
    content = (tmp_path / "saved/data-00000-of-00001.arrow").read_bytes()
    (tmp_path / "b").write_bytes(gzip.compress(content))
    assert [row for _, row in read_rows(tmp_path / "b", "b.arrow.gz")] == READ
    (tmp_path / "cut.arrow").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cut.arrow: not an Arrow file, or a damaged one"):
        list(read_rows(tmp_path / "cut.arrow", "cut.arrow"))


def test_feather(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.feather

    pyarrow.feather.write_feather(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.arrow")
    assert list(read_rows(tmp_path / "a.arrow", "a.arrow")) == [(1, {"text": "a"}), (2, {"text": "b"})]


def test_minus_one_is_no_class(tmp_path: Path) -> None:
    Dataset.from_dict({"label": [-1, 1]}, features=Features({"label": FEATURES["label"]})).to_parquet(
        tmp_path / "a.parquet"
    )
    assert [row for _, row in read_rows(tmp_path / "a.parquet", "a.parquet")] == [{"label": None}, {"label": "pos"}]
