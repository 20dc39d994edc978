"""Ties a worker to its supervisor. In a pod the kernel ends both together; `finetune local` has no such kernel, and must leave none behind."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def stop_with_supervisor() -> None:
    """Asks the kernel for SIGTERM to this process when its parent ends, so that it saves and goes. Linux; elsewhere it does nothing."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    supervisor = os.getppid()
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != supervisor:  # it ended in between
        os.kill(os.getpid(), signal.SIGTERM)
