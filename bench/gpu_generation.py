"""Answers of objective.grpo on one GPU: the captured step writes what the uncaptured one writes, twice, of every family and kind of method.

    PYTHONPATH=crds:trainer_image:tests python bench/gpu_generation.py                 all of it, on tiny models
    PYTHONPATH=crds:trainer_image:tests python bench/gpu_generation.py llama           of these families
    PYTHONPATH=crds:trainer_image:tests python bench/gpu_generation.py --cpu           is the script whole?
    PYTHONPATH=crds:trainer_image:tests python bench/gpu_generation.py --profile 1b    where the time goes, for a shape of gpu_trainer.py

Fails if tokens differ. Prints for each case whether the step was captured. How fast it is, `gpu_trainer.py --objective grpo` says.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from gpu_trainer import SHAPES
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_crds import support
from finetune_trainer import setup
from finetune_trainer.modelling import attention, generation
from finetune_trainer.modelling.models import Model
from finetune_trainer.objectives.grpo import answer_keys
from finetune_trainer.ranks import Ranks, make_repeatable
from training import tiny

FAMILIES = [name for name, family in support.FAMILIES.items() if "text-generation" in family.tasks]
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "gemma3_text": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1},
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"full": {}},
    "lora": {"lora": {"rank": 8}},
    "lora, DoRA": {"lora": {"rank": 8, "useDora": True}},
    "lora, added tokens": {"lora": {"rank": 8}},
    "lora, experts": {"lora": {"rank": 8, "experts": True}},
    "qlora, 4 bits": {"qlora": {"rank": 8}},
    "qlora, 8 bits": {"qlora": {"rank": 8, "bits": 8}},
    "adapter": {"adapter": {}},
    "ia3": {"ia3": {}},
}
MOST = 90
"""Tokens of an answer, through two sizes of the cache that attention looks at."""


def cases(pattern: str) -> list[tuple[str, str, str]]:
    """Family, method and precision: every family with LoRA, Llama and a mixture with every method that they have."""
    found = [(family, "lora", "bf16") for family in FAMILIES]
    found += [("llama", method, "bf16") for method in METHODS if method not in ("lora", "lora, experts")]
    found += [("qwen3_moe", method, "bf16") for method in ("full", "lora, experts", "adapter")]
    found += [("llama", "lora", "fp32"), ("gpt2", "lora", "fp32"), ("mixtral", "lora", "fp32")]
    return [case for case in found if re.search(pattern, case[0])]


def loaded(folder: Path, family: str, method: str, precision: str, device: torch.device) -> Any:
    """A job's model; adapters are moved from where they begin, as nothing."""
    model = tiny.make_model(folder / "model", family, **WINDOWS.get(family, {}))
    job = tiny.job(
        folder, model, tiny.write_rows(folder / "rows.jsonl", tiny.chat_rows(8)), method=METHODS[method],
        model={"addTokens": {"tokens": ["<red>", "stone"]}} if "added" in method else {},
        training={"precision": precision}, objective={"grpo": {"rewards": [{"name": "r", "regex": {"pattern": "a"}}]}},
    )  # fmt: skip
    context = tiny.context(job, folder / "scratch", ranks=Ranks(device=device))
    made = setup.load(setup.read(job.spec, context), context.ranks)
    made.masters.begin(0)
    torch.manual_seed(1)
    made.masters.weights.add_(0.02 * torch.randn_like(made.masters.weights))
    made.masters.refresh()
    return made


@contextmanager
def uncaptured() -> Any:
    """Steps as they are without a graph."""
    repeated = generation.Repeated
    generation.Repeated = lambda work, device: work  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        generation.Repeated = repeated  # type: ignore[misc]


@contextmanager
def counted() -> Any:
    """Counts graphs."""
    graphs: list[Any] = []
    made = torch.cuda.CUDAGraph

    class Counted(made):  # type: ignore[misc, valid-type]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            graphs.append(None)
            return super().__new__(cls, *args, **kwargs)

    torch.cuda.CUDAGraph = Counted  # type: ignore[misc]
    try:
        yield graphs
    finally:
        torch.cuda.CUDAGraph = made  # type: ignore[misc]


def check(folder: Path, case: tuple[str, str, str], device: torch.device) -> str:
    """A row."""
    made = loaded(folder, *case, device)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 259, size).astype(np.int64) for size in (5, 40, 17, 23)]
    keys = answer_keys(1, 0, np.arange(4), 8)

    def write() -> list[list[int]]:
        found = generation.write(made.model, prompts, keys, MOST, [2], 1.0, device)
        return [one.tokens.tolist() for group in found for one in group]

    with counted() as graphs:
        first = write()
    again = write()
    with uncaptured():
        plain = write()
    assert len({tuple(one) for one in first}) > 16
    assert first == again, f"{case}: does not repeat itself"
    assert first == plain, f"{case}: captured differs from uncaptured"
    return f"| {' | '.join(case)} | {f'yes, {len(graphs)} graphs' if graphs else 'no'} | equal |"


def llama(shape: str, device: torch.device) -> Model:
    """LoRA r=16 on random weights, without a job around it."""
    attention.register()
    torch.manual_seed(0)
    with device:
        config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, eos_token_id=1, pad_token_id=0)
        inner = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME)
    outer = peft.get_peft_model(inner, peft.LoraConfig(r=16, target_modules="all-linear"), autocast_adapter_dtype=False)
    return Model(outer, inner, torch.bfloat16)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def profile(shape: str, most: int, device: torch.device) -> None:
    """32 answers, four prompts of 128 tokens: seconds by tokens, captured and not, and kernels by time."""
    model = llama(shape, device)
    vocabulary = int(SHAPES[shape]["vocab_size"])
    prompts = [np.random.default_rng(i).integers(2, vocabulary, 128).astype(np.int64) for i in range(4)]
    keys = answer_keys(1, 0, np.arange(4), 8)

    def write(tokens: int) -> Callable[[], Any]:
        return lambda: generation.write(model, prompts, keys, tokens, [], 1.0, device)

    write(4)()
    for tokens in (2, 3, 4, most // 2, most):
        print(f"{tokens} tokens: {1000 * timed(write(tokens), device):.0f} ms", flush=True)
    with uncaptured():
        print(f"{most // 4} tokens uncaptured: {1000 * timed(write(most // 4), device):.0f} ms", flush=True)
    activities = (
        [torch.profiler.ProfilerActivity.CPU] if device.type == "cpu" else [torch.profiler.ProfilerActivity.CUDA]
    )
    with torch.profiler.profile(activities=activities) as profiled:
        write(32)()
    by = "self_cpu_time_total" if device.type == "cpu" else "self_cuda_time_total"
    print(profiled.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=90))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="?", default=".")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--profile", choices=SHAPES)
    parser.add_argument("--most", type=int, default=256)
    options = parser.parse_args()
    device = torch.device("cpu") if options.cpu else torch.device("cuda", 0)
    if not options.cpu:
        make_repeatable()
    if options.profile:
        profile(options.profile, options.most, device)
        return 0
    print("| family | method | precision | captured | tokens |\n|---|---|---|---|---|")
    bad = 0
    for case in cases(options.families):
        if options.cpu and "8 bits" in case[1]:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            try:
                print(check(Path(scratch), case, device), flush=True)
            except (AssertionError, RuntimeError, TypeError) as error:
                bad += 1
                print(f"| {' | '.join(case)} | failed: {str(error)[:300]} |", flush=True)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
