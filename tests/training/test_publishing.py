"""Outputs that are no folders, from training to the next training: an image in a real registry."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_crds.resolution import ResolvedJob
from finetune_crds.v1alpha1 import Location
from finetune_crds.verdict import ExitCode, Verdict
from finetune_trainer import train
from finetune_trainer.storage.places import materialise
from shell.registries import RealRegistry

from . import tiny


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    made = RealRegistry(tmp_path_factory.mktemp("registry"))
    yield made
    made.process.stop()


def _job(folder: Path, model: Path, uri: str, **spec: Any) -> ResolvedJob:
    data = tiny.write_rows(folder / "rows.jsonl", tiny.chat_rows(24))
    return tiny.job(
        folder, model, data,
        output={"uri": uri},
        checkpoints={"storage": {"uri": f"file://{folder}/checkpoints"}},
        training={"maxSteps": 4, "batchSize": 4, "sequenceLength": 64},
        method={"lora": {"rank": 4}},
        **spec,
    )  # fmt: skip


def _run(job: ResolvedJob, folder: Path, name: str = "run", reporter: tiny.Recorder | None = None) -> Verdict:
    return train.run(job, tiny.context(job, folder / name, run_id=name, reporter=reporter))


def test_an_image_is_published_reused_and_continued(registry: RealRegistry, tmp_path: Path, llama: Path) -> None:
    uri = f"oci://{registry.host}/team/bot"
    whole = _job(tmp_path, llama, f"{uri}:v1")
    straight = _run(whole, tmp_path)
    assert straight.code == 0 and straight.output and straight.output.digest, straight.message
    assert straight.output.digest in registry.blobs()

    again = _run(whole, tmp_path, "again")
    assert again.output == straight.output.model_copy(update={"reused": True})

    # The same job to another tag, stopped on the way: the same bytes, so the same digest.
    other = _job(tmp_path, llama, f"{uri}:v2")
    other.spec.checkpoints.storage = Location(uri=f"file://{tmp_path}/other.checkpoints")
    stopped = _run(other, tmp_path, "stopped", tiny.Recorder(stop_at=2))
    assert stopped.code == ExitCode.STOPPED
    resumed = _run(other, tmp_path, "resumed")
    assert resumed.first_step and resumed.output
    assert resumed.output.digest == straight.output.digest

    continued = _job(tmp_path / "next", llama, f"file://{tmp_path}/next/output")
    continued.spec.model.adapter = Location(uri=f"{uri}@{straight.output.digest}")  # type: ignore[union-attr]
    lora = continued.spec.method.lora  # type: ignore[union-attr]
    lora.rank = lora.alpha = lora.targets = lora.use_dora = lora.use_rslora = lora.initialization = None
    verdict = _run(continued, tmp_path / "next")
    assert verdict.code == 0, verdict.message
    folder = materialise(Location(uri=f"{uri}:v1"), tmp_path / "pulled")
    assert (folder / "adapter_model.safetensors").stat().st_size > 0


def test_a_tag_that_another_holds_is_refused_before_training(
    registry: RealRegistry, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.storage.images.LABEL", "somebody.else/record")
    assert _run(_job(tmp_path, llama, f"oci://{registry.host}/taken/bot:v1"), tmp_path).code == 0
    monkeypatch.undo()
    job = _job(tmp_path / "ours", llama, f"oci://{registry.host}/taken/bot:v1")
    recorder = tiny.Recorder()
    verdict = _run(job, tmp_path / "ours", reporter=recorder)
    assert verdict.code == ExitCode.USER_ERROR
    assert "taken/bot:v1 is an image that no FineTuneJob wrote" in verdict.message
    assert "Training" not in {report.stage for report, _ in recorder.reports}
