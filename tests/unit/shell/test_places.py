"""Locations on this machine: what a URI means, and the sentences for those that are wrong."""

import hashlib
import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from finetune_crds.v1alpha1 import Location
from finetune_trainer.errors import UserError
from finetune_trainer.storage import downloads
from finetune_trainer.storage.places import materialise
from finetune_trainer.storage.roots import ENV_ROOT, Roots
from finetune_trainer.storage.sources import _THREADS, fetched, fits, local_file, source_files, wanted
from finetune_trainer.storage.trees import SourceFile


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    """A claim `data` and a ConfigMap `faq`."""
    found = Roots.below(tmp_path)
    folder = found.volumes / "data" / "support"
    folder.mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.zst", "notes.md", ".hidden.jsonl", "_SUCCESS.txt"):
        (folder / name).write_text(name)
    (folder / "nested").mkdir()
    (folder / "nested" / "d.jsonl").write_text("d")
    (found.configmaps / "faq").mkdir(parents=True)
    (found.configmaps / "faq" / "train.jsonl").write_text("{}")
    return found


def names(uri: str, roots: Roots, into: Path) -> list[str]:
    return [file.uri.rpartition("/")[2] for file in source_files(Location(uri=uri), into, roots)]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("pvc://data/support/a.jsonl", ["a.jsonl"]),
        ("pvc://data/support/notes.md", ["notes.md"]),
        ("pvc://data/support", ["a.jsonl", "b.jsonl", "c.jsonl.zst"]),
        ("pvc://data/support/", ["a.jsonl", "b.jsonl", "c.jsonl.zst"]),
        ("pvc://data/support/*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("pvc://data/support/*", ["_SUCCESS.txt", "a.jsonl", "b.jsonl", "c.jsonl.zst", "notes.md"]),
        ("configmap://faq/train.jsonl", ["train.jsonl"]),
    ],
)
def test_files_of_a_source(uri: str, expected: list[str], roots: Roots, tmp_path: Path) -> None:
    assert names(uri, roots, tmp_path / "into") == expected


def test_a_source_file_is_described_by_content(roots: Roots, tmp_path: Path) -> None:
    (listed,) = source_files(Location(uri="pvc://data/support/a.jsonl"), tmp_path / "into", roots)
    ((_, path),) = fetched([listed])
    file = local_file(listed.uri, path)
    assert (file.uri, file.size) == ("pvc://data/support/a.jsonl", 7) == (listed.uri, listed.size)
    assert file.sha256 == hashlib.sha256(b"a.jsonl").hexdigest()
    assert path == roots.volumes / "data/support/a.jsonl" and path.is_file()


def test_who_stops_reading_waits_for_no_further_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    go = threading.Event()
    monkeypatch.setattr(downloads, "forget", lambda _: go.set())

    def fetch(number: int) -> Path:
        begun.append(number)
        if number:
            go.wait()
            time.sleep(0.05)
        return tmp_path / f"{number}"

    files = (SourceFile(f"https://h/{i}", "", 1, partial(fetch, i), tmp_path) for i in range(40))
    reading = fetched(files)
    next(reading)
    reading.close()
    assert 0 in begun and set(begun) <= set(range(_THREADS + 1))


def test_local_files_need_no_root(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    (file,) = source_files(Location(uri=f"file://{tmp_path}/rows.jsonl"), tmp_path / "into", Roots())
    assert file.fetch() == tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("pvc://absent/x", "PersistentVolumeClaim absent is not mounted; create it in the job's namespace"),
        ("configmap://absent/x", "ConfigMap absent is not mounted"),
        ("configmap://faq/test.jsonl", "there is no such key; faq holds train.jsonl"),
        ("pvc://data/suport/a.jsonl", "there is no such file or folder; data holds support"),
        ("pvc://data/support/x.jsonl", "support holds _SUCCESS.txt, a.jsonl, b.jsonl, c.jsonl.zst, nested, notes.md"),
        ("pvc://data/support/*.csv", "no file matches"),
        ("pvc://data/*/a.jsonl", "* matches within a folder only"),
        ("pvc://data/support/nested/../a.csv", "no such file"),
    ],
)
def test_a_wrong_place_is_told_in_a_sentence(uri: str, sentence: str, roots: Roots, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        source_files(Location(uri=uri), tmp_path / "into", roots)
    assert str(caught.value).startswith(uri)
    assert sentence in str(caught.value)


def test_a_model_is_used_where_it_is(roots: Roots, tmp_path: Path) -> None:
    assert materialise(Location(uri="pvc://data/support"), tmp_path / "into", roots) == roots.volumes / "data/support"
    assert not (tmp_path / "into").exists()
    with pytest.raises(UserError, match="data holds support"):
        materialise(Location(uri="pvc://data/model"), tmp_path / "into", roots)


def test_only_a_star_is_special() -> None:
    assert fits("rows[1].jsonl", "rows[1]*")
    assert not fits("rows1.jsonl", "rows[1]*")
    assert not fits("rows1.jsonl", "rows?.jsonl")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("pvc://data/pets", ["cat/1.png", "cat/2.JPG", "dog/1.png"]),
        ("pvc://data/pets/c*", ["cat/1.png", "cat/2.JPG"]),
        ("pvc://data/pets/dog/1.png", ["dog/1.png"]),
        ("pvc://data/listed", ["pets.csv"]),
    ],
)
def test_images_lie_in_folders_by_class(uri: str, expected: list[str], roots: Roots, tmp_path: Path) -> None:
    """Beside a table they are what its rows name."""
    for name in (
        "cat/1.png",
        "cat/2.JPG",
        "cat/._1.png",
        "cat/Thumbs.db",
        "dog/1.png",
        "dog/old/3.png",
        ".cache/4.png",
        "5.png",
    ):
        for folder in ("pets", "listed"):
            file = roots.volumes / "data" / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(name)
    (roots.volumes / "data/listed/pets.csv").write_text("image,label")
    found = source_files(Location(uri=uri), tmp_path / "into", roots, images=True)
    start = f"pvc://data/{uri.split('/')[3]}/"
    assert [file.uri.removeprefix(start) for file in found] == expected
    which = wanted(uri, images=True)
    if uri != "pvc://data/pets/dog/1.png":
        assert all(which.matches(file.uri.removeprefix(start)) for file in found)


def test_a_pattern_matches_names_only(roots: Roots) -> None:
    which = wanted("s3://corp/support/2026-*.jsonl")
    assert which.folder == "support" and which.matches("2026-01.jsonl")
    assert not which.matches("old/2026-01.jsonl")
    assert not which.matches("2025-01.jsonl")


def test_roots_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ENV_ROOT, raising=False)
    assert Roots.from_environment().volumes == Path("/finetune/volumes")
    monkeypatch.setenv(ENV_ROOT, os.fspath(tmp_path))
    assert Roots.from_environment() == Roots.below(tmp_path)
    assert Roots.from_environment().secrets == tmp_path / "secrets"
