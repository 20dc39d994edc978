"""Putting an output in its place: folders in it, files that went missing, and neighbours at work."""

from pathlib import Path

import pytest

from finetune_trainer.results import outputs
from finetune_trainer.storage.stores import VolumeFolder

RECORD = outputs.Record(
    job="sha256:1", dataset="", model="", base="hf://a/b", model_type="llama", task="text-generation", method="lora", classes=[],
    format="peft", servable_by=[], step=1, total_steps=1, epochs=1.0, rows=1, evaluation_rows=0, tokens=1,
    before=None, after=None, versions={},
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> VolumeFolder:
    return VolumeFolder("pvc://models/bot", tmp_path / "bot")


def _put(store: VolumeFolder, tmp_path: Path) -> None:
    with outputs.staging(store, tmp_path / "scratch") as folder:
        (folder / "weights").write_bytes(b"w")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
        outputs.put(store, folder, RECORD, lambda: None)


def test_an_output_may_hold_folders(store: VolumeFolder, tmp_path: Path) -> None:
    _put(store, tmp_path)
    there = outputs.existing(store)
    assert there is not None
    assert sorted(there.files) == ["additional_chat_templates/tool_use.jinja", "weights"]
    assert outputs.is_whole(store, there)
    _put(store, tmp_path)  # all of it is ours: replaced


def test_an_output_that_lost_a_file_is_not_whole(store: VolumeFolder, tmp_path: Path) -> None:
    _put(store, tmp_path)
    store.delete("weights")
    there = outputs.existing(store)
    assert there is not None
    assert not outputs.is_whole(store, there)


def test_what_a_killed_run_left_goes_and_a_neighbours_work_stays(store: VolumeFolder, tmp_path: Path) -> None:
    left_over, neighbours = tmp_path / ".bot.0123456789ab.part", tmp_path / ".bot.v2.0123456789ab.part"
    left_over.mkdir()
    neighbours.mkdir()
    _put(store, tmp_path)
    assert not left_over.exists()
    assert neighbours.is_dir()
