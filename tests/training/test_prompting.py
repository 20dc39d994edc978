"""Prompting beside tuning, and the evaluation report: losses against transformers by hand, exact resumes, a page that is safe to open."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_crds.verdict import ExitCode, Verdict
from finetune_trainer import train
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.prompting import Compared
from finetune_trainer.reporting.evaluation_report import EvaluationReport

from . import tiny
from .spawn import run_ranks
from .test_data import Page

HOSTILE = "<script>alert('x')</script> & \"quoted\""
QUICK = {"maxSteps": 6, "batchSize": 8, "microBatchSize": 3, "learningRate": "1e-2", "sequenceLength": 384}


def instructions(count: int, seed: int) -> list[dict[str, str]]:
    return [{"prompt": row["source"], "completion": row["target"]} for row in tiny.pair_rows(count, seed)]


def make(folder: Path, model: Path, rows: Any, held: Any, /, **spec: Any) -> Any:
    data, other = (tiny.write_rows(folder / f"{name}.jsonl", one) for name, one in (("train", rows), ("held", held)))
    dataset = {"evaluation": {"sources": [{"uri": f"file://{other}"}]}} | spec.pop("dataset", {})
    evaluation = {"prompts": ["red blue", HOSTILE], "maxNewTokens": 5} | spec.pop("evaluation", {})
    training = QUICK | spec.pop("training", {})
    return tiny.job(folder, model, data, dataset=dataset, evaluation=evaluation, training=training, **spec)


def run(job: Any, folder: Path, **options: Any) -> Verdict:
    return train.run(job, tiny.context(job, folder / "scratch", **options))


def found(folder: Path) -> EvaluationReport:
    return EvaluationReport.model_validate_json((folder / "output/evaluation.json").read_text())


def few_shot_rows(folder: Path) -> RowSet:
    return RowSet.open(next((folder / "scratch/few-shot").iterdir()))


def answer_loss(model: Any, before: list[int], answer: list[int]) -> float:
    """Sum over an answer's tokens, by transformers' own loss."""
    tokens = torch.tensor([[*before, *answer]])
    labels = tokens.clone()
    labels[0, : len(before)] = -100
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=labels).loss) * len(answer)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_losses_behind_examples_are_those_of_transformers(tmp_path: Path, template: str) -> None:
    """Which examples were drawn is read back from a prompt; what they are worth is computed from the rows anew."""
    model = tiny.make_model(tmp_path / "model")
    if template == "plain":
        tiny.tokenizer(template=None).save_pretrained(model)
        (model / "chat_template.jinja").unlink(missing_ok=True)
    rows, held = instructions(30, 1), instructions(9, 2)
    job = make(tmp_path, model, rows, held, evaluation={"fewShot": {"examples": 3, "rows": 6}})
    verdict = run(job, tmp_path)
    assert verdict.code == 0, verdict.message

    tokenizer, base = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    sets = few_shot_rows(tmp_path)
    tokens = lambda row: sets.tokens[sets.offsets[row] : sets.offsets[row + 1]].tolist()  # noqa: E731
    question = next(row for row in range(len(sets.sources)) if sets.sources[row] == 2)
    assert sets.numbers[question] == 3
    text = tokenizer.decode(tokens(question))

    def asked(row: dict[str, str]) -> tuple[list[dict[str, str]], str]:
        return [{"role": "user", "content": row["prompt"]}], f"{row['prompt']}\n\n"

    def whole(row: dict[str, str]) -> tuple[list[dict[str, str]], str]:
        return [
            *asked(row)[0],
            {"role": "assistant", "content": row["completion"]},
        ], f"{asked(row)[1]}{row['completion']}\n\n"

    def rendered(row: dict[str, str]) -> str:
        return tokenizer.apply_chat_template(whole(row)[0], tokenize=False) if template == "chat" else whole(row)[1]

    shown: list[dict[str, str]] = []
    while len(shown) < 3:
        rest = text[len("".join(map(rendered, shown))) :]
        shown.append(max((row for row in rows if rest.startswith(rendered(row))), key=lambda row: len(rendered(row))))

    losses: dict[str, list[float]] = {"before": [], "prompted": []}
    counts = []
    plain = [tokens(row) for row in np.flatnonzero(sets.sources == 0)]
    for row in held:
        for name, behind in (("before", []), ("prompted", shown)):
            if template == "chat":
                messages = [message for one in behind for message in whole(one)[0]] + asked(row)[0]
                before = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                answer = row["completion"] + "<|im_end|>"
            else:
                before, answer = "".join(whole(one)[1] for one in behind) + asked(row)[1], row["completion"]
            ids, said = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, answer))
            if name == "before":
                chosen = any(one[: len(ids) + len(said)] == ids + said for one in plain)
            if chosen:
                losses[name].append(answer_loss(base, ids, said))
        counts += [len(said)] if chosen else []
    compared = found(tmp_path).few_shot
    assert compared and compared.rows == len(counts) == 6 and compared.tokens == sum(counts)
    assert compared.before == pytest.approx(sum(losses["before"]) / sum(counts), abs=1e-5)
    assert compared.prompted == pytest.approx(sum(losses["prompted"]) / sum(counts), abs=1e-5)
    assert abs(compared.prompted - compared.before) > 1e-3, "examples change what it says, or equality says little"
    assert verdict.evaluation and verdict.evaluation.few_shot
    assert float(verdict.evaluation.few_shot.after) == pytest.approx(compared.after, rel=1e-5)


@pytest.mark.parametrize("method", ["full", "prefix"])
def test_a_resumed_run_compares_with_the_same_base(tmp_path: Path, llama: Path, method: str) -> None:
    """Of virtual tokens the base is without them, though they begin at random; two ranks find the same numbers."""
    records = []
    folder = tmp_path / "job"
    for stop_at in (None, 3):
        job = make(
            folder, llama, tiny.chat_rows(30), tiny.chat_rows(12, seed=3), method={method: {}},
            evaluation={"everySteps": 2}, training={"learningRate": "3e-3"},
        )  # fmt: skip
        if stop_at:
            assert run(job, folder, reporter=tiny.Recorder(stop_at=stop_at)).code == ExitCode.STOPPED
        verdict = run(job, folder, run_id="second")
        assert verdict.code == 0, verdict.message
        assert verdict.output and verdict.output.evaluation_report == f"file://{folder}/output/evaluation.html"
        assert verdict.output.data_report_json == f"file://{folder}/output/data-report.json"
        records.append(json.loads((folder / "output/finetune.json").read_text())["files"])
        if not stop_at:
            folder.rename(tmp_path / "whole")
    assert records[0] == records[1] and {"evaluation.html", "evaluation.json"} <= set(records[0])
    report = found(tmp_path / "whole")
    assert report.few_shot and report.few_shot.examples and report.few_shot.sentence in report.findings
    base = AutoModelForCausalLM.from_pretrained(llama).eval()
    rows = RowSet.open(next((tmp_path / "whole/scratch/prepared").iterdir()))
    total = count = 0.0
    for row in np.flatnonzero(rows.sources == -1):
        tokens = torch.tensor([rows.tokens[rows.offsets[row] : rows.offsets[row + 1]].tolist()])
        learned = torch.from_numpy(np.array(rows.learned[rows.offsets[row] : rows.offsets[row + 1]]))
        labels = torch.where(learned, tokens, -100)
        targets = int(learned[1:].sum())
        with torch.no_grad():
            total += float(base(input_ids=tokens, labels=labels).loss) * targets
        count += targets
    (whole, *_) = report.sets
    assert whole.metrics[0].name == "eval_loss" and whole.rows == 12
    assert whole.metrics[0].baseline == pytest.approx(total / count, abs=1e-5)
    if method == "full":
        job = make(tmp_path / "two", llama, tiny.chat_rows(30), tiny.chat_rows(12, seed=3), method={method: {}}, evaluation={"everySteps": 2}, training={"learningRate": "3e-3"})  # fmt: skip
        assert run_ranks(job, tmp_path / "two", 2).code == 0
        two = found(tmp_path / "two").few_shot
        assert two and two.prompted == pytest.approx(report.few_shot.prompted, abs=1e-6)


class Tags(HTMLParser):
    """Checks that tags close in order, and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "line", "circle", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_safe_and_the_numbers_hold_no_text(tmp_path: Path, llama: Path) -> None:
    """Prompts and answers are in the page, escaped, and in no other report, status or metric."""
    slices = [{"name": "red", "column": "prompt", "value": "red"}]
    gates = [{"metric": "eval_loss", "max": "100"}, {"metric": "eval_loss", "maxRegression": "50"}]
    rows = [{"prompt": word, "completion": HOSTILE} for word in tiny.WORDS]
    job = make(
        tmp_path, llama, rows, rows[:5], evaluation={"slices": slices, "gates": gates, "everySteps": 3, "maxNewTokens": 40},
        training={"maxSteps": 30, "learningRate": "1e-2", "sequenceLength": 512},
    )  # fmt: skip
    verdict = run(job, tmp_path)
    assert verdict.code == 0, verdict.message
    page, numbers = ((tmp_path / f"output/evaluation.{kind}").read_text() for kind in ("html", "json"))
    assert "<script" not in page and "&lt;script&gt;" in page
    checked = Tags()
    checked.feed(page)
    assert not checked.open and "polyline" in checked.seen and "script" not in checked.seen
    assert "http:" not in page.replace("http://www.w3.org", "") and "https:" not in page
    assert "script" not in numbers and "script" not in verdict.model_dump_json()
    report = found(tmp_path)
    assert [gate.passed for gate in report.gates] == [True, True]
    assert {one.name: one.rows for one in report.sets} == {"": 5, "red": int(sum(row["prompt"] == "red" for row in rows[:5]))}  # fmt: skip
    assert [curve.name for curve in report.curves] == ["training", "held-out rows"]
    assert report.curves[0].steps == list(range(1, 31))


def test_when_prompting_is_as_good_it_says_so() -> None:
    given = {"examples": 1, "rows": 20, "tokens": 100, "before": 3.0, "after": 1.5, "standard_error": 0.02}
    sentences = {
        1.53: "Prompting with 1 example is as good as tuning: the difference is 0.030 ± 0.040",
        1.45: "Prompting with 1 example is better than tuning by 0.050 ± 0.040",
        2.0: "Tuning is better than prompting with 1 example by 0.500 ± 0.040 nats a token (2.000 against 1.500 on 20",
    }
    for prompted, sentence in sentences.items():
        assert Compared(prompted=prompted, **given).sentence.startswith(sentence)


def test_what_cannot_be_shown_is_left_out(tmp_path: Path, llama: Path) -> None:
    """Rows too long for half of a sequence, and plain text; nobody is asked where examples are 0."""
    short = {"maxSteps": 1}
    cases: dict[str, Any] = {
        "long": {"training": short | {"sequenceLength": 40}},
        "nothing held out": {"training": short, "dataset": {"evaluation": {"fraction": "0"}}},
        "none": {"training": short, "evaluation": {"fewShot": {"examples": 0}}},
    }
    for name, spec in cases.items():
        folder = tmp_path / name
        assert run(make(folder, llama, tiny.chat_rows(20), tiny.chat_rows(6, seed=3), **spec), folder).code == 0
        assert found(folder).few_shot is None
        assert Page((folder / "output/evaluation.html").read_text()).loads == []
    folder = tmp_path / "text"
    texts = [{"text": " ".join(tiny.WORDS[i % 5 :])} for i in range(20)]
    assert run(make(folder, llama, texts, texts[:5], training=short), folder).code == 0
    assert found(folder).few_shot is None


@pytest.mark.parametrize("metric", ["eval_loss", "eval_rouge1"])
def test_texts_are_written_when_they_are_needed(tmp_path: Path, metric: str) -> None:
    """On the way the loss is enough, unless the metric decides; what is published is measured by what it writes, and gates see it."""
    model = tiny.make_encoder_decoder(tmp_path / "model", "t5-gated")
    rows = tiny.pair_rows(12)
    job = make(
        tmp_path, model, rows, rows[:4], task="summarization", training={"maxSteps": 6, "sequenceLength": 128},
        evaluation={"everySteps": 2, "metric": metric, "gates": [{"metric": "eval_rouge1", "min": "0"}], "maxNewTokens": 3},
    )  # fmt: skip
    assert job.spec.evaluation.generate == ("beforeAndAfter" if metric == "eval_loss" else "everyEvaluation")
    verdict = run(job, tmp_path)
    assert verdict.code == 0, verdict.message
    lines = [json.loads(line) for line in (tmp_path / "output/metrics.jsonl").read_text().splitlines()]
    written = ["eval_rouge1" in line for line in lines if "eval_loss" in line]
    assert written == ([True, False, False, False, True] if metric == "eval_loss" else [True] * 4)
    record = json.loads((tmp_path / "output/finetune.json").read_text())
    assert record["before"].keys() == record["after"].keys() >= {"eval_loss", "eval_rouge1"}
    assert found(tmp_path).few_shot is None
    answers = (tmp_path / "output/evaluation.html").read_text()
    assert Page(answers).loads == []
    assert "with examples in the prompt" in answers
