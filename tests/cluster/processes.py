"""One long-running program of the cluster: started detached, found again by any later process, ended for certain.

`make demo` leaves a cluster behind and another `python -m cluster` continues with it, so nothing may depend on who
started what: the pid file beside the log is the only memory. It holds the start time too, because a pid alone may
have been given to another program since.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from .errors import NotReady


@dataclass
class Process:
    """A program with its pid file and log in the folder of the cluster."""

    name: str
    folder: Path
    command: Callable[[], Sequence[str | Path]]
    """Its command line; asked for at each start, as it may find or build the program."""
    ready: Callable[[], bool] = lambda: True
    """Whether it serves; must return or raise OSError quickly."""
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_seconds: float = 120
    stop_seconds: float = 15
    """How long it may take to end by SIGTERM before it is killed."""

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def _pid_file(self) -> Path:
        return self.folder / "pids" / f"{self.name}.json"

    @property
    def pid(self) -> int | None:
        """Its pid while it runs."""
        try:
            saved = json.loads(self._pid_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        started = _started_at(saved["pid"])
        return saved["pid"] if started is not None and started == saved["started"] else None

    def start(self) -> None:
        """Starts it unless it runs, and waits until it is ready."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Starts it unless it runs."""
        if self.pid is None:
            self._spawn([str(part) for part in self.command()])

    def _spawn(self, command: list[str]) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._pid_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=os.environ | dict(self.environment),
                start_new_session=True,
            )
        try:
            self._pid_file.write_text(json.dumps({"pid": child.pid, "started": _started_at(child.pid)}))
        except BaseException:  # Ctrl-C here would leave a process that nobody knows
            child.kill()
            raise
        child.returncode = 0  # it outlives this object on purpose; `_started_at` reaps it

    def wait_ready(self) -> None:
        deadline = time.monotonic() + self.ready_seconds
        while not self._is_ready():
            if self.pid is None:
                raise NotReady(f"{self.name} ended while starting. The end of {self.log}:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise NotReady(
                    f"{self.name} is not ready after {self.ready_seconds:.0f} s. The end of {self.log}:\n{self._log_tail()}"
                )
            time.sleep(0.1)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL if it has not gone after `stop_seconds`."""
        self._end(signal.SIGTERM, self.stop_seconds)

    def kill(self) -> None:
        """SIGKILL: what a crash looks like."""
        self._end(signal.SIGKILL, 10)

    def restart(self) -> None:
        self.stop()
        self.start()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stopped inside the block, started again after it: `with cluster.apiserver.stopped(): time.sleep(5)`."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def _end(self, first: signal.Signals, seconds: float) -> None:
        pid = self.pid
        if pid is not None:
            _signal(pid, first)
            if not self._gone_within(seconds):
                _signal(pid, signal.SIGKILL)
                if not self._gone_within(10):
                    raise RuntimeError(f"{self.name} (pid {pid}) does not end, not even by SIGKILL")
        self._pid_file.unlink(missing_ok=True)

    def _gone_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.pid is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _is_ready(self) -> bool:
        with suppress(OSError):
            return self.pid is not None and self.ready()
        return False

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def start_together(*processes: Process) -> None:
    """Starts programs that do not need each other."""
    for process in processes:
        process.launch()
    for process in processes:
        process.wait_ready()


def _started_at(pid: int) -> int | None:
    """The start time of a process in clock ticks since boot; None when there is none, or only its zombie. One that is a zombie but for some threads still has its ports."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    is_gone = fields[0] in "ZX" and int(fields[17]) < 2
    return None if is_gone else int(fields[19])


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
