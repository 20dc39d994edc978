"""The static init of users' own programs (trainer_image/init): each way a program can end, and what is said of it.

It is compiled here with the machine's C compiler, and runs as a plain process: nothing in it needs to be PID 1.
"""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from finetune_crds.verdict import ExitCode, Verdict

SOURCE = Path(__file__).parents[2] / "trainer_image" / "init" / "finetune-init.c"

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("init") / "finetune-init"
    subprocess.run(
        ["cc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", program, SOURCE], check=True
    )
    return program


def run(init: Path, folder: Path, script: str) -> tuple[int, str]:
    """Exit code and termination message of a shell script under the init; $MESSAGE is the message file."""
    message = folder / "message"
    command: list[str | Path] = [init, "--message-file", message, "--", "sh", "-c", script]
    ended = subprocess.run(command, env={"MESSAGE": str(message), "PATH": "/bin:/usr/bin"}, check=False)
    return ended.returncode, message.read_text()


def stop(init: Path, folder: Path, script: str, signal_number: int = signal.SIGTERM) -> tuple[int, str]:
    """The same for a script that says `ready` in $READY and is then asked to stop."""
    message, ready = folder / "message", folder / "ready"
    command: list[str | Path] = [init, "--message-file", message, "--", "sh", "-c", script]
    environment = {"MESSAGE": str(message), "READY": str(ready), "PATH": "/bin:/usr/bin"}
    with subprocess.Popen(command, env=environment) as process:
        deadline = time.monotonic() + 10
        while not ready.exists():
            assert time.monotonic() < deadline, "the script did not start"
            time.sleep(0.01)
        process.send_signal(signal_number)
        return process.wait(timeout=10), message.read_text()


@pytest.mark.parametrize(
    ("script", "exit_code", "verdict", "says"),
    [
        ("true", 0, ExitCode.FINISHED, ""),
        ("exit 3", 3, ExitCode.PROGRAM_FAILED, "The program ended with exit code 3."),
        ("exit 75", 68, ExitCode.PROGRAM_FAILED, "The program ended with exit code 75."),
        ("kill -9 $$", 137, ExitCode.PROGRAM_FAILED, "The program was killed by signal 9 (Killed)."),
        ("sleep 0.2 & exit 5", 5, ExitCode.PROGRAM_FAILED, "The program ended with exit code 5."),
    ],
    ids=["finished", "failed", "a code of the table by chance", "killed", "leaves a child behind"],
)
def test_how_a_program_ends(
    init: Path, tmp_path: Path, script: str, exit_code: int, verdict: ExitCode, says: str
) -> None:
    code, message = run(init, tmp_path, script)
    assert code == exit_code
    assert Verdict.model_validate_json(message) == Verdict(code=verdict, message=says)


@pytest.mark.parametrize("end", ["exit 0", "exit 1", "exit 143"])
def test_a_program_asked_to_stop_is_stopped_however_it_ends(init: Path, tmp_path: Path, end: str) -> None:
    script = f"trap '{end}' TERM; touch $READY; while :; do sleep 0.01; done"
    code, message = stop(init, tmp_path, script)
    assert (code, json.loads(message)["code"]) == (ExitCode.STOPPED, ExitCode.STOPPED)


def test_a_program_without_a_handler_is_stopped(init: Path, tmp_path: Path) -> None:
    code, message = stop(init, tmp_path, "touch $READY; exec sleep 30")
    assert (code, json.loads(message)) == (
        ExitCode.STOPPED,
        {"code": 75, "message": "Asked to stop; the program was killed by signal 15 (Terminated)."},
    )


def test_other_signals_reach_the_program_and_stop_nothing(init: Path, tmp_path: Path) -> None:
    script = "trap 'exit 7' USR1; touch $READY; while :; do sleep 0.01; done"
    code, _ = stop(init, tmp_path, script, signal.SIGUSR1)
    assert code == 7


def test_a_message_of_the_program_and_its_code_stay(init: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"code": 65, "message": "row 7 has no answer"}
    code, message = run(init, tmp_path, f"echo '{json.dumps(own)}' > $MESSAGE; exit 65")
    assert (code, json.loads(message)) == (65, own)


@pytest.mark.parametrize(("end", "verdict"), [(0, 0), (75, 68), (3, 68)])
def test_last_words_that_are_no_verdict_change_nothing(init: Path, tmp_path: Path, end: int, verdict: int) -> None:
    code, message = run(init, tmp_path, f'echo \'{{"error": "try again"}}\' > $MESSAGE; exit {end}')
    assert (code, json.loads(message)["code"]) == (68 if end == 75 else end, verdict)


def test_a_message_of_the_program_does_not_make_a_stop_a_success(init: Path, tmp_path: Path) -> None:
    script = "trap 'echo {} > $MESSAGE; exit 0' TERM; touch $READY; while :; do sleep 0.01; done"
    code, message = stop(init, tmp_path, script)
    assert (code, json.loads(message)["code"]) == (ExitCode.STOPPED, ExitCode.STOPPED)


def test_a_command_that_is_not_there_is_the_users_error(init: Path, tmp_path: Path) -> None:
    message = tmp_path / "message"
    ended = subprocess.run([init, "--message-file", message, "--", 'no"such'], capture_output=True, check=False)
    assert ended.returncode == ExitCode.USER_ERROR
    assert Verdict.model_validate_json(message.read_text()).message == (
        "spec.runtime.command: cannot run 'no?such': No such file or directory"
    )


def test_it_copies_itself(init: Path, tmp_path: Path) -> None:
    subprocess.run([init, "--copy-to", tmp_path], check=True)
    copy = tmp_path / "finetune-init"
    assert copy.read_bytes() == init.read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o755
