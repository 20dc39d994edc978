"""Servers that these tests talk to: an S3 store, one of https, and the roots of a job with its Secrets."""

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.pki import Authority
from cluster.ports import free_port
from cluster.s3 import ObjectStore
from cluster.settings import Settings
from finetune_trainer.storage.roots import Roots

from .file_server import Files


@dataclass(frozen=True)
class Here(Settings):
    """Settings of an object store without a cluster, in a folder of the test's."""

    root: Path = Path()

    @property
    def folder(self) -> Path:
        return self.root


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A versitygw on loopback."""
    store = ObjectStore(Here("shell", "api", 0, {"s3": free_port()}, root=tmp_path_factory.mktemp("s3")))
    store.start()
    yield store
    store.process.stop()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("pki"))
    made.create()
    return made


@pytest.fixture
def web(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    """A server of https on loopback, which is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.files.certificate))
    files = authority.issue("web", names=["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    server = Files(context)
    yield server
    server.stop()


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    """Roots with a Secret for the object store, one with wrong keys, and tokens."""
    found = Roots.below(tmp_path / "finetune")
    contents = {
        "s3": {"AWS_ACCESS_KEY_ID": ObjectStore.access_key, "AWS_SECRET_ACCESS_KEY": ObjectStore.secret_key},
        "s3-wrong": {"AWS_ACCESS_KEY_ID": ObjectStore.access_key, "AWS_SECRET_ACCESS_KEY": "wrong"},
        "s3-half": {"AWS_ACCESS_KEY_ID": ObjectStore.access_key},
        "hub": {"token": "hf_right"},
        "hub-wrong": {"token": "hf_wrong"},
    }
    for name, keys in contents.items():
        (found.secrets / name).mkdir(parents=True)
        for key, value in keys.items():
            (found.secrets / name / key).write_text(value + "\n")
    found.scratch.mkdir(parents=True)
    return found
