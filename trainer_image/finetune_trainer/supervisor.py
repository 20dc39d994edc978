"""PID 1 of a training pod: starts one worker a process, hands on the stop signal, and has the final word on how the run ended.

Why not torchrun: it turns every worker's exit code into 1, kills a worker that is saving 30 s after SIGTERM, and importing torch for
the agent would cost PID 1 seconds and hundreds of MB (this takes 0.4 s and 36 MB). Rendezvous is static here (the completion index is the node rank,
the headless Service gives rank 0's name), so what remains is environment variables, waiting and signals.

    python -m finetune_trainer.supervisor [COMMAND ...]      COMMAND takes the worker's place (tests use it)

Signals: SIGTERM or SIGINT is handed to the workers, which save and exit with STOPPED; they have the grace period less ten seconds. A
second SIGINT ends the wait. When a worker fails, its peers have a minute to notice by themselves and leave their verdicts.
"""

import signal

_WATCHED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
if __name__ == "__main__":
    # Before all else: the kernel drops a SIGTERM that PID 1 neither handles nor blocks, and there is only one.
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)

# ruff: noqa: E402
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from finetune_crds import names
from finetune_crds.verdict import ExitCode, Verdict

from . import cgroups, logs
from .errors import PeerLost, UserError, verdict_of
from .reporting import verdicts
from .reporting.verdicts import RankExit
from .storage.roots import Roots

ENV_TERMINATION_FILE: Final = "FINETUNE_TERMINATION_FILE"
"""Set by `finetune local`; a pod has names.TERMINATION_FILE."""
WORKER: Final = (sys.executable, "-m", "finetune_trainer.worker")
GRACE_MARGIN: Final = 10.0
"""Seconds before the kubelet's SIGKILL at which what still runs is killed, so that a verdict can be written."""
NAME_SECONDS: Final = 300.0
"""How long rank 0's host name may take to appear: its pod may be waiting for an image."""
PEER_SECONDS: Final = 60.0
"""How long workers get to notice that a peer failed."""
_TICK: Final = 1.0
_FOLDER_VARIABLES: Final = (
    "HOME",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
)

log = logging.getLogger("finetune.supervisor")


@dataclass(frozen=True)
class Pod:
    """What the pod builder says in the environment."""

    nodes: int = 1
    node_rank: int = 0
    processes: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = names.MASTER_PORT
    grace: float = 600.0

    @classmethod
    def from_environment(cls) -> "Pod":
        """Reads names.ENV_*.

        Raises:
            UserError: a variable is no number, or several nodes have no address of rank 0.
        """

        def number(name: str, default: int) -> int:
            try:
                return int(os.environ.get(name) or default)
            except ValueError:
                raise UserError(f"the variable {name} must be a whole number, not {os.environ[name]!r}") from None

        nodes = number(names.ENV_NODES, 1)
        address = os.environ.get(names.ENV_MASTER_ADDR, "")
        if nodes > 1 and not address:
            raise UserError(
                f"the variable {names.ENV_MASTER_ADDR} must name the pod of rank 0 when there are {nodes} nodes"
            )
        return cls(
            nodes=nodes,
            node_rank=number(names.ENV_NODE_RANK, 0),
            processes=number(names.ENV_PROCESSES_PER_NODE, 1),
            master_address=address if nodes > 1 else "127.0.0.1",
            master_port=number(names.ENV_MASTER_PORT, names.MASTER_PORT),
            grace=float(number(names.ENV_GRACE_SECONDS, 600)),
        )


@dataclass
class _Run:
    """Processes of this pod and what is known of their ends."""

    ranks: dict[int, int] = field(default_factory=dict)
    """Rank by process id, of what still runs."""
    exits: dict[int, RankExit] = field(default_factory=dict)
    killed: set[int] = field(default_factory=set)
    """Ranks that the supervisor itself killed."""

    def signal(self, number: signal.Signals) -> None:
        for pid in self.ranks:
            os.kill(pid, number)  # cannot hit a stranger: a pid of ours is free only after we have reaped it

    def kill(self) -> None:
        self.killed |= set(self.ranks.values())
        self.signal(signal.SIGKILL)

    def reap(self) -> None:
        """Collects every child that ended; orphans that PID 1 inherited are among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            rank = self.ranks.pop(pid, None)
            if rank is not None:
                self.exits[rank] = RankExit(os.waitstatus_to_exitcode(status), ours=rank in self.killed)

    def has_failed(self) -> bool:
        return any(end.returncode not in (ExitCode.FINISHED, ExitCode.STOPPED) for end in self.exits.values())


def supervise(
    pod: Pod,
    command: Sequence[str],
    folder: Path,
    *,
    name_seconds: float = NAME_SECONDS,
    peer_seconds: float = PEER_SECONDS,
) -> Verdict:
    """Runs the workers of one pod to their end.

    Args:
        pod: who we are.
        command: what each worker runs.
        folder: empty; verdicts of the ranks go there.
        name_seconds: how long rank 0's host name may take to appear.
        peer_seconds: how long workers get to notice that a peer failed.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # again, for who calls this without main
    parent, kills_before = os.getppid(), cgroups.memory_kills()
    if pod.nodes > 1 and not _wait_for_name(pod.master_address, name_seconds):
        return Verdict(code=ExitCode.STOPPED, message="stopped while waiting for the other nodes")
    run = _start(pod, command, folder)
    stopping, deadline = False, float("inf")
    while run.ranks:
        caught = signal.sigtimedwait(_WATCHED, min(_TICK, max(0.0, deadline - time.monotonic())))
        number = caught.si_signo if caught else None
        if number is None and os.getppid() != parent:
            number = signal.SIGTERM  # `finetune local` itself was killed
            parent = os.getppid()
        if number in (signal.SIGTERM, signal.SIGINT):
            if not stopping:
                log.info("asked to stop: workers have %.0f s to save", pod.grace - GRACE_MARGIN)
                deadline = min(deadline, time.monotonic() + max(1.0, pod.grace - GRACE_MARGIN))
                run.signal(signal.SIGTERM)
                stopping = True
            elif number == signal.SIGINT:
                deadline = time.monotonic()
        failed_before = run.has_failed()
        run.reap()
        if run.has_failed() and not failed_before:
            deadline = min(deadline, time.monotonic() + peer_seconds)
        if time.monotonic() >= deadline:
            run.kill()
            deadline = float("inf")
    kills = cgroups.memory_kills() - kills_before
    return verdicts.combine(run.exits, verdicts.read_all(folder), stopping=stopping, memory_kills=kills)


def _start(pod: Pod, command: Sequence[str], folder: Path) -> _Run:
    run = _Run()
    world = pod.nodes * pod.processes
    threads = str(max(1, cgroups.cpus() // pod.processes))
    for local_rank in range(pod.processes):
        rank = pod.node_rank * pod.processes + local_rank
        environment = {
            "OMP_NUM_THREADS": threads,
            "PYTHONHASHSEED": "0",  # a user's function that goes through a set does so in the same order on all ranks and in all runs
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(pod.processes),
            "GROUP_RANK": str(pod.node_rank),
            "MASTER_ADDR": pod.master_address,
            "MASTER_PORT": str(pod.master_port),
            verdicts.ENV_VERDICT_DIR: str(folder),
        }
        # A group of its own: Ctrl-C in a terminal reaches the supervisor only, which hands it on once.
        pid = os.posix_spawnp(
            command[0],
            list(command),
            environment,
            setpgroup=0,
            setsigmask=(),
            setsigdef=(signal.SIGTERM, signal.SIGINT),
        )
        run.ranks[pid] = rank
    return run


def _wait_for_name(host: str, seconds: float) -> bool:
    """Waits until a host name resolves; False when asked to stop meanwhile.

    Raises:
        PeerLost: it does not in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
            return True
        except OSError:
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"the pod of rank 0, {host}, has no address after {seconds:.0f} s: it did not start, or DNS is not answering"
                ) from None
        caught = signal.sigtimedwait((signal.SIGTERM, signal.SIGINT), _TICK)
        if caught:
            return False


def _make_folders(roots: Roots) -> None:
    """HOME and caches lie on scratch, which is empty when a pod starts."""
    roots.scratch.mkdir(parents=True, exist_ok=True)
    for variable in _FOLDER_VARIABLES:
        value = os.environ.get(variable)
        if value and Path(value).is_relative_to(roots.scratch):
            Path(value).mkdir(parents=True, exist_ok=True)


def _leave(verdict: Verdict) -> None:
    """Writes the termination message and says the same in the log."""
    file = Path(os.environ.get(ENV_TERMINATION_FILE) or names.TERMINATION_FILE)
    log.info("exit %d at step %d of %d. %s", verdict.code, verdict.step, verdict.total_steps, verdict.message)
    try:
        file.write_text(verdict.to_message(), encoding="utf-8")
    except OSError as error:
        log.warning("the termination message could not be written to %s: %s", file, error.strerror)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    logs.begin(logging.INFO, "%(asctime)s %(name)s %(message)s")
    command = list(sys.argv[1:] if arguments is None else arguments) or list(WORKER)
    try:
        roots = Roots.from_environment()
        _make_folders(roots)
        with tempfile.TemporaryDirectory(prefix="verdicts-", dir=roots.scratch) as folder:
            verdict = supervise(Pod.from_environment(), command, Path(folder))
    except Exception as error:
        log.exception("the supervisor failed")
        verdict = verdict_of(error)
    _leave(verdict)
    return verdict.code


if __name__ == "__main__":
    sys.exit(main())
