"""Files that are too large for scratch are read as they arrive: from a real S3 server, from https, and from as much of the hub as its client asks for."""

import csv
import gzip
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from cluster.s3 import ObjectStore
from finetune_crds.resolved import ResolvedFineTune
from finetune_crds.v1alpha1 import Location
from finetune_trainer import setup
from finetune_trainer.data import few_shot, prepare, rows
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.errors import StorageError, UserError
from finetune_trainer.storage import downloads, patience, remote_files, s3, sources
from finetune_trainer.storage.roots import ENV_ROOT, Roots
from training import tiny

from .file_server import Files
from .test_streaming import Watch, size_of

ROWS, GROUP, BLOCK, COMMIT = 480, 60, 2 * 1024, "c0ffee" * 6 + "c0ff"
FOOTER = 64 * 1024
"""Bytes from the end that pyarrow reads of Parquet first."""
draw = random.Random(3)
ALL = [{"prompt": f"{i} {draw.randbytes(60).hex()}", "completion": draw.randbytes(40).hex()} for i in range(ROWS)]
LINES = "".join(json.dumps(row) + "\n" for row in ALL).encode()


def _csv() -> bytes:
    text = io.StringIO()
    table = csv.DictWriter(text, ["prompt", "completion"])
    table.writeheader()
    table.writerows(ALL)
    return text.getvalue().encode()


def _columns(write: Callable[[Any, Any], None], rows: list[dict[str, Any]] = ALL) -> bytes:
    sink = pyarrow.BufferOutputStream()
    write(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def _arrow(new: Callable[..., Any]) -> bytes:
    def write(table: Any, sink: Any) -> None:
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=GROUP)

    return _columns(write)


def _parquet(table: Any, sink: Any) -> None:
    pyarrow.parquet.write_table(table, sink, row_group_size=GROUP)


PARQUET = _columns(_parquet)
FORMATS = {
    "rows.jsonl": LINES,
    "rows.jsonl.zst": zstandard.compress(LINES),
    "rows.csv.gz": gzip.compress(_csv()),
    "rows.json": json.dumps(ALL).encode(),
    "rows.parquet": PARQUET,
    "rows.parquet.gz": gzip.compress(PARQUET),
    "stream.arrow": _arrow(pyarrow.ipc.new_stream),
    "file.arrow": _arrow(pyarrow.ipc.new_file),
}


class Bucket:
    """One of a test's own, written as users do."""

    def __init__(self, store: ObjectStore, roots: Roots, name: str) -> None:
        store.create_bucket(name)
        self.place = {"uri": f"s3://{name}", "endpoint": store.endpoint, "secretRef": {"name": "s3"}}
        self.client = s3.client(Location.model_validate(self.place), roots)

    def put(self, name: str, content: bytes) -> dict[str, Any]:
        obstore.put(self.client, name, content)
        return self.place | {"uri": f"{self.place['uri']}/{name}"}


@pytest.fixture
def bucket(object_store: ObjectStore, roots: Roots, request: pytest.FixtureRequest) -> Bucket:
    return Bucket(object_store, roots, "a" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "BLOCK", BLOCK)
    monkeypatch.setattr(remote_files, "_BUFFER", 1024)
    monkeypatch.setattr(prepare, "BATCH_ROWS", 16)
    monkeypatch.setattr(rows, "BATCH_ROWS", GROUP // 3)
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    for variable in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)


class Seen:
    """What was fetched, and what was opened where it lies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fetched: list[str] = []
        self.opened: list[remote_files.RemoteFile] = []
        for name in ("fetch_object", "from_https", "from_repository"):
            self._note(monkeypatch, name, lambda _, name=name: self.fetched.append(name))
        for name in ("open_object", "open_https", "open_in_repository"):
            self._note(monkeypatch, name, self.opened.append)

    def _note(self, monkeypatch: pytest.MonkeyPatch, name: str, note: Callable[[Any], None]) -> None:
        call = getattr(downloads, name)

        def noting(*given: Any) -> Any:
            made = call(*given)
            note(made)
            return made

        monkeypatch.setattr(downloads, name, noting)

    @property
    def arrived(self) -> int:
        return sum(file.arrived for file in self.opened)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


Run = Callable[..., tuple[RowSet, ResolvedFineTune, prepare.Dataset]]


@pytest.fixture
def run(roots: Roots, tmp_path: Path) -> Run:
    """Prepares sources with so much scratch."""

    def prepared(
        *train: dict[str, Any], scratch: str = "32Ki", watch: Callable[[], None] = lambda: None,
        into: str = "prepared", **dataset: Any,
    ) -> tuple[RowSet, ResolvedFineTune, prepare.Dataset]:  # fmt: skip
        spec = tiny.job(
            tmp_path, Path("/m"), list(train), training={"sequenceLength": 512},
            resources={"gpusPerNode": 0, "scratch": scratch}, dataset=dataset,
        ).spec  # fmt: skip
        assert isinstance(spec, ResolvedFineTune)
        held_out = spec.dataset.evaluation
        most = sources.room_for_file(spec.resources.scratch)
        listed = [
            [sources.source_files(one, tmp_path / "in", roots, room=most) for one in group]
            for group in (spec.dataset.train, (held_out and held_out.sources) or [])
        ]
        files = prepare.Dataset(listed[0], listed[1], [])
        return prepare.prepare(spec, files, tiny.tokenizer(), tmp_path / into, check_stop=watch), spec, files

    return prepared


def at(batch: int, action: Callable[[], None]) -> Callable[[], None]:
    """Does something between two batches."""
    batches = iter(range(1000))
    return lambda: action() if next(batches) == batch else None


def same(one: RowSet, other: RowSet) -> bool:
    names = ("tokens", "learned", "offsets", "numbers", "content")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize("name", FORMATS)
def test_what_arrives_is_prepared_as_if_it_had_been_fetched(
    bucket: Bucket, run: Run, seen: Seen, tmp_path: Path, name: str
) -> None:
    place = bucket.put(name, FORMATS[name])
    watch = Watch(tmp_path / "in")
    arrived, *_ = run(place, watch=watch)
    assert (seen.fetched, len(seen.opened), watch.peak) == ([], 1, 0) and watch.batches >= ROWS / 16
    assert len(FORMATS[name]) <= seen.arrived < 1.02 * len(FORMATS[name]) + FOOTER * ("parquet" in name), (
        "it comes once"
    )
    fetched, *_ = run(place, scratch="50Gi", into="other")
    assert seen.fetched == ["fetch_object"] and len(arrived.targets) == ROWS and same(arrived, fetched)
    assert arrived.index.digest == fetched.index.digest, "another scratch makes no other data"
    assert arrived.index.digests[0] == f"sha256:{hashlib.sha256(FORMATS[name]).hexdigest()}"


def test_row_groups_smaller_than_what_is_taken_at_a_time_come_once(
    bucket: Bucket, run: Run, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BATCH_ROWS", 2 * GROUP + 8)
    found, *_ = run(bucket.put("rows.parquet", PARQUET))
    assert len(found.targets) == ROWS and seen.arrived < 1.02 * len(PARQUET) + FOOTER


def test_half_of_scratch_is_for_a_file_and_images_lie_beside_their_table(
    bucket: Bucket, roots: Roots, tmp_path: Path
) -> None:
    place = Location.model_validate(bucket.put("rows.jsonl", LINES))
    for scratch, images, arrives in (
        (2 * len(LINES), False, False),
        (2 * len(LINES) - 2, False, True),
        ("1Ki", True, False),
    ):
        (file,) = sources.source_files(
            place, tmp_path / "in", roots, images=images, room=sources.room_for_file(scratch)
        )
        assert (file.arrive is not None) == arrives


def test_what_is_prepared_is_found_again(bucket: Bucket, run: Run, seen: Seen) -> None:
    place = bucket.put("rows.jsonl", LINES)
    first, *_ = run(place)
    seen.opened.clear()
    again, *_ = run(place)
    assert (again.folder, seen.opened) == (first.folder, [])
    bucket.put("rows.jsonl", LINES.replace(b"prompt", b"PROMPT", 1).replace(b"PROMPT", b"prompt")[:-1])
    other, *_ = run(place)
    assert len(seen.opened) == 1 and other.index.digest != first.index.digest


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "stream.arrow", "file.arrow", "rows.csv.gz"])
def test_an_object_that_changes_on_the_way_is_told(bucket: Bucket, run: Run, tmp_path: Path, name: str) -> None:
    place = bucket.put(name, FORMATS[name])
    with pytest.raises(StorageError) as told:
        run(place, watch=at(1, lambda: bucket.put(name, FORMATS[name][::-1]) and None))
    assert str(told.value).startswith(f"{place['uri']}: it changed while it was read")
    assert not list((tmp_path / "prepared").glob("*/index.json")) and size_of(tmp_path / "in") == 0


def test_of_a_budget_the_beginning_is_read(bucket: Bucket, run: Run, seen: Seen) -> None:
    place = bucket.put("rows.jsonl", LINES)
    found, *_ = run(place, tokenBudget=4000)
    count = len(found.targets)
    assert found.numbers.tolist() == list(range(1, count + 1))
    of_one = int(found.offsets[-1]) / count
    assert 16000 < found.offsets[-1] < 16000 + of_one * (16 + 9 * 1024 / (len(LINES) / ROWS)), (
        "a batch, and what text is read by"
    )
    assert found.index.shares[0] == pytest.approx(count / ROWS, abs=0.03) and seen.arrived < len(LINES) / 2
    again, *_ = run(place, tokenBudget=4000, into="anew")
    assert again.index.digest == found.index.digest and same(again, found)
    assert run(place, tokenBudget=4001)[0].index.digest != found.index.digest
    opened = len(seen.opened)
    assert run(place, tokenBudget=4000)[0].folder == found.folder and len(seen.opened) == opened
    whole, *_ = run(place, tokenBudget=10**6)
    assert len(whole.targets) == ROWS and not whole.index.shares
    cut = LINES.splitlines(keepends=True)
    bucket.put("rows.jsonl", b"".join([cut[0].replace(b"0 ", b"1 "), *cut[1:]]))
    assert run(place, tokenBudget=4000)[0].index.digest != found.index.digest


def test_what_has_arrived_is_read_for_a_budget(bucket: Bucket, run: Run) -> None:
    """Row groups and lists come whole: no row of them is left, so that the share that was read is true."""
    wide = _columns(_parquet, [{**row, "unused": draw.randbytes(4000)} for row in ALL])
    groups, *_ = run(bucket.put("rows.parquet", wide), tokenBudget=2000)
    assert len(groups.targets) == GROUP
    assert groups.index.shares[0] == pytest.approx(GROUP / ROWS + FOOTER / len(wide), abs=0.03)
    whole, *_ = run(bucket.put("rows.json", FORMATS["rows.json"]), tokenBudget=2000)
    assert len(whole.targets) == ROWS and not whole.index.shares


def test_sources_give_parts_of_a_budget_by_size_and_evaluation_is_read_whole(bucket: Bucket, run: Run) -> None:
    first = bucket.put("one.jsonl", LINES)
    second = bucket.put("two.jsonl", LINES * 3)
    held_out = bucket.put("three.jsonl", LINES)
    found, *_ = run(first, second, tokenBudget=20_000, evaluation={"sources": [held_out]})
    counts = {source: int((found.sources == source).sum()) for source in (0, 1, -1)}
    assert counts[-1] == ROWS and 0.1 * ROWS < counts[0] < 0.4 * ROWS and 1.8 * counts[0] < counts[1] < 3.6 * counts[0]
    for source, of_all in ((0, ROWS), (1, 3 * ROWS)):
        assert found.index.shares[source] == pytest.approx(counts[source] / of_all, abs=0.02)


def test_what_was_read_before_a_file_is_not_charged_to_it(
    bucket: Bucket, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "BATCH_ROWS", ROWS // 2)
    first, second = bucket.put("one.jsonl", LINES), bucket.put("two.jsonl", LINES)
    found, *_ = run(first, second, tokenBudget=8000)
    assert min((found.sources == source).sum() for source in (0, 1)) > 16000 / (found.offsets[-1] / len(found.targets))


def test_a_whole_file_that_fills_a_budget_leaves_those_that_arrive_their_parts(
    bucket: Bucket, run: Run, seen: Seen
) -> None:
    small = bucket.put("small.jsonl", b"".join(LINES.splitlines(keepends=True)[:60]))
    for i in range(4):
        bucket.put(f"large/{i}.jsonl", LINES)
    large = small | {"uri": f"{bucket.place['uri']}/large"}
    found, *_ = run(small, large, tokenBudget=2500)
    assert (seen.fetched, len(seen.opened)) == (["fetch_object"], 4)
    tokens = [int(found.lengths[found.files == number].sum()) for number in range(5)]
    part = 4 * 2500 * len(LINES) / (4 * len(LINES) + len(LINES) * 60 / ROWS)
    assert tokens[0] > part and all(part < one < part + 15_000 for one in tokens[1:])


def test_examples_for_prompting_come_from_the_beginning(
    bucket: Bucket, run: Run, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, spec, files = run(bucket.put("rows.jsonl", LINES), evaluation={"fraction": "0.2"})
    seen.opened.clear()
    monkeypatch.setattr(few_shot, "_REREAD", len(LINES) // 4)
    monkeypatch.setattr(few_shot, "_TOKEN", 1)  # this tokenizer's
    near = few_shot._near(spec, files, read, np.arange(ROWS))
    assert ROWS / 8 < len(near) < ROWS / 3 and near.tolist() == list(range(len(near)))
    found = few_shot._examples(spec, files, read, near[[3, 7]])
    assert [found[row].prompt for row in (3, 7)] == [ALL[row]["prompt"] for row in (3, 7)]
    assert seen.fetched == [] and seen.arrived < len(LINES) / 4 and size_of(tmp_path / "in") == 0


def test_a_job_reads_so_by_its_own_scratch(
    bucket: Bucket, roots: Roots, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_ROOT, str(roots.secrets.parent))
    model = tiny.make_model(tmp_path / "model")
    place = bucket.put("rows.parquet", PARQUET)
    for scratch, fetched in (("32Ki", []), ("1Gi", ["fetch_object"])):
        resources = {"gpusPerNode": 0, "scratch": scratch}
        job = tiny.job(tmp_path, model, [place], training={"sequenceLength": 512}, resources=resources)
        reading = setup.read(job.spec, tiny.context(job, tmp_path / scratch))
        assert len(reading.rows.targets) == ROWS and seen.fetched == fetched and len(seen.opened) == 1


@pytest.fixture
def signed(web: Files) -> dict[str, Any]:
    """Rows at an address with a signature."""
    web.files["/rows.jsonl"] = LINES
    return {"uri": f"{web.address}/rows.jsonl?signature=Zx81"}


def test_a_connection_that_breaks_goes_on_where_it_stopped(
    web: Files, run: Run, signed: dict[str, Any], seen: Seen
) -> None:
    web.troubles = ["torn", 503]
    found, *_ = run(signed)
    assert len(found.targets) == ROWS and seen.fetched == []
    asked = [
        tuple(map(int, (each or "").removeprefix("bytes=").split("-")))
        for method, _, each in web.requests
        if method == "GET"
    ]
    inside = [(start, end) for start, end in asked if start % BLOCK]
    assert len(set(inside)) == 1 and inside[0][0] % BLOCK == BLOCK // 2 and (inside[0][1] + 1) % BLOCK == 0
    assert len(asked) == -(-len(LINES) // BLOCK) + 2, "one more for each trouble"


@pytest.mark.parametrize(
    ("trouble", "kind", "sentence"),
    [
        ("changed", StorageError, "it changed while it was read"),
        ("shorter", StorageError, "it changed while it was read"),
        ("whole", UserError, rf"does not give those that it is asked for; set resources.scratch to at least {2 * len(LINES)} bytes"),
        ("nameless", UserError, r"names no version \(ETag or Last-Modified\) with the parts"),
        (403, UserError, r"refused without credentials \(403\); sign the address anew"),
        (404, UserError, r"not found \(404\)"),
        ("torn", StorageError, "could not be read after 6 tries"),
    ],
)  # fmt: skip
def test_what_goes_wrong_on_the_way_is_told_without_the_signature(
    web: Files,
    run: Run,
    signed: dict[str, Any],
    tmp_path: Path,
    trouble: int | str,
    kind: type[Exception],
    sentence: str,
) -> None:
    def happen() -> None:
        match trouble:
            case "changed":
                web.files["/rows.jsonl"] = LINES[::-1]
            case "shorter":
                web.files["/rows.jsonl"] = LINES[:BLOCK]
            case "whole":
                web.gives_parts = False
            case "nameless":
                web.parts_have_versions = False
            case _:
                web.troubles = [trouble] * 1000

    with pytest.raises(kind, match=sentence) as told:
        run(signed, watch=at(1, happen))
    assert str(told.value).startswith(f"{web.address}/rows.jsonl: ") and "Zx81" not in str(told.value)
    assert not list((tmp_path / "prepared").glob("*/index.json"))


def test_blocks_come_over_the_same_connections(web: Files, run: Run, signed: dict[str, Any]) -> None:
    run(signed)
    assert web.connections <= 1 + remote_files.AHEAD < len(web.requests) / 4


def test_a_server_may_give_less_at_a_time(web: Files, run: Run, signed: dict[str, Any]) -> None:
    web.most = BLOCK // 20
    found, *_ = run(signed)
    assert len(found.targets) == ROWS and web.connections <= 1 + remote_files.AHEAD


def test_a_token_that_is_renewed_is_read_anew(web: Files, run: Run, roots: Roots, signed: dict[str, Any]) -> None:
    renew = at(9, lambda: (roots.secrets / "hub/token").write_text("hf_new") and None)
    found, *_ = run(signed | {"secretRef": {"name": "hub"}}, watch=renew)
    assert len(found.targets) == ROWS and {"Bearer hf_right", "Bearer hf_new"} == set(web.authorizations)


def test_what_a_server_does_not_give_in_parts_is_fetched(
    web: Files, run: Run, signed: dict[str, Any], seen: Seen
) -> None:
    web.gives_parts = False
    found, *_ = run(signed)
    assert len(found.targets) == ROWS and (seen.fetched, seen.opened) == (["from_https"], [])


@pytest.fixture
def hub(web: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    """A repository whose large file lies elsewhere."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    server = Files()
    server.needs_token = "hf_right"
    listed = [{"rfilename": "data/rows.parquet", "size": len(PARQUET)}]
    server.json["/api/datasets/org/rows/revision/v1"] = {"id": "org/rows", "sha": COMMIT, "siblings": listed}
    server.moved[f"/datasets/org/rows/resolve/{COMMIT}/data/rows.parquet"] = f"{web.address}/blob?signature=Zx81"
    web.files["/blob"] = PARQUET
    yield server
    server.stop()


def test_a_file_of_the_hub_arrives_from_its_commit(hub: Files, web: Files, run: Run, seen: Seen) -> None:
    place = {"uri": "hf://org/rows@v1", "endpoint": hub.address, "secretRef": {"name": "hub"}}
    found, *_ = run(place)
    assert len(found.targets) == ROWS and (seen.fetched, len(seen.opened)) == ([], 1)
    assert found.index.digests[0] == f"sha256:{hashlib.sha256(PARQUET).hexdigest()}"
    assert set(hub.authorizations) == {"Bearer hf_right"}
    assert set(web.authorizations) == {None}, "the token is for the hub alone"
    web.troubles = [403] * 1000
    with pytest.raises(UserError, match=r"^hf://org/rows/data/rows.parquet@v1: the token in Secret hub was refused"):
        run(place, into="other")


def test_the_hubs_cache_is_read_in_parts_too(hub: Files, run: Run, seen: Seen, tmp_path: Path) -> None:
    folder = tmp_path / f"hub/datasets--org--rows/snapshots/{COMMIT}/data"
    folder.mkdir(parents=True)
    (folder / "rows.parquet").write_bytes(PARQUET)
    found, *_ = run({"uri": "hf://org/rows@v1", "endpoint": hub.address, "secretRef": {"name": "hub"}})
    assert len(found.targets) == ROWS and seen.fetched == [] and len(hub.requests) == 1, "the list"
