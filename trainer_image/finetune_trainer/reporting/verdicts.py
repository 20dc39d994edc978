"""Each rank's verdict in a file, and the one verdict of a pod that the supervisor makes of them.

A worker writes its file at each checkpoint and at its end. The exit code of the process is the truth about how it ended; the file
says how far it got and why. So a worker killed in mid-step still leaves its last checkpoint and step in the pod's verdict.
"""

import os
import signal
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import ValidationError

from finetune_crds.verdict import ExitCode, Verdict

ENV_VERDICT_DIR: Final = "FINETUNE_VERDICT_DIR"
"""Folder for rank-N.json, N the rank among all processes of the job. Set by the supervisor for its workers."""

_ORDER = (
    ExitCode.FENCED,
    ExitCode.USER_ERROR,
    ExitCode.DATA_ERROR,
    ExitCode.DIVERGED,
    ExitCode.GATE_FAILED,
    ExitCode.OUT_OF_GPU_MEMORY,
    ExitCode.STORAGE_ERROR,
    None,  # killed, or a code of no table
    ExitCode.INTERNAL_ERROR,
    ExitCode.STOPPED,
    ExitCode.PEER_LOST,
    ExitCode.FINISHED,
)
"""What explains more comes first: causes before their consequences on other ranks."""
_SIGNALLED = 128


def write(verdict: Verdict) -> None:
    """Leaves this rank's verdict for the supervisor: whole or not at all. Without a supervisor it does nothing."""
    folder = os.environ.get(ENV_VERDICT_DIR)
    if not folder:
        return
    target = Path(folder) / f"rank-{os.environ.get('RANK', '0')}.json"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(verdict.model_dump_json(by_alias=True, exclude_none=True), encoding="utf-8")
    temporary.replace(target)


def read_all(folder: Path) -> dict[int, Verdict]:
    """The verdicts in a folder by rank; what cannot be parsed counts as not written."""
    found: dict[int, Verdict] = {}
    for path in folder.glob("rank-*.json"):
        try:
            found[int(path.stem.removeprefix("rank-"))] = Verdict.model_validate_json(path.read_bytes())
        except (ValueError, ValidationError):
            continue
    return found


class RankExit(NamedTuple):
    """How one worker process ended."""

    returncode: int
    """As of subprocess: negative for a signal."""
    ours: bool = False
    """Whether the supervisor itself killed it (at the end of the grace period, or after a peer failed)."""


def combine(exits: dict[int, RankExit], verdicts: dict[int, Verdict], *, stopping: bool, memory_kills: int) -> Verdict:
    """One verdict of all ranks of a pod.

    The cause wins over its consequences: a user's error on one rank makes its peers end as PEER_LOST, and the supervisor kills
    who does not notice. FINISHED needs every rank to say so with the last step done and, of rank 0, an output.

    Args:
        exits: by rank, every process that was started.
        verdicts: by rank, what was written.
        stopping: whether the pod was asked to stop before the first process ended.
        memory_kills: how many processes the kernel's out-of-memory killer ended in this pod.
    """
    codes = {rank: _code(rank, end, verdicts.get(rank), stopping=stopping) for rank, end in exits.items()}
    rank = min(codes, key=lambda r: (_urgency(codes[r]), exits[r].ours, r))
    code, cause = codes[rank], verdicts.get(rank)
    progress = verdicts[min(verdicts)] if verdicts else Verdict(code=code)
    if cause is not None and cause.code == code and (cause.message or code == ExitCode.FINISHED):
        message, evidence = cause.message, cause.evidence
    else:
        message, evidence = _explain(code, rank, exits[rank], cause, memory_kills), None
    return progress.model_copy(update={"code": int(code), "message": message, "evidence": evidence})


def _code(rank: int, end: RankExit, verdict: Verdict | None, *, stopping: bool) -> int:
    if end.ours:
        return ExitCode.STOPPED if stopping else ExitCode.PEER_LOST
    if end.returncode == 0:
        return ExitCode.FINISHED if verdict is not None and _is_finished(rank, verdict) else ExitCode.INTERNAL_ERROR
    if end.returncode < 0:
        # Its own stop signal found it before it could listen (while importing, say): nothing was lost.
        if stopping and -end.returncode == signal.SIGTERM:
            return ExitCode.STOPPED
        return _SIGNALLED - end.returncode
    return end.returncode


def _is_finished(rank: int, verdict: Verdict) -> bool:
    return (
        verdict.code == ExitCode.FINISHED
        and verdict.step == verdict.total_steps
        and (rank != 0 or verdict.output is not None or verdict.preflight is not None)
    )


def _urgency(code: int) -> int:
    return _ORDER.index(ExitCode(code)) if code in _ORDER else _ORDER.index(None)


def _explain(code: int, rank: int, end: RankExit, verdict: Verdict | None, memory_kills: int) -> str:
    """For an end that the worker could not tell about."""
    reached = f" after step {verdict.step}" if verdict and verdict.step else ""
    if end.ours and code == ExitCode.STOPPED:
        return (
            f"rank {rank} was still busy{reached} when the time to stop was up, and was killed; "
            "raise checkpoints.gracePeriodSeconds if saving takes longer"
        )
    if end.ours:
        return f"rank {rank} was killed{reached}: it did not notice that a peer had gone"
    if end.returncode == 0:
        return f"rank {rank} exited with 0 without having finished"
    if code == ExitCode.STOPPED:
        return f"rank {rank} was stopped before it could listen to the stop signal"
    if end.returncode == -signal.SIGKILL and memory_kills:
        return (
            f"rank {rank} was killed{reached} by the kernel because the pod ran out of memory; "
            "raise resources.memory or lower training.microBatchSize"
        )
    if end.returncode < 0:
        return f"rank {rank} was killed{reached} by {signal.Signals(-end.returncode).name}"
    return f"rank {rank} exited with {code}{reached} and left no word"
