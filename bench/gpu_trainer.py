"""Speed and memory of the trainer's own loop on one GPU: `train()` as a job runs it, on a model with random weights.

    PYTHONPATH=crds:trainer_image python bench/gpu_trainer.py                      1B llama, LoRA r=16 on all linear layers, packed to 4096
    PYTHONPATH=crds:trainer_image python bench/gpu_trainer.py --method full
    PYTHONPATH=crds:trainer_image python bench/gpu_trainer.py --twice              also: is a second run equal to the last bit?
    PYTHONPATH=crds:trainer_image python bench/gpu_trainer.py --tiny               the same on a CPU, in seconds: is the script whole?

    PYTHONPATH=crds:trainer_image python bench/gpu_trainer.py --table bench/gpu_trainer.md      the shapes of TABLE, into a file

Prints a profile, then one line `tokens_per_second=... peak_gib=... ...`. Fails if a loss or gradient norm is not finite and positive: a
benchmark that computes nothing is fast.
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from finetune_crds.progress import RunReport
from finetune_crds.resolution import Defaults, resolve
from finetune_crds.resolved import ResolvedFineTune
from finetune_crds.v1alpha1 import FineTuneJob, Inputs, Location
from finetune_trainer import setup, train
from finetune_trainer.context import RunContext
from finetune_trainer.data.encoding import EncodedRow
from finetune_trainer.data.holdout import divide
from finetune_trainer.data.prepared import Index, RowSet, RowWriter
from finetune_trainer.ranks import Ranks, make_repeatable
from finetune_trainer.reporting.story import Story
from finetune_trainer.results.checkpoints import Checkpoints
from finetune_trainer.results.journal import Journal
from finetune_trainer.storage.stores import open_store

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": True},
}  # fmt: skip

TABLE = (
    ("1B LoRA r=16, documents packed to 4096", ["--documents", "lognormal"]),
    ("1B LoRA r=16, fixed 4096", ["--documents", "fixed"]),
    ("1B full, documents packed to 4096", ["--method", "full"]),
    ("8B LoRA r=16, documents packed to 4096", ["--shape", "8b", "--sequences", "2", "--micro-batch", "2"]),
)
"""What `--table` measures, each in a process of its own."""


@dataclass
class Clock:
    """A reporter that times steps, and profiles some."""

    warm: int
    profiled: int
    stop_requested: str | None = None
    fenced: bool = False
    seconds: list[float] = field(default_factory=list)
    profile: Any = None
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest."""
    _step: int = 0
    _at: float = 0.0

    def update(self, report: RunReport, metrics: dict[str, float]) -> None:
        """Called on each change; a new step ends with the losses on the host, so the device is done with it."""
        self.metrics |= metrics
        if report.step == self._step:
            return
        self._step, now = report.step, time.perf_counter()
        if self._at and not self._profiling(report.step - 1):
            self.seconds.append(now - self._at)
        if self.profiled and report.step == self.warm:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.start()
        elif self.profiled and report.step == self.warm + self.profiled:
            self.profile.stop()
        self._at = time.perf_counter()

    def _profiling(self, step: int) -> bool:
        return self.warm <= step < self.warm + self.profiled

    def close(self, timeout: float = 10.0) -> None:
        """Nothing."""


def write_rows(folder: Path, options: argparse.Namespace, vocabulary: int) -> RowSet:
    """Random tokens: documents of one length, or of log-normal lengths (median 400) that are packed."""
    rng = np.random.default_rng(0)
    needed = (options.steps + 1) * options.sequences * options.length
    writer = RowWriter(folder)
    total = 0
    while total < needed:
        length = options.length
        if options.documents == "lognormal":
            length = int(np.clip(rng.lognormal(math.log(options.length / 10), 1.0), 16, options.length))
        # A skewed distribution, so that there is something to learn and the gradient is no noise. Never the padding token 0: its
        # embedding is zero, and a norm of zeros multiplies gradients by 1 / sqrt(epsilon) in every layer until they overflow.
        tokens = 2 + (rng.random(length) ** 3 * (vocabulary - 2)).astype(np.int64)
        if options.objective == "dpo":  # two answers behind one prompt, a quarter of each sequence
            other = np.concatenate([tokens[: length // 4], rng.permutation(tokens[length // 4 :])])
            learned = [False] * (length // 4) + [True] * (length - length // 4)
            row = EncodedRow([*tokens.tolist(), *other.tolist()], learned * 2, split=length)
            total += length
        elif options.objective == "grpo":  # a prompt, a quarter of each sequence
            length = max(1, length // 4)
            row = EncodedRow(tokens[:length].tolist(), note=json.dumps({"asked": "", "columns": {}}).encode())
        else:
            row = EncodedRow(tokens.tolist(), [True] * length, targets=length - 1)
        writer.add(row, sources=0, files=0, numbers=len(writer) + 1, content=len(writer), groups=len(writer), slices=0)
        total += length
    writer.finish(Index(digest="sha256:random", files=["random"], classes=[]))
    return RowSet.open(folder)


def run(
    options: argparse.Namespace,
    folder: Path,
    device: torch.device,
    profiled: int,
    method: dict[str, Any] | None = None,
    adamw: dict[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], Clock]:
    """One run: lines of metrics.jsonl, and times. `method` and `adamw` as in a manifest; without, what the options say."""
    shape = SHAPES[options.shape]
    model = folder / "model"
    if not model.exists():
        config = LlamaConfig(
            **shape,
            max_position_embeddings=max(8192, options.length),
            rope_theta=500_000.0,
            eos_token_id=1,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        with device:
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    work = Path(tempfile.mkdtemp(dir=folder))
    objective: dict[str, Any] = {}
    if options.objective == "grpo":
        objective = {
            "rewards": [{"name": "even", "regex": {"pattern": "[02468]$"}}],
            "maxCompletionLength": options.length // 2,
        }
    job = resolve(
        FineTuneJob.model_validate(
            {
                "metadata": {"name": "bench"},
                "spec": {
                    "model": {"uri": f"file://{model}"},
                    "dataset": {"train": [{"uri": "file:///random.jsonl"}], "evaluation": {"fraction": "0"}},
                    "objective": {options.objective: objective},
                    "method": method or {options.method: {} if options.method == "full" else {"rank": 16}},
                    "training": {
                        "maxSteps": options.steps, "batchSize": options.sequences, "microBatchSize": options.micro_batch,
                        "sequenceLength": options.length, "packing": options.objective == "sft", "learningRate": "1e-4", "precision": options.precision,
                        "optimizer": {"adamw": adamw or {}},
                    },
                    "output": {"uri": f"file://{work}/output"},
                    "resources": {"gpusPerNode": int(device.type == "cuda")},
                },
            }
        ),
        Defaults(trainer_image="bench"),
    )  # fmt: skip
    spec = job.spec
    assert isinstance(spec, ResolvedFineTune) and spec.checkpoints.storage
    ranks, clock = Ranks(device=device), Clock(options.warm, profiled)
    tokenizer = SimpleNamespace(
        pad_token_id=0, eos_token_id=1, decode=lambda tokens, skip_special_tokens: " ".join(map(str, tokens))
    )
    inputs = Inputs(model_digest="sha256:random", dataset_digest="sha256:random")
    rows = write_rows(work / "rows", options, int(shape["vocab_size"]))
    config = AutoConfig.from_pretrained(model)
    reading = setup.Reading(
        spec, model, None, config, tokenizer, None, rows, divide(spec, rows), inputs, {}, None, work
    )
    context = RunContext(
        ranks, work, 1, "bench", clock, threading.Event(), open_store(spec.checkpoints.storage), open_store(Location(uri=spec.output.uri))
    )  # fmt: skip
    checkpoints = Checkpoints(context.checkpoints, job, ranks, attempt=1, run_id="bench", keep=1, scratch=work)
    journal = Journal(work / "journal")
    loaded = setup.load(reading, ranks)
    state = train.resume(loaded, checkpoints, journal, ranks, inputs)
    if state.step == 0:
        loaded.objective.begin(loaded.model, loaded.rows, loaded.micro_batch or 1, ranks, context.asked_to_stop)
    train.train(loaded, state, checkpoints, journal, context, Story(clock, 1), inputs)
    lines = [json.loads(line) for line in journal.files()["metrics.jsonl"].splitlines()]
    shutil.rmtree(work)
    return lines, clock


def write_table(file: Path) -> None:
    """Measures every shape, with kernels that repeat themselves (as jobs run) and with any kernels."""
    rows = []
    last: dict[str, str] = {}
    for name, arguments in TABLE:
        found = []
        for extra in ([], ["--any-order"]):
            command = [sys.executable, __file__, "--steps", "12", "--warm", "4", *arguments, *extra]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            last = dict(re.findall(r"(\w+)=('[^']*'|\S+)", out.strip().splitlines()[-1]))
            found.append(last)
        exact, any_order = (float(each["tokens_per_second"]) for each in found)
        rows.append(
            f"| {name} | {exact:,.0f} | {found[0]['step_ms']} | {found[0]['peak_gib']} | {any_order:,.0f} | {exact / any_order:.2f} |"
        )
    head = "| work | tokens/s | ms a step | peak GiB | tokens/s, any order | ratio= |\n|---|---|---|---|---|---|\n"
    where = f"\nbf16 on {last['device']}, torch {last['torch']}; random weights, median of the timed steps. The first three columns are what jobs\n"
    where += "run: the same bits each time. Written by `bench/gpu_trainer.py --table`.\n"
    file.write_text(head + "\n".join(rows) + "\n" + where)


def arguments() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--method", choices=("lora", "qlora", "full"), default="lora")
    parser.add_argument(
        "--objective",
        choices=("sft", "dpo", "grpo"),
        default="sft",
        help="dpo: rows are pairs, and --sequences counts pairs; grpo: prompts, with eight answers to each",
    )
    parser.add_argument("--documents", choices=("lognormal", "fixed"), default="lognormal")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=4, help="sequences in one step")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences in one forward pass")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm", type=int, default=5, help="steps that are not timed")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--twice", action="store_true", help="run twice and compare the losses bit by bit")
    parser.add_argument(
        "--any-order", action="store_true", help="allow kernels that do not repeat themselves (jobs never do)"
    )
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="measure the shapes of TABLE, repeatable and not, into FILE"
    )
    parser.add_argument(
        "--profiled", type=int, default=None, help="steps to profile: 3, of grpo none, which a profile makes slow"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    return parser


def main() -> int:
    """Entry point."""
    options = arguments().parse_args()
    if options.table:
        write_table(options.table)
        return 0
    if options.tiny:
        options.shape, options.length, options.steps, options.warm = "tiny", 256, 10, 3
    device = torch.device("cpu") if options.tiny else torch.device("cuda", 0)
    if device.type == "cuda" and not options.any_order:
        make_repeatable()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        profiled = options.profiled if options.profiled is not None else 3 * (options.objective != "grpo")
        lines, clock = run(options, folder, device, profiled)
        for line in lines:
            assert math.isfinite(line["loss"]) and (line["loss"] > 0 or options.objective == "grpo"), line
            assert math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0, line
        if options.twice:
            again, _ = run(options, folder, device, profiled=0)
            equal = [
                a["loss_hex"] == b["loss_hex"] and a["grad_norm"] == b["grad_norm"]
                for a, b in zip(lines, again, strict=True)
            ]
            print(f"second run: {sum(equal)} of {len(equal)} steps equal to the last bit")
    sort_by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    if clock.profile:
        print(clock.profile.key_averages().table(sort_by=sort_by, row_limit=25, max_name_column_width=70))
    timed = sorted(clock.seconds[max(0, options.warm - 1) :])
    median = timed[len(timed) // 2]
    tokens = sum(line["tokens"] for line in lines) / len(lines)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(
        f"tokens_per_second={tokens / median:.0f} step_ms={median * 1000:.1f} tokens_per_step={tokens:.0f} peak_gib={peak:.2f} "
        f"first_loss={lines[0]['loss']:.4f} last_loss={lines[-1]['loss']:.4f} grad_norm={lines[-1]['grad_norm']:.4f} "
        f"shape={options.shape} objective={options.objective} method={options.method} documents={options.documents} precision={options.precision} "
        f"generated_tokens_per_second={clock.metrics.get('generated_tokens_per_second', 0):.0f} repeatable={not options.any_order} device={name!r} torch={torch.__version__}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
