"""https:// and hf:// from real servers on loopback that break off, refuse and change their minds."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_crds.v1alpha1 import Location, Source
from finetune_trainer.errors import StorageError, UserError
from finetune_trainer.storage import downloads, patience
from finetune_trainer.storage.places import materialise
from finetune_trainer.storage.roots import Roots
from finetune_trainer.storage.sources import fetched, source_files
from finetune_trainer.storage.trees import named

from .file_server import Files

CONTENT = os.urandom(300_000)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    for variable in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def web(web: Files) -> Files:
    web.files["/data/rows.jsonl"] = CONTENT
    return web


@pytest.fixture
def rows(web: Files, roots: Roots, tmp_path: Path) -> Callable[..., bytes]:
    """Downloads the rows; their content."""

    def download(path: str = "/data/rows.jsonl", secret: str | None = None) -> bytes:
        location = Location.model_validate(
            {"uri": web.address + path, "secretRef": {"name": secret} if secret else None}
        )
        (file,) = source_files(location, tmp_path / "into", roots)
        return file.fetch().read_bytes()

    return download


def test_a_file_is_downloaded_once(web: Files, rows: Callable[..., bytes]) -> None:
    assert rows() == CONTENT
    assert rows() == CONTENT
    assert [method for method, _, _ in web.requests] == ["HEAD", "HEAD", "GET", "HEAD", "HEAD"]


def test_an_address_with_a_signature_is_read_and_not_told(web: Files, roots: Roots, tmp_path: Path) -> None:
    location = Location(uri=f"{web.address}/data/rows.jsonl?signature=x")
    (file,) = source_files(location, tmp_path / "into", roots)
    assert file.uri == f"{web.address}/data/rows.jsonl", "by which messages and reports call it, and its format is told"
    assert file.fetch().read_bytes() == CONTENT
    assert {path for _, path, _ in web.requests} == {"/data/rows.jsonl?signature=x"}


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("data/rows.jsonl?signature=a/b.csv", "data/rows.jsonl"),
        ("get?file=rows.csv.gz", "get.csv.gz"),
        ("get?signature=x", "get"),
    ],
)
def test_the_format_is_told_by_the_address_or_by_what_its_query_asks_for(address: str, name: str) -> None:
    assert named(f"https://host/{address}") == f"https://host/{name}"


@pytest.mark.parametrize(
    "fields", [{"split": "train"}, {"uri": "absent.csv?signature=secret"}, {"secretRef": {"name": "a"}}]
)
def test_no_mistake_repeats_a_signature(web: Files, roots: Roots, tmp_path: Path, fields: dict[str, Any]) -> None:
    uri = f"{web.address}/{fields.pop('uri', 'data/rows.jsonl?signature=secret*')}"
    source = Source.model_validate({"uri": uri, **fields})
    with pytest.raises(UserError, match=r"rows|absent") as told:
        source_files(source, tmp_path / "into", roots)
    assert "secret*" not in str(told.value) and "=secret" not in str(told.value)


def test_a_broken_download_goes_on_where_it_stopped(web: Files, rows: Callable[..., bytes]) -> None:
    web.troubles = ["torn", 503, 429]
    assert rows() == CONTENT
    ranges = [asked for method, _, asked in web.requests if method == "GET"]
    assert ranges == [None, *[f"bytes={len(CONTENT) // 2}-"] * 3]


def test_an_address_that_answers_get_only_is_downloaded(web: Files, rows: Callable[..., bytes]) -> None:
    web.knows_head = False
    assert rows() == CONTENT
    assert rows() == CONTENT
    assert [method for method, _, _ in web.requests] == [
        "HEAD",
        "GET",
        "HEAD",
        "GET",
        "GET",
        "HEAD",
        "GET",
        "HEAD",
        "GET",
    ]


def test_a_file_that_changed_meanwhile_is_begun_anew(web: Files, rows: Callable[..., bytes]) -> None:
    web.troubles = ["torn"] + [503] * 20
    with pytest.raises(StorageError, match="could not be read after 6 tries"):
        rows()
    web.troubles, web.files["/data/rows.jsonl"] = [], CONTENT[::-1]
    assert rows() == CONTENT[::-1]


def test_a_token_is_sent_when_a_secret_is_named(web: Files, rows: Callable[..., bytes]) -> None:
    web.needs_token = "hf_right"
    assert rows(secret="hub") == CONTENT


@pytest.mark.parametrize(
    ("path", "secret", "sentence"),
    [
        ("/data/absent.jsonl", "hub", r"absent.jsonl: not found \(404\); correct the uri"),
        ("/data/rows.jsonl", None, r"refused without credentials \(401\); name a Secret"),
        ("/data/rows.jsonl", "hub-wrong", r"the token in Secret hub-wrong was refused \(403\)"),
        ("/data/rows.jsonl", "s3", "Secret s3 has no key token"),
        ("/data/*.jsonl", None, r"\* does not work there"),
        ("/data/absent.jsonl?signature=x", "hub", r"absent.jsonl: not found"),
    ],
)
def test_a_wrong_address_is_told_in_a_sentence(
    web: Files, rows: Callable[..., bytes], path: str, secret: str, sentence: str
) -> None:
    web.needs_token = "hf_right"
    with pytest.raises(UserError, match=sentence):
        rows(path, secret)
    assert len(web.requests) <= 2


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    """As much of the hub's protocol as its own client asks for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    server = Files()
    commit = "c0ffee" * 6 + "c0ff"
    contents = {
        "models/org/bot": {
            "config.json": b"{}",
            "model.safetensors": CONTENT,
            "pytorch_model.bin": b"old",
            "consolidated.safetensors": b"the same weights again",
            "x/y.json": b"1",
        },
        "datasets/org/rows": {"data/train-1.jsonl": b"1", "data/train-0.jsonl": b"0", "data/test-0.jsonl": b"t"},
    }
    for repository, files in contents.items():
        kind, _, name = repository.partition("/")
        info = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
        tree = [
            {"type": "file", "path": f, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for f, c in files.items()
        ]
        for revision in ("main", "v1", commit):
            server.json[f"/api/{repository}/revision/{revision}"] = info
            server.json[f"/api/{repository}/tree/{revision}"] = tree
            prefix = f"/{name}" if kind == "models" else f"/{repository}"
            server.files |= {f"{prefix}/resolve/{revision}/{file}": content for file, content in files.items()}
    yield server
    server.stop()


def on(hub: Files, uri: str, secret: str | None = None) -> Location:
    return Location.model_validate(
        {"uri": uri, "endpoint": hub.address, "secretRef": {"name": secret} if secret else None}
    )


def test_a_model_comes_from_the_hub_without_the_weights_of_other_formats(
    hub: Files, roots: Roots, tmp_path: Path
) -> None:
    hub.needs_token = "hf_right"
    folder = materialise(on(hub, "hf://org/bot@v1", "hub"), tmp_path / "into", roots)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == CONTENT


def test_rows_come_from_a_dataset_repository(hub: Files, roots: Roots, tmp_path: Path) -> None:
    found = source_files(on(hub, "hf://org/rows/data/train-*.jsonl"), tmp_path / "into", roots)
    assert [file.uri for file in found] == [f"hf://org/rows/data/train-{i}.jsonl" for i in (0, 1)]
    assert [path.read_bytes() for _, path in fetched(found)] == [b"0", b"1"]
    assert not list((tmp_path / "into").rglob("*.jsonl"))


def test_a_repository_is_read_by_its_splits(
    hub: Files, roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contents(evaluation: bool = False, **asked: str) -> list[bytes]:
        source = Source.model_validate({"uri": "hf://org/rows", "endpoint": hub.address, **asked})
        found = source_files(source, tmp_path / "into", roots, evaluation=evaluation)
        return [path.read_bytes() for _, path in fetched(found)]

    assert contents() == [b"0", b"1"]
    assert contents(evaluation=True) == [b"t"] == contents(split="test")
    with pytest.raises(UserError, match="hf://org/rows: there is no split dev; there is test, train"):
        contents(split="dev")
    commit, card = "c0ffee" * 6 + "c0ff", b"---\nconfigs: [{config_name: odd, data_files: data/*-1.jsonl}]\n---\n"
    for name in ("main", commit):
        listed = hub.json[f"/api/datasets/org/rows/revision/{name}"]["siblings"]
        hub.json[f"/api/datasets/org/rows/revision/{name}"]["siblings"] = [*listed, {"rfilename": "README.md"}]
        hub.files[f"/datasets/org/rows/resolve/{name}/README.md"] = card
    assert contents() == [b"1"] == contents(config="odd")
    assert not [path for path in (tmp_path / "into").rglob("*") if path.suffix in (".md", ".jsonl")]


def test_what_the_hubs_cache_has_is_taken_from_there_and_stays(
    hub: Files, roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other tools' downloads, and without a network."""
    place = on(hub, "hf://org/rows/data/train-*.jsonl")
    downloads.snapshot(place, roots, "dataset", [])
    asked = len(hub.requests)
    found = source_files(place, tmp_path / "into", roots)
    assert [path.read_bytes() for _, path in fetched(found)] == [b"0", b"1"]
    assert len(hub.requests) == asked + 1, "the list"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = source_files(place, tmp_path / "into", roots)
    assert [file.uri for file in offline] == [file.uri for file in found]
    assert [path.read_bytes() for _, path in fetched(offline)] == [b"0", b"1"]


def test_trouble_with_the_hub_passes(hub: Files, roots: Roots, tmp_path: Path) -> None:
    hub.troubles = [503, 503]
    (found,) = source_files(on(hub, "hf://org/rows/data/test-0.jsonl@v1"), tmp_path / "into", roots)
    assert found.uri == "hf://org/rows/data/test-0.jsonl@v1"


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("hf://org/absent/x.jsonl", "no dataset repository of this name; if it is private, name a Secret"),
        ("hf://org/rows/x.jsonl@v9", "the repository has no revision v9"),
        ("hf://org/rows/data/valid.jsonl", "no file matches"),
    ],
)
def test_a_wrong_repository_is_told_in_a_sentence(
    hub: Files, roots: Roots, tmp_path: Path, uri: str, sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        source_files(on(hub, uri), tmp_path / "into", roots)
    assert sentence in str(caught.value)
