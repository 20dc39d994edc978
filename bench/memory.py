"""The estimate of a preflight beside what a GPU needed: the shapes of bench/gpu_trainer.py and bench/gpu_methods.py, counted on a CPU.

    PYTHONPATH=crds:trainer_image:tests python bench/memory.py          the table in docs/performance.md; about two minutes, and no disk to speak of

Models are the header of a safetensors file and a hole: a preflight reads no more of it. The measured peaks are those of docs/performance.md.
"""

import tempfile
from pathlib import Path
from typing import Any

from training.test_preflight import FIXED, LORA, counted

CASES: list[tuple[str, str, dict[str, Any], list[int], int, float]] = [
    ("1B lora", "1b", LORA, FIXED, 4, 29.65),
    ("1B lora, one sequence a forward pass", "1b", LORA, FIXED, 1, 9.98),
    ("8B lora, 7,889 tokens", "8b", LORA, [3944] * 2, 2, 64.81),
    ("1B full", "1b", {"full": {}}, FIXED, 4, 51.58),
    ("1B freeze, last 2 blocks", "1b", {"freeze": {"trainLastBlocks": 2}}, FIXED, 4, 8.69),
    ("1B lora, DoRA", "1b", {"lora": {"useDora": True}}, FIXED, 4, 52.65),
    ("1B qlora, 4 bits", "1b", {"qlora": {}}, FIXED, 4, 28.30),
    ("1B qlora, 8 bits", "1b", {"qlora": {"bits": 8}}, FIXED, 4, 39.68),
    ("1B adapter", "1b", {"adapter": {}}, FIXED, 4, 23.48),
    ("1B prefix", "1b", {"prefix": {}}, FIXED, 4, 24.75),
    ("1B prompt", "1b", {"prompt": {}}, FIXED, 4, 24.76),
    ("1B pTuning", "1b", {"pTuning": {}}, FIXED, 4, 24.97),
    ("1B ia3", "1b", {"ia3": {}}, FIXED, 4, 27.91),
]


def main() -> None:
    """Prints the table."""
    print("| work | estimate, GiB | measured, GiB | difference |\n|---|---|---|---|")
    for name, shape, method, lengths, micro, measured in CASES:
        with tempfile.TemporaryDirectory() as folder:
            estimate = counted(Path(folder), shape, method, lengths, micro)
        print(f"| {name} | {estimate:.2f} | {measured:.2f} | {100 * (estimate / measured - 1):+.0f} % |", flush=True)


if __name__ == "__main__":
    main()
