"""The supervisor with real processes: exit codes, grace, killed ranks, peers, and the termination message."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from finetune_crds import names
from finetune_crds.verdict import MESSAGE_MAX, ExitCode, Verdict
from finetune_trainer.storage.roots import ENV_ROOT
from finetune_trainer.supervisor import ENV_TERMINATION_FILE

WORKER = Path(__file__).parent / "worker.py"


class Pod:
    """A supervisor that runs as it does in a pod, but for its folders."""

    def __init__(self, folder: Path, words: str, prefix: Sequence[str] = (), **environment: str) -> None:
        self.message, self.ready = folder / "termination", folder / "ready"
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "finetune_trainer.supervisor", sys.executable, str(WORKER), words],
            env=os.environ
            | {ENV_ROOT: str(folder), ENV_TERMINATION_FILE: str(self.message), "READY": str(self.ready)}
            | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self, ranks: int = 1) -> None:
        deadline = time.monotonic() + 60
        while not self.ready.exists() or len(self.ready.read_text()) < ranks:
            assert time.monotonic() < deadline, "the worker did not start"
            time.sleep(0.02)

    def wait_log(self, words: str) -> None:
        assert self.process.stderr is not None
        assert any(words in line for line in self.process.stderr), "it ended without these words"

    def end(self, seconds: float = 60) -> Verdict:
        """Waits for the end; exit code and message must agree."""
        _, self.log = self.process.communicate(timeout=seconds)
        verdict = Verdict.model_validate_json(self.message.read_bytes())
        assert self.process.returncode == verdict.code
        return verdict


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Callable[..., Pod]]:
    pods: list[Pod] = []

    def start(words: str, **options: object) -> Pod:
        pods.append(Pod(tmp_path, words, **options))  # type: ignore[arg-type]
        return pods[-1]

    yield start
    for each in pods:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


UNSHARE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child=SIGKILL")
TWO = {names.ENV_PROCESSES_PER_NODE: "2"}


@pytest.mark.parametrize(
    ("words", "environment", "code"),
    [
        pytest.param("finish", {}, ExitCode.FINISHED, id="finished"),
        pytest.param("finish", TWO, ExitCode.FINISHED, id="finished on two ranks"),
        pytest.param("exit:0", {}, ExitCode.INTERNAL_ERROR, id="0 without a verdict"),
        pytest.param("finish,exit:0", TWO, ExitCode.INTERNAL_ERROR, id="one rank without a verdict"),
        pytest.param("say:65", {}, ExitCode.DATA_ERROR, id="data error"),
        pytest.param("say:76,say:64", TWO, ExitCode.USER_ERROR, id="cause before consequence"),
        pytest.param("say:76", {}, ExitCode.PEER_LOST, id="peer on another node"),
        pytest.param("exit:3", {}, 3, id="a code of no table"),
    ],
)
def test_exit_code_of_the_pod(pod: Callable[..., Pod], words: str, environment: dict[str, str], code: int) -> None:
    assert pod(words, **environment).end().code == code


def test_a_killed_rank_is_told_as_killed_with_the_last_step_it_had_saved(pod: Callable[..., Pod]) -> None:
    verdict = pod("die").end()
    assert (verdict.code, verdict.step) == (128 + signal.SIGKILL, 4)
    assert "killed after step 4 by SIGKILL" in verdict.message


def test_the_peer_of_a_killed_rank_that_does_not_notice_is_ended(tmp_path: Path) -> None:
    # In-process settings shorten the minute that a peer has; everything else is as in a pod.
    program = (
        "import sys; from pathlib import Path; from finetune_trainer.supervisor import Pod, supervise\n"
        "print(supervise(Pod(processes=2), sys.argv[2:], Path(sys.argv[1]), peer_seconds=1.0).to_message())"
    )
    ready = tmp_path / "ready"
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), sys.executable, str(WORKER), "hang,die"],
        env=os.environ | {"READY": str(ready)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    verdict = Verdict.model_validate_json(run.stdout)
    assert verdict.code == 137
    assert "rank 1" in verdict.message


def test_a_save_of_45_seconds_survives_sigterm(pod: Callable[..., Pod]) -> None:
    """torchrun alone would kill it after 30."""
    run = pod("save:45", **TWO)
    run.wait_ready(ranks=2)
    begun = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    verdict = run.end(90)
    assert (verdict.code, verdict.step, verdict.message) == (ExitCode.STOPPED, 6, "stopped and saved")
    assert time.monotonic() - begun >= 45


def test_who_is_still_saving_ten_seconds_before_the_end_of_grace_is_killed_and_told_so(pod: Callable[..., Pod]) -> None:
    run = pod("hang", **{names.ENV_GRACE_SECONDS: "12"})
    run.wait_ready()
    run.process.send_signal(signal.SIGTERM)
    verdict = run.end()
    assert verdict.code == ExitCode.STOPPED
    assert "gracePeriodSeconds" in verdict.message


def test_a_second_interrupt_ends_the_wait(pod: Callable[..., Pod]) -> None:
    run = pod("hang")
    run.wait_ready()
    run.process.send_signal(signal.SIGINT)
    run.wait_log("asked to stop")  # two that are pending are one
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.end(10).code == ExitCode.STOPPED


def test_pid_1_hears_a_stop_that_comes_while_it_starts(pod: Callable[..., Pod]) -> None:
    """From before its imports on, which take longest."""
    run = pod("save:0", prefix=UNSHARE)
    deadline = time.monotonic() + 20
    while not (child := _forked(run)) or not _blocks_sigterm(child):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(int(child.name), signal.SIGTERM)
    assert run.end().code == ExitCode.STOPPED


def _forked(run: Pod) -> Path | None:
    """/proc of the supervisor, once `unshare` runs it."""
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    found = [Path("/proc", pid) for pid in children]
    return next((each for each in found if (each / "cmdline").read_text().startswith(sys.executable)), None)


def _blocks_sigterm(process: Path) -> bool:
    imports = "pydantic_core" in (process / "maps").read_text()
    (mask,) = re.findall(r"^SigBlk:\s(\w+)$", (process / "status").read_text(), re.MULTILINE)
    blocks = bool(int(mask, 16) & 1 << signal.SIGTERM - 1)
    assert blocks or not imports, "a stop would be lost while it imports"
    return blocks


def test_a_stop_while_the_worker_still_imports_is_a_stop(pod: Callable[..., Pod], tmp_path: Path) -> None:
    run = pod("save:0")
    deadline = time.monotonic() + 20
    while not any(tmp_path.glob("scratch/verdicts-*")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.02)
    run.process.send_signal(signal.SIGTERM)
    assert run.end().code == ExitCode.STOPPED


def test_as_pid_1_it_hears_sigterm_and_collects_orphans(pod: Callable[..., Pod], tmp_path: Path) -> None:
    """In a PID namespace of its own, as in a container: there the kernel drops signals that PID 1 does not handle."""
    run = pod("save:0", prefix=UNSHARE)
    run.wait_ready()
    (child,) = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    assert run.end().code == ExitCode.STOPPED
    mark = tmp_path / "mark"
    assert pod(f"orphan:{mark}", prefix=UNSHARE).end().code == ExitCode.FINISHED
    assert mark.exists()


def test_workers_get_the_environment_of_torch_distributed(pod: Callable[..., Pod], tmp_path: Path) -> None:
    environment = {
        names.ENV_NODES: "2",
        names.ENV_NODE_RANK: "1",
        names.ENV_PROCESSES_PER_NODE: "2",
        names.ENV_MASTER_ADDR: "localhost",
        names.ENV_MASTER_PORT: "29411",
        "HOME": str(tmp_path / "scratch/home"),
    }
    assert pod(f"print:{tmp_path}/env", **environment).end().code == ExitCode.FINISHED
    seen = json.loads((tmp_path / "env-3.json").read_text())
    wanted = {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "29411",
    }  # fmt: skip
    assert {key: seen[key] for key in wanted} == wanted
    assert int(seen["OMP_NUM_THREADS"]) >= 1
    assert Path(seen["HOME"]).is_dir()
    assert not (tmp_path / "env-0.json").exists()


def test_a_first_node_without_an_address_is_a_lost_peer(tmp_path: Path) -> None:
    program = (
        "import sys; from finetune_trainer import supervisor\n"
        "supervisor.NAME_SECONDS = 0.5; supervisor.supervise.__kwdefaults__['name_seconds'] = 0.5\n"
        "sys.exit(supervisor.main(['true']))"
    )
    message = tmp_path / "message"
    environment = {
        ENV_ROOT: str(tmp_path), ENV_TERMINATION_FILE: str(message),
        names.ENV_NODES: "2", names.ENV_MASTER_ADDR: "bot-0.bot.invalid", "RES_OPTIONS": "timeout:1 attempts:1 ndots:1",
    }  # fmt: skip
    run = subprocess.run([sys.executable, "-c", program], env=os.environ | environment, timeout=60)
    verdict = Verdict.model_validate_json(message.read_bytes())
    assert run.returncode == verdict.code == ExitCode.PEER_LOST
    assert "bot-0.bot.invalid" in verdict.message


def test_a_wrong_variable_is_named(pod: Callable[..., Pod]) -> None:
    verdict = pod("finish", **{names.ENV_NODES: "two"}).end()
    assert verdict.code == ExitCode.USER_ERROR
    assert names.ENV_NODES in verdict.message


def test_the_message_stays_below_what_the_kubelet_keeps(pod: Callable[..., Pod]) -> None:
    run = pod("finish")
    run.end()
    assert len(run.message.read_bytes()) <= MESSAGE_MAX


def test_workers_stop_when_the_supervisor_is_killed(pod: Callable[..., Pod], tmp_path: Path) -> None:
    run = pod("save:0")
    run.wait_ready()
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + 20
    while not (written := list(tmp_path.glob("scratch/verdicts-*/rank-0.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert Verdict.model_validate_json(written[0].read_bytes()).code == ExitCode.STOPPED


def test_workers_stop_when_finetune_local_is_killed(tmp_path: Path) -> None:
    ready, message = tmp_path / "ready", tmp_path / "termination"
    parent = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-m', 'finetune_trainer.supervisor', *sys.argv[1:]]); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, sys.executable, str(WORKER), "save:0"],
        env=os.environ | {ENV_ROOT: str(tmp_path), ENV_TERMINATION_FILE: str(message), "READY": str(ready)},
    )
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while not message.exists() or not message.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert Verdict.model_validate_json(message.read_bytes()).code == ExitCode.STOPPED
