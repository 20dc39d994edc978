"""Speed and memory of preparing a dataset, as a job does it before its first step: read, render, tokenise, mask, sign, select.

    PYTHONPATH=crds:trainer_image python bench/prepare.py                                   100,000 chats
    PYTHONPATH=crds:trainer_image python bench/prepare.py --rows 10000 --deduplicate near
    PYTHONPATH=crds:trainer_image python bench/prepare.py --table bench/prepare.md          a quarter, all, and all with near copies found, into a file

Each measurement is a process of its own. Memory is what the process grew by between the first row and the last (mapped files that the
system may drop at any time are not counted), so it shows what grows with the set.
"""

import argparse
import json
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finetune_crds.resolution import Defaults, resolve
from finetune_crds.resolved import ResolvedFineTune
from finetune_crds.v1alpha1 import FineTuneJob
from finetune_trainer.data.holdout import divide
from finetune_trainer.data.prepare import Dataset, prepare
from finetune_trainer.storage.sources import source_files

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
TABLE = (("25,000", []), ("100,000", []), ("100,000, near copies found", ["--deduplicate", "near"]))
"""What `--table` measures."""


def vocabulary(rng: random.Random) -> list[str]:
    """Words with the frequencies of a language."""
    return ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]


def tokenizer(words: list[str]) -> Any:
    """A byte-level BPE of 4,000 tokens, as large models have it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(words)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=special[0], eos_token=special[1], chat_template=CHATML
    )


def write_rows(path: Path, count: int, words: list[str], rng: random.Random) -> None:
    """Chats of one to three turns, about 250 words; one in a hundred is a near copy of the one before."""
    weights = [1 / (i + 3) for i in range(len(words))]
    pool = [" ".join(rng.choices(words, weights, k=20)) for _ in range(20_000)]
    with path.open("w") as file:
        messages: list[dict[str, str]] = []
        for i in range(count):
            if i % 100 != 99:
                sizes = [(rng.randint(1, 3), rng.randint(2, 8)) for _ in range(rng.randint(1, 3))]
                messages = [
                    {"role": role, "content": " ".join(rng.choices(pool, k=size))}
                    for pair in sizes
                    for role, size in zip(("user", "assistant"), pair, strict=True)
                ]
            copy = [{**messages[0], "content": f"{messages[0]['content']} please"}, *messages[1:]]
            file.write(json.dumps({"messages": copy if i % 100 == 99 else messages}) + "\n")


class Memory:
    """The process's own memory (RssAnon), sampled: now, and at its highest."""

    def __init__(self) -> None:
        self.before = self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> int:
        """Bytes that it grew by at most."""
        self._done.set()
        self._thread.join()
        return self.peak - self.before

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return 1024 * int(found[1])


def measure(count: int, deduplicate: str | None) -> dict[str, Any]:
    """One preparation."""
    rng = random.Random(0)
    words = vocabulary(rng)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "train.jsonl", count, words, rng)
        dataset = {"train": [{"uri": f"file://{folder}/train.jsonl"}], "deduplicate": deduplicate}
        manifest = {
            "metadata": {"name": "bench"},
            "spec": {
                "model": {"uri": "file:///model"}, "dataset": {k: v for k, v in dataset.items() if v},
                "output": {"uri": f"file://{folder}/output"}, "training": {"sequenceLength": 1024},
            },
        }  # fmt: skip
        spec = resolve(FineTuneJob.model_validate(manifest), Defaults(trainer_image="bench")).spec
        assert isinstance(spec, ResolvedFineTune)
        files = Dataset([source_files(source, folder / "in") for source in spec.dataset.train], [], [])
        chosen = tokenizer(words)
        chosen(["warm up"])
        memory, began, worked = Memory(), time.perf_counter(), time.process_time()
        rows = prepare(spec, files, chosen, folder / "prepared")
        prepared, work = time.perf_counter(), time.process_time() - worked
        division = divide(spec, rows)
        selected = time.perf_counter()
        return {
            "rows": count,
            "rows_per_second": round(count / (prepared - began)),
            "tokens_per_second": round(int(rows.offsets[-1]) / (prepared - began)),
            "cpu_milliseconds_per_row": round(1000 * work / count, 2),
            "select_seconds": round(selected - prepared, 2),
            "grown_mib": round(memory.stop() / 2**20),
            "set_mib": round(sum(file.stat().st_size for file in (folder / "prepared").rglob("*.*")) / 2**20),
            "near_or_equal": len(division.selection.duplicates) + len(division.selection.leaked),
        }


def write_table(file: Path) -> None:
    """Measures each line of TABLE."""
    lines = ["| rows | rows/s | tokens/s | CPU, ms a row | selecting, s | prepared set, MiB | memory grown, MiB | duplicates found |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, extra in TABLE:
        count = name.split(",")[0] + "000"
        command = [sys.executable, __file__, "--rows", count, *extra]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        lines.append(
            f"| {name} | {found['rows_per_second']:,} | {found['tokens_per_second']:,} | {found['cpu_milliseconds_per_row']} | {found['select_seconds']} | {found['set_mib']} | {found['grown_mib']} | {found['near_or_equal']:,} |"
        )
    file.write_text(
        "\n".join(lines)
        + f"\n\nChats of about 250 words; {platform.machine()}, as many cores as the tokenizer's threads found. One row in a hundred is a near copy of another.\nRows/s swing with what else the machine does, CPU less, memory not.\n"
        "Written by `bench/prepare.py --table`.\n"
    )


def main() -> int:
    """Entry point."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--deduplicate", choices=["exact", "near"])
    options.add_argument("--table", type=Path)
    given = options.parse_args()
    if given.table:
        write_table(given.table)
    else:
        print(json.dumps(measure(given.rows, given.deduplicate)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
