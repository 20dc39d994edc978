"""Several GPUs of one machine: do they compute what one does, resume to the same bytes, hear of a killed peer, and how much faster are they?

    PYTHONPATH=crds:trainer_image:tests:bench python bench/gpu_ranks.py --gpus 2 --table bench/gpu_ranks.md    all of it
    PYTHONPATH=crds:trainer_image:tests:bench python bench/gpu_ranks.py --gpus 2 --cells '^bert' --works ''    tiny cells of the support table alone
    PYTHONPATH=crds:trainer_image:tests:bench python bench/gpu_ranks.py --gpus 2 --cpu                        the same on a CPU: is the script whole?

Processes are started as in a pod, by the supervisor, one a GPU. A cell is trained in bf16 by all of them, whole, and again stopped on the way and resumed: the same bytes must be published. In
fp32, with nothing drawn by chance, all steps' losses and norms of gradients must be those of one process (not of ResNet, whose batches are normalised by each process for itself). A work of bench/gpu_tasks.py is trained by one GPU and by all, each with as many sequences a
GPU.
"""

import argparse
import gc
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_support
import gpu_tasks
import tables
import torch
import transformers

from cluster.ports import free_port
from finetune_crds import names
from finetune_crds.resolved import ResolvedJob
from finetune_crds.verdict import ExitCode, Verdict
from finetune_trainer import train
from finetune_trainer.modelling import masters, partition
from finetune_trainer.ranks import Ranks
from finetune_trainer.storage.roots import ENV_ROOT
from finetune_trainer.supervisor import ENV_TERMINATION_FILE
from training import cells, runs, tiny

AGREEMENT = 1e-4
"""Of losses and norms of gradients of all steps with those of one process, relative, in fp32."""
CELLS = r"^(llama|bert-text-cl|t5-summ|vit|resnet|gpt2-text-g|mixtral-text-g|qwen3_moe-text-g)"
WORKS = "llama 1B (lora|full|dpo, lora|grpo, lora)$|llama 8B full|bert-base text-classification, full|^vit .* full"
HEAD = (
    "| work | GPUs | tokens, images or answers a second, at the end | ratio of median steps | median ms a step | peak GiB | repeats itself |\n"
    "|---|---|---|---|---|---|---|"
)


def supervised(processes: int, folder: Path, *command: str, job: ResolvedJob | None = None) -> "subprocess.Popen[str]":
    """Starts as many processes as a pod with so many GPUs does; they run the command, or the job."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        ENV_ROOT: str(folder),
        ENV_TERMINATION_FILE: str(folder / "message"),
        names.ENV_PROCESSES_PER_NODE: str(processes),
        names.ENV_MASTER_PORT: str(free_port()),
        names.ENV_RUN_ID: str(time.monotonic_ns()),
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    if job is not None:
        file = folder / "job.json"
        file.write_text(job.model_dump_json(by_alias=True, exclude_none=True))
        environment[names.ENV_JOB_FILE] = str(file)
    return subprocess.Popen(
        [sys.executable, "-m", "finetune_trainer.supervisor", *command], env=os.environ | environment, text=True
    )


def joined(cpu: bool) -> Ranks:
    """One of the processes."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return Ranks.join(gpu=not cpu)


# Cells


def check_cells(chosen: Sequence[str], into: Path, cpu: bool) -> None:
    """What each process does; the first one writes a line a cell."""
    ranks = joined(cpu)
    torch.set_num_threads(1)
    made = gpu_support.jobs()
    for name in chosen:
        began = time.monotonic()
        shared = ranks.once(lambda: tempfile.mkdtemp(dir=into.parent))
        found = {"name": name, **_checked(made[name], name, Path(shared), ranks)}
        ranks.any(False)
        if ranks.first:
            shutil.rmtree(shared, ignore_errors=True)
            with into.open("a") as out:
                out.write(json.dumps(found | {"seconds": time.monotonic() - began}) + "\n")
    ranks.leave()


def _checked(make: Any, name: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Of a cell: what is wrong, or how far losses and norms of gradients are from those of one process. Every other cell with a gradient that is divided, and many chunks."""
    if zlib.crc32(name.encode()) % 2:
        with mock.patch.object(masters, "WHOLE_GRADIENT", 0), mock.patch.object(partition, "CHUNK", 1 << 14):
            return _compared(make, name, folder, ranks)
    return _compared(make, name, folder, ranks)


def _compared(make: Any, name: str, folder: Path, ranks: Ranks) -> dict[str, Any]:

    def run(job: ResolvedJob, place: Path, **options: Any) -> Verdict:
        verdict = runs.run(job, place, ranks=ranks, **options)
        gc.collect()
        worst = max(ranks.gather((int(verdict.code), verdict.message)))
        return verdict if verdict.code == worst[0] else verdict.model_copy(update={"message": worst[1]})

    place, whole = folder / "job", folder / "whole"
    job, stop = ranks.once(lambda: make(place, training={"precision": "bf16"}))
    verdict = run(job, place)
    if verdict.code:
        return {"wrong": f"bf16: {verdict.message}"}
    ranks.once(lambda: place.rename(whole) and None)
    job, stop = ranks.once(lambda: make(place, training={"precision": "bf16"}))
    last = ranks.rank == ranks.world - 1
    verdict = run(job, place, reporter=tiny.Recorder(stop_at=stop if last else None), run_id="stopped")
    if verdict.code != ExitCode.STOPPED:
        return {"wrong": f"asked to stop: {verdict.message}"}
    verdict = run(job, place)
    if verdict.code:
        return {"wrong": f"resumed: {verdict.message}"}
    if not ranks.once(lambda: runs.published(place) == runs.published(whole)):
        return {"wrong": "resumed: other bytes are published than without a stop"}

    together, alone = folder / "together", folder / "alone"
    several = {"precision": "fp32", "microBatchSize": 3}  # forward passes a step, of which the ranks have not as many
    job, _ = ranks.once(lambda: make(together, plain=True, training=several))
    with mock.patch.object(train, "load", gpu_support.without_chance):
        verdict = run(job, together)
        if verdict.code:
            return {"wrong": f"fp32: {verdict.message}"}
        if not ranks.first:
            return {}
        job, _ = make(alone, plain=True, training=several)
        verdict = runs.run(job, alone, ranks=Ranks(device=ranks.device))
    if verdict.code:
        return {"wrong": f"fp32, one process: {verdict.message}"}
    if "resnet" in name:
        return {}
    pairs = list(zip(runs.journal(together), runs.journal(alone), strict=True))
    apart = [max(gpu_support.differ(a[key], b[key]) for key in ("loss", "grad_norm")) for a, b in pairs]
    return {"first": apart[0], "all": max(apart)}


def cell_lines(pattern: str, gpus: int, at_once: int, cpu: bool, folder: Path) -> Iterator[str]:
    """What was found of cells, several of which are tried side by side."""
    chosen = [name for name in gpu_support.jobs() if re.search(pattern, name)] if pattern else []
    groups = [chosen[i::at_once] for i in range(at_once) if chosen[i::at_once]]
    into = folder / "cells.jsonl"
    if cpu:
        os.environ["OMP_NUM_THREADS"] = "1"
    started = [
        supervised(
            gpus, folder / f"cells-{i}",
            sys.executable, __file__, "--rank", "cells", "--of", json.dumps(group), "--into", str(into), *(["--cpu"] if cpu else []),
        )
        for i, group in enumerate(groups)
    ]  # fmt: skip
    for process in started:
        process.wait()
    found = [json.loads(line) for line in into.read_text().splitlines()] if into.exists() else []
    for one in found:
        if one.get("all", 0.0) > AGREEMENT:
            yield f"- {one['name']}: {one['first']:.1e} apart in the first step, {one['all']:.1e} in the worst"
        elif "wrong" in one:
            yield f"- {one['name']}: {one['wrong'][:500]}"
    for name in sorted(set(chosen) - {one["name"] for one in found}):
        yield f"- {name}: no word of it"
    right = [one for one in found if "wrong" not in one]
    compared = [one for one in right if "all" in one]
    close = [one for one in compared if one["all"] <= AGREEMENT]
    if chosen:
        yield f"- {gpus} processes, {len(chosen)} cells: {len(right)} publish the same bytes when stopped and resumed in bf16, and of {len(compared)} in fp32 {len(close)} have all losses and norms of one process within {AGREEMENT:.0e}"
    if close:
        yield f"- worst of these {max(one['all'] for one in close):.1e}, of the first steps of all {max(one['first'] for one in compared):.1e}"


# Works


def train_works(chosen: Sequence[str], shared: Path, into: Path, cpu: bool) -> None:
    """What each process does: each work with as many sequences a process as it has on one GPU, twice."""
    ranks = joined(cpu)
    for name in chosen:
        work = _scaled(name, ranks.world)
        meters = []
        for _ in range(2):
            folder = Path(ranks.once(lambda: tempfile.mkdtemp(dir=shared)))
            job = ranks.once(lambda folder=folder, work=work: gpu_tasks.make_job(folder, shared, work, cpu))
            meter = gpu_tasks.Meter(steps=None if work.publishes else gpu_tasks.STEPS)
            verdict = train.run(job, tiny.context(job, folder / "scratch", ranks=ranks, reporter=meter))
            gc.collect()
            if not cpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            meters.append(meter)
            if ranks.any(len(meter.losses()) != gpu_tasks.STEPS):
                raise RuntimeError(f"{name}: {verdict.message} {verdict.evidence}")
            ranks.any(False)
            if ranks.first:
                shutil.rmtree(folder, ignore_errors=True)
        first, second = meters
        peak = max(ranks.gather(first.peaks.get("Training", (0.0, 0.0))[0]))
        rates = [report.tokens_per_second for report, _ in second.reports if report.tokens_per_second]
        found = {
            "name": name,
            "world": ranks.world,
            "seconds": statistics.median(second.seconds[-gpu_tasks.STEPS + gpu_tasks.WARM :]),
            "tokens": rates[-1] if rates else None,
            "peak": peak,
            "same": first.losses() == second.losses(),
        }
        if ranks.first:
            with into.open("a") as out:
                out.write(json.dumps(found) + "\n")
    ranks.leave()


def _scaled(name: str, world: int) -> gpu_tasks.Work:
    """A work for so many GPUs."""
    work = gpu_tasks.WORKS[name]
    return work._replace(training=work.training | {"batchSize": work.training["batchSize"] * world})


def work_lines(pattern: str, gpus: int, cpu: bool, folder: Path, shared: Path) -> Iterator[str]:
    """Rows of the table: of each work one for a GPU and one for all."""
    chosen = [name for name in gpu_tasks.WORKS if re.search(pattern, name)] if pattern else []
    into = folder / "works.jsonl"
    shared.mkdir(parents=True, exist_ok=True)
    for family in {gpu_tasks.WORKS[name].model for name in chosen}:
        gpu_tasks.make_model(shared / family, family, cpu)
    for kind in {gpu_tasks.WORKS[name].rows for name in chosen}:
        gpu_tasks.write_rows(shared, kind, cpu)
    for name in chosen:
        alone: float | None = None
        worlds = [1, gpus] if gpu_tasks.WORKS[name].gpus == 1 else [gpus]
        for world in worlds:  # each in processes of its own: what one leaves is no other's peak
            into.unlink(missing_ok=True)
            command = ["--rank", "works", "--of", json.dumps([name]), "--into", str(into), "--shared", str(shared)]
            process = supervised(world, folder / "works", sys.executable, __file__, *command, *(["--cpu"] if cpu else []))  # fmt: skip
            process.wait()
            if not into.exists():
                yield f"| {name} | {world} | failed | | | | |"
                continue
            one = json.loads(into.read_text())
            alone = one["seconds"] if world == 1 else alone
            each_second = _scaled(name, world).training["batchSize"] / one["seconds"]
            speed = f"{one['tokens']:,} tokens" if one["tokens"] else f"{each_second:,.0f} images"
            if "grpo" in name:
                speed = f"{each_second * gpu_tasks.GRPO['grpo']['generations']:.1f} answers"
            ratio = f"{world * alone / one['seconds']:.2f}" if alone else ""
            yield f"| {name} | {world} | {speed} | {ratio} | {1000 * one['seconds']:.0f} | {one['peak']:.2f} | {'yes' if one['same'] else 'NO'} |"


# A killed peer


def killed(gpus: int, cpu: bool, folder: Path) -> Iterator[str]:
    """The last of the processes is killed in mid-training, and the job is run again."""
    made = cells.Cell("llama", "text-generation", "lora")
    training = {"maxSteps": 400, "precision": "fp32" if cpu else "bf16"}
    job, _ = cells.make_job(folder / "job", made, training=training)
    job.spec.checkpoints.every_steps = 5  # type: ignore[union-attr]
    job.spec.resources.gpus_per_node = 0 if cpu else gpus

    def saved() -> int:
        found = (folder / "job").glob("output.checkpoints/*/*/step-*/index.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)

    process = supervised(gpus, folder / "pod", job=job)
    deadline = time.monotonic() + 120
    while saved() < 10 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.monotonic()
    process.wait()
    verdict = Verdict.model_validate_json((folder / "pod/message").read_bytes())
    yield f"- killed: the pod ended {time.monotonic() - began:.1f} s later with {int(verdict.code)}, «{verdict.message}», step {saved()} saved"
    process = supervised(gpus, folder / "pod", job=job)
    process.wait()
    verdict = Verdict.model_validate_json((folder / "pod/message").read_bytes())
    yield f"- run again: {int(verdict.code)}, from step {verdict.first_step} to {verdict.step}"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="processes, one a GPU")
    parser.add_argument(
        "--cells", metavar="REGEX", default=CELLS, help="cells of these names; empty for none, and no peer is killed"
    )
    parser.add_argument("--works", metavar="REGEX", default=WORKS, help="works of these names; empty for none")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="cells side by side")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write what was found there too")
    parser.add_argument("--scratch", type=Path, help="keep models and rows of works there, for another time")
    parser.add_argument("--rank", choices=("cells", "works"), help=argparse.SUPPRESS)
    parser.add_argument("--of", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shared", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank == "cells":
        check_cells(options.of, options.into, options.cpu)
        return 0
    if options.rank == "works":
        train_works(options.of, options.shared, options.into, options.cpu)
        return 0
    card = "cpu" if options.cpu else torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts = (
            [f"Written by `bench/gpu_ranks.py` on {options.gpus} x {card}; torch {torch.__version__}.", ""],
            killed(options.gpus, options.cpu, folder / "killed") if options.cells else (),
            cell_lines(options.cells, options.gpus, options.at_once, options.cpu, folder),
            ["", *HEAD.splitlines()] if options.works else (),
            work_lines(options.works, options.gpus, options.cpu, folder, options.scratch or folder / "shared"),
        )
        tables.tell(itertools.chain.from_iterable(parts), options.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
