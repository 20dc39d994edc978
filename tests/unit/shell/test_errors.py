"""Exceptions become errors of the tree, and evidence without values."""

import errno

import pytest

from finetune_crds.verdict import OUTCOMES, ExitCode
from finetune_trainer import errors
from finetune_trainer.errors import TrainerError, classified, evidence_of, verdict_of


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class DistBackendError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UserError("x"), ExitCode.USER_ERROR),
        (errors.AlreadyExists("x"), ExitCode.STORAGE_ERROR),
        (OutOfMemoryError("CUDA out of memory"), ExitCode.OUT_OF_GPU_MEMORY),
        (DistBackendError("NCCL error"), ExitCode.PEER_LOST),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), ExitCode.PEER_LOST),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), ExitCode.INTERNAL_ERROR),
        (OSError(errno.ENOSPC, "No space left on device", "/x/shard"), ExitCode.STORAGE_ERROR),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), ExitCode.INTERNAL_ERROR),
        (ValueError("bad"), ExitCode.INTERNAL_ERROR),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_each_exception_has_its_code(error: Exception, code: ExitCode) -> None:
    assert classified(error).code == code


def test_every_failure_of_the_table_but_a_users_own_program_has_an_error() -> None:
    codes = {kind.code for kind in TrainerError.__subclasses__()}
    assert codes == set(OUTCOMES) - {ExitCode.FINISHED, ExitCode.PROGRAM_FAILED}


def test_evidence_names_our_innermost_line_and_no_value() -> None:
    secret = "the customer's own words"
    try:
        errors._below_packages(secret.nope)  # type: ignore[attr-defined]
    except AttributeError as error:
        evidence = evidence_of(error)
    assert (evidence.type, evidence.file) == ("AttributeError", "shell/test_errors.py")
    try:
        raise ValueError(secret)
    except ValueError as error:
        verdict = verdict_of(error)
    assert secret not in verdict.model_dump_json()
    assert verdict.message == "the trainer failed with ValueError"


def test_evidence_prefers_our_own_frame_to_a_librarys() -> None:
    try:
        errors._below_packages(None)  # type: ignore[arg-type]
    except TypeError as error:
        evidence = evidence_of(error)
    assert evidence.file == "finetune_trainer/errors.py"


def test_a_stop_needs_no_evidence() -> None:
    assert verdict_of(errors.Stopped("suspended")).evidence is None
