"""Every example trains, for two steps: with its task, objective, method, columns and hyperparameters, on a tiny model of its family and a few rows."""

import functools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_crds.resolution import Published
from finetune_crds.support import COLUMNS, METRICS, Format, formats_of
from finetune_trainer.local.manifests import load

from . import pictures, tiny
from .runs import finish, journal

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAM = "user-program"
"""Is not for our trainer."""
FAMILIES = {
    "SmolLM2": "llama", "Llama": "llama", "Qwen2.5": "qwen2", "Qwen3": "qwen3", "OLMo-2": "olmo2", "OLMoE": "olmoe", "Mistral": "mistral",
    "xlm-roberta": "xlm-roberta", "distilbert": "distilbert", "bert-base": "bert", "roberta": "roberta", "bart": "bart", "t5": "t5", "vit": "vit",
}  # fmt: skip
"""Of the models that examples name."""
NEEDED = {"support-bot": "s3", "tone-judge": "reward"}
"""Examples whose results others go on from, by the names of their jobs."""


BLOCKS = {"freeze": {"num_hidden_layers": 4}}
"""Of models that need more than others."""
STAGES = {"gradual-unfreezing": {"maxSteps": 3, "batchSize": 24}}
"""Of training, where each epoch brings something new."""


def text(number: int) -> str:
    return " ".join([*random.Random(number).choices(tiny.WORDS, k=30), "invoice"])


ROWS: dict[Format, Callable[[int], dict[str, Any]]] = {
    "chat": lambda i: tiny.chat_rows(1, seed=i)[0],
    "instruction": lambda i: {"prompt": f"What is {i}?", "completion": f"It is {i + 1}."},
    "text": lambda i: {"text": text(i)},
    "preference": lambda i: {"prompt": f"What is {i}?", "chosen": f"It is {i + 1}.", "rejected": "No idea."},
    "unpairedPreference": lambda i: {"prompt": f"What is {i}?", "completion": text(i)[:20], "label": i % 3 > 0},
    "classification": lambda i: {"text": text(i), "label": ("warm", "cold")[i % 2]},
    "tags": lambda i: tiny.tagged_rows(i + 1)[i],
    "question": lambda i: tiny.question_rows(i + 1)[i],
    "pair": lambda i: tiny.pair_rows(1, seed=i)[0],
}
"""Row number so many of a format, with the usual columns."""


def rows(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """As the example reads them: in its format, by the names of its columns, and with the columns that it names elsewhere."""
    objective = spec.get("objective", {})
    named: dict[str, str] = spec["dataset"].get("columns", {})
    possible = formats_of(spec.get("task", "text-generation"), next(iter(objective), None))
    fitting = [one for one in possible if all(one in COLUMNS[column] for column in named)]
    chosen: Format = spec["dataset"].get("format") or fitting[0]
    several = objective.get("classification", {}).get("problem") == "multiLabel"
    found = []
    for number in range(24):
        row = ROWS[chosen](number)
        row = {named.get(column, column): [value] if several and column == "label" else value for column, value in row.items()}  # fmt: skip
        slices = spec.get("evaluation", {}).get("slices", [])
        row |= {one["column"]: one["value"] for one in slices[number % 2 :: 2]}
        if group := spec["dataset"].get("evaluation", {}).get("groupBy"):
            row[group] = str(number)
        for reward in objective.get("grpo", {}).get("rewards", []):
            row |= {reward["reference"]["column"]: "#### 42"} if "reference" in reward else {}
        found.append(row)
    return found


def placed(value: Any, folder: Path, data: Path) -> Any:
    """A part of the spec with files of this machine in the place of all others, and without what opens those."""
    if isinstance(value, list):
        return [placed(one, folder, data) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {name: placed(one, folder, data) for name, one in value.items() if name not in ("secretRef", "endpoint")}
    if uri := kept.get("uri"):
        kept["uri"] = f"file://{folder / 'configmaps'}/{uri[12:]}" if uri.startswith("configmap://") else f"file://{data}"  # fmt: skip
    return kept


def metrics_of(spec: Any) -> set[str]:
    """What evaluation.metric may be of a job, by the table of what is supported; GRPO has no loss."""
    objective = spec.objective.name if spec.objective else ""
    return {
        name
        for name, metric in METRICS.items()
        if (spec.task in metric.tasks and (objective, name) != ("grpo", "eval_loss"))
        or objective in metric.objectives
        or (spec.task == "text-classification" and spec.problem in metric.problems)
    }


def trained(stem: str, folder: Path, published: dict[str, Published]) -> Published:
    """What the example publishes, once it has learned for its steps and was measured by all that it may be judged by.

    Args:
        stem: the example.
        folder: for the run.
        published: what it may go on from.
    """
    manifests = load([EXAMPLES / f"{stem}.yaml"])
    spec = manifests.job["spec"]
    for name, contents in manifests.configmaps.items():
        for key, content in contents.items():
            (folder / "configmaps" / name).mkdir(parents=True, exist_ok=True)
            (folder / "configmaps" / name / key).write_bytes(content)
    family = next(family for part, family in FAMILIES.items() if part in spec["model"]["uri"])
    images = spec.get("task") == "image-classification"
    model = (pictures if images else tiny).make_model(folder / "model", family, **BLOCKS.get(stem, {}))
    if images:
        data = pictures.write_folder(folder / "rows", each=2)
    else:
        data = folder / "rows"
        for split in ("train", "test"):
            tiny.write_rows(data / f"{split}.jsonl", rows(spec))
    given = placed({name: spec.get(name, {}) for name in ("model", "dataset")}, folder, data)
    training = spec.get("training", {})
    training = {name: value for name, value in training.items() if name != "epochs"} | {"maxSteps": 2}
    training |= {"tokensPerStep": 1024} if "tokensPerStep" in training else {"batchSize": 4}
    training |= ({} if images else {"sequenceLength": 128}) | STAGES.get(stem, {})
    evaluation = {name: value for name, value in spec.get("evaluation", {}).items() if name not in ("gates", "benchmarks")}  # fmt: skip
    evaluation |= {"everySteps": 1} if "everySteps" in evaluation else {}
    if "prompts" in evaluation or "maxNewTokens" in evaluation or spec.get("task") in ("summarization", "translation"):
        evaluation["maxNewTokens"] = 2
    objective = spec.get("objective")
    if objective and "grpo" in objective:
        objective = {"grpo": placed(objective["grpo"], folder, data) | {"generations": 2, "maxCompletionLength": 4}}
    chosen = {"task": spec.get("task"), "objective": objective, "method": spec.get("method")}
    job = tiny.job(
        folder, model, given["dataset"].pop("train"),
        published=published, dataset={"evaluation": None} | given["dataset"], training=training, evaluation=evaluation,
        model={**given["model"], "uri": f"file://{model}"}, output={"uri": f"file://{folder}/output", "merged": spec["output"].get("merged", False)},
        **{name: value for name, value in chosen.items() if value},
    )  # fmt: skip
    output = finish(job, folder).output
    lines = journal(folder)
    assert output and sum("loss" in line for line in lines) == training["maxSteps"]
    assert METRICS.keys() & lines[0].keys() == metrics_of(job.spec)
    return Published(f"file://{folder}/output", output.digest, base=job.spec.model)


@pytest.fixture(scope="module")
def needed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Published]:
    """What the example of a job's name publishes."""
    return functools.cache(lambda name: trained(NEEDED[name], tmp_path_factory.mktemp(name), {}))


@pytest.mark.parametrize("stem", [file.stem for file in sorted(EXAMPLES.glob("*.yaml")) if file.stem != PROGRAM])
def test_an_example_trains(tmp_path: Path, stem: str, needed: Callable[[str], Published]) -> None:
    names = re.findall(r"[{ ]job: ([a-z-]+)", (EXAMPLES / f"{stem}.yaml").read_text())
    trained(stem, tmp_path, {name: needed(name) for name in names})
