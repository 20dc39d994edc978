"""Many ranks, one verdict: a table of how they can end together."""

import signal
from pathlib import Path

import pytest

from finetune_crds.v1alpha1 import OutputStatus
from finetune_crds.verdict import MESSAGE_MAX, ExitCode, Verdict
from finetune_trainer.reporting import verdicts
from finetune_trainer.reporting.verdicts import RankExit, combine

OUTPUT = OutputStatus(uri="pvc://models/bot")
KILLED = -signal.SIGKILL


def finished(**changes: object) -> Verdict:
    return Verdict.model_validate({"code": 0, "step": 10, "total_steps": 10, "output": OUTPUT, **changes})


def said(code: ExitCode, message: str = "why") -> Verdict:
    return Verdict(code=code, message=message, step=4, total_steps=10)


@pytest.mark.parametrize(
    ("exits", "written", "stopping", "code"),
    [
        pytest.param({0: 0}, {0: finished()}, False, ExitCode.FINISHED, id="finished"),
        pytest.param({0: 0}, {}, False, ExitCode.INTERNAL_ERROR, id="0 without a verdict"),
        pytest.param({0: 0}, {0: finished(step=9)}, False, ExitCode.INTERNAL_ERROR, id="0 before the last step"),
        pytest.param({0: 0}, {0: finished(output=None)}, False, ExitCode.INTERNAL_ERROR, id="0 without an output"),
        pytest.param({0: 0}, {0: said(ExitCode.STOPPED)}, True, ExitCode.INTERNAL_ERROR, id="0 but stopped"),
        pytest.param({1: 0}, {1: finished(output=None)}, False, ExitCode.FINISHED, id="only rank 0 has an output"),
        pytest.param({0: 0, 1: 0}, {0: finished()}, False, ExitCode.INTERNAL_ERROR, id="one of two said nothing"),
        pytest.param({0: 75, 1: 75}, {0: said(ExitCode.STOPPED)}, True, ExitCode.STOPPED, id="stopped"),
        pytest.param({0: -15, 1: -15}, {}, True, ExitCode.STOPPED, id="stopped while importing"),
        pytest.param({0: -15}, {}, False, 143, id="SIGTERM from elsewhere"),
        pytest.param(
            {0: 76, 1: 64}, {0: said(ExitCode.PEER_LOST), 1: said(ExitCode.USER_ERROR)}, False, 64, id="cause wins"
        ),
        pytest.param({0: 70, 1: KILLED}, {0: said(ExitCode.INTERNAL_ERROR)}, False, 137, id="killed explains a crash"),
        pytest.param({0: 76, 1: KILLED}, {0: said(ExitCode.PEER_LOST)}, False, 137, id="killed explains a lost peer"),
        pytest.param({0: 76, 1: 76}, {0: said(ExitCode.PEER_LOST)}, False, 76, id="peer on another node"),
        pytest.param({0: 75, 1: 76}, {0: said(ExitCode.STOPPED)}, True, 75, id="stop before peer lost"),
        pytest.param({0: 77, 1: 74}, {0: said(ExitCode.FENCED)}, False, 77, id="fenced first"),
        pytest.param({0: 1}, {}, False, 1, id="no code of ours"),
    ],
)
def test_the_cause_of_the_ranks_ends_becomes_the_pods_code(
    exits: dict[int, int], written: dict[int, Verdict], stopping: bool, code: int
) -> None:
    ends = {rank: RankExit(returncode) for rank, returncode in exits.items()}
    assert combine(ends, written, stopping=stopping, memory_kills=0).code == code


def test_who_is_killed_at_the_end_of_the_grace_period_counts_as_stopped_and_is_told_what_to_raise() -> None:
    verdict = combine(
        {0: RankExit(KILLED, ours=True)}, {0: said(ExitCode.INTERNAL_ERROR, "")}, stopping=True, memory_kills=0
    )
    assert verdict.code == ExitCode.STOPPED
    assert "after step 4" in verdict.message
    assert "gracePeriodSeconds" in verdict.message


def test_who_is_killed_because_a_peer_failed_is_never_the_cause() -> None:
    ends = {0: RankExit(KILLED, ours=True), 1: RankExit(66)}
    verdict = combine(ends, {1: said(ExitCode.DIVERGED, "loss is nan at step 4")}, stopping=False, memory_kills=0)
    assert (verdict.code, verdict.message) == (66, "loss is nan at step 4")


def test_a_killed_rank_keeps_the_progress_that_it_had_written() -> None:
    verdict = combine({0: RankExit(KILLED)}, {0: said(ExitCode.INTERNAL_ERROR, "")}, stopping=False, memory_kills=0)
    assert (verdict.code, verdict.step, verdict.total_steps) == (137, 4, 10)
    assert verdict.message == "rank 0 was killed after step 4 by SIGKILL"


def test_memory_of_the_pod_is_named_when_the_kernel_killed_for_it() -> None:
    verdict = combine({0: RankExit(KILLED)}, {}, stopping=False, memory_kills=1)
    assert "resources.memory" in verdict.message


def test_progress_comes_from_the_first_rank_and_the_message_from_the_failed_one() -> None:
    written = {0: said(ExitCode.PEER_LOST).model_copy(update={"step": 7}), 3: said(ExitCode.STORAGE_ERROR, "disk full")}
    verdict = combine({0: RankExit(76), 3: RankExit(74)}, written, stopping=False, memory_kills=0)
    assert (verdict.code, verdict.step, verdict.message) == (74, 7, "disk full")


def test_written_verdicts_are_read_back_and_a_torn_one_counts_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(verdicts.ENV_VERDICT_DIR, str(tmp_path))
    monkeypatch.setenv("RANK", "2")
    verdicts.write(finished())
    (tmp_path / "rank-0.json").write_text('{"code": 0, "st')
    assert verdicts.read_all(tmp_path) == {2: finished()}


def test_the_message_of_a_long_verdict_fits_into_what_the_kubelet_keeps() -> None:
    metrics = [{"name": f"eval_{i}", "value": "0.123456"} for i in range(200)]
    long = Verdict.model_validate({"code": 64, "message": "ü" * 1500, "metrics": metrics, "step": 3})
    message = long.to_message()
    assert len(message.encode()) <= MESSAGE_MAX
    assert Verdict.model_validate_json(message).step == 3
