"""From ended pods to why: each pod's exit is classified by the table of exit codes, and the most telling one speaks for the Job.

A user's error on one node makes its peers end as PEER_LOST or killed; what is last or loudest is seldom the cause.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from pydantic import ValidationError

from finetune_crds.v1alpha1 import Cause, Failure
from finetune_crds.verdict import OUTCOMES, ExitCode, Policy, Verdict

from .views import JobView, PodView

_WEIGHT: dict[Policy, int] = {"FailJob": 0, "Count": 1, "Ignore": 2}
_KILLED = (137, 143)
_CODE_IN_MESSAGE = re.compile(r"failed with exit code (\d+)")


class Finding(NamedTuple):
    """Why a run or a Job ended."""

    policy: Policy
    failure: Failure
    verdict: Verdict | None

    @property
    def cause(self) -> Cause:
        """One word."""
        return self.failure.cause


def verdict_of(pod: PodView) -> Verdict | None:
    """The supervisor's record in a pod's termination message; None when there is none, or something else's."""
    if not pod.message.startswith("{"):
        return None
    try:
        return Verdict.model_validate_json(pod.message)
    except ValidationError:
        return None


def finished_verdict(pods: Iterable[PodView]) -> Verdict | None:
    """The record of a run that reached its end, from the pod with index 0."""
    for pod in pods:
        if pod.index == 0 and pod.exit_code == 0:
            verdict = verdict_of(pod)
            if verdict and verdict.code == ExitCode.FINISHED:
                return verdict
    return None


def of_job(job: JobView, pods: Iterable[PodView], *, is_program: bool) -> Finding:
    """Why a Job failed."""
    found = [(of_pod(pod, is_program=is_program), pod.finished or pod.deleted or "") for pod in pods if _failed(pod)]
    if found:
        return min(found, key=lambda each: (_WEIGHT[each[0].policy], each[1]))[0]
    code = _CODE_IN_MESSAGE.search(job.failure)  # pods are gone, the Job controller has seen them
    if code:
        return _by_code(int(code[1]), None, job.failure, is_program=is_program)
    return _finding("NoVerdict", "Count", None, f"The pods are gone and left no record. Job {job.failure}", "")


def of_pod(pod: PodView, *, is_program: bool) -> Finding:
    """Why a pod ended that did not finish."""
    verdict = verdict_of(pod)
    if pod.evicted is not None:
        return _finding(
            "UserError",
            "FailJob",
            pod.exit_code,
            f"Pod {pod.name} was evicted: {pod.evicted.strip()}",
            "Raise what the message names (resources.scratch for the volume scratch), and apply the manifest again.",
            verdict,
        )
    if pod.exit_reason == "OOMKilled":
        return _finding(
            "OutOfMemory",
            "FailJob",
            pod.exit_code,
            f"Pod {pod.name} used more memory than resources.memory allows, and the kernel ended it.",
            "Raise resources.memory (or lower training.microBatchSize), and apply the manifest again.",
            verdict,
        )
    if verdict:
        return _by_code(verdict.code, verdict, verdict.message, is_program=is_program, exit_code=pod.exit_code)
    if pod.exit_code is not None and pod.exit_code in OUTCOMES:
        return _by_code(pod.exit_code, None, f"Pod {pod.name} left no message.", is_program=is_program)
    if pod.deleted or pod.disrupted or pod.exit_code is None:
        why = pod.disrupted or "it was deleted"
        return _finding("Disruption", "Ignore", pod.exit_code, f"Pod {pod.name} was taken away: {why}.", "")
    said = f"Pod {pod.name} ended with exit code {pod.exit_code} ({pod.exit_reason}) and left no message."
    return _by_code(pod.exit_code, None, said, is_program=is_program)


def over_limits(pods: Iterable[PodView]) -> Failure | None:
    """Why a Job is to end though its pod may have left as one that was disrupted, whose place another would take, for ever."""
    return next((of_pod(pod, is_program=False).failure for pod in pods if pod.evicted is not None), None)


def _failed(pod: PodView) -> bool:
    return pod.ended and pod.exit_code != 0 and (pod.exit_code is not None or pod.running_since is not None or pod.gone)


def _by_code(
    code: int, verdict: Verdict | None, message: str, *, is_program: bool, exit_code: int | None = None
) -> Finding:
    exit_code = code if exit_code is None else exit_code
    if code in OUTCOMES:
        outcome = OUTCOMES[ExitCode(code)]
        if outcome.cause is None:  # 0 written by a pod that did not end with 0
            return _finding("NoVerdict", "Count", exit_code, message, "", verdict)
        return _finding(outcome.cause, outcome.policy, exit_code, message, outcome.next_step, verdict)
    if is_program and code not in _KILLED:
        advice = OUTCOMES[ExitCode.PROGRAM_FAILED].next_step
        return _finding("ProgramFailed", "Count", exit_code, message, advice, verdict)
    advice = "Look at the node's events: something outside the pod killed it, or it used too much memory or disk."
    return _finding("Killed", "Count", exit_code, message, advice, verdict)


def _finding(
    cause: Cause, policy: Policy, exit_code: int | None, message: str, next_step: str, verdict: Verdict | None = None
) -> Finding:
    where = verdict.evidence if verdict else None
    place = f"{where.type} at {where.file or '?'}:{where.line or '?'}" if where else None
    return Finding(
        policy,
        Failure(cause=cause, exit_code=exit_code, message=message[:2048], evidence=place, next_step=next_step),
        verdict,
    )
