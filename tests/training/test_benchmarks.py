"""evaluation.benchmarks: our numbers are those of lm-evaluation-harness with its own model on what was published; code and network are refused."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_crds.v1alpha1.evaluation import Benchmark
from finetune_crds.verdict import ExitCode
from finetune_trainer import train
from finetune_trainer.benchmarks.files import find
from finetune_trainer.errors import UserError

from . import tiny
from .runs import opened_as_its_card_says
from .spawn import run_ranks

CHOICE: dict[str, Any] = {
    "task": "last_word",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/test.jsonl", "train": "data/train.jsonl"}},
    "test_split": "test",
    "fewshot_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} ->",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
WRITTEN: dict[str, Any] = {
    **{key: CHOICE[key] for key in ("dataset_path", "dataset_kwargs", "test_split", "fewshot_split", "doc_to_text")},
    "task": "write_word",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12},
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
        {"metric": "chrf", "aggregation": "chrf", "higher_is_better": True},
    ],
}
PERPLEXITY: dict[str, Any] = {
    "task": "texts",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/test.jsonl"}},
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
}


def folder(place: Path, *configs: dict[str, Any], rows: int = 9) -> Path:
    """A benchmark's folder."""
    (place / "data").mkdir(parents=True)
    for config in configs:
        (place / f"{config['task']}.yaml").write_text(yaml.safe_dump(config))
    for split, seed in (("test", 3), ("train", 4)):
        listed = []
        for i, row in enumerate(tiny.pair_rows(rows, seed=seed)):
            words = row["source"].split()
            choices = [words[-1], "other thing", "no"]
            listed.append({"question": row["source"], "choices": choices[i % 3 :] + choices[: i % 3], "answer": -i % 3})
        tiny.write_rows(place / "data" / f"{split}.jsonl", listed)
    return place


class StopsInTheEnd(tiny.Recorder):
    """Asks to stop once the result is measured."""

    def update(self, report: Any, metrics: dict[str, float]) -> None:
        """As it says."""
        if report.stage == "Evaluating" and report.step == report.total_steps:
            self.stop_requested = "Suspended"


def make(where: Path, model: Path, place: Path, /, benchmarks: list[dict[str, Any]], **evaluation: Any) -> Any:
    data = tiny.write_rows(where / "train.jsonl", tiny.chat_rows(24))
    given = [{"uri": f"file://{place}", **one} for one in benchmarks]
    training = {"maxSteps": 6, "batchSize": 4, "learningRate": "1e-2", "sequenceLength": 512}
    dataset = evaluation.pop("dataset", {})
    return tiny.job(
        where, model, data, method={"lora": {"rank": 4}}, training=training, dataset=dataset,
        evaluation={"benchmarks": given, **evaluation},
    )  # fmt: skip


def of_the_harness(output: Path, model: Path, place: Path, task: str, cache: Path, **options: Any) -> dict[str, float]:
    """What the harness itself says of a published adapter, with its own HFLM."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    from transformers import AutoTokenizer

    config = load_yaml(place / f"{task}.yaml")
    files = {split: str(place / file) for split, file in config["dataset_kwargs"]["data_files"].items()}
    config["dataset_kwargs"] = {"data_files": files, "cache_dir": str(cache)}
    opened = opened_as_its_card_says(output).merge_and_unload().float().eval()
    theirs = HFLM(pretrained=opened, tokenizer=AutoTokenizer.from_pretrained(output), batch_size=3, device="cpu")
    found: Any = simple_evaluate(
        theirs, tasks=[config], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, **options
    )
    return {key.split(",")[0]: value for key, value in found["results"][task].items() if "," in key and "_stderr" not in key}  # fmt: skip


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, address: Any) -> None:
        raise AssertionError(f"{address} was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_our_numbers_are_those_of_the_harness(tmp_path: Path, no_network: None) -> None:
    """Choices with and without solved examples, what is written, and perplexity; before and after training, without a connection."""
    model = tiny.make_model(tmp_path / "model")
    place = folder(tmp_path / "tasks", CHOICE, WRITTEN, PERPLEXITY)
    job = make(
        tmp_path, model, place,
        [{"name": "choice", "task": "last_word"}, {"name": "shots", "task": "last_word", "fewShot": 2, "limit": 5},
         {"name": "written", "task": "write_word"}, {"name": "texts", "task": "texts"},
         {"name": "asked", "task": "last_word", "chatTemplate": True, "fewShot": 1}],
        gates=[{"metric": "acc", "benchmark": "choice", "min": "0"}],
        dataset={"evaluation": None},
    )  # fmt: skip
    verdict = train.run(job, tiny.context(job, tmp_path / "scratch"))
    assert verdict.code == 0, verdict.message
    record = json.loads((tmp_path / "output/finetune.json").read_text())
    before, after = record["before"], record["after"]
    assert "eval_loss" in after and before.keys() == after.keys()
    assert {metric.name for metric in verdict.evaluation.after} == set(after)
    for name, task, options in (
        ("choice", "last_word", {}),
        ("shots", "last_word", {"num_fewshot": 2, "limit": 5}),
        ("written", "write_word", {}),
        ("texts", "texts", {}),
        ("asked", "last_word", {"num_fewshot": 1, "apply_chat_template": True}),
    ):
        theirs = of_the_harness(tmp_path / "output", model, place, task, tmp_path / "cache", **options)
        assert len(theirs) >= 2
        ours = {metric: after[f"benchmark/{name}/{metric}"] for metric in theirs}
        assert ours == pytest.approx(theirs, rel=1e-5), name
    changed = [name for name in after if name.startswith("benchmark/") and before[name] != after[name]]
    assert "benchmark/texts/bits_per_byte" in changed
    assert before["benchmark/texts/bits_per_byte"] > after["benchmark/texts/bits_per_byte"]


def test_two_ranks_share_the_questions_and_a_stopped_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    place = folder(tmp_path / "tasks", CHOICE, WRITTEN, rows=5)
    benchmarks = [{"name": "choice", "task": "last_word"}, {"name": "written", "task": "write_word"}]
    found = []
    for name in ("one", "two", "stopped"):
        where = tmp_path / "job"
        job = make(where, model, place, benchmarks)
        if name == "stopped":
            stopped = train.run(job, tiny.context(job, where / "scratch", reporter=tiny.Recorder(stop_at=3)))
            assert stopped.code == ExitCode.STOPPED and stopped.step, stopped.message
            stopped = train.run(job, tiny.context(job, where / "scratch", reporter=StopsInTheEnd(), run_id="again"))
            assert stopped.code == ExitCode.STOPPED and "while benchmarks were run" in stopped.message
        if name == "two":
            verdict = run_ranks(job, where, 2)
        else:
            verdict = train.run(job, tiny.context(job, where / "scratch", run_id="second"))
        assert verdict.code == 0, verdict.message
        found.append(json.loads((where / "output/finetune.json").read_text()))
        where.rename(tmp_path / name)
    one, two, stopped = found
    assert stopped["files"] == one["files"] and stopped["before"] == one["before"]
    assert two["before"] == one["before"] and len(one["before"]) == 4
    assert two["after"].keys() == one["after"].keys()


def test_gates_judge_benchmarks(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    place = folder(tmp_path / "tasks", PERPLEXITY, rows=4)
    for gate, code, sentence in (
        ({"max": "0.5"}, ExitCode.GATE_FAILED, "benchmark/texts/bits_per_byte is"),
        ({"maxRegression": "0"}, 0, None),
        ({"metric": "accuracy", "min": "0"}, ExitCode.USER_ERROR, "it has bits_per_byte, word_perplexity"),
    ):
        gates = [{"metric": "bits_per_byte", "benchmark": "texts", **gate}]
        where = tmp_path / str(int(code))
        job = make(where, model, place, [{"name": "texts"}], gates=gates, dataset={"evaluation": None})
        verdict = train.run(job, tiny.context(job, where / "scratch"))
        assert verdict.code == code, verdict.message
        assert sentence is None or sentence in verdict.message


@pytest.mark.parametrize("named", ["folder", "file"])
def test_other_questions_are_another_run(tmp_path: Path, named: str) -> None:
    """A run is not resumed with a benchmark whose data has changed, also where the uri names its file alone."""
    model = tiny.make_model(tmp_path / "model")
    place = folder(tmp_path / "tasks", PERPLEXITY, rows=4)
    job = make(tmp_path, model, place / "texts.yaml" if named == "file" else place, [{"name": "texts"}])
    stopped = train.run(job, tiny.context(job, tmp_path / "scratch", reporter=tiny.Recorder(stop_at=3)))
    assert stopped.code == ExitCode.STOPPED, stopped.message
    (place / "data/test.jsonl").write_text('{"question": "other"}\n')
    verdict = train.run(job, tiny.context(job, tmp_path / "scratch", run_id="second"))
    assert verdict.code not in (0, ExitCode.STOPPED) and "dataset" in verdict.message


CODE = "!function utils.shuffled"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"process_docs": CODE}, "!function utils.shuffled runs code of the file's author, and allowUserCode is not set"),
        ({"metric_list": [{"metric": CODE}]}, "!function utils.shuffled runs code"),
        ({"unsafe_code": True}, "unsafe_code runs code"),
        ({"include": "../outside.yaml"}, "../outside.yaml lies outside of the benchmark's folder"),
        ({"include": "absent.yaml"}, "absent.yaml is not there"),
        ({"include": "last_word.yaml"}, "it includes itself"),
        ({"dataset_path": "super_glue"}, "dataset_path 'super_glue' would be downloaded"),
        ({"dataset_path": "../../code.py"}, "would be downloaded"),
        ({"dataset_kwargs": {"data_files": {"test": "https://host/test.jsonl"}}}, "lies outside"),
        ({"dataset_kwargs": {"data_files": {"test": "/etc/passwd"}}}, "lies outside"),
        ({"dataset_kwargs": {"data_files": {"test": "data/absent.jsonl"}}}, "data/absent.jsonl is not there"),
        ({"dataset_kwargs": {}}, "needs data_files"),
        ({"dataset_kwargs": {"data_dir": "x"}}, "dataset_kwargs.data_dir is not supported"),
        ({"metric_list": [{"metric": "bleurt", "hf_evaluate": True}]}, "hf_evaluate would download metric bleurt"),
        ({"generation_kwargs": {"do_sample": True}}, "draws answers at random"),
        ({"test_split": None}, "it names no split"),
        ({"doc_to_image": "x"}, "doc_to_image is not supported"),
        ({"generation_kwargs": ["x"]}, "has a field of another type"),
        ({"task": ["a", "b"], "group": "g"}, "holds 0 tasks (none)"),
        ({"doc_to_text": "!!python/object/apply:os.system [x]"}, "line 5: it is no YAML of plain values"),
    ],
)  # fmt: skip
def test_code_and_what_would_be_downloaded_is_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    """Before the harness is imported, and before the model is loaded."""
    place = folder(tmp_path / "tasks")
    (tmp_path / "outside.yaml").write_text("task: outside\n")
    (place / "utils.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    text = yaml.safe_dump(CHOICE | change, sort_keys=True).replace(f"'{CODE}'", CODE)
    (place / "last_word.yaml").write_text(text.replace("'!!python/object/apply:os.system [x]'", "!!python/object/apply:os.system [x]"))  # fmt: skip
    with pytest.raises(UserError) as refused:
        find(Benchmark(uri=f"file://{place}", name="mine"), place)
    if "line" not in sentence:
        assert sentence in str(refused.value)
    assert "it is no YAML" in str(refused.value) or "line" not in sentence
    assert not (tmp_path / "ran").exists()


HIDDEN = {
    "overridden": "doc_to_text: !function utils.x\n",
    "key": "? !function utils.x\n: 1\n",
    "included": "include: base.inc\n",
}
"""What a task may begin with, so that its fields name no code in the end, but its parser has met some."""


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_code_that_is_named_and_overridden_does_not_run_either(tmp_path: Path, hidden: str) -> None:
    """The harness imports what it meets while it parses."""
    place = folder(tmp_path / "tasks")
    (place / "utils.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef x(): pass\n")
    (place / "base.inc").write_text("doc_to_text: !function utils.x\n")
    (place / "last_word.yaml").write_text(hidden + yaml.safe_dump(CHOICE))
    model = tiny.make_model(tmp_path / "model")
    job = make(tmp_path, model, place, [{"name": "mine", "limit": 1}])
    train.run(job, tiny.context(job, tmp_path / "scratch"))
    assert not (tmp_path / "ran").exists()


def test_code_runs_where_it_is_allowed(tmp_path: Path) -> None:
    """process_docs keeps two of the questions; in the folder of a ConfigMap, with the links and hidden folders that a kubelet makes."""
    model = tiny.make_model(tmp_path / "model")
    real = folder(tmp_path / "tasks/..2026_11", CHOICE, rows=4)
    (real / "utils.py").write_text("def few(docs):\n    return docs.select([0, 1])\n")
    listed = yaml.safe_dump(CHOICE | {"process_docs": "CODE"}).replace("CODE", "!function utils.few")
    (real / "last_word.yaml").write_text(listed)
    for name in ("last_word.yaml", "utils.py", "data"):
        (tmp_path / "tasks" / name).symlink_to(Path("..2026_11") / name)
    for allowed in (False, True):
        job = make(tmp_path, model, tmp_path / "tasks", [{"name": "mine", "allowUserCode": allowed}])
        verdict = train.run(job, tiny.context(job, tmp_path / "scratch", run_id=str(allowed)))
        assert (verdict.code == 0) is allowed, verdict.message
    after = json.loads((tmp_path / "output/finetune.json").read_text())["after"]
    assert after["benchmark/mine/acc"] in (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"doc_to_text": "{{ question.__class__.__mro__ }}"}, "cannot load task last_word (SecurityError)"),
        ({"doc_to_text": "{{ absent }}"}, "cannot load task last_word (UndefinedError)"),
        ({"metric_list": [{"metric": "bleurt"}]}, "metric bleurt is none of the harness's own"),
        ({"num_fewshot": 0}, "fewShot is 1, and the task says num_fewshot: 0"),
    ],
)
def test_what_only_running_shows_is_told(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    model = tiny.make_model(tmp_path / "model")
    place = folder(tmp_path / "tasks", CHOICE | change, rows=3)
    job = make(tmp_path, model, place, [{"name": "mine", "fewShot": 1}])
    verdict = train.run(job, tiny.context(job, tmp_path / "scratch"))
    assert verdict.code == ExitCode.USER_ERROR and sentence in verdict.message, verdict.message
