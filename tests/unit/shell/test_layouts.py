"""Folders as Hugging Face datasets and its hub lay them out: which files are meant, and what is told when that is not clear."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_crds.v1alpha1 import Source
from finetune_trainer.errors import UserError
from finetune_trainer.storage import downloads
from finetune_trainer.storage.layouts import told
from finetune_trainer.storage.roots import Roots
from finetune_trainer.storage.sources import source_files

CONFIGS = """---
license: mit
configs:
- config_name: plain
  data_files: [{split: train, path: data/plain/part-*}, {split: test, path: ["data/plain/held.*"]}]
- config_name: main
  default: true
  data_dir: main
  data_files: {train: "**/[ab].jsonl.gz", dev: dev.csv}
- config_name: named
  data_dir: ./named
- config_name: gone
  data_files: missing/*.parquet
- config_name: elsewhere
  data_files: https://host/rows.csv
---
# Rows
"""
SHARDS = [
    "data/train_sft-00000-of-00002.parquet",
    "data/train_sft-00001-of-00002.parquet",
    "data/test_sft-00000-of-00001.parquet",
]
CONFIGURED = [
    "README.md", "data/plain/part-0.csv", "data/plain/part-1.csv", "data/plain/held.csv",
    "main/x/a.jsonl.gz", "main/b.jsonl.gz", "main/c.jsonl.gz", "main/dev.csv", "named/train.csv", "named/val-1.csv", "named/extra.csv",
]  # fmt: skip
SAVED = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}
CASES: dict[str, tuple[list[str], dict[str, Any], list[str] | str]] = {
    "rows beside each other": (["a.jsonl", "b.csv", "c.tsv", "notes.md", "state.json"], {}, ["a.jsonl", "b.csv", "c.tsv"]),
    "rows beside their test": (["train.jsonl", "test.jsonl"], {}, ["train.jsonl"]),
    "evaluation of them": (["train.jsonl", "test.jsonl"], {"evaluation": True}, ["test.jsonl"]),
    "validation comes first": (["train.csv", "dev.csv", "test.csv"], {"evaluation": True}, ["dev.csv"]),
    "another word for it": (["train.csv", "dev.csv"], {"split": "validation"}, ["dev.csv"]),
    "one split is named": (["train.jsonl", "more.jsonl"], {}, ["more.jsonl", "train.jsonl"]),
    "neither is named": (["math.jsonl", "train_chat.jsonl", "eval_chat.jsonl"], {}, "math.jsonl would be left out, beside files that are named by a split; name one in split (test, train), or the files by *"),
    "one of them all the same": (["math.jsonl", "train_chat.jsonl", "eval_chat.jsonl"], {"split": "train"}, ["train_chat.jsonl"]),
    "a folder beside dev": (["support/a.jsonl", "dev/b.jsonl"], {}, "support/a.jsonl would be left out"),
    "only a test": (["test/a.jsonl"], {}, "there is no split train; name one in split: test"),
    "only a test, to evaluate on": (["test/a.jsonl"], {"evaluation": True}, ["test/a.jsonl"]),
    "only a training set, to evaluate on": (["train/a.jsonl"], {"evaluation": True}, ["train/a.jsonl"]),
    "texts about the rows": (["x/a.parquet", "x/LICENSE.txt", "requirements.txt"], {"split": "train"}, ["x/a.parquet"]),
    "texts that are the rows": (["x/a.txt", "x/b.txt"], {}, ["x/a.txt", "x/b.txt"]),
    "saved sets further down": (["x/rows.arrow", "x/state.json", "x/dataset_info.json", "x/y/config.json"], {}, ["x/rows.arrow"]),
    "folders": (["train/a.csv", "train/b.csv", "test/c.csv", ".git/train/d.csv"], {}, ["train/a.csv", "train/b.csv"]),
    "shards": (SHARDS, {"split": "test_sft"}, SHARDS[2:]),
    "splits of other names": (SHARDS, {}, "there is no split train; name one in split: test_sft, train_sft"),
    "no such split": (SHARDS, {"split": "dev"}, "there is no split dev; there is test_sft, train_sft"),
    "no such config": (SHARDS, {"config": "main"}, "README.md there declares no configs; remove config main"),
    "the default config": (CONFIGURED, {}, ["main/b.jsonl.gz", "main/x/a.jsonl.gz"]),
    "its evaluation": (CONFIGURED, {"evaluation": True}, ["main/dev.csv"]),
    "another": (CONFIGURED, {"config": "plain"}, ["data/plain/part-0.csv", "data/plain/part-1.csv"]),
    "its test": (CONFIGURED, {"config": "plain", "split": "test"}, ["data/plain/held.csv"]),
    "a folder's names": (CONFIGURED, {"config": "named", "split": "val"}, ["named/val-1.csv"]),
    "an unknown one": (CONFIGURED, {"config": "x"}, "there is no config x; there is elsewhere, gone, main, named, plain"),
    "without files": (CONFIGURED, {"config": "gone"}, "split train has no files; there is README.md, data/plain/held.csv"),
    "at another place": (CONFIGURED, {"config": "elsewhere"}, "README.md names https://host/rows.csv; make that a source"),
    "converted": (["a/train/0000.parquet", "a/test/0000.parquet", "b/train/0000.parquet"], {"config": "b"}, ["b/train/0000.parquet"]),
    "converted, several": (["a/train/0000.parquet", "b/train/0000.parquet"], {}, "name one of its configs in config: a, b"),
    "a file": (["rows.csv"], {"below": "/rows.csv", "split": "train"}, "choose among the files of a folder, and this is a file"),
    "cut off": (["state.json", "dataset_info.json"], {}, "data-00000-of-00001.arrow is not there; copy what save_to_disk wrote"),
    "nothing": (["notes.md"], {}, "no file matches; a data file ends in"),
    "what is there": (["notes.md"], {}, "there is notes.md"),
}  # fmt: skip


@pytest.fixture
def listed(tmp_path: Path) -> Callable[..., list[str]]:
    def files(
        names: list[str], *, below: str = "", evaluation: bool = False, images: bool = False, **asked: Any
    ) -> list[str]:
        contents = {"README.md": CONFIGS, "state.json": json.dumps(SAVED if "dataset_info.json" in names else {})}
        for name in names:
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).write_text(contents.get(name, ""))
        base = f"file://{tmp_path}/set"
        source = Source.model_validate({"uri": f"{base}{below}", **asked})
        found = source_files(source, tmp_path / "into", Roots(), images=images, evaluation=evaluation)
        return [file.uri.removeprefix(f"{base}/") for file in found]

    return files


@pytest.mark.parametrize("case", CASES)
def test_files_of_a_split(listed: Callable[..., list[str]], case: str) -> None:
    names, asked, expected = CASES[case]
    if isinstance(expected, list):
        assert listed(names, **asked) == expected
        return
    with pytest.raises(UserError) as caught:
        listed(names, **asked)
    assert expected in str(caught.value)


def test_classes_of_images_are_no_splits(listed: Callable[..., list[str]]) -> None:
    assert listed(["car/1.png", "train/test_2.png"], images=True) == ["car/1.png", "train/test_2.png"]


def test_images_beside_tables_are_no_rows(listed: Callable[..., list[str]]) -> None:
    names = ["train.csv", "test.csv", "train/1.png", "test/3.png"]
    assert listed(names, images=True) == ["train.csv"]
    assert listed(names, images=True, evaluation=True) == ["test.csv"]


@pytest.mark.parametrize("name", ["../rows.arrow", "x/../../rows.arrow", "{}/rows.arrow"])
def test_what_was_saved_lies_in_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.arrow").touch()
    (tmp_path / "set/x").mkdir(parents=True)
    saved = {"_data_files": [{"filename": name.format(tmp_path)}]}
    (tmp_path / "set/state.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="which is not in the folder; save it again"):
        source_files(Source(uri=f"file://{tmp_path}/set"), tmp_path / "into", Roots())


def test_a_repository_is_read_alike_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rows.jsonl", "more/rows.jsonl"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(downloads, "snapshot", lambda *_: tmp_path / "set")
    found = source_files(Source(uri="hf://org/set"), tmp_path / "into", Roots())
    assert [file.uri for file in found] == ["hf://org/set/more/rows.jsonl", "hf://org/set/rows.jsonl"]


def test_splits_hold_classes_of_images(listed: Callable[..., list[str]]) -> None:
    names = ["train/car/1.png", "train/bus/2.png", "test/car/3.png"]
    assert listed(names, images=True) == ["train/bus/2.png", "train/car/1.png"]
    assert listed(names, images=True, evaluation=True) == ["test/car/3.png"]


def test_names_tell_splits_as_datasets_reads_them(tmp_path: Path) -> None:
    """Against datasets itself, folder by folder."""
    from datasets.data_files import get_data_patterns, resolve_pattern

    folders = [
        ["train.csv", "test.csv", "extra.csv"],
        ["my-train-file.csv", "dev_1.csv", "trainer.csv"],
        ["train/a.csv", "eval/b.csv", "train.csv"],
        ["x/training-2/a.csv", "x/valid/b.csv"],
        SHARDS,
        ["data/test-00000-of-00001.parquet", "train.csv"],
    ]
    for i, names in enumerate(folders):
        base = tmp_path / str(i)
        for name in names:
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).write_text("x")
        theirs = {}
        for split, patterns in get_data_patterns(str(base)).items():
            found: set[str] = set()
            for pattern in patterns:
                with contextlib.suppress(FileNotFoundError):
                    found |= {Path(path).relative_to(base).as_posix() for path in resolve_pattern(pattern, str(base))}
            theirs[str(split)] = sorted(found)
        assert {split: sorted(files) for split, files in told(names).items()} == theirs
