"""What a run has besides its job: who it is, where it writes, and who may stop it. Made by worker, used by setup and train."""

import threading
from dataclasses import dataclass
from pathlib import Path

from .errors import Stopped
from .ranks import Ranks
from .reporting.reporter import Progress
from .storage.stores import FolderStore, WholeStore


@dataclass(frozen=True)
class RunContext:
    """What a run has besides its job."""

    ranks: Ranks
    scratch: Path
    """Node-local folder for downloads, prepared data and staging."""
    attempt: int
    run_id: str
    """The fencing token."""
    reporter: Progress
    stop: threading.Event
    """Set when this process was asked to stop."""
    checkpoints: FolderStore
    output: FolderStore | WholeStore

    def asked_to_stop(self) -> bool:
        """Whether this rank knows of a wish to stop."""
        return self.stop.is_set() or self.reporter.stop_requested is not None

    def check_stop(self) -> None:
        """Raises Stopped if so: for the time before the first step, when there is nothing to save."""
        if self.asked_to_stop():
            raise Stopped("stopped before training began")
