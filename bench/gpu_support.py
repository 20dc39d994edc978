"""The support table on one GPU: every cell of the tests, tiny and whole. Does it run there, repeat itself, resume to the same bytes, and compute what a CPU does?

    PYTHONPATH=crds:trainer_image:tests python bench/gpu_support.py --at-once 12            all of it, and what failed (about 4 minutes with 16 cores)
    PYTHONPATH=crds:trainer_image:tests python bench/gpu_support.py --only 'swin|^bert'      cells of these names
    PYTHONPATH=crds:trainer_image:tests python bench/gpu_support.py --cpu --only llama      is the script whole?

A cell is trained in bf16, whole, and again stopped on the way and resumed, then with gradient checkpointing where the family has it: every number must be finite, and the same bytes be published. Then with nothing drawn by chance, on the
GPU and on the CPU: the first loss and its gradient's norm must agree in fp32, and the first loss be near in bf16. Objectives of preferences and rewards are tried with every method on Llama.
"""

import argparse
import gc
import json
import math
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

ATTENTION = 2e-2
"""Of the attention kernel in bf16 with attention document by document in fp32, on the CPU: norm of the difference of outputs and of gradients, relative."""
ROUNDED = 3e-2
"""Of a first loss in bf16 on a GPU with that on a CPU, relative."""
DRAWN = "pissa|dora|grpo|(classification|answering|reward)-qlora"
"""Cells that a GPU begins elsewhere: adapters at a decomposition with other signs, answers that are sampled, a quantised model's head that is drawn where the model is quantised."""
AGREEMENT = 1e-4
"""Of a first loss and of its gradient's norm on a GPU with those on a CPU, relative, in fp32."""
LESS = {"qlora-8": 1e-2, "mobilenet_v1-image-classification-full": 1e-2}
"""In its place of some cells: with 8 bits, bitsandbytes quantises inputs of layers on GPUs; and of MobileNet V1 a rounding of its weights changes the gradient as much."""


@dataclass(frozen=True)
class Found:
    """Of a cell: relative differences of the first loss and gradient's norm in fp32, and of the first loss in bf16; or what went wrong, and where."""

    name: str
    seconds: float
    loss: float = math.nan
    norm: float = math.nan
    rounded: float = math.nan
    wrong: str = ""


def attention_agrees(cpu: bool) -> Iterator[str]:
    """Lines of the kernel that attends in all documents at once: outputs and gradients, of all its uses, beside one document at a time; twice the same bits."""
    import torch
    from torch import nn

    device = torch.device("cpu" if cpu else "cuda")
    lengths = [1, 40, 7, 300, 129]
    for causal, heads, window, before in (
        (True, 2, None, 0), (True, 8, 24, 0), (True, 2, None, 5), (True, 8, 24, 5), (False, 8, None, 0), (False, 8, 24, 0),
    ):  # fmt: skip
        torch.manual_seed(0)
        module = nn.Module()
        module.is_causal, module.layer_idx = causal, 0  # type: ignore[assignment]
        shapes = [(1, 8, sum(lengths), 64), *[(1, heads, sum(lengths), 64)] * 2, *[(1, heads, before, 64)] * 2]
        given = [torch.randn(shape, device=device).bfloat16().float() for shape in shapes]
        outer = torch.randn(1, sum(lengths), 8, 64, device=device).bfloat16().float()

        work = (module, given, outer, lengths, window, before)
        there = torch.device("cpu")
        plain = _attended(*work, torch.float32, there)
        fast, again = (_attended(*work, torch.bfloat16, device) for _ in range(2))
        worst = max(float((a.float().cpu() - b).norm() / b.norm()) for a, b in zip(fast, plain, strict=True))
        same = all(torch.equal(a, b) for a, b in zip(fast, again, strict=True))
        name = (
            f"attention, {'causal' if causal else 'both ways'}, {heads} heads of keys, window {window}, prefix {before}"
        )
        yield f"{name}: {worst:.1e} apart, {'the same bits' if same else 'OTHER BITS'} again{'' if worst < ATTENTION and same else ' WRONG'}"


def _attended(
    module: Any, given: Any, outer: Any, lengths: list[int], window: int | None, before: int, dtype: Any, device: Any
) -> list[Any]:
    """Outputs and gradients."""
    from finetune_trainer.modelling.attention import Documents, documents_attention

    tensors = [one.to(device, dtype, copy=True).requires_grad_() for one in given]
    documents = Documents.of(lengths, device)
    if before:
        documents = documents._replace(prefixes=((tensors[3], tensors[4]),))
    out, _ = documents_attention(module, *tensors[:3], None, sliding_window=window, documents=documents)
    out.backward(outer.to(device, dtype))
    return [out.detach(), *(one.grad for one in tensors if one.grad is not None)]


def jobs() -> dict[str, Callable[..., Any]]:
    """Of each cell a function that makes its job in a folder, and says at which step to stop it."""
    from training import cells, test_objectives

    made: dict[str, Callable[..., Any]] = {
        str(cell): lambda folder, cell=cell, **more: cells.make_job(folder, cell, **more) for cell in cells.CELLS
    }
    for objective, method in test_objectives.CELLS:
        made[f"llama-{objective}-{method}"] = lambda folder, objective=objective, method=method, **more: (
            test_objectives.make_job(folder, objective, method, **more)
        )
    return made


def differ(one: float, other: float) -> float:
    """Relative to the other, or to a thousandth where it is less."""
    return abs(one - other) / max(abs(other), 1e-3)


def without_chance(*arguments: Any) -> Any:
    """In place of the trainer's load: a model that drops nothing."""
    from finetune_trainer import setup

    made = setup.load(*arguments)
    for module in made.model.outer.modules():
        for rate in {"p", "drop_prob", "drop_rate"} & vars(module).keys():
            setattr(module, rate, 0.0)
    return made


def check(name: str, cpu: bool) -> Found:
    """A cell, in a process that has a GPU."""
    import torch

    from finetune_crds.verdict import ExitCode
    from finetune_trainer import train
    from finetune_trainer.ranks import CPU, Ranks
    from training import runs, tiny

    make = jobs()[name]
    device = CPU if cpu else torch.device("cuda", 0)
    began = time.monotonic()
    stage = ""

    errors: list[str] = []
    trains = train._run

    def told(*arguments: Any) -> Any:
        try:
            return trains(*arguments)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}"[:400])
            raise

    def run(job: Any, folder: Path, where: torch.device, **options: Any) -> Any:
        with mock.patch.object(train, "_run", told):
            verdict = runs.run(job, folder, ranks=Ranks(device=where), **options)
        gc.collect()
        return verdict

    def finished(job: Any, folder: Path, where: torch.device) -> list[dict[str, Any]]:
        verdict = run(job, folder, where)
        if verdict.code:
            raise RuntimeError(f"{verdict.message} {errors[-1:]}")
        return runs.journal(folder)

    try:
        with tempfile.TemporaryDirectory() as scratch:
            place, whole, first = Path(scratch) / "job", Path(scratch) / "whole", Path(scratch) / "plain"
            stage = "bf16"
            job, stop = make(place, training={"precision": "bf16"})
            steps = finished(job, place, device)
            numbers = [value for step in steps for value in step.values() if isinstance(value, float)]
            if not all(map(math.isfinite, numbers)):
                raise RuntimeError("not all numbers are finite")
            place.rename(whole)
            stage = "resumed"
            job, stop = make(place, training={"precision": "bf16"})
            again, _ = make(place, training={"precision": "bf16"}, saving=True)
            if run(job, place, device, reporter=tiny.Recorder(stop_at=stop), run_id="stopped").code != ExitCode.STOPPED:
                raise RuntimeError("it did not stop")
            finished(again, place, device)
            if runs.published(place) != runs.published(whole):
                raise RuntimeError("other bytes are published than without a stop")
            first_steps = []
            for where, precision in ((CPU, "fp32"), (device, "fp32"), (CPU, "bf16"), (device, "bf16")):
                stage = f"{precision} on {where.type}"
                folder = first / str(len(first_steps))
                job, _ = make(folder, plain=True, training={"precision": precision})
                with mock.patch.object(train, "load", without_chance):
                    first_steps.append(finished(job, folder, where)[0])
            stage = "agreement"
            loss, norm = (differ(first_steps[1][key], first_steps[0][key]) for key in ("loss", "grad_norm"))
            rounded = differ(first_steps[3]["loss"], first_steps[2]["loss"])
            drawn = re.search(DRAWN, name) is not None
            bound = next((less for part, less in LESS.items() if part in name), AGREEMENT)
            right = drawn or (loss < bound and norm < bound and rounded < ROUNDED)
            wrong = "" if right else f"{stage}: {[(step['loss'], step['grad_norm']) for step in first_steps]}"
            if drawn:
                loss = norm = rounded = math.nan
            return Found(name, time.monotonic() - began, loss, norm, rounded, wrong)
    except Exception as error:
        text = "".join(traceback.format_exception(error)[-2:])
        return Found(
            name, time.monotonic() - began, wrong=f"{stage}: {type(error).__name__}: {str(error)[:600]}\n{text[-1500:]}"
        )


def prepare(cpu: bool) -> None:
    """Of a worker."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    import transformers

    from finetune_trainer.ranks import make_repeatable

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not cpu:
        make_repeatable()


def results(names: list[str], at_once: int, cpu: bool) -> Iterator[Found]:
    """As they come."""
    with ProcessPoolExecutor(at_once, get_context("spawn"), prepare, (cpu,), max_tasks_per_child=60) as pool:
        for done in as_completed([pool.submit(check, name, cpu) for name in names]):
            yield done.result()


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", default="", help="only cells of these names")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="cells side by side")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no more is waited for than this")
    parser.add_argument("--cpu", action="store_true", help="all of it on the CPU")
    parser.add_argument("--into", type=Path, metavar="FILE", help="what was found, a line of JSON each")
    options = parser.parse_args()
    names = [name for name in jobs() if re.search(options.only, name)]
    began, found = time.monotonic(), []
    prepare(options.cpu)
    bad = False
    for line in attention_agrees(options.cpu):
        print(line, flush=True)
        bad |= line.endswith("WRONG")
    for one in results(names, options.at_once, options.cpu):
        found.append(one)
        if options.into:
            with options.into.open("a") as out:
                out.write(json.dumps(vars(one)) + "\n")
        if one.wrong:
            print(f"{one.name}: {one.wrong}", flush=True)
        if time.monotonic() - began > options.seconds:
            print(f"{len(names) - len(found)} cells were not waited for", flush=True)
            break
    right = [one for one in found if not one.wrong]
    print(f"{len(right)} of {len(names)} cells are right, in {time.monotonic() - began:.0f} s", flush=True)
    for what in ("loss", "norm", "rounded"):
        known = [one for one in right if not math.isnan(getattr(one, what))]
        for one in sorted(known, key=lambda one: -getattr(one, what))[:4]:
            print(f"  {what} differs from a CPU's by {getattr(one, what):.1e}: {one.name}")
    sys.stdout.flush()
    if len(found) < len(names):
        os._exit(1)
    return bad or len(right) != len(names)


if __name__ == "__main__":
    sys.exit(main())
