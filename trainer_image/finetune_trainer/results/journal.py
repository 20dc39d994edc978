"""What training leaves to read beside the weights: a line for each step and evaluation, and the answers to the samples.

The first rank writes; each checkpoint holds a copy, so that a resumed run continues the file as if it had never been away. Times are
not in it: two runs of one job write the same bytes.
"""

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
FILES = (METRICS, SAMPLES)


class Journal:
    """The files in one folder on scratch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.restore({})

    def restore(self, files: dict[str, bytes]) -> None:
        """Begins with what a checkpoint held."""
        for name in FILES:
            (self._folder / name).write_bytes(files.get(name, b""))

    def files(self) -> dict[str, bytes]:
        """Contents by name, without empty ones."""
        found = {name: (self._folder / name).read_bytes() for name in FILES}
        return {name: content for name, content in found.items() if content}

    def step(self, step: int, numbers: dict[str, float | int]) -> None:
        """Notes one step or evaluation. The loss is there as a hex float too: exact, whatever reads it."""
        line: dict[str, Any] = {"step": step, **numbers}
        for name in ("loss", "eval_loss"):
            if name in numbers:
                line[f"{name}_hex"] = float(numbers[name]).hex()
        self._append(METRICS, line)

    def samples(self, step: int, when: str, prompts: list[str], answers: list[str]) -> None:
        """Notes answers; `when` is before, during or after."""
        for prompt, answer in zip(prompts, answers, strict=True):
            self._append(SAMPLES, {"step": step, "when": when, "prompt": prompt, "answer": answer})

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
