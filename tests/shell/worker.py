"""A worker that behaves as the words of its command line say, for tests of the supervisor. It is a real process, without a model.

    finish        verdict FINISHED, exit 0
    say:CODE      verdict with that code, exit with it
    exit:CODE     no verdict, exit with it
    save:SECONDS  on SIGTERM take so long to save, then verdict STOPPED
    hang          never listens to SIGTERM
    die           SIGKILL to itself, after a checkpoint's verdict
    print:FILE    its environment goes to FILE-<rank>.json, then finish
    orphan:FILE   leaves a grandchild behind, whose end PID 1 must collect; then finish

`A,B` gives rank 0 the word A and rank 1 the word B.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from finetune_crds.v1alpha1 import OutputStatus
from finetune_crds.verdict import ExitCode, Verdict
from finetune_trainer import lifeline
from finetune_trainer.reporting import verdicts


def leave(code: int, step: int, message: str = "") -> None:
    output = OutputStatus(uri="pvc://models/bot") if code == ExitCode.FINISHED else None
    verdicts.write(Verdict(code=code, message=message, step=step, total_steps=10, output=output))


def save_on_stop(seconds: float) -> None:
    def save(number: int, frame: FrameType | None) -> None:
        time.sleep(seconds)
        leave(ExitCode.STOPPED, 6, "stopped and saved")
        sys.exit(ExitCode.STOPPED)

    signal.signal(signal.SIGTERM, save)
    lifeline.stop_with_supervisor()
    say_ready()
    time.sleep(600)


def say_ready() -> None:
    """One letter for each rank that listens."""
    with Path(os.environ["READY"]).open("a") as file:
        file.write("x")


def behave(word: str, argument: str) -> None:
    rank = os.environ["RANK"]
    if word == "exit":
        sys.exit(int(argument))
    if word == "say":
        leave(int(argument), 4, f"rank {rank} says {argument}")
        sys.exit(int(argument))
    if word == "save":
        save_on_stop(float(argument))
    if word == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say_ready()
        time.sleep(600)
    if word == "die":
        leave(ExitCode.INTERNAL_ERROR, 4)
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "print":
        Path(f"{argument}-{rank}.json").write_text(json.dumps(dict(os.environ)))
    if word == "orphan" and os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.2)
            Path(argument).touch()
        os._exit(0)
    if word == "orphan":
        deadline = time.monotonic() + 60
        while not Path(argument).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
    leave(ExitCode.FINISHED, 10)


if __name__ == "__main__":
    words = sys.argv[1].split(",")
    word, _, argument = words[int(os.environ["RANK"]) % len(words)].partition(":")
    behave(word, argument)
