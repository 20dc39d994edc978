"""How a run can end other than by finishing. Each error carries the exit code of the table in `finetune_crds.verdict`.

    TrainerError
    ├── UserError          a field of the manifest, or what it names, is wrong; never retried
    ├── DataError          the dataset's rows are wrong; never retried
    ├── Diverged           loss or gradient norm is not finite; nothing of it was applied
    ├── GateFailed         the result is not good enough to be published
    ├── OutOfGpuMemory     the device is too small for this configuration
    ├── StorageError       a place cannot be reached, or is full
    │   └── AlreadyExists  another writer was there first (see stores.create_exclusive)
    ├── Stopped            asked to stop: SIGTERM or the progress server's reply; a checkpoint was saved
    ├── PeerLost           another rank went away
    ├── Fenced             another run has taken this one's place
    └── InternalError      a fault of this program

Interrupted is none of them: what was under way is given up, and who asked for it decides what is saved.

Messages name fields, URIs and row numbers; never the content of a row.
"""

import errno
import traceback
from pathlib import PurePath
from typing import ClassVar

from finetune_crds.verdict import Evidence, ExitCode, Verdict


class TrainerError(Exception):
    """Base of all that ends a run with a code of the table."""

    code: ClassVar[ExitCode]


class UserError(TrainerError):
    """A field of the manifest, or what it names, is wrong. The message says which, and what to do."""

    code = ExitCode.USER_ERROR


class DataError(TrainerError):
    """The dataset's rows are wrong. The message names file and row numbers."""

    code = ExitCode.DATA_ERROR


class Diverged(TrainerError):
    """Loss or gradient norm is not finite."""

    code = ExitCode.DIVERGED


class GateFailed(TrainerError):
    """The result is not what evaluation.gates asks for."""

    code = ExitCode.GATE_FAILED


class OutOfGpuMemory(TrainerError):
    """The device is too small for this configuration."""

    code = ExitCode.OUT_OF_GPU_MEMORY


class StorageError(TrainerError):
    """A place cannot be reached after retries, or is full."""

    code = ExitCode.STORAGE_ERROR


class AlreadyExists(StorageError):
    """What was to be created is there already."""


class Stopped(TrainerError):
    """Asked to stop, and stopped at a step boundary."""

    code = ExitCode.STOPPED


class Interrupted(Exception):
    """Asked to stop in the middle of something that can be done again."""


class PeerLost(TrainerError):
    """Another rank went away in the middle of a collective operation."""

    code = ExitCode.PEER_LOST


class Fenced(TrainerError):
    """Another run has taken this one's place: nothing may be committed any more."""

    code = ExitCode.FENCED


class InternalError(TrainerError):
    """A fault of this program."""

    code = ExitCode.INTERNAL_ERROR


_GPU_MEMORY = {"OutOfMemoryError"}
_GPU_MEMORY_PHRASES = ("cuda error: out of memory", "cuda out of memory", "alloc_failed", "failed to cuda calloc")
"""Of CUDA, cuBLAS, cuDNN and NCCL, which allocate beside torch."""
_PEER = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_PEER_PHRASES = ("Connection closed by peer", "Connection reset by peer", "gloo/transport")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}


def classified(error: BaseException) -> TrainerError:
    """The error of our tree that an exception amounts to. torch's are told by name, so that torch is not imported for it."""
    if isinstance(error, TrainerError):
        return error
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if lacks_gpu_memory(error):
        found: TrainerError = OutOfGpuMemory("the GPU ran out of memory")
    elif kinds & _PEER or (isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PEER_PHRASES)):
        found = PeerLost("another rank of this job went away")
    elif isinstance(error, OSError) and error.errno in _FULL:
        found = StorageError(f"{error.filename or 'a file'} could not be written: {error.strerror}")
    else:
        found = InternalError(f"the trainer failed with {type(error).__name__}")
    found.__cause__ = error
    return found


def lacks_gpu_memory(error: BaseException) -> bool:
    """Whether an exception says that a GPU's memory is full."""
    if isinstance(error, OutOfGpuMemory):
        return True
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).lower()
    return bool(kinds & _GPU_MEMORY) or (
        isinstance(error, RuntimeError) and any(phrase in text for phrase in _GPU_MEMORY_PHRASES)
    )


def evidence_of(error: BaseException) -> Evidence:
    """Type, file and line of the innermost frame of ours, or else of the innermost one. No values, so no training text."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    frames = traceback.extract_tb(root.__traceback__) or traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "finetune_trainer" in PurePath(frame.filename).parts]
    frame = next(reversed(ours or list(frames)), None)
    return Evidence(
        type=type(root).__name__[:128],
        file=_below_packages(frame.filename)[-256:] if frame else None,
        line=frame.lineno if frame else None,
    )


def _below_packages(filename: str) -> str:
    """torch/nn/functional.py for .../site-packages/torch/nn/functional.py: where an interpreter lies is nobody's business."""
    parts = PurePath(filename).parts
    for root in ("site-packages", "trainer_image"):
        if root in parts:
            return "/".join(parts[parts.index(root) + 1 :])
    return "/".join(parts[-2:])


def verdict_of(error: BaseException) -> Verdict:
    """The part of a verdict that is about the end; the caller adds step, checkpoints and metrics."""
    found = classified(error)
    evidence = None if isinstance(found, (Stopped, Fenced)) else evidence_of(found)
    return Verdict(code=found.code, message=str(found)[:1500], evidence=evidence)
