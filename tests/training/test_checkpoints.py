"""Checkpoints: when they are made, kept and passed over, and who may go on from them."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from finetune_crds.verdict import ExitCode, Verdict
from finetune_trainer import train
from finetune_trainer.errors import StorageError
from finetune_trainer.modelling.masters import Masters
from finetune_trainer.results.checkpoints import Checkpoints

from . import tiny
from .runs import finish, run
from .spawn import run_ranks
from .test_run import QUICK, chat_job


def test_a_stop_saves_and_the_next_run_goes_on(tmp_path: Path, llama: Path) -> None:
    job = chat_job(tmp_path, llama)
    stopped = run(job, tmp_path, reporter=tiny.Recorder(stop_at=3))
    assert stopped.code == ExitCode.STOPPED
    assert stopped.checkpoints and stopped.checkpoints.latest and stopped.checkpoints.latest.step == stopped.step < 6
    assert "Suspended" in stopped.message
    assert not (tmp_path / "output").exists()
    finished = run(job, tmp_path, run_id="second")
    assert (finished.code, finished.first_step, finished.step) == (0, stopped.step, 6)


def test_a_stop_in_mid_evaluation_is_not_lost(tmp_path: Path, llama: Path) -> None:
    """What was not evaluated before the stop is evaluated after it, and a best found then is committed over the plain checkpoint."""
    spec = {"dataset": {"evaluation": {"fraction": "0.3"}}, "evaluation": {"everySteps": 3}}
    whole = chat_job(tmp_path / "whole", llama, **spec)
    finish(whole, tmp_path / "whole")

    class StopsInEvaluation(tiny.Recorder):
        def update(self, report: Any, metrics: Any) -> None:
            if report.stage == "Evaluating" and report.step == 3:
                self.stop_requested = "Suspended"

    job = chat_job(tmp_path / "stopped", llama, **spec)
    stopped = run(job, tmp_path / "stopped", reporter=StopsInEvaluation())
    assert (stopped.code, stopped.step) == (ExitCode.STOPPED, 3)
    finished = run(job, tmp_path / "stopped", run_id="second")
    assert (finished.code, finished.first_step) == (0, 3)
    assert tiny.losses(tmp_path / "stopped/output", "eval_loss_hex") == tiny.losses(
        tmp_path / "whole/output", "eval_loss_hex"
    )


def test_a_replaced_run_commits_nothing(tmp_path: Path, llama: Path) -> None:
    job = chat_job(tmp_path, llama, checkpoints={"everySteps": 2})

    class Replaced(tiny.Recorder):
        def update(self, report: Any, metrics: Any) -> None:
            if report.step == 3 and report.stage == "Training":
                owner = next(tmp_path.rglob("owner.json"))
                owner.write_text('{"attempt": 1, "runId": "another"}')

    verdict = run(job, tmp_path, reporter=Replaced())
    assert verdict.code == ExitCode.FENCED
    assert [path.parent.name for path in tmp_path.rglob("step-*/index.json")] == ["step-00000002"]


def test_an_earlier_attempt_is_refused(tmp_path: Path, llama: Path) -> None:
    job = chat_job(tmp_path, llama)
    assert run(job, tmp_path, attempt=2, reporter=tiny.Recorder(stop_at=2)).code == ExitCode.STOPPED
    assert run(job, tmp_path, attempt=1, run_id="late").code == ExitCode.FENCED


def test_a_changed_dataset_is_refused(tmp_path: Path, llama: Path) -> None:
    job = chat_job(tmp_path, llama)
    assert run(job, tmp_path, reporter=tiny.Recorder(stop_at=2)).code == ExitCode.STOPPED
    tiny.write_rows(tmp_path / "train.jsonl", tiny.chat_rows(29))
    verdict = run(job, tmp_path, run_id="second")
    assert verdict.code == ExitCode.DATA_ERROR
    assert verdict.message.startswith("DatasetChanged")


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "index"])
def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, llama: Path, harm: str) -> None:
    job = chat_job(tmp_path, llama, checkpoints={"everySteps": 2})
    stopped = run(job, tmp_path, reporter=tiny.Recorder(stop_at=4))
    folder = max(path for path in tmp_path.rglob("step-*") if path.is_dir())
    assert int(folder.name[5:]) == stopped.step
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    match harm:
        case "flip":
            data[-7] ^= 1
            shard.write_bytes(data)
        case "cut":
            shard.write_bytes(data[:-1])
        case "remove":
            shard.unlink()
        case "index":
            (folder / "index.json").write_text("{")
    verdict = run(job, tmp_path, run_id="second")
    assert verdict.code == 0, verdict.message
    assert 0 < verdict.first_step < stopped.step
    assert verdict.step == 6


def test_checkpoints_by_the_clock(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which each look at it takes 40 seconds: several saves of everyMinutes: 1 in a run of six steps."""
    looks = itertools.count(0.0, 40.0)
    monkeypatch.setattr(train.time, "monotonic", lambda: next(looks))
    job = chat_job(tmp_path, llama, checkpoints={"everyMinutes": 1, "keep": 9})
    finish(job, tmp_path)
    steps = sorted(int(path.parent.name[5:]) for path in tmp_path.rglob("step-*/index.json"))
    assert steps[-1] == 6 and len(steps) > 1


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path, llama: Path) -> None:
    """Nothing moves, so the first evaluation stays the best."""
    job = chat_job(
        tmp_path, llama,
        dataset={"evaluation": {"fraction": "0.3"}},
        training=QUICK | {"maxSteps": 30, "learningRate": "0"},
        evaluation={"everySteps": 5, "publish": "last"},
        checkpoints={"everySteps": 3, "keep": 2},
    )  # fmt: skip
    verdict = run(job, tmp_path)
    assert verdict.checkpoints and verdict.checkpoints.best
    best = verdict.checkpoints.best.step
    steps = {int(path.parent.name[5:]) for path in tmp_path.rglob("step-*/index.json")}
    assert best == 5
    assert steps == {best, 27, 30}
    assert verdict.output and verdict.output.step == 30


def test_a_rank_that_cannot_write_leaves_no_other_waiting(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with the exchange of what others write; nothing is committed, and the next run begins where the last commit was."""
    write = Checkpoints._write_shard

    def fails(self: Checkpoints, *arguments: Any) -> Any:
        if self._ranks.rank == 1 and self.latest is not None:
            raise StorageError("the volume is gone")
        return write(self, *arguments)

    job = chat_job(tmp_path, llama, checkpoints={"everySteps": 2})
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "_write_shard", fails)
        assert run_ranks(job, tmp_path, 2).code == ExitCode.PEER_LOST
    said = Verdict.model_validate_json((tmp_path / "verdict-1.json").read_bytes())
    assert (said.code, said.message, said.step) == (ExitCode.STORAGE_ERROR, "the volume is gone", 4)
    again = run_ranks(job, tmp_path, 2, run_id="second")
    assert (again.code, again.first_step, again.step) == (0, 2, 6)


def test_a_checkpoint_that_keeps_other_tensors_is_refused_in_words(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of another version of the trainer does."""
    job = chat_job(tmp_path, llama)
    assert run(job, tmp_path, reporter=tiny.Recorder(stop_at=3)).code == ExitCode.STOPPED
    entries = Masters._entries
    monkeypatch.setattr(
        Masters, "_entries", lambda masters: {f"new-{name}": one for name, one in entries(masters).items()}
    )
    verdict = run(job, tmp_path, run_id="second")
    assert verdict.code == ExitCode.USER_ERROR
    assert "was written by a trainer of another version, which kept other tensors" in verdict.message
