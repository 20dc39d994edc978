"""Outputs that are no folders, from training to the next training: an image in a real registry."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_crds.resolved import ResolvedAdapter, ResolvedFineTune, ResolvedJob, ResolvedModel
from finetune_crds.v1alpha1 import JobOutput, Location
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


def _job(folder: Path, model: Path, uri: str, *, output_merged: bool | None = None, **spec: Any) -> ResolvedJob:
    data = tiny.write_rows(folder / "rows.jsonl", tiny.chat_rows(24))
    return tiny.job(
        folder, model, data,
        output={"uri": uri, "merged": output_merged},
        checkpoints={"storage": {"uri": f"file://{folder}/checkpoints"}},
        training={"maxSteps": 4, "batchSize": 4, "sequenceLength": 64},
        **{"method": {"lora": {"rank": 4}}, **spec},
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

    reference = {"job": "first", "uri": f"{uri}:v1@{straight.output.digest}", "digest": straight.output.digest}
    continued = _job(tmp_path / "next", llama, f"file://{tmp_path}/next/output", method={"lora": {}})
    assert isinstance(continued.spec, ResolvedFineTune)
    continued.spec.model.adapter = ResolvedAdapter.model_validate(reference)
    _keep_its_shape(continued)
    verdict = _run(continued, tmp_path / "next")
    assert verdict.code == 0, verdict.message
    assert verdict.inputs and verdict.inputs.adapter
    assert (verdict.inputs.adapter.job, verdict.inputs.adapter.digest) == ("first", straight.output.digest)
    folder = materialise(Location(uri=f"{uri}:v1"), tmp_path / "pulled")
    assert (folder / "adapter_model.safetensors").stat().st_size > 0


def _keep_its_shape(job: ResolvedJob) -> None:
    """As the resolver does for a job with model.adapter."""
    assert isinstance(job.spec, ResolvedFineTune) and job.spec.method.lora
    shape = ("rank", "alpha", "targets", "use_dora", "use_rslora", "initialization")
    job.spec.method.lora = job.spec.method.lora.model_copy(update=dict.fromkeys(shape))


def test_the_output_of_another_job_is_continued_as_it_was(tmp_path: Path, llama: Path) -> None:
    """pretrain -> sft: an adapter and a whole model by reference, and what happens when the place changed in between."""
    first = _job(tmp_path / "first", llama, f"file://{tmp_path}/first/output", output_merged=True)
    published = _run(first, tmp_path / "first")
    assert published.output and published.output.digest, published.message
    place = {"job": "first", "uri": published.output.uri, "digest": published.output.digest}

    whole = _job(tmp_path / "whole", llama, f"file://{tmp_path}/whole/output")
    assert isinstance(whole.spec, ResolvedFineTune)
    whole.spec.model = ResolvedModel.model_validate(place)
    verdict = _run(whole, tmp_path / "whole")
    assert verdict.code == 0, verdict.message
    assert verdict.inputs and verdict.inputs.model == JobOutput(job="first", digest=published.output.digest)

    weights = tmp_path / "first/output/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    verdict = _run(whole, tmp_path / "whole", "changed")
    assert verdict.code == ExitCode.USER_ERROR
    assert (
        "spec.model.job: " in verdict.message and "no longer holds what FineTuneJob first published" in verdict.message
    )
    weights.write_bytes(content)
    whole.spec.model = ResolvedModel.model_validate({**place, "digest": "sha256:0"})
    assert _run(whole, tmp_path / "whole", "other").code == ExitCode.USER_ERROR


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
