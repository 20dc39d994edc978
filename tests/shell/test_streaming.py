"""Sets that are larger than the disk: of a real S3 server's files one is here at a time, and a token budget leaves files where they are."""

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.s3 import ObjectStore
from finetune_crds.resolved import ResolvedFineTune
from finetune_crds.v1alpha1 import Location
from finetune_trainer.data import few_shot, prepare
from finetune_trainer.data.holdout import divide
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.storage import downloads, sources
from finetune_trainer.storage.roots import Roots
from training import tiny

FILES, ROWS = 8, 40
Prepare = Callable[..., RowSet]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def bucket(object_store: ObjectStore, request: pytest.FixtureRequest) -> Path:
    """Rows of equal size in several files."""
    name = "b" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    folder = object_store.create_bucket(name)
    for i in range(FILES):
        rows = [{**row, "file": i} for row in tiny.chat_rows(ROWS, seed=i)]
        (folder / "rows").mkdir(exist_ok=True)
        content = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"rows/{i}.jsonl.gz").write_bytes(gzip.compress(content.encode(), mtime=0))
    return folder


class Watch:
    """What lies on scratch beside the prepared set, seen between batches."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.peak, self.batches = folder, 0, 0

    def __call__(self) -> None:
        self.batches += 1
        self.peak = max(self.peak, size_of(self.folder))


@pytest.fixture
def run(
    object_store: ObjectStore, bucket: Path, roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[RowSet, ResolvedFineTune, prepare.Dataset, list[str]]]:
    monkeypatch.setattr(sources, "AHEAD", 0)
    monkeypatch.setattr(prepare, "BATCH_ROWS", 16)
    fetched: list[str] = []
    fetch_object = downloads.fetch_object
    monkeypatch.setattr(
        downloads, "fetch_object", lambda *given: (fetched.append(given[2]["path"]), fetch_object(*given))[1]
    )

    def prepared(watch: Callable[[], None] = lambda: None, uri: str = "", **dataset: Any) -> Any:
        fetched.clear()
        source = {"uri": f"s3://{bucket.name}/rows", "endpoint": object_store.endpoint, "secretRef": {"name": "s3"}}
        spec = tiny.job(
            tmp_path, Path("/m"), [{"uri": uri} if uri else source], training={"sequenceLength": 1024}, dataset=dataset
        ).spec
        assert isinstance(spec, ResolvedFineTune)
        listed = [sources.source_files(one, tmp_path / "in", roots) for one in spec.dataset.train]
        files = prepare.Dataset(listed, [], [])
        rows = prepare.prepare(spec, files, tiny.tokenizer(), tmp_path / "prepared", check_stop=watch)
        return rows, spec, files, list(fetched)

    return prepared


def test_one_file_at_a_time(run: Callable[..., Any], bucket: Path, tmp_path: Path) -> None:
    watch = Watch(tmp_path / "in")
    rows, _, _, fetched = run(watch)
    largest = max(path.stat().st_size for path in (bucket / "rows").iterdir())
    assert len(fetched) == FILES and len(rows.targets) == FILES * ROWS
    assert 0 < watch.peak < largest + 100, "one file, and a note of its version"
    assert size_of(tmp_path / "in") == 0
    here, *_ = run(uri=f"file://{bucket}/rows")
    assert np.array_equal(rows.tokens, here.tokens) and np.array_equal(rows.files, here.files)
    again = Watch(tmp_path / "in")
    _, _, _, fetched = run(again)
    assert (fetched, again.batches) == ([], 0), "what is prepared needs no file"
    changed = bucket / "rows/3.jsonl.gz"
    changed.write_bytes(gzip.compress(gzip.decompress(changed.read_bytes()).replace(b"red", b"RED")))
    other, *_ = run()
    assert other.index.digest != rows.index.digest


def test_small_files_come_together(
    run: Callable[..., Any], bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sum(path.stat().st_size for path in (bucket / "rows").iterdir())
    monkeypatch.setattr(sources, "AHEAD", sizes // 2)
    watch = Watch(tmp_path / "in")
    run(watch)
    assert sizes // FILES * 2 < watch.peak < sizes // 2 + 1000
    assert size_of(tmp_path / "in") == 0


def test_what_was_broken_off_is_done_again(run: Callable[..., Any], tmp_path: Path) -> None:
    def stop() -> None:
        if watch.batches == 5:
            raise InterruptedError
        watch()

    watch = Watch(tmp_path / "in")
    with pytest.raises(InterruptedError):
        run(stop)
    broken, *_ = run()
    whole, *_ = run(tokenBudget=10**9)
    assert len(broken.targets) == len(whole.targets) == FILES * ROWS
    assert size_of(tmp_path / "in") == 0


def test_a_budget_leaves_files_where_they_are(run: Callable[..., Any], tmp_path: Path) -> None:
    whole, *_ = run()
    one = int(whole.offsets[-1]) // FILES
    rows, spec, _, fetched = run(tokenBudget=one // 2)
    assert len(fetched) == 2 or len(fetched) == 3, "four times the budget is two files, about"
    read = sorted(set(rows.files.tolist()))
    assert sorted(fetched) == [f"rows/{i}.jsonl.gz" for i in read]
    assert rows.index.shares[0] == pytest.approx(len(fetched) / FILES, rel=0.05)
    division = divide(spec, rows)
    assert 0.8 * one / 2 < rows.lengths[division.train].sum() <= one / 2
    assert len(set(rows.files[division.train].tolist())) == len(read), "from all that were read"
    again, _, _, fetched = run(tokenBudget=one // 2)
    assert fetched == [] and again.index.digest == rows.index.digest
    other, *_ = run(tokenBudget=one * 4)
    assert other.index.digest != rows.index.digest and len(other.targets) == FILES * ROWS and not other.index.shares


def test_examples_for_prompting_are_read_again_in_part(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, spec, files, _ = run(evaluation={"fraction": "0.2"})
    wanted = np.arange(len(rows.targets))
    monkeypatch.setattr(few_shot, "_REREAD", 1)
    near = few_shot._near(spec, files, rows, wanted)
    assert len(set(rows.files[near].tolist())) == 1
    found = few_shot._examples(spec, files, rows, near[:3])
    assert len(found) == 3 and size_of(tmp_path / "in") == 0
    monkeypatch.setattr(few_shot, "_REREAD", 10**9)
    assert len(few_shot._near(spec, files, rows, wanted)) == len(wanted)


def test_images_that_a_table_names_are_there_with_it(
    object_store: ObjectStore, bucket: Path, roots: Roots, tmp_path: Path
) -> None:
    folder = bucket / "pets/cats"
    folder.mkdir(parents=True)
    for i in range(2):
        (folder / f"{i}.png").write_bytes(f"{i}".encode())
    (bucket / "pets/pets.csv").write_text("image,label\ncats/0.png,cat\ncats/1.png,cat\n")
    place = {"uri": f"s3://{bucket.name}/pets", "endpoint": object_store.endpoint, "secretRef": {"name": "s3"}}

    def listed() -> sources.SourceFile:
        (file,) = sources.source_files(Location.model_validate(place), tmp_path / "in", roots, images=True)
        return file

    for file, path in sources.fetched([listed()]):
        assert file.uri == f"s3://{bucket.name}/pets/pets.csv"
        assert [(path.parent / f"cats/{i}.png").read_text() for i in range(2)] == ["0", "1"]
    (folder / "1.png").write_bytes(b"other")
    for _, path in sources.fetched([listed()]):
        assert (path.parent / "cats/1.png").read_text() == "other"
