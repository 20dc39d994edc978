"""Outputs as images in real registries: what is there afterwards, who may, and what survives a line that breaks."""

import base64
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cluster.binaries import find
from cluster.packages import IMAGES, NODE, find_program, install_missing
from cluster.pki import Authority
from cluster.processes import Process
from finetune_crds.v1alpha1 import Location
from finetune_trainer.errors import StorageError, UserError
from finetune_trainer.results import outputs
from finetune_trainer.storage import images, patience, registry
from finetune_trainer.storage.places import materialise
from finetune_trainer.storage.roots import Roots
from finetune_trainer.storage.stores import open_output

from .registries import PASSWORD, USER, BreakingLine, RealRegistry, TokenServer, with_password

FILES = {
    "README.md": b"# A model\n",
    "adapter/adapter_config.json": b"{}",
    "adapter_config.json": b'{"r": 8}',
    "adapter_model.safetensors": bytes(range(256)) * 4096,
    "tokenizer.json": b"[]" * 30_000,
}
"""The third is large here."""
RECORD = outputs.Record(
    job="sha256:1", dataset="sha256:2", model="sha256:3", base="hf://a/b", model_type="llama", task="text-generation",
    method="lora", classes=[], format="peft", servable_by=["vllm"], step=1, total_steps=1, epochs=1.0, rows=1,
    evaluation_rows=0, tokens=1, before=None, after=None, versions={},
)  # fmt: skip
CHECKPOINTS = Location(uri="pvc://work/bot")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    made = RealRegistry(tmp_path_factory.mktemp("registry") / "open")
    yield made
    made.process.stop()


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    made = with_password(tmp_path_factory.mktemp("registry") / "locked")
    yield made
    made.process.stop()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    authority = Authority(tmp_path_factory.mktemp("pki"))
    authority.create()
    made = TokenServer(authority)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tokens: TokenServer) -> Iterator[RealRegistry]:
    made = tokens.registry(tmp_path_factory.mktemp("registry") / "guarded")
    yield made
    made.process.stop()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "LARGE", 512 * 1024)
    monkeypatch.setattr(registry, "CHUNK", 256 * 1024)
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)


@pytest.fixture
def secrets(roots: Roots) -> Callable[..., str]:
    """Makes Secrets."""

    def secret(name: str, **keys: str) -> str:
        (roots.secrets / name).mkdir()
        for key, value in keys.items():
            (roots.secrets / name / key.replace("__", ".")).write_text(value)
        return name

    return secret


def _location(place: RealRegistry, name: str, *, secret: str | None = None, endpoint: str | None = None) -> Location:
    return Location.model_validate(
        {
            "uri": f"oci://{place.host}/{name}",
            "secretRef": {"name": secret} if secret else None,
            "endpoint": endpoint,
        }
    )


def _publish(location: Location, roots: Roots, files: dict[str, bytes] = FILES, job: str = "sha256:1") -> str:
    store = open_output(location, roots)
    with outputs.staging(store, roots.scratch) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        status = outputs.put(store, folder, RECORD.model_copy(update={"job": job}), lambda: None)
    assert status.digest
    return status.digest


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_becomes_an_image_and_comes_back(opened: RealRegistry, roots: Roots, tmp_path: Path) -> None:
    location = _location(opened, "team/bot:v1")
    store = open_output(location, roots)
    assert outputs.existing(store) is None
    outputs.check_free(store, None, CHECKPOINTS)
    digest = _publish(location, roots)
    there = outputs.existing(store)
    assert there is not None
    assert outputs.is_whole(store, there)
    assert outputs.status(store, there, reused=True).digest == digest
    outputs.check_free(store, there, CHECKPOINTS)
    found = _contents(materialise(location, tmp_path / "into", roots))
    assert found == {**FILES, "finetune.json": there.to_bytes()}
    pinned = location.model_copy(update={"uri": f"oci://{opened.host}/team/bot@{digest}"})
    assert _contents(materialise(pinned, tmp_path / "again", roots)) == found


def test_the_same_files_have_the_same_digest_and_are_sent_once(opened: RealRegistry, roots: Roots) -> None:
    first = _publish(_location(opened, "same/bot:v1"), roots)
    before = opened.blobs()
    shutil.rmtree(roots.scratch)
    assert _publish(_location(opened, "same/bot:v2"), roots) == first
    assert opened.blobs() == before


def test_a_run_killed_before_its_last_word_leaves_no_tag(
    opened: RealRegistry, roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = _location(opened, "killed/bot:v1")
    whole = _publish(_location(opened, "killed/whole:v1"), roots)
    real = registry.Registry.put_manifest

    def killed(self: registry.Registry, reference: str, media_type: str, content: bytes) -> str:
        if reference == "v1":
            raise KeyboardInterrupt
        return real(self, reference, media_type, content)

    with monkeypatch.context() as patched:
        patched.setattr(registry.Registry, "put_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            _publish(location, roots)
    assert outputs.existing(open_output(location, roots)) is None
    assert _publish(location, roots) == whole


def test_an_output_of_another_job_is_replaced_in_one_step(opened: RealRegistry, roots: Roots, tmp_path: Path) -> None:
    location = _location(opened, "moved/bot:v1")
    old = _publish(location, roots)
    new = _publish(location, roots, {"weights": b"w"}, job="sha256:other")
    assert new != old
    assert sorted(_contents(materialise(location, tmp_path / "into", roots))) == ["finetune.json", "weights"]


def test_an_image_of_somebody_else_is_refused(opened: RealRegistry, roots: Roots) -> None:
    client = registry.Registry(_location(opened, "foreign/app:v1"), roots, actions="pull,push")
    (roots.scratch / "config").write_text("{}")
    config = client.upload(roots.scratch / "config")
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": kind,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 2},
        "layers": [],
    }
    client.put_manifest("v1", kind, json.dumps(manifest).encode())
    with pytest.raises(
        UserError, match=r"foreign/app:v1 is an image that no FineTuneJob wrote; choose a tag of its own"
    ):
        outputs.existing(open_output(_location(opened, "foreign/app:v1"), roots))


def test_an_image_that_lost_a_layer_is_not_whole(opened: RealRegistry, roots: Roots) -> None:
    location = _location(opened, "torn/bot:v1")
    _publish(location, roots, {**FILES, "own": b"of this test"})
    store = open_output(location, roots)
    there = outputs.existing(store)
    assert there is not None
    client = registry.Registry(location, roots, actions="pull")
    index = client.manifest("v1")
    image = client.manifest(index.content["manifests"][0]["digest"]) if index else None
    assert image is not None
    layer = image.content["layers"][0]["digest"].removeprefix("sha256:")
    shutil.rmtree(opened.folder / "storage/docker/registry/v2/repositories/torn/bot/_layers/sha256" / layer)
    assert not outputs.is_whole(store, there)
    _publish(location, roots, {**FILES, "own": b"of this test"})
    assert outputs.is_whole(store, there)


@pytest.mark.parametrize("kind", ["basic", "docker", "docker-user"])
def test_a_password_opens_a_registry(
    locked: RealRegistry, guarded: RealRegistry, roots: Roots, tmp_path: Path, secrets: Callable[..., str], kind: str
) -> None:
    packed = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    entry = {"auth": packed} if kind == "docker" else {"username": USER, "password": PASSWORD}
    for place, name in ((locked, "a"), (guarded, "b")):
        config = json.dumps({"auths": {"registry.invalid": {}, f"http://{place.host}/v2/": entry}})
        keys = {"username": USER, "password": PASSWORD} if kind == "basic" else {"__dockerconfigjson": config}
        location = _location(place, f"{kind}/bot:v1", secret=secrets(f"{kind}-{name}", **keys))
        open_output(location, roots)
        digest = _publish(location, roots)
        assert _contents(materialise(location, tmp_path / name, roots)).keys() == {*FILES, "finetune.json"}
        assert digest in place.blobs()


def test_tokens_are_asked_for_what_is_done(
    guarded: RealRegistry, tokens: TokenServer, roots: Roots, tmp_path: Path, secrets: Callable[..., str]
) -> None:
    location = _location(guarded, "scoped/bot:v1", secret=secrets("scoped", username=USER, password=PASSWORD))
    tokens.asked.clear()
    _publish(location, roots)
    assert set(tokens.asked) == {("repository:scoped/bot:pull,push", True)}
    tokens.asked.clear()
    materialise(_location(guarded, "scoped/bot:v1"), tmp_path / "anonymous", roots)
    assert set(tokens.asked) == {("repository:scoped/bot:pull", False)}


def test_a_token_that_runs_out_is_renewed(
    guarded: RealRegistry,
    tokens: TokenServer,
    roots: Roots,
    secrets: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "seconds", -61)  # the registry allows a minute for clocks that differ
    location = _location(guarded, "late/bot:v1", secret=secrets("late", username=USER, password=PASSWORD))
    store = open_output(location, roots)
    with pytest.raises(UserError, match="may not push to it"):
        outputs.existing(store)
    monkeypatch.setattr(tokens, "seconds", 300)
    assert outputs.existing(store) is None


def test_a_download_goes_on_and_signs_in_again(
    guarded: RealRegistry, roots: Roots, tmp_path: Path, secrets: Callable[..., str]
) -> None:
    location = _location(guarded, "again/bot:v1", secret=secrets("again", username=USER, password=PASSWORD))
    client = registry.Registry(location, roots, actions="pull,push")
    content = os.urandom(700_000)
    (roots.scratch / "blob").write_bytes(content)
    digest = client.upload(roots.scratch / "blob")
    (tmp_path / "blob").write_bytes(content[:300_000])
    client._authorization = "Bearer run-out"
    client.download(digest, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == content
    client.download(digest, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == content, "all of it was there"
    (tmp_path / "blob").write_bytes(b"damaged" * 10)
    client.download(digest, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == content


def test_a_last_word_whose_answer_was_lost_is_believed(
    opened: RealRegistry, roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = registry.Registry(_location(opened, "lost/bot:v1"), roots, actions="pull,push")
    (roots.scratch / "blob").write_bytes(os.urandom(700_000))
    real, lost = registry.Registry._send, []

    def send(self: registry.Registry, method: str, *rest: object) -> httpx.Response:
        answer = real(self, method, *rest)  # type: ignore[arg-type]
        if method == "PUT" and not lost:
            lost.append(answer)
            raise httpx.ReadError("the line broke")
        return answer

    monkeypatch.setattr(registry.Registry, "_send", send)
    digest = client.upload(roots.scratch / "blob")
    assert lost and digest in opened.blobs()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"username": USER, "password": "wrong-word"}, "the credentials in Secret wrong may not push to it"),
        ({"username": USER}, "Secret wrong has no key password"),
        ({"token": "x"}, "Secret wrong has no key username"),
        ({"__dockerconfigjson": "{"}, "Secret wrong is no docker config file"),
        ({"__dockerconfigjson": '{"auths": {}}'}, "the credentials in Secret wrong may not push to it"),
        (None, "the registry refused to let nobody in particular push to it"),
    ],
)
def test_who_may_not_push_is_told_before_training(
    locked: RealRegistry, guarded: RealRegistry, roots: Roots, secrets: Callable[..., str],
    keys: dict[str, str] | None, sentence: str, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    name = None if keys is None else secrets("wrong", **keys)
    caplog.set_level(logging.DEBUG)
    for place in (locked, guarded):
        with pytest.raises(UserError) as caught:
            store = open_output(_location(place, "closed/bot:v1", secret=name), roots)
            there = outputs.existing(store)
            outputs.check_free(store, there, CHECKPOINTS)
        assert sentence in str(caught.value)
        assert "wrong-word" not in str(caught.value) + caplog.text
    with pytest.raises(UserError, match="Secret absent is not mounted"):
        open_output(_location(locked, "closed/bot:v1", secret="absent"), roots)


def test_no_secret_is_told(
    guarded: RealRegistry, roots: Roots, secrets: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # as in a worker
    _publish(_location(guarded, "quiet/bot:v1", secret=secrets("quiet", username=USER, password=PASSWORD)), roots)
    assert PASSWORD not in caplog.text
    assert "token" not in caplog.text


def test_a_large_upload_goes_on_where_the_line_broke(opened: RealRegistry, roots: Roots, tmp_path: Path) -> None:
    line = BreakingLine(opened.port)
    location = _location(opened, "broken/bot:v1", endpoint=line.address)
    line.cut_after = [900_000, 400_000, 300_000]
    content = {"model.safetensors": b"breaks" * 400_000}
    digest = _publish(location, roots, content)
    assert line.cuts == 3
    line.cut_after = []
    there = _contents(materialise(location, tmp_path / "into", roots))
    assert there["model.safetensors"] == content["model.safetensors"]
    assert digest == _publish(_location(opened, "broken/straight:v1"), roots, content)
    line.stop()


def test_a_registry_that_takes_no_parts_gets_the_whole(
    opened: RealRegistry, roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = registry.Registry._send

    def send(self: registry.Registry, method: str, *rest: object) -> httpx.Response:
        asked.append(method)
        return httpx.Response(405) if method == "PATCH" else real(self, method, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(registry.Registry, "_send", send)
    digest = _publish(_location(opened, "whole/bot:v1"), roots, {"model.safetensors": b"whole" * 400_000})
    assert asked.count("PATCH") == 1
    assert digest in opened.blobs()


def test_a_registry_that_is_away_is_a_storage_error(roots: Roots) -> None:
    away = Location(uri="oci://127.0.0.1:9/bot:v1")
    with pytest.raises(StorageError, match=r"oci://127\.0\.0\.1:9/bot:v1: could not be read after 6 tries"):
        outputs.existing(open_output(away, roots))


def test_an_image_of_a_program_is_no_model(opened: RealRegistry, roots: Roots, tmp_path: Path) -> None:
    _publish(_location(opened, "app/bot:v1"), roots, {".wh.gone": b""})
    with pytest.raises(UserError, match="is the image of a program and no model"):
        materialise(_location(opened, "app/bot:v1"), tmp_path / "into", roots)
    with pytest.raises(UserError, match="there is no such image; correct the uri"):
        materialise(_location(opened, "app/bot:v2"), tmp_path / "into", roots)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_buildah_pulls_and_mounts_it(opened: RealRegistry, roots: Roots, tmp_path: Path) -> None:
    """The library under podman, buildah and CRI-O."""
    install_missing(IMAGES)
    digest = _publish(_location(opened, "tools/bot:v1"), roots)
    storage = ["--root", tmp_path / "root", "--runroot", tmp_path / "runroot", "--storage-driver", "vfs"]
    buildah = [find_program("buildah"), *storage]
    container = _run(*buildah, "from", "--tls-verify=false", f"{opened.host}/tools/bot@{digest}")
    try:
        _is_published(Path(_run(*buildah, "mount", container)))
    finally:
        _run(*buildah, "rm", container)


@pytest.mark.skipif(os.geteuid() != 0, reason="containerd needs root")
@pytest.mark.parametrize("machine", ["amd64", "arm64"])
def test_containerd_pulls_and_mounts_it(opened: RealRegistry, roots: Roots, tmp_path: Path, machine: str) -> None:
    """As for a kubelet's image volume: the layers unpacked one over the other."""
    install_missing({"containerd": NODE["containerd"]})
    _publish(_location(opened, "tools/bot:v1"), roots)
    socket, mounted = tmp_path / "c.sock", tmp_path / "mounted"
    mounted.mkdir()
    folders = ["--root", tmp_path / "root", "--state", tmp_path / "state"]
    ctr = [find_program("ctr"), "--address", socket, "images"]
    process = Process(
        "containerd", tmp_path, lambda: [find_program("containerd"), *folders, "--address", socket], socket.exists
    )
    process.start()
    try:
        image, native = f"{opened.host}/tools/bot:v1", ("--snapshotter", "native")
        _run(*ctr, "pull", "--plain-http", *native, "--platform", f"linux/{machine}", image)
        _run(*ctr, "mount", *native, "--platform", f"linux/{machine}", image, mounted)
        try:
            _is_published(mounted)
        finally:
            _run(*ctr, "unmount", mounted)
    finally:
        process.stop()


@pytest.mark.parametrize("options", [[], ["--platform", "linux/arm64"]], ids=["tag", "machine"])
def test_oras_pulls_it(opened: RealRegistry, roots: Roots, tmp_path: Path, options: list[str]) -> None:
    _publish(_location(opened, "tools/bot:v1"), roots)
    _run(find("oras"), "pull", "--plain-http", *options, "--output", tmp_path / "into", f"{opened.host}/tools/bot:v1")
    _is_published(tmp_path / "into")


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _is_published(folder: Path) -> None:
    """Every file, for everybody to read."""
    there = {name: content for name, content in _contents(folder).items() if name in (*FILES, "finetune.json")}
    assert {name: content for name, content in there.items() if name in FILES} == FILES
    assert json.loads(there["finetune.json"])["files"].keys() == FILES.keys()
    assert all(folder.joinpath(name).stat().st_mode & 0o004 for name in there)


def test_locations_say_where_a_registry_is() -> None:
    assert registry._address("docker.io") == "https://registry-1.docker.io"
    assert registry._address("ghcr.io") == "https://ghcr.io"
    assert registry._address("localhost:5000") == "http://localhost:5000"
    assert registry._is_for("https://index.docker.io/v1/", "docker.io")
    assert registry._is_for("*.example.com", "registry.example.com")
    assert not registry._is_for("example.com", "registry.example.com")
