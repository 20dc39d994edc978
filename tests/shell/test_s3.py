"""Places and stores on a real S3 server."""

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.s3 import ObjectStore
from finetune_crds.v1alpha1 import Location
from finetune_trainer.errors import AlreadyExists, StorageError, UserError
from finetune_trainer.storage import downloads
from finetune_trainer.storage.places import materialise
from finetune_trainer.storage.roots import Roots
from finetune_trainer.storage.sources import local_file, source_files
from finetune_trainer.storage.stores import FolderStore, open_store


@pytest.fixture(autouse=True)
def no_ambient_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def bucket(object_store: ObjectStore, request: pytest.FixtureRequest) -> str:
    name = "b" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    object_store.create_bucket(name)
    return name


@pytest.fixture
def at(object_store: ObjectStore, bucket: str) -> Callable[..., Location]:
    """A location in this test's bucket."""

    def location(path: str, secret: str | None = "s3", bucket: str = bucket) -> Location:
        return Location.model_validate(
            {
                "uri": f"s3://{bucket}/{path}",
                "endpoint": object_store.endpoint,
                "secretRef": {"name": secret} if secret else None,
            }
        )

    return location


@pytest.fixture
def store(at: Callable[..., Location], roots: Roots) -> FolderStore:
    return open_store(at("models/bot"), roots)


def test_what_is_written_is_read_listed_and_deleted(store: FolderStore, tmp_path: Path) -> None:
    assert store.local is None
    assert store.names() == []
    shard = tmp_path / "shard"
    shard.write_bytes(os.urandom(40 * 1024 * 1024))
    store.write_file("step-2/weights", shard)
    store.write_file("step-2/index.json", b"{}")
    store.write_file("step-20/index.json", b"{}")
    store.replace("latest", b"1")
    store.replace("latest", b"2")
    assert store.names() == ["latest", "step-2/index.json", "step-2/weights", "step-20/index.json"]
    assert store.names("step-2") == ["step-2/index.json", "step-2/weights"]
    assert store.read("latest") == b"2"
    assert hashlib.sha256(store.read("step-2/weights")).digest() == hashlib.sha256(shard.read_bytes()).digest()
    store.delete("step-2")
    store.delete("step-2")
    store.delete("latest")
    assert store.names() == ["step-20/index.json"]
    with pytest.raises(FileNotFoundError):
        store.read("latest")


def test_of_many_writers_exactly_one_wins(at: Callable[..., Location], roots: Roots) -> None:
    wins: list[bytes] = []

    def race(name: bytes) -> None:
        rival = open_store(at("models/bot"), roots)
        for turn in range(5):
            try:
                rival.create_exclusive(f"epoch-{turn}", name)
                wins.append(name)
            except AlreadyExists:
                pass

    racers = [threading.Thread(target=race, args=(bytes([65 + i]),)) for i in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    store = open_store(at("models/bot"), roots)
    assert sorted(wins) == sorted(store.read(f"epoch-{turn}") for turn in range(5))


def test_a_commit_whose_answer_was_lost_is_no_rivals(store: FolderStore) -> None:
    store.create_exclusive("commit", b"mine")
    store.create_exclusive("commit", b"mine")  # the client tries again after what looked like a failure
    with pytest.raises(AlreadyExists):
        store.create_exclusive("commit", b"theirs")


def test_a_model_is_downloaded_once_and_whole(
    at: Callable[..., Location], roots: Roots, tmp_path: Path, store: FolderStore
) -> None:
    for name in ("config.json", "model.safetensors", "original/params.json"):
        store.write_file(name, name.encode())
    open_store(at("models/bot-2"), roots).write_file("config.json", b"another")
    folder = materialise(at("models/bot"), tmp_path / "into", roots)
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("[!.]*") if p.is_file()}
    assert found == {name: name.encode() for name in ("config.json", "model.safetensors", "original/params.json")}
    inode = (folder / "config.json").stat().st_ino
    store.write_file("model.safetensors", b"newer")
    materialise(at("models/bot"), tmp_path / "into", roots)
    assert (folder / "config.json").stat().st_ino == inode
    assert (folder / "model.safetensors").read_bytes() == b"newer"


def test_an_empty_object_that_stands_for_a_folder_is_no_file() -> None:
    listed = [{"path": "models/bot/original"}, {"path": "models/bot/original/params.json"}, {"path": "models/bot/x"}]
    assert downloads._without_folders(listed) == listed[1:]


def test_a_download_goes_on_where_it_stopped(
    at: Callable[..., Location], roots: Roots, tmp_path: Path, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_RANGE", 1024 * 1024)
    content = os.urandom(5 * 1024 * 1024 + 7)
    store.write_file("rows.jsonl", content)
    into = tmp_path / "into"
    (file,) = source_files(at("models/bot/rows.jsonl"), into, roots)
    first = local_file(file.uri, file.fetch())
    assert first.sha256 == hashlib.sha256(content).hexdigest()
    tag = (into / ".rows.jsonl.tag").read_text()
    assert tag == file.version
    file.release(first.path)
    assert not list(into.iterdir())
    part = into / f"rows.jsonl.{downloads._short(tag)}.part"
    part.write_bytes(content[: 2 * 1024 * 1024 + 3])
    inode = part.stat().st_ino
    second = local_file(file.uri, file.fetch())
    assert second.sha256 == first.sha256
    assert second.path.stat().st_ino == inode
    assert not part.exists()


def test_sources_match_within_a_folder(
    at: Callable[..., Location], roots: Roots, tmp_path: Path, store: FolderStore, bucket: str
) -> None:
    for name in ("2026-02.jsonl", "2026-01.jsonl", "2025-12.jsonl", "old/2026-03.jsonl", "notes.md"):
        store.write_file(name, name.encode())
    base = f"s3://{bucket}/models/bot"

    def uris(path: str) -> list[str]:
        return [file.uri for file in source_files(at(path), tmp_path / "into", roots)]

    assert uris("models/bot/2026-*.jsonl") == [f"{base}/2026-01.jsonl", f"{base}/2026-02.jsonl"]
    assert uris("models/bot") == [f"{base}/{name}.jsonl" for name in ("2025-12", "2026-01", "2026-02")]
    assert uris("models/bot/notes.md") == [f"{base}/notes.md"]
    with pytest.raises(UserError, match="no file matches"):
        uris("models/bot/*.csv")


@pytest.mark.parametrize(
    ("path", "secret", "sentence"),
    [
        ("models/bot/absent.jsonl", "s3", "there is no such object; correct the uri"),
        ("models/bot/rows.jsonl", None, "access was refused without credentials; name a Secret in secretRef"),
        ("models/bot/rows.jsonl", "s3-wrong", "the credentials in Secret s3-wrong may not read from it"),
        ("models/bot/rows.jsonl", "s3-half", "Secret s3-half has no key AWS_SECRET_ACCESS_KEY"),
        ("models/bot/rows.jsonl", "absent", "Secret absent is not mounted"),
    ],
)
def test_a_wrong_place_is_told_in_a_sentence(
    at: Callable[..., Location], roots: Roots, tmp_path: Path, store: FolderStore, path: str, secret: str, sentence: str
) -> None:
    store.write_file("rows.jsonl", b"{}")
    for call in (source_files, materialise):
        with pytest.raises(UserError) as caught:
            call(at(path, secret), tmp_path / "into", roots)
        assert sentence in str(caught.value)
        assert at(path).uri in str(caught.value)


def test_a_bucket_that_is_not_there_is_named(at: Callable[..., Location], roots: Roots, tmp_path: Path) -> None:
    gone = at("bot", bucket="no-such-bucket")
    with pytest.raises(UserError, match="s3://no-such-bucket/bot: there is no such bucket"):
        source_files(gone, tmp_path / "into", roots)
    with pytest.raises(UserError, match="s3://no-such-bucket/bot: there is no such bucket"):
        open_store(gone, roots).replace("x", b"")


def test_writing_without_permission_is_told(at: Callable[..., Location], roots: Roots) -> None:
    with pytest.raises(UserError, match="Secret s3-wrong may not write to it"):
        open_store(at("bot", "s3-wrong"), roots).replace("x", b"")


def test_a_rotated_secret_is_read_by_the_next_client(
    at: Callable[..., Location], roots: Roots, object_store: ObjectStore
) -> None:
    key = roots.secrets / "s3-wrong/AWS_SECRET_ACCESS_KEY"
    key.write_text(object_store.secret_key)
    open_store(at("bot", "s3-wrong"), roots).replace("x", b"1")
    assert open_store(at("bot"), roots).read("x") == b"1"


def test_cloud_identity_of_the_environment_is_used_without_a_secret(
    at: Callable[..., Location], roots: Roots, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret_key)
    open_store(at("bot", None), roots).replace("x", b"1")
    assert open_store(at("bot"), roots).read("x") == b"1"
    # A Secret that is named wins over it.
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "stale")
    assert open_store(at("bot"), roots).read("x") == b"1"


def test_a_server_that_is_away_is_a_storage_error(roots: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.storage import s3

    monkeypatch.setattr(s3, "_RETRIES", 1)
    away = Location.model_validate(
        {"uri": "s3://bucket/bot", "endpoint": "http://127.0.0.1:9", "secretRef": {"name": "s3"}}
    )
    with pytest.raises(StorageError, match=r"s3://bucket/bot: .*127\.0\.0\.1:9"):
        open_store(away, roots).replace("x", b"")
