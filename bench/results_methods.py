"""Every method of `spec.method` on one task, an e-mail's header into JSON: tasks for bench/results.py."""

import json
from functools import cache
from typing import Any

from real_data import header_rows
from result_jobs import Chat, Found, Lab, Task, Work, rows, sources

from cluster.model import SMOLLM2, model_path

HELD_OUT, ANSWER = 200, 64
"""Rows, and the tokens of the longest answer."""
RATES = {
    "full": "2e-5",
    "lora": "2e-4",
    "adapter": "1e-4",
    "prefix": "1e-2",
    "prompt": "3e-2",
    "pTuning": "1e-3",
    "ia3": "3e-3",
}
"""The defaults of docs/methods.md, which a job that names none gets: other rates are multiples of these."""


def methods(lab: Lab) -> dict[str, Task]:
    """Tasks in the order of their worth: prompting and each method as it comes, then other rates and seeds."""
    listed = header_rows()
    if lab.small:
        listed = listed[:20]
    held = lab.size(HELD_OUT, 8)
    test, train = listed[:held], listed[held:]
    answered = [row for row in test if _length(row["completion"]) < ANSWER]
    folder = lab.folder / "sft"
    tested, trained = rows(folder / "test.jsonl", test), rows(folder / "train.jsonl", train)

    def prompted() -> Found:
        asked = [[_turns(row)[0]] for row in answered]
        shots = {
            f"{count} examples": [message for row in train[:count] for message in _turns(row)] for count in (0, 2, 8)
        }
        chats = {name: [before + one for one in asked] for name, before in shots.items()}
        said = lab.answers("sft-prompted", None, chats, ANSWER)
        return {name: _scored(texts, answered) for name, texts in said.items()}

    def tuned(method: dict[str, Any], **training: Any) -> Work:
        def task() -> Found:
            name = "-".join(["sft", *_words(method), *map(str, training.values())])
            found = lab.run(
                name, trained, method=method, keep=True,
                dataset={"evaluation": {"sources": sources(tested)}},
                evaluation={"fewShot": {"examples": 0, "rows": 0}},
                training={"batchSize": 4, "microBatchSize": 4, "sequenceLength": 512, **training},
            )  # fmt: skip
            output = lab.folder / name / "output"
            size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
            said = lab.answers(name, output, {"test": [[_turns(row)[0]] for row in answered]}, ANSWER)["test"]
            return found | _scored(said, answered) | {"method": method, "training": training, "output_bytes": size}

        return task

    variants: dict[str, dict[str, Any]] = {
        "lora": {"lora": {}},
        "full": {"full": {}},
        "qlora": {"qlora": {}},
        "lora, DoRA": {"lora": {"useDora": True}},
        "freeze, last 4 blocks": {"freeze": {"trainLastBlocks": 4}},
        "gradualUnfreezing": {"gradualUnfreezing": {"everyEpochs": "0.5", "blocksPerStage": 8}},
        "adapter": {"adapter": {}},
        "prefix": {"prefix": {}},
        "prompt": {"prompt": {}},
        "pTuning": {"pTuning": {}},
        "ia3": {"ia3": {}},
        "lora, PiSSA": {"lora": {"initialization": "pissa"}},
        "prefix, initialText": {"prefix": {"initialText": "Answer with one line of JSON."}},
        "qlora, 8 bits": {"qlora": {"bits": 8}},
    }
    if lab.small:
        variants["gradualUnfreezing"]["gradualUnfreezing"] = {"everySteps": 1, "blocksPerStage": 30}
    first = list(variants).index("lora, PiSSA")
    tasks = {"sft/prompted": Task(1, prompted)}
    tasks |= {
        f"sft/{name}": Task(1 if i < first else 2, tuned(method)) for i, (name, method) in enumerate(variants.items())
    }
    for factor in (3, 1 / 3, 10):
        for method in ("lora", "full", "adapter", "prompt", "pTuning", "ia3", "prefix"):
            if factor < 10 or method in ("full", "adapter", "lora"):
                rate = f"{float(RATES[method]) * factor:.1e}"
                tasks[f"sft/{method} at {rate}"] = Task(4, tuned({method: {}}, learningRate=rate))
    for seed in (1, 2):
        for method in ("lora", "full"):
            tasks[f"sft/{method}, seed {seed}"] = Task(4, tuned({method: {}}, seed=seed))
    return tasks


@cache
def _tokenizer() -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(model_path(SMOLLM2))


def _length(text: str) -> int:
    """In tokens."""
    return len(_tokenizer()(text)["input_ids"])


def _words(method: dict[str, Any]) -> list[str]:
    ((name, fields),) = method.items()
    return [name, *(str(value).replace(" ", "").replace(".", "")[:12] for value in fields.values())]


def _turns(row: dict[str, str]) -> Chat:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def _parsed(text: str) -> dict[str, Any]:
    """The first JSON object of an answer, also in a code block or behind other words: what a tolerant reader finds."""
    try:
        found = json.JSONDecoder().raw_decode(text[max(0, text.find("{")) :])[0]
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _scored(texts: list[str], test: list[dict[str, str]]) -> Found:
    """The share of answers with all fields right."""
    right = sum(_parsed(text) == json.loads(row["completion"]) for text, row in zip(texts, test, strict=True))
    return {"asked": len(test), "exact": right / len(test)}
