"""Every method of `spec.method` on one GPU: is it right, does it repeat itself, how fast is it, and what does it take?

    PYTHONPATH=crds:trainer_image:tests python bench/gpu_methods.py --table bench/gpu_methods.md      all of it, into a file (about 20 minutes)
    PYTHONPATH=crds:trainer_image:tests python bench/gpu_methods.py --checks .                        is it right? on tiny models
    PYTHONPATH=crds:trainer_image:tests python bench/gpu_methods.py --speed 'qlora|lora'              methods of these names
    PYTHONPATH=crds:trainer_image:tests python bench/gpu_methods.py --cpu                             what a CPU can do of it: is the script whole?

Each row is printed, and written, as soon as it is known. Each method is timed in a process of its own, twice in it, by the loop of
`gpu_trainer.py`. Plain allocations are capped at 90 % of the GPU's memory, so that they never compete with managed memory.
"""

import argparse
import ctypes
import gc
import hashlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import tables
import torch
import transformers
from gpu_trainer import arguments, run

from finetune_crds.resolved import ResolvedAdamW
from finetune_trainer import train
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.modelling import optimizers, paged
from finetune_trainer.ranks import Ranks, make_repeatable
from training import reference, tiny
from training.runs import opened_as_its_card_says
from training.test_methods import make
from training.test_parity import ROWS, lora, order_of
from training.variants import LLAMA, VARIANTS, spec_of

SPEEDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"full": {}}, {}),
    "full, 8-bit moments": ({"full": {}}, {"bits": 8}),
    "full, 8-bit moments, paged": ({"full": {}}, {"bits": 8, "paged": True}),
    "freeze, last 2 blocks": ({"freeze": {"trainLastBlocks": 2}}, {}),
    "gradualUnfreezing, all unfrozen": ({"gradualUnfreezing": {"everySteps": 1, "blocksPerStage": 8}}, {}),
    "lora": ({"lora": {}}, {}),
    "lora, DoRA": ({"lora": {"useDora": True}}, {}),
    "lora, PiSSA": ({"lora": {"initialization": "pissa"}}, {}),
    "qlora, 4 bits (NF4)": ({"qlora": {}}, {}),
    "qlora, 8 bits": ({"qlora": {"bits": 8}}, {}),
    "adapter": ({"adapter": {}}, {}),
    "prefix": ({"prefix": {}}, {}),
    "prompt": ({"prompt": {}}, {}),
    "pTuning": ({"pTuning": {}}, {}),
    "ia3": ({"ia3": {}}, {}),
}
"""Name: method and optimizer as in a manifest, the rest by default."""

SPEED_HEAD = "| method | tokens/s | ms a step | peak GiB | repeats itself | losses |\n|---|---|---|---|---|---|"
CHECK_HEAD = "| check | found | as it should be |\n|---|---|---|"


class Found(NamedTuple):
    """A row of the second table."""

    what: str
    found: str
    good: bool | None
    """None: a figure without a bound."""


# Speed


def measure(name: str, scratch: Path, device: torch.device) -> str:
    """A row of the first table. The losses are told by a digest: rows with the same computed the same."""
    method, adamw = SPEEDS[name]
    options = arguments().parse_args(["--steps", "9", "--warm", "4"] + (["--tiny"] if device.type == "cpu" else []))
    if device.type == "cpu":
        options.shape, options.length, options.precision = "tiny", 256, "fp32"
    else:
        torch.cuda.set_per_process_memory_fraction(0.9)
    lines, clock = run(options, scratch, device, 0, method, adamw)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    gc.collect()
    torch.cuda.empty_cache()
    again, _ = run(options, scratch, device, 0, method, adamw)
    for line in lines:
        assert np.isfinite(line["loss"]) and line["grad_norm"] > 0, line
    equal = [(a["loss_hex"], a["grad_norm"]) == (b["loss_hex"], b["grad_norm"]) for a, b in zip(lines, again, strict=True)]  # fmt: skip
    seconds = statistics.median(clock.seconds[options.warm - 1 :])
    tokens = statistics.mean(line["tokens"] for line in lines)
    digest = hashlib.sha256("".join(line["loss_hex"] for line in lines).encode()).hexdigest()[:8]
    repeats = "yes" if all(equal) else f"no ({sum(equal)} of {len(equal)} steps)"
    return f"| {name} | {tokens / seconds:,.0f} | {1000 * seconds:.0f} | {peak:.2f} | {repeats} | {digest} |"


def speeds(pattern: str, scratch: Path, cpu: bool) -> Iterator[str]:
    """Rows of the first table, each from a process of its own."""
    for name in SPEEDS:
        if not re.search(pattern, name) or (cpu and "paged" in name):
            continue
        command = [sys.executable, __file__, "--one", name, "--scratch", str(scratch), *(["--cpu"] if cpu else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            yield done.stdout.strip().splitlines()[-1]
        else:
            print(done.stderr[-3000:], file=sys.stderr, flush=True)
            reason = (done.stderr.strip().splitlines() or ["?"])[-1][:120].replace("|", "/")
            yield f"| {name} | failed: {reason} | | | | |"


# Checks


def train_tiny(
    folder: Path, model: Path, device: torch.device, method: dict[str, Any], /, stop_at: int | None = None, **spec: Any
) -> Path:
    """Trains a tiny job to its end, stopped and resumed on the way if told so. Its folder."""
    job = make(folder, model, "text-generation", method, **spec)
    ranks = Ranks(device=device)
    if stop_at:
        recorder = tiny.Recorder(stop_at=stop_at)
        stopped = train.run(job, tiny.context(job, folder / "scratch", ranks=ranks, reporter=recorder))
        assert 0 < stopped.step < job.spec.training.max_steps, stopped.message
    verdict = train.run(job, tiny.context(job, folder / "scratch", ranks=ranks, run_id="second"))
    if verdict.code:
        raise RuntimeError(f"{verdict.message} {verdict.evidence}")
    return folder


def losses(folder: Path, name: str = "loss_hex") -> list[float]:
    """Of each step."""
    return [float.fromhex(loss) for loss in tiny.losses(folder / "output", name)]


def files(folder: Path) -> dict[str, Any]:
    """What was published, by digest: weights, and metrics.jsonl with all losses."""
    found: dict[str, Any] = json.loads((folder / "output/finetune.json").read_text())["files"]
    return found


def losses_by_method(folder: Path, model: Path, device: torch.device) -> dict[str, Any]:
    """Losses of ten steps in fp32, or what went wrong.

    At a rate where rounding does not grow: at 1e-2 a CPU whose weights are changed by 6e-8 ends 3e-4 away from itself. PiSSA's random
    draws are the CPU's on both.
    """
    draw = peft.tuners.lora.layer.svd_lowrank
    peft.tuners.lora.layer.svd_lowrank = lambda matrix, *arguments, **options: [
        factor.to(matrix.device) for factor in draw(matrix.cpu(), *arguments, **options)
    ]
    found: dict[str, Any] = {}
    for variant in LLAMA:
        options = {"training": {"maxSteps": 10, "precision": "fp32", "learningRate": "1e-3"}}
        try:
            found[variant] = losses(
                train_tiny(folder / variant, model, device, spec_of(variant, plain=True), **options)
            )
        except Exception as error:
            traceback.print_exc()
            found[variant] = f"{type(error).__name__}: {error}"[:200]
    peft.tuners.lora.layer.svd_lowrank = draw
    return found


def as_on_the_cpu(folder: Path, model: Path, device: torch.device) -> Iterator[Found]:
    """fp32 losses of each method against those of a process that sees no GPU."""
    command = [sys.executable, __file__, "--losses-on-cpu", "--scratch", str(folder)]
    child = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.PIPE, text=True)
    here = losses_by_method(folder / "gpu", model, device)
    out, _ = child.communicate()
    there = json.loads(out.strip().splitlines()[-1])
    for variant, ours in here.items():
        if isinstance(ours, str) or isinstance(there[variant], str):
            yield Found(f"{variant}: ten steps in fp32, GPU and CPU", f"{ours} / {there[variant]}", False)
            continue
        apart = float(np.abs(np.subtract(ours, there[variant])).max())
        yield Found(f"{variant}: ten steps in fp32, GPU and CPU", f"losses {apart:.1e} apart", apart <= 1e-4)


def as_bitsandbytes(folder: Path, model: Path, device: torch.device) -> Iterator[Found]:
    """Our AdamW of 8 bits against bitsandbytes' own, and both against 32 bits, on the same gradients for 50 steps."""
    from bitsandbytes.optim import AdamW8bit

    for name, sizes in (("one matrix", [(1024, 768)]), ("matrices of odd sizes", [(300, 411), (77, 130), (5, 1000)])):
        rng = torch.Generator().manual_seed(3)
        shapes = [torch.randn(size, generator=rng).to(device) * 0.05 for size in sizes]
        weights = torch.cat([matrix.flatten() for matrix in shapes])
        whole = (0, len(weights))
        theirs = [torch.nn.Parameter(matrix.clone()) for matrix in shapes]
        optimizer = AdamW8bit(theirs, lr=1e-3, weight_decay=0.01)
        kinds = {8: weights.clone(), 32: weights.clone()}
        ours = {bits: optimizers.make(vector, adamw(bits=bits), [whole]) for bits, vector in kinds.items()}
        scale = torch.logspace(-4, 0, len(weights), device=device)
        mean = torch.randn(len(weights), generator=rng)
        for step in range(1, 51):
            gradient = (mean + torch.randn(len(weights), generator=rng)).to(device) * scale
            for bits, vector in kinds.items():
                ours[bits].update(whole, vector, gradient.clone(), step, 1e-3, 0.01)
            for parameter, part in zip(theirs, gradient.split([p.numel() for p in theirs]), strict=True):
                parameter.grad = part.view_as(parameter).clone()
            optimizer.step()
        moved = {"theirs": torch.cat([p.detach().flatten() for p in theirs]) - weights}
        moved |= {str(bits): vector - weights for bits, vector in kinds.items()}
        largest = float((moved["8"] - moved["theirs"]).abs().max() / moved["theirs"].abs().max())
        apart, rounding = (
            float((moved[a] - moved[b]).norm() / moved[b].norm()) for a, b in (("8", "theirs"), ("8", "32"))
        )
        found = f"updates {apart:.1e} apart (norm), at most {largest:.1e} of the largest; 8 and 32 bits are {rounding:.1e} apart"
        yield Found(
            f"50 steps of our 8-bit AdamW and bitsandbytes', {name}",
            found,
            apart == 0 if len(sizes) == 1 else apart < rounding,
        )


def as_transformers(folder: Path, model: Path, device: torch.device) -> Iterator[Found]:
    """Losses of qlora in bf16 against the script of transformers, peft and bitsandbytes."""
    for bits in (4, 8):
        place = folder / str(bits)
        data = tiny.write_rows(place / "train.jsonl", ROWS)
        training = {"epochs": "2", "batchSize": 8, "microBatchSize": 3, "learningRate": "5e-3", "sequenceLength": 512, "packing": False,
                    "warmupSteps": 2, "weightDecay": "0.1", "maxGradNorm": "0.5"}  # fmt: skip
        quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
        if bits == 4:
            quantization = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
            )  # fmt: skip
        found = {}
        for precision in ("bf16", "fp32"):
            method = {"qlora": {"rank": 4, "alpha": 8, "bits": bits}}
            job = tiny.job(place / precision, model, data, method=method, training=training | {"precision": precision})
            context = tiny.context(job, place / precision / "scratch", ranks=Ranks(device=device))
            verdict = train.run(job, context)
            if verdict.code:
                raise RuntimeError(verdict.message)
            found[precision] = losses(place / precision)
        rows = RowSet.open(next((place / "bf16/scratch/prepared").iterdir()))
        order = order_of(rows, 8, seed=42)
        steps = [[int(i) for sequence in step for i in sequence] for epoch in (0, 1) for step in order.epoch(epoch)]
        theirs, _, _ = reference.train(
            model, [row["messages"] for row in ROWS], steps, adapt=lora(), seed=42, rate=5e-3, decay=0.1, clip=0.5, micro_batch=3,
            quantization=quantization, dtype=torch.bfloat16, device=str(device),
        )  # fmt: skip
        apart, rounding = (float(np.abs(np.subtract(found["bf16"], other)).max()) for other in (theirs, found["fp32"]))
        text = f"losses {apart:.1e} apart, of {theirs[0]:.2f} to {theirs[-1]:.2f}; our bf16 and fp32 are {rounding:.1e} apart"
        yield Found(f"qlora, {bits} bits, bf16: ours and transformers with peft, within 2e-2", text, apart <= 2e-2)


def plain_loss(model: Any, rows: RowSet) -> float:
    """Mean over the learned tokens of held-out rows, each row alone in a forward pass of the library's own."""
    total, count = 0.0, 0
    for row in np.flatnonzero(rows.sources < 0):
        span = slice(int(rows.offsets[row]), int(rows.offsets[row + 1]))
        tokens = torch.from_numpy(rows.tokens[span].astype(np.int64)).to(model.device)
        learned = np.flatnonzero(rows.learned[span][1:])
        with torch.no_grad():
            logits = model(input_ids=tokens[None], attention_mask=torch.ones_like(tokens[None])).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits[learned], tokens[1:][learned], reduction="sum"))
        count += len(learned)
    return total / count


def merged_as_trained(folder: Path, model: Path, device: torch.device) -> Iterator[Found]:
    """Held-out loss of a merged output, opened on the GPU by transformers, against the one that training ended with."""
    for variant, precision, bound in (
        ("qlora", "fp32", 2e-5), ("qlora", "bf16", 2e-2), ("qlora-8", "fp32", 2e-2), ("qlora-8", "bf16", 2e-2), ("lora", "bf16", 2e-2),
    ):  # fmt: skip
        place = folder / f"{variant}-{precision}"
        output = {"uri": f"file://{place}/output", "merged": True}
        train_tiny(place, model, device, VARIANTS[variant], output=output, training={"precision": precision})
        after = losses(place, "eval_loss_hex")[-1]
        opened = opened_as_its_card_says(place / "output").eval().to(device)
        rows = RowSet.open(next((place / "scratch/prepared").iterdir()))
        apart = abs(plain_loss(opened, rows) - after)
        what = f"{variant}, {precision}: merged output opened on the GPU, within {bound:.0e}"
        yield Found(what, f"held-out loss {apart:.1e} apart, of {after:.3f}", apart <= bound)


def paged_as_not(folder: Path, model: Path, device: torch.device) -> Iterator[Found]:
    """Paged moments change no bit: whole jobs, a worker's own process, a resume across the two, and pages that were on the host."""
    for bits in (8, 32):
        found = {}
        for name, there in (("unpaged", {}), ("paged", {"paged": True})):
            training = {"optimizer": {"adamw": {"bits": bits, **there}}}
            found[name] = files(
                train_tiny(folder / f"{name}-{bits}", model, device, {"full": {}}, training=training, resources={"gpusPerNode": 1})
            )  # fmt: skip
        yield Found(f"full, {bits} bits: paged and not", "published files", found["paged"] == found["unpaged"])
        place = folder / f"worker-{bits}"
        training = {"optimizer": {"adamw": {"bits": bits, "paged": True}}}
        job = make(place, model, "text-generation", {"full": {}}, training=training, resources={"gpusPerNode": 1})
        (place / "job.json").write_text(job.model_dump_json(by_alias=True))
        environment = {**os.environ, "FINETUNE_JOB_FILE": str(place / "job.json"), "FINETUNE_ROOT": str(place / "root")}
        done = subprocess.run(
            [sys.executable, "-m", "finetune_trainer.worker"], env=environment, capture_output=True, text=True
        )
        same = done.returncode == 0 and files(place) == found["unpaged"]
        yield Found(f"full, {bits} bits: paged by a worker's process", f"exit code {done.returncode}, published files", same)  # fmt: skip
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
        yield from _from_the_host(bits, device)


def _from_the_host(bits: int, device: torch.device, length: int = 1 << 26) -> Iterator[Found]:
    """Updates of moments whose pages are on the GPU, and of ones that were pushed to the host, with and without fetching all at once."""
    stretches = [(at, at + (1 << 24)) for at in range(0, length, 1 << 24)]
    assert torch.cuda.mem_get_info()[0] > 16 * 8 * length, "managed memory must fit many times over"
    torch.manual_seed(0)
    start = torch.randn(length, device=device)
    vectors = {"unpaged": start, "paged": start.clone()}
    made = {
        name: optimizers.make(vectors[name], adamw(bits=bits, paged=name == "paged"), stretches) for name in vectors
    }
    places = ("on the GPU", "fetched from the host", "from the host page by page")
    fetch, seconds = paged.fetch, dict.fromkeys(("unpaged", *places), 1e9)
    for step in range(1, 13):
        gradient = torch.randn(length, device=device)
        place = places[step % 3]
        if "host" in place:
            _push_to_host(made["paged"])
        paged.fetch = (lambda part: None) if "page by page" in place else fetch
        for name, optimizer in made.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            for stretch in stretches:
                part = slice(*stretch)
                optimizer.update(stretch, vectors[name][part], gradient[part], step, 1e-3, 0.01)
            torch.cuda.synchronize()
            which = place if name == "paged" else name
            seconds[which] = min(seconds[which], time.perf_counter() - began)
    paged.fetch = fetch
    equal = torch.equal(*vectors.values()) and all(
        torch.equal(made["paged"].moments[name], made["unpaged"].moments[name]) for name in ("first", "second")
    )
    size = sum(moment.nbytes for moment in made["paged"].moments.values()) / 2**20
    times = ", ".join(f"{name} {1000 * fastest:.1f}" for name, fastest in seconds.items())
    what = (
        f"{bits} bits: 12 updates of 67 million weights, {size:.0f} MiB of moments pushed to the host before 8 of them"
    )
    yield Found(what, f"ms an update: {times}", equal)


def _push_to_host(optimizer: optimizers.Optimizer) -> None:
    """Writes a byte of each page from the host."""
    torch.cuda.synchronize()
    for moment in optimizer.moments.values():
        pages = np.frombuffer((ctypes.c_uint8 * moment.nbytes).from_address(moment.data_ptr()), np.uint8)[::4096]
        pages += np.uint8(0)


def resumed_as_whole(folder: Path, model: Path, device: torch.device) -> Iterator[Found]:
    """A run that is stopped at step 3 of 8 and resumed publishes the bytes of one that was not."""
    bits = {"full, 8 bits": {"bits": 8}, "full, 8 bits, paged": {"bits": 8, "paged": True}}
    if device.type == "cpu":
        del bits["full, 8 bits, paged"]
    methods = {name: VARIANTS[name] for name in ("lora", "lora-pissa", "qlora", "qlora-8", "prefix", "pTuning")}
    for name, method in (methods | {name: {"full": {}} for name in bits}).items():
        training = {"precision": "bf16", "optimizer": {"adamw": bits.get(name, {})}}
        options = {"training": training, "resources": {"gpusPerNode": int(device.type == "cuda")}}
        place = folder / name.replace(", ", "-").replace(" ", "-")
        whole = files(train_tiny(place, model, device, method, **options))
        place.rename(place.with_suffix(".whole"))  # its card names where the rows lay
        stopped = files(train_tiny(place, model, device, method, stop_at=3, **options))
        yield Found(f"{name}, bf16: stopped, resumed", "published files", whole == stopped)


CHECKS: tuple[Callable[[Path, Path, torch.device], Iterator[Found]], ...] = (
    as_bitsandbytes, paged_as_not, resumed_as_whole, as_transformers, merged_as_trained, as_on_the_cpu,
)  # fmt: skip


def checks(pattern: str, scratch: Path, device: torch.device) -> Iterator[str]:
    """Rows of the second table. A check that breaks is a row too."""
    model = tiny.make_model(scratch / "tiny")
    for check in CHECKS:
        if not re.search(pattern, check.__name__) or (device.type == "cpu" and check is paged_as_not):
            continue
        try:
            for what, found, good in check(scratch / check.__name__, model, device):
                yield f"| {what} | {found} | {'' if good is None else 'yes' if good else '**no**'} |"
        except Exception as error:
            traceback.print_exc()
            yield f"| {check.__name__} | {type(error).__name__}: {str(error)[:200]} | **no** |"


def adamw(**changes: Any) -> ResolvedAdamW:
    """With the defaults of a job."""
    settings: dict[str, Any] = {"beta1": "0.9", "beta2": "0.999", "epsilon": "1e-8", "bits": 32, "paged": False}
    return ResolvedAdamW(**settings | changes)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", metavar="REGEX", help="only checks of these names, and no speed unless asked for")
    parser.add_argument("--speed", metavar="REGEX", help="only methods of these names, and no checks unless asked for")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the tables there too")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--scratch", type=Path, default=None, help="where models and jobs lie")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--losses-on-cpu", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_cpu = options.cpu or options.losses_on_cpu
    device = torch.device("cpu") if on_cpu else torch.device("cuda", 0)
    if not on_cpu:
        make_repeatable()
        torch.cuda.set_device(device)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        if options.one:
            print(measure(options.one, scratch, device))
            return 0
        if options.losses_on_cpu:
            torch.set_num_threads(2)
            print(json.dumps(losses_by_method(scratch / "cpu", scratch.parent / "tiny", device)))
            return 0
        name = "cpu" if options.cpu else torch.cuda.get_device_name()
        libraries = ", ".join(
            f"{package} {version(package)}" for package in ("torch", "transformers", "peft", "bitsandbytes")
        )
        parts: list[Iterable[str]] = [[f"Written by `bench/gpu_methods.py` on {name}; {libraries}."]]
        if options.checks or not options.speed:
            parts += [[f"\n{CHECK_HEAD}"], checks(options.checks or "", scratch / "checks", device)]
        if options.speed or not options.checks:
            parts += [[f"\n{SPEED_HEAD}"], speeds(options.speed or "", scratch, options.cpu)]
        tables.tell(itertools.chain.from_iterable(parts), options.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
