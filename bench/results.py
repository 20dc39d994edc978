"""What tuning does to real data, beside baselines that were not tuned: measures it, and writes docs/results.md.

    PYTHONPATH=crds:trainer_image:tests python bench/results.py --gpus 1 --at-once 12       all of it: about twenty minutes on an H200 with 16 cores (estimated; the first 30 tasks took 7)
    PYTHONPATH=crds:trainer_image:tests python bench/results.py --only 'sft/(lora|full)$'   some of it, on the CPU
    PYTHONPATH=crds:trainer_image:tests python bench/results.py --small --into /tmp/found.json     is the script whole? two steps of a few rows
    PYTHONPATH=crds:trainer_image:tests python bench/results.py --page                      the page anew, from bench/results.json

The most telling tasks run first; each one's figures are in --into as soon as it ends, and those that are there are not run again. All data and the model come out of
packages. Jobs share the GPU, so their seconds are no measure of speed (docs/performance.md has that); peaks of memory are each job's own.
"""

import argparse
import datetime
import json
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

import results_page
from result_jobs import Lab, Task, work

PROJECT = Path(__file__).resolve().parents[1]
FOUND = Path(__file__).with_suffix(".json")


def tasks(lab: Lab, only: str) -> dict[str, Task]:
    """All that fit, and the answers that some of them learn from."""
    import results_images
    import results_methods
    import results_text

    made = {"own answers": Task(0, lambda: results_text.own_answers(lab))}
    for section in (
        results_text.classification, results_methods.methods, results_text.dpo, results_text.pretrain, results_images.images,
    ):  # fmt: skip
        made |= section(lab)
    chosen = {name: task for name, task in made.items() if re.search(only, name)}
    needs_own = any(name.startswith(("dpo", "pretrain")) for name in chosen)
    return ({"own answers": made["own answers"]} if needs_own else {}) | chosen


def machine(gpus: int, at_once: int) -> dict[str, object]:
    """Where and when."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "card": torch.cuda.get_device_name() if gpus else None,
        "cores": os.cpu_count(),
        "at_once": at_once,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("torch", "transformers", "peft", "scikit-learn")},
    }


def main() -> None:
    """Measures, or writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="tasks whose names it fits")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="tasks that run side by side")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no task begins later than this")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--into", type=Path, default=FOUND, metavar="FILE")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if options.page:
        (PROJECT / "docs/results.md").write_text(results_page.page(json.loads(options.into.read_text())))
        return
    lab = Lab(PROJECT / "build/results", options.gpus, options.small)
    lab.folder.mkdir(parents=True, exist_ok=True)
    chosen = tasks(lab, options.only)
    chosen = {"machine": Task(0, lambda: machine(options.gpus, options.at_once)), **chosen}
    print(f"{len(chosen)} tasks", file=sys.stderr, flush=True)
    work(chosen, options.into, options.at_once, options.seconds)


if __name__ == "__main__":
    main()
