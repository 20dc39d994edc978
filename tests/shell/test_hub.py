"""Outputs as commits to a stand-in of the Hugging Face hub, through huggingface_hub as it is, but for Xet."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_crds.v1alpha1 import Location
from finetune_trainer.errors import UserError
from finetune_trainer.results import outputs
from finetune_trainer.storage import patience
from finetune_trainer.storage.roots import Roots
from finetune_trainer.storage.stores import open_output

from .hub_server import Hub
from .test_images import CHECKPOINTS, RECORD

FILES = {"README.md": b"# A model\n", "adapter/config.json": b"{}", "adapter_model.safetensors": b"weights" * 40_000}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    for variable in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    made = Hub()
    yield made
    made.stop()


def _location(hub: Hub, name: str = "org/bot", secret: str | None = "hub") -> Location:
    return Location.model_validate(
        {"uri": f"hf://{name}", "endpoint": hub.address, "secretRef": {"name": secret} if secret else None}
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


def test_a_folder_becomes_one_commit_in_a_private_repository(hub: Hub, roots: Roots) -> None:
    location = _location(hub)
    store = open_output(location, roots)
    assert outputs.existing(store) is None
    outputs.check_free(store, None, CHECKPOINTS)
    digest = _publish(location, roots)
    assert hub.private == {"org/bot": True}
    assert hub.commits == [("org/bot", "main", "hf://a/b after 1 steps of lora, for text-generation")]
    there = outputs.existing(store)
    assert there is not None
    assert hub.branches["org/bot", "main"].keys() == {*FILES, "finetune.json", ".gitattributes"}
    assert {name: hub.branches["org/bot", "main"][name] for name in FILES} == FILES
    assert outputs.is_whole(store, there)
    assert outputs.status(store, there).digest == digest
    outputs.check_free(store, there, CHECKPOINTS)
    assert _publish(location, roots) == digest
    assert len(hub.commits) == 1, "nothing has changed"


def test_an_output_of_another_job_is_replaced_on_its_branch(hub: Hub, roots: Roots) -> None:
    location = _location(hub, "org/bot@v2")
    _publish(location, roots)
    _publish(location, roots, {"weights": b"w"}, job="sha256:other")
    assert hub.branches["org/bot", "v2"].keys() == {"weights", "finetune.json", ".gitattributes"}
    assert hub.branches["org/bot", "main"].keys() == {".gitattributes"}


def test_files_of_somebody_else_are_refused(hub: Hub, roots: Roots) -> None:
    location = _location(hub)
    _publish(location, roots)
    hub.branches["org/bot", "main"]["theirs.bin"] = b"precious"
    store = open_output(location, roots)
    with pytest.raises(UserError, match=r"holds files that no FineTuneJob wrote \(such as theirs\.bin\)"):
        outputs.check_free(store, outputs.existing(store), CHECKPOINTS)
    _publish(location, roots, {"weights": b"w"})  # it came while we trained
    assert hub.branches["org/bot", "main"]["theirs.bin"] == b"precious"
    del hub.branches["org/bot", "main"]["finetune.json"]
    with pytest.raises(UserError, match="no FineTuneJob wrote"):
        outputs.existing(store)


@pytest.mark.parametrize(
    ("secret", "sentence"),
    [
        ("hub-wrong", "the token in Secret hub-wrong may not read from it (401); give it write access"),
        ("hub-reader", "the token in Secret hub-reader may only read; give it write access to this repository"),
        (None, "without a token one may not read from it (401); name a Secret with the key token in secretRef"),
    ],
)
def test_who_may_not_write_is_told_before_training(
    hub: Hub, roots: Roots, secret: str | None, sentence: str, caplog: pytest.LogCaptureFixture, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    (roots.secrets / "hub-reader").mkdir()
    (roots.secrets / "hub-reader/token").write_text("hf_reader")
    caplog.set_level(logging.INFO)
    with pytest.raises(UserError) as caught:
        store = open_output(_location(hub, secret=secret), roots)
        outputs.check_free(store, outputs.existing(store), CHECKPOINTS)
    assert sentence in str(caught.value)
    assert "hf_wrong" not in str(caught.value) + caplog.text


@pytest.mark.parametrize("path", ["/commit/", "/preupload/", "/lfs/", "/objects/batch", "/repos/create"])
def test_trouble_that_passes_is_tried_again(hub: Hub, roots: Roots, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.troubles = [(path, 503)]
    _publish(_location(hub), roots)
    assert hub.troubles == []
    assert len(hub.commits) == 1
