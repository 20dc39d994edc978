"""Whether this process can have a GPU at all, told without torch, whose import takes seconds. Called by worker."""

import ctypes
from pathlib import Path


def no_gpu() -> bool:
    """True where torch is sure to find none: there is no driver, or it shows this process no GPU."""
    if Path("/dev/kfd").exists():  # AMD's; only torch can tell more
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return bool(driver.cuInit(0))
