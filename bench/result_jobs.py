"""What bench/results.py measures with: jobs through `finetune local`, as a user runs them, answers of what they published, and a pool that keeps what was found."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cluster.model import SMOLLM2, model_path

Found = dict[str, Any]
Work = Callable[[], Found]
Chat = list[dict[str, str]]


class Task(NamedTuple):
    """Something to measure."""

    rank: int
    """Those of lower ones come first."""
    work: Work


@dataclass(frozen=True)
class Lab:
    """Where jobs run, and how large they are."""

    folder: Path
    """Of all that is written."""
    gpus: int
    small: bool
    """Two steps of a few rows: is the script whole?"""

    def size(self, proper: int, small: int) -> int:
        """Of a set."""
        return small if self.small else proper

    def run(
        self,
        name: str,
        train: Path | list[dict[str, Any]],
        /,
        model: Path | None = None,
        keep: bool = False,
        **spec: Any,
    ) -> Found:
        """A job from its manifest to its output, in a folder of its own: metrics before and after, what was trained, peak of the GPU's memory in GiB, seconds of all of it.

        What training needed is deleted at its end, and without `keep` the weights too.
        """
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        training = dict(spec.pop("training", {}))
        if self.small:
            sizes = {"tokensPerStep": 1024} if "tokensPerStep" in training else {"batchSize": 2}
            training = (
                {key: value for key, value in training.items() if key != "epochs"}
                | {"maxSteps": 2, "microBatchSize": 1}
                | sizes
            )
            spec["evaluation"] = spec.get("evaluation", {}) | (
                {"everySteps": 1} if "everySteps" in spec.get("evaluation", {}) else {}
            )
        manifest = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "results"},
            "spec": {
                "model": {"uri": (model or model_path(SMOLLM2)).as_uri()},
                "output": {"uri": (folder / "output").as_uri()},
                "resources": {"gpusPerNode": self.gpus, "cpu": 2},
                **spec,
                "training": training,
                "dataset": {"train": sources(train) if isinstance(train, Path) else train, **spec.get("dataset", {})},
            },
        }  # fmt: skip
        place, scratch = folder / "job.yaml", folder / "scratch"
        place.write_text(json.dumps(manifest, indent=1, ensure_ascii=False))  # which is YAML too
        began = time.monotonic()
        python("-m", "finetune_trainer.cli", "local", "-f", str(place), "--scratch", str(scratch), log=folder / "log", peaks=folder)  # fmt: skip
        record = json.loads((folder / "output/finetune.json").read_text())
        found = {key: record[key] for key in ("before", "after", "rows", "tokens", "step", "total_steps", "epochs", "evaluation_rows", "versions")}  # fmt: skip
        trained = re.findall(r"(\d+) weights are trained", (scratch / "log").read_text())
        peaks = [int(file.read_text()) for file in folder.glob("peak-*")]
        found |= {
            "seconds": time.monotonic() - began,
            "trained": int(trained[-1]),
            "peak_gib": max(peaks) / 2**30 if peaks else None,
        }
        for spent in [scratch, folder / "output.checkpoints", *([] if keep else [folder / "output"])]:
            shutil.rmtree(spent, ignore_errors=True)
        return found

    def answers(
        self, name: str, output: Path | None, asked: Mapping[str, Sequence[Chat]], longest: int
    ) -> dict[str, list[str]]:
        """What SmolLM2, or what a job made of it, writes greedily behind each conversation, in at most so many tokens."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        request, into = folder / "asked.json", folder / "answers.json"
        request.write_text(json.dumps({"output": output and str(output), "model": str(model_path(SMOLLM2)), "asked": dict(asked), "longest": min(longest, 8) if self.small else longest}))  # fmt: skip
        python(str(Path(__file__).with_name("result_answers.py")), str(request), str(into), log=folder / "answers.log")
        return dict(json.loads(into.read_text()))


def python(*arguments: str, log: Path, peaks: Path | None = None) -> None:
    """Runs Python with the paths of this one, and raises with the end of its log if it fails."""
    here = os.pathsep.join([str(Path(__file__).with_name("probe")), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": here, "TOKENIZERS_PARALLELISM": "false", **({"RESULTS_PEAKS": str(peaks)} if peaks else {})}  # fmt: skip
    with log.open("a") as sink:
        code = subprocess.run([sys.executable, *arguments], stdout=sink, stderr=subprocess.STDOUT, check=False, env=environment).returncode  # fmt: skip
    if code:
        raise RuntimeError(f"{log} ends with {code}: {log.read_text()[-1500:]}")


def work(tasks: Mapping[str, Task], place: Path, at_once: int, seconds: float) -> None:
    """Runs tasks by rank, some at once, none begun after so many seconds; a file has what each found as soon as it is known.

    What is in the file already is not run again. A task that fails is told of, and the others go on.
    """
    began, lock = time.monotonic(), threading.Lock()
    known: dict[str, Found] = json.loads(place.read_text()) if place.exists() else {}

    def do(name: str, task: Task) -> None:
        if time.monotonic() - began > seconds:
            print(f"{name}: no time is left", file=sys.stderr, flush=True)
            return
        start = time.monotonic()
        try:
            found = task.work()
        except Exception as error:
            print(f"{name}: FAILED {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return
        with lock:
            known[name] = found
            place.write_text(json.dumps(known, indent=1))
        print(f"{name}: {start - began:.0f} to {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        for name, task in sorted(tasks.items(), key=lambda pair: pair[1].rank):
            if name not in known:
                pool.submit(do, name, task)


def rows(place: Path, listed: Iterable[dict[str, Any]]) -> Path:
    """A JSON lines file of them."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed))
    return place


def sources(place: Path, **more: Any) -> list[dict[str, Any]]:
    """A file as a manifest names it."""
    return [{"uri": place.as_uri(), **more}]
