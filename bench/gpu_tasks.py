"""Tasks, objectives and methods on one GPU, each as a whole job: does it learn, does it repeat itself, how fast is it, what does it take, and what did the preflight say?

    PYTHONPATH=crds:trainer_image:tests python bench/gpu_tasks.py --table bench/gpu_tasks.md     all of it, into a file (never yet in one run: about a quarter of an hour)
    PYTHONPATH=crds:trainer_image:tests python bench/gpu_tasks.py --only 'bert|t5'               works of these names
    PYTHONPATH=crds:trainer_image:tests python bench/gpu_tasks.py --cpu                          tiny shapes on a CPU: is the script whole?

Models have random weights, tokens are bytes. Each job is trained twice in one process. Its estimate is what a preflight of the same files says,
in processes that see no GPU, meanwhile. A job that would publish gigabytes ends behind its last step.
"""

import argparse
import gc
import itertools
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import tables
import torch
import transformers
from gpu_trainer import SHAPES

from finetune_crds import support
from finetune_crds.progress import RunReport
from finetune_crds.resolved import ResolvedJob
from finetune_trainer import preflight, train
from finetune_trainer.errors import Stopped
from finetune_trainer.ranks import Ranks, make_repeatable
from finetune_trainer.reporting.story import Story
from training import pictures, tiny

Rows = list[dict[str, Any]]

STEPS, WARM = 8, 3
LLAMA = {
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_theta": 500_000.0,
}
T5 = {
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_layers": 12,
    "num_heads": 12,
    "vocab_size": 32_128,
    "decoder_start_token_id": 0,
}
MODELS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "llama": ("AutoModelForCausalLM", torch.bfloat16, SHAPES["1b"] | LLAMA),
    "llama 8B": ("AutoModelForCausalLM", torch.bfloat16, SHAPES["8b"] | LLAMA),
    "gpt2": ("AutoModelForCausalLM", torch.float32, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "bert": ("AutoModel", torch.float32, {}),
    "t5": ("AutoModelForSeq2SeqLM", torch.float32, T5),
    **{family: ("AutoModel", torch.float32, {}) for family in pictures.SHAPES},
    "perceiver": ("AutoModelForImageClassification", torch.float32, {
        "num_latents": 512, "d_latents": 1024, "num_blocks": 8, "num_self_attends_per_block": 6, "num_cross_attention_heads": 1, "image_size": 224,
        "architectures": ["PerceiverForImageClassificationLearned"],
    }),
    "timm_wrapper": ("AutoModel", torch.float32, {"architecture": "vit_base_patch16_224", "pretrained_cfg": {"input_size": [3, 224, 224]}}),
}  # fmt: skip
"""Class, type and shape of each family, or of another size of it; empty: transformers' own, which are GPT-2, BERT-base, ViT-base, ResNet-50 and their like."""


class Work(NamedTuple):
    """A row of the table."""

    model: str
    rows: str
    method: dict[str, Any]
    training: dict[str, Any]
    spec: dict[str, Any] = {}
    publishes: bool = True
    evaluates: bool = False
    gpus: int = 1
    """That it takes at least."""


PACKED = {"batchSize": 4, "microBatchSize": 4, "sequenceLength": 4096, "learningRate": "1e-3"}
PRETRAIN = {"objective": {"pretrain": {}}}
PAIRS = {"batchSize": 4, "microBatchSize": 2, "sequenceLength": 4096, "learningRate": "1e-3"}
CLASSES = {"batchSize": 32, "microBatchSize": 32, "sequenceLength": 512}
PROMPTS = {"batchSize": 4, "microBatchSize": 4, "sequenceLength": 512, "learningRate": "1e-3"}
GRPO = {
    "grpo": {
        "rewards": [{"name": "even", "regex": {"pattern": "[02468]$"}}],
        "generations": 8,
        "maxCompletionLength": 256,
    }
}
SUMMARY = {"batchSize": 16, "microBatchSize": 16, "sequenceLength": 640}
IMAGES = {"batchSize": 64, "microBatchSize": 64, "learningRate": "1e-4"}
LORA: dict[str, Any] = {"lora": {}}
FULL: dict[str, Any] = {"full": {}}


def _llama(method: dict[str, Any], publishes: bool = True, **training: Any) -> Work:
    return Work("llama", "texts", method, PACKED | training, PRETRAIN, publishes)


_SAVING = {"gradientCheckpointing": True}
_DEFAULT = {"batchSize": 16, "learningRate": "1e-3"}
"""All that has to do with sizes as it is when nobody says; batchSize, too."""

WORKS = {
    "llama 1B lora": _llama(LORA),
    "llama 1B lora, one sequence a forward pass": _llama(LORA, microBatchSize=1),
    "llama 1B lora, default sizes": Work("llama", "texts", LORA, _DEFAULT, PRETRAIN),
    "llama 1B lora, default sizes, one sequence a forward pass": Work("llama", "texts", LORA, _DEFAULT | {"microBatchSize": 1}, PRETRAIN),
    "llama 1B dpo, lora, default sizes": Work("llama", "pairs", LORA, _DEFAULT, {"objective": {"dpo": {}}}),
    "llama 1B dpo, lora, default sizes, four pairs a forward pass": Work("llama", "pairs", LORA, _DEFAULT | {"microBatchSize": 4}, {"objective": {"dpo": {}}}),
    "llama 1B full": _llama(FULL, publishes=False, learningRate="1e-4"),
    "llama 1B full, 8-bit moments": _llama(FULL, publishes=False, learningRate="1e-4", optimizer={"adamw": {"bits": 8}}),
    "llama 1B lora, gradient checkpointing": _llama(LORA, **_SAVING),
    "llama 1B full, gradient checkpointing": _llama(FULL, publishes=False, learningRate="1e-4", **_SAVING),
    "llama 8B full, gradient checkpointing": Work(
        "llama 8B", "texts", FULL, PACKED | _SAVING | {"batchSize": 2, "microBatchSize": 1, "learningRate": "1e-5"}, PRETRAIN,
        publishes=False, gpus=2,
    ),
    "llama 1B freeze, last 2 blocks": _llama({"freeze": {"trainLastBlocks": 2}}, publishes=False),
    "llama 1B lora, DoRA": _llama({"lora": {"useDora": True}}),
    "llama 1B qlora, 4 bits": _llama({"qlora": {}}),
    "llama 1B qlora, 8 bits": _llama({"qlora": {"bits": 8}}),
    "llama 1B adapter": _llama({"adapter": {}}),
    "llama 1B prefix": _llama({"prefix": {}}),
    "llama 1B prompt": _llama({"prompt": {}}),
    "llama 1B pTuning": _llama({"pTuning": {}}),
    "llama 1B ia3": _llama({"ia3": {}}),
    "llama 1B dpo, lora": Work("llama", "pairs", LORA, PAIRS, {"objective": {"dpo": {}}}),
    "llama 1B orpo, lora": Work("llama", "pairs", LORA, PAIRS, {"objective": {"orpo": {}}}),
    "llama 1B reward, lora": Work("llama", "pairs", LORA, PAIRS, {"objective": {"reward": {}}}),
    "llama 1B lora, dropout of attention": _llama(LORA, dropout="0.1"),
    "llama 1B grpo, lora": Work("llama", "prompts", LORA, PROMPTS, {"objective": GRPO}),
    "llama 1B grpo, full": Work("llama", "prompts", FULL, PROMPTS | {"learningRate": "1e-6"}, {"objective": GRPO}, publishes=False),
    "llama 1B grpo, lora, one prompt a forward pass": Work("llama", "prompts", LORA, PROMPTS | {"microBatchSize": 1}, {"objective": GRPO}),
    "llama 1B kto, lora": Work("llama", "thumbs", LORA, PAIRS | {"batchSize": 8, "microBatchSize": 4}, {"objective": {"kto": {}}}),
    "gpt2 pretrain, full, with its dropout": Work("gpt2", "texts", FULL, PACKED | {"sequenceLength": 1024, "batchSize": 16, "microBatchSize": 16, "learningRate": "1e-4"}, PRETRAIN),
    "bert-base text-classification, full": Work("bert", "labels", FULL, CLASSES | {"learningRate": "1e-4"}, {"task": "text-classification"}),
    "bert-base text-classification, lora": Work("bert", "labels", LORA, CLASSES | {"learningRate": "1e-3"}, {"task": "text-classification"}),
    "bert-base token-classification, full": Work("bert", "tags", FULL, CLASSES | {"learningRate": "1e-4"}, {"task": "token-classification"}),
    "t5-base summarization, full": Work("t5", "summaries", FULL, SUMMARY | {"learningRate": "1e-4"}, {"task": "summarization"}),
    "t5-base summarization, lora": Work("t5", "summaries", LORA, SUMMARY | {"learningRate": "1e-3"}, {"task": "summarization"}, evaluates=True),
    **{f"{family} image-classification, {method}": Work(family, "images", {method: {}}, IMAGES, {"task": "image-classification"})
       for family in pictures.SHAPES for method in ("full", "lora") if method in support.FAMILIES[family].methods},
}  # fmt: skip

HEAD = (
    "| work | tokens or images a second | ms a step | peak GiB | reserved GiB | preflight's estimate | difference | evaluation GiB | repeats itself | loss |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


# Models and rows


def make_model(folder: Path, family: str, small: bool) -> Path:
    """A model of its shape with what reads its input, unless it is there; a small one is that of the tests."""
    if folder.exists():
        return folder
    kind, dtype, shape = MODELS[family]
    family = family.partition(" ")[0]
    (pictures if family in pictures.SHAPES else tiny).make_model(folder, family)
    if small:
        return folder
    config = transformers.AutoConfig.for_model(family, **shape)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        getattr(transformers, kind).from_config(config, dtype=dtype).save_pretrained(folder)
    if family in pictures.SHAPES:
        pictures.image_processor(family, 32 if family == "imagegpt" else 224).save_pretrained(folder)
    return folder


def _words(rng: random.Random, median: int, least: int, most: int, words: list[str] = tiny.WORDS) -> str:
    """Text of a log-normal number of bytes."""
    length = min(max(int(rng.lognormvariate(0, 1) * median), least), most)
    return " ".join(rng.choices(words, k=length // 4 + 1))[:length]


def texts(rng: random.Random, small: bool) -> Iterator[dict[str, Any]]:
    while True:
        yield {"text": _words(rng, *((20, 8, 200) if small else (400, 16, 4000)))}


def pairs(rng: random.Random, small: bool) -> Iterator[dict[str, Any]]:
    """The better answer has other words."""
    bounds = (10, 8, 60) if small else (300, 16, 2500)
    while True:
        prompt = _words(rng, *(bounds if small else (100, 16, 1400)))
        good, bad = (_words(rng, *bounds, words) for words in (tiny.WORDS[:6], tiny.WORDS[6:]))
        yield {"prompt": prompt, "chosen": good, "rejected": bad}


def thumbs(rng: random.Random, small: bool) -> Iterator[dict[str, Any]]:
    for pair in pairs(rng, small):
        good = rng.random() < 0.5
        yield {"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good}


def prompts(rng: random.Random, small: bool) -> Iterator[dict[str, Any]]:
    """Of 128 tokens with their template."""
    while True:
        yield {"prompt": _words(rng, 60, 8, 60) if small else _words(rng, 500, 88, 88)}


def labels(rng: random.Random, small: bool) -> Iterator[dict[str, Any]]:
    while True:
        warm = rng.random() < 0.5
        text = _words(rng, *((20, 8, 100) if small else (200, 16, 500)), tiny.WORDS[:6] if warm else tiny.WORDS[6:])
        yield {"text": text, "label": "warm" if warm else "cold"}


def tags(rng: random.Random, small: bool) -> Iterator[dict[str, Any]]:
    while True:
        words = _words(rng, *((20, 8, 100) if small else (200, 16, 500))).split()
        yield {"tokens": words, "ner_tags": [tiny.TAGS.get(word, "O") for word in words]}


def summaries(rng: random.Random, small: bool) -> Iterator[dict[str, Any]]:
    while True:
        source = _words(rng, *((20, 8, 100) if small else (300, 32, 500)))
        yield {"source": source, "target": source[: 20 if small else 120].upper()}


TEXTS: dict[str, Callable[[random.Random, bool], Iterator[dict[str, Any]]]] = {
    each.__name__: each for each in (texts, pairs, thumbs, prompts, labels, tags, summaries)
}


def write_rows(folder: Path, kind: str, small: bool) -> Path:
    """Enough for all steps, and as many more as packing leaves."""
    if kind == "images":
        if (folder / "images").exists():
            return folder / "images"
        return pictures.write_folder(folder / "images", each=20 if small else 60)
    rng = random.Random(0)
    wanted = 400 if small or kind != "texts" else 1200
    made = TEXTS[kind](rng, small)
    return tiny.write_rows(folder / f"{kind}.jsonl", [next(made) for _ in range(wanted)])


def make_job(folder: Path, shared: Path, work: Work, small: bool) -> ResolvedJob:
    """The job of a work, of models and rows that are there already."""
    data = shared / ("images" if work.rows == "images" else f"{work.rows}.jsonl")
    source = [{"uri": f"file://{data}"}]
    training = work.training | {"maxSteps": STEPS, "precision": "bf16", "warmupSteps": 0}
    if small and "sequenceLength" in training:
        training |= {
            "sequenceLength": 400 if work.rows == "prompts" else 250,
            "batchSize": 4,
            "microBatchSize": min(4, training.get("microBatchSize", 1)),
        }
    spec = dict(work.spec)
    if work.evaluates:
        made = TEXTS[work.rows](random.Random(1), small)
        held_out = tiny.write_rows(folder / "held-out.jsonl", [next(made) for _ in range(16)])
        spec["dataset"] = {"evaluation": {"sources": [{"uri": f"file://{held_out}"}]}}
        spec["evaluation"] = {"everySteps": STEPS // 2, "maxNewTokens": 32, "generate": "everyEvaluation"}
    return tiny.job(
        folder, shared / work.model, source, method=work.method, training=training, resources={"gpusPerNode": 1}, **spec
    )


# Measuring


@dataclass
class Meter(tiny.Recorder):
    """A reporter that notes time and memory by stage."""

    steps: int | None = None
    """Ends the run behind so many."""
    peaks: dict[str, tuple[float, float]] = field(default_factory=dict)
    """GiB that were allocated and reserved, by stage."""
    seconds: list[float] = field(default_factory=list)
    """Of each step but the first, without what lies between steps."""
    _stage: str = "Preparing"
    _step: int = 0
    _at: float = 0.0

    def update(self, report: RunReport, metrics: dict[str, float]) -> None:
        """Called on each change; a new step ends with the losses on the host, so the device is done with it."""
        super().update(report, metrics)
        now = time.perf_counter()
        self.note(self._stage)
        if report.step > self._step:
            if self._step and self._stage == report.stage == "Training" and self._at:
                self.seconds.append(now - self._at)
            self._step = report.step
        self._stage, self._at = report.stage, time.perf_counter()
        if self.steps is not None and report.step >= self.steps:
            raise Stopped("all steps are done")

    def note(self, stage: str) -> None:
        """The peak since the last call belongs to this stage."""
        if not torch.cuda.is_available():
            return
        found = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        self.peaks[stage] = max(self.peaks.get(stage, (0.0, 0.0)), found)
        torch.cuda.reset_peak_memory_stats()

    def losses(self) -> list[tuple[float, float]]:
        """Loss and norm of the gradient of each step."""
        by_step = {report.step: metrics for report, metrics in self.reports if "loss" in metrics}
        return [(by_step[step]["loss"], by_step[step]["grad_norm"]) for step in sorted(by_step)]


def trained(job: ResolvedJob, folder: Path, device: torch.device, meter: Meter) -> Meter:
    """Runs a job."""
    verdict = train.run(job, tiny.context(job, folder / "scratch", ranks=Ranks(device=device), reporter=meter))
    if verdict.code and meter.steps is None:
        raise RuntimeError(f"{verdict.message} {verdict.evidence}")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if len(meter.losses()) != STEPS:
        raise RuntimeError(f"only {len(meter.losses())} steps: {verdict.message}")
    return meter


def measured(name: str, shared: Path, device: torch.device, small: bool, told: Callable[[], str]) -> str:
    """A row of the table; `told` says the preflight's estimate."""
    work = WORKS[name]
    meters = []
    for _ in range(2):
        with tempfile.TemporaryDirectory(dir=shared) as folder:
            job = make_job(Path(folder), shared, work, small)
            meters.append(trained(job, Path(folder), device, Meter(steps=None if work.publishes else STEPS)))
    first, second = meters
    equal = sum(a == b for a, b in zip(first.losses(), second.losses(), strict=True))
    losses = [loss for loss, _ in first.losses()]
    last = statistics.mean(losses[-2:])
    seconds = statistics.median(second.seconds[-STEPS + WARM :])
    rates = [report.tokens_per_second for report, _ in second.reports if report.tokens_per_second]
    each_second = work.training["batchSize"] / seconds
    speed = f"{rates[-1]:,} tokens" if rates else f"{each_second:,.0f} images"
    if "grpo" in work.spec.get("objective", {}):
        speed = f"{each_second * GRPO['grpo']['generations']:.1f} answers"
    peak, reserved = first.peaks.get("Training", (0.0, 0.0))
    learned = "" if last < losses[0] or "grpo" in name else ", **not lower**"
    evaluation = first.peaks.get("Evaluating", (0.0, 0.0))[0] if work.evaluates else 0.0
    estimate = told() if "microBatchSize" in work.training else ""  # which is of what fits at least
    found = float(estimate) if re.fullmatch(r"[\d.]+", estimate) else None
    difference = f"{100 * (found / peak - 1):+.1f} %" if found and peak else ""
    return (
        f"| {name} | {speed} | {1000 * seconds:.0f} | {peak:.2f} | {reserved:.2f} | {estimate} | {difference} "
        f"| {f'{evaluation:.2f}' if evaluation else ''} | {'yes' if equal == STEPS else f'no ({equal} of {STEPS} steps)'} "
        f"| {losses[0]:.4f} to {last:.4f}{learned} |"
    )


def profiled(name: str, shared: Path, device: torch.device, small: bool) -> None:
    """Prints what takes the time of a work's last steps."""
    activities = [torch.profiler.ProfilerActivity.CPU, *([] if small else [torch.profiler.ProfilerActivity.CUDA])]

    @dataclass
    class Watched(Meter):
        profile: Any = None

        def update(self, report: RunReport, metrics: dict[str, float]) -> None:
            if report.step == STEPS - 2 and self.profile is None:
                self.profile = torch.profiler.profile(activities=activities)
                self.profile.start()
            super().update(report, metrics)

    work = WORKS[name]
    make_model(shared / work.model, work.model, small)
    write_rows(shared, work.rows, small)
    for meter in (Meter(steps=STEPS), Watched(steps=STEPS)):
        with tempfile.TemporaryDirectory(dir=shared) as folder:
            trained(make_job(Path(folder), shared, work, small), Path(folder), device, meter)
        print(f"{name}: {1000 * statistics.median(meter.seconds[-STEPS + WARM :]):.0f} ms a step")
    meter.profile.stop()
    for by in ("self_cpu_time_total", *([] if small else ["self_cuda_time_total"])):
        print(meter.profile.key_averages().table(sort_by=by, row_limit=14, max_name_column_width=60))


def estimated(name: str, shared: Path, small: bool) -> str:
    """What a preflight says of a work, GiB."""
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        job = make_job(Path(folder), shared, WORKS[name], small)
        context = tiny.context(job, Path(folder) / "scratch")
        memory = preflight.check(job, context, Story(context.reporter, 1)).memory
    return f"{int(memory.total.removesuffix('Mi')) / 1024:.2f}" if memory else "none"


def told_by_a_process(name: str, shared: Path, small: bool) -> str:
    """The same, of a process that sees no GPU."""
    command = [sys.executable, __file__, "--estimate", name, "--scratch", str(shared), *(["--cpu"] if small else [])]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr, flush=True)
        return "failed"
    return done.stdout.strip().splitlines()[-1]


def rows(pattern: str, shared: Path, device: torch.device, small: bool) -> Iterator[str]:
    """Rows of the table. A work that fails is a row too."""
    names = [name for name, work in WORKS.items() if re.search(pattern, name) and work.gpus == 1]
    for family in {WORKS[name].model for name in names}:
        make_model(shared / family, family, small)
    for kind in {WORKS[name].rows for name in names}:
        write_rows(shared, kind, small)
    with ThreadPoolExecutor(1 if small else 4) as pool:
        estimates = {name: pool.submit(told_by_a_process, name, shared, small) for name in names}
        for name in names:
            try:
                yield measured(name, shared, device, small, estimates[name].result)
            except Exception as error:
                traceback.print_exc()
                yield f"| {name} | failed: {type(error).__name__}: {str(error)[:160].replace('|', '/')} | | | | | | | | |"
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", default="", help="only works of these names")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--profile", action="store_true", help="no table: what takes the time of these works")
    parser.add_argument("--scratch", type=Path, help="keep models and rows there, for another time")
    parser.add_argument("--estimate", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if options.estimate:
        print(estimated(options.estimate, options.scratch, options.cpu))
        return 0
    device = torch.device("cpu") if options.cpu else torch.device("cuda", 0)
    if not options.cpu:
        make_repeatable()
        torch.cuda.set_device(device)
    if options.profile:
        with tempfile.TemporaryDirectory() as temporary:
            for name in (name for name in WORKS if re.search(options.only, name)):
                profiled(name, options.scratch or Path(temporary), device, options.cpu)
        return 0
    card = "cpu" if options.cpu else torch.cuda.get_device_name()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    head = [f"Written by `bench/gpu_tasks.py` on {card}; {libraries}.", "", *HEAD.splitlines()]
    with tempfile.TemporaryDirectory() as temporary:
        found = rows(options.only, options.scratch or Path(temporary), device, options.cpu)
        tables.tell(itertools.chain(head, found), options.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
