"""Careful evaluation: sets and slices of their own, gates, what is forgotten; and what protects against overfitting and forgetting."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune_crds.v1alpha1.evaluation import Gate
from finetune_crds.verdict import ExitCode, Verdict
from finetune_trainer import gates, setup, train
from finetune_trainer.errors import GateFailed
from finetune_trainer.modelling import noise
from finetune_trainer.modelling.head_loss import head_loss

from . import tiny
from .spawn import run_ranks

QUICK = {"maxSteps": 6, "batchSize": 8, "microBatchSize": 3, "learningRate": "1e-2", "sequenceLength": 256}


def texts(count: int, seed: int = 7) -> list[dict[str, Any]]:
    return [row | {"region": ("eu", "us", "eu", "asia")[i % 4]} for i, row in enumerate(tiny.chat_rows(count, seed))]


def make(folder: Path, model: Path, /, **spec: Any) -> Any:
    """A job with two further sets and two slices."""
    train_file = tiny.write_rows(folder / "train.jsonl", texts(30))
    held, law, general = (
        [{"uri": f"file://{tiny.write_rows(folder / f'{name}.jsonl', texts(12, seed))}"}]
        for seed, name in enumerate(("held", "law", "general"))
    )
    evaluation = {"sources": held, "sets": [{"name": "law", "sources": law}], "general": general}
    slices = [{"name": name, "column": "region", "value": name} for name in ("eu", "us")]
    judged = {"slices": slices} | spec.pop("evaluation", {})
    return tiny.job(
        folder, model, train_file, dataset={"evaluation": evaluation}, evaluation=judged,
        training=QUICK | spec.pop("training", {}), **spec,
    )  # fmt: skip


def run(job: Any, folder: Path, **options: Any) -> Verdict:
    return train.run(job, tiny.context(job, folder / "scratch", **options))


def evaluations(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "output/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


def test_sets_and_slices_are_measured_apart(tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Slices of half the rows and more are weighed by their tokens in the whole; what is forgotten is a difference on the same rows."""
    slices = [{"name": name, "column": "region", "value": name} for name in ("eu", "us", "mars")]
    job = make(tmp_path, llama, evaluation={"slices": slices})
    verdict = run(job, tmp_path)
    assert verdict.code == 0, verdict.message
    nothing = "No held-out row is in these of evaluation.slices, and nothing is measured of them: mars."
    judged = json.loads((tmp_path / "output/evaluation.json").read_text())
    assert nothing in judged["findings"] and nothing in caplog.text
    assert [one["rows"] for one in judged["sets"] if one["kind"] == "slice"] == [6, 3, 0]
    before, after = evaluations(tmp_path)
    assert {"eval_loss", "eval_loss.eu", "eval_loss.us", "eval_law_loss", "eval_general_loss"} <= set(before)
    assert "eval_loss.asia" not in before and "eval_law_loss.eu" not in before
    assert len({round(before[name], 9) for name in ("eval_loss", "eval_loss.eu", "eval_loss.us", "eval_law_loss")}) == 4
    assert verdict.evaluation and verdict.evaluation.forgetting
    assert math.isclose(float(verdict.evaluation.forgetting), after["eval_general_loss"] - before["eval_general_loss"], rel_tol=1e-5)  # fmt: skip

    alone = tiny.job(
        tmp_path / "alone", llama, tmp_path / "train.jsonl", training=QUICK,
        dataset={"evaluation": {"sources": [{"uri": f"file://{tiny.write_rows(tmp_path / 'eu.jsonl', texts(12, 0)[::2])}"}]}},
    )  # fmt: skip
    assert run(alone, tmp_path / "alone").code == 0
    assert math.isclose(evaluations(tmp_path / "alone")[0]["eval_loss"], before["eval_loss.eu"], abs_tol=1e-6)
    two = make(tmp_path / "two", llama)
    assert run_ranks(two, tmp_path / "two", 2).code == 0
    for name in ("eval_loss", "eval_loss.eu", "eval_law_loss"):
        assert math.isclose(evaluations(tmp_path / "two")[0][name], before[name], abs_tol=1e-6)


def test_a_gate_keeps_the_output_back_and_a_wider_one_lets_the_same_weights_out(tmp_path: Path, llama: Path) -> None:
    job = make(tmp_path, llama, evaluation={"gates": [{"metric": "eval_loss", "set": "law", "max": "0.5"}]})
    verdict = run(job, tmp_path)
    assert verdict.code == ExitCode.GATE_FAILED
    assert "eval_law_loss is" in verdict.message and "above max 0.5" in verdict.message
    assert verdict.evaluation and verdict.evaluation.after, "what it was judged by is told"
    assert not (tmp_path / "output").exists()
    (page,) = (tmp_path / "output.checkpoints").rglob("evaluation.html")
    assert f"the reports are in file://{page.parent}" in verdict.message and "eval_law_loss" in page.read_text()
    for name in ("evaluation.json", "data-report.html", "data-report.json"):
        assert (page.parent / name).stat().st_size > 100
    wider = make(tmp_path, llama, evaluation={"gates": [{"metric": "eval_loss", "set": "law", "maxRegression": "0"}]})
    assert wider.digest == job.digest
    again = run(wider, tmp_path, run_id="second", attempt=2)
    assert (again.code, again.first_step, again.step) == (0, 6, 6), "nothing is trained again"
    narrow = run(job, tmp_path, run_id="third", attempt=3)
    assert narrow.code == ExitCode.GATE_FAILED, "an output that is there is judged by the gates of today"


GATES: dict[str, tuple[dict[str, str], str | None]] = {
    "min": ({"metric": "eval_loss", "min": "1000"}, "below min 1000"),
    "max": ({"metric": "eval_loss", "slice": "us", "max": "0.1"}, "eval_loss.us is"),
    "regression": ({"metric": "eval_loss", "maxRegression": "0"}, None),
    "no rows": ({"metric": "eval_loss", "slice": "mars", "max": "0.1"}, "is not measured"),
}


@pytest.mark.parametrize("case", GATES)
def test_gates(tmp_path: Path, llama: Path, case: str) -> None:
    gate, sentence = GATES[case]
    slices = [{"name": name, "column": "region", "value": name} for name in ("us", "mars")]
    job = make(tmp_path, llama, evaluation={"gates": [gate], "slices": slices}, training={"maxSteps": 2})
    verdict = run(job, tmp_path)
    if sentence is None:
        assert verdict.code == 0, verdict.message
    else:
        assert sentence in verdict.message
        assert verdict.code == (ExitCode.USER_ERROR if case == "no rows" else ExitCode.GATE_FAILED)
        assert case != "no rows" or verdict.step == 0, "seen before anything is trained"


@pytest.mark.parametrize(
    ("metric", "before", "after", "passes"),
    [
        ("eval_loss", 2.0, 2.05, True),
        ("eval_loss", 2.0, 2.2, False),
        ("eval_f1", 0.8, 0.75, True),
        ("eval_f1", 0.8, 0.6, False),
        ("eval_f1", 0.8, math.nan, False),
        ("eval_f1", 0.2, 0.9, True),
    ],
)
def test_regression_is_towards_the_worse(metric: str, before: float, after: float, passes: bool) -> None:
    gate = Gate.model_validate({"metric": metric, "maxRegression": "0.1"})
    if passes:
        gates.check([gate], {metric: before}, {metric: after})
    else:
        with pytest.raises(GateFailed, match=r"worse by more than maxRegression 0\.1"):
            gates.check([gate], {metric: before}, {metric: after})


def test_label_smoothing_is_torchs() -> None:
    """Loss and gradients of the head without its logits, against torch's."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 40)
    hidden, targets = torch.randn(9, 16), torch.randint(40, (9,))
    found = []
    for loss in (
        lambda h: head_loss(h, head, targets, 0.1),
        lambda h: F.cross_entropy(head(h), targets, label_smoothing=0.1, reduction="sum"),
    ):
        states = hidden.clone().requires_grad_()
        head.zero_grad()
        value = loss(states)
        value.backward()
        found.append([value.detach(), states.grad, head.weight.grad, head.bias.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_held_out_losses_are_without_smoothing_and_noise(tmp_path: Path, llama: Path) -> None:
    plain = make(tmp_path / "plain", llama)
    changed = make(tmp_path / "changed", llama, training={"labelSmoothing": "0.2", "neftuneNoise": "5"})
    for name, job in (("plain", plain), ("changed", changed)):
        assert run(job, tmp_path / name).code == 0
    assert evaluations(tmp_path / "plain")[0]["eval_loss"] == evaluations(tmp_path / "changed")[0]["eval_loss"]
    losses = [tiny.losses(tmp_path / name / "output") for name in ("plain", "changed")]
    assert float.fromhex(losses[1][0]) > float.fromhex(losses[0][0])


def test_noise_is_uniform_within_the_papers_bounds(llama: Path) -> None:
    """alpha / sqrt(L d), L of each row alone; the embedding itself stays."""
    from transformers import AutoModel

    inner = AutoModel.from_pretrained(llama)
    tokens = torch.arange(3, 53)[None]
    with torch.no_grad():
        plain = inner.get_input_embeddings()(tokens)
        with noise.on_embeddings(inner, [10, 40], 5.0):
            moved = inner.get_input_embeddings()(tokens) - plain
        assert torch.equal(inner.get_input_embeddings()(tokens), plain)
    for part, length in ((moved[0, :10], 10), (moved[0, 10:], 40)):
        bound = 5.0 / math.sqrt(length * 64)
        assert bound * 0.98 < float(part.abs().max()) <= bound
        assert abs(float(part.std()) - bound / math.sqrt(3)) < 0.1 * bound


def test_l2_sp_pulls_to_the_pretrained_weights_and_leaves_the_head_alone(tmp_path: Path, llama: Path) -> None:
    """One step by hand: the weights come nearer by rate times strength of their way, before the gradient's update."""
    rows = [{"text": f"{word} {other}", "label": word} for word in ("red", "one") for other in tiny.WORDS]
    data = tiny.write_rows(tmp_path / "train.jsonl", rows)

    def masters(pull: str) -> Any:
        job = tiny.job(
            tmp_path, llama, data, task="text-classification", method={"full": {}},
            training={"l2Sp": pull, "sequenceLength": 64, "optimizer": {"adamw": {}}},
        )  # fmt: skip
        context = tiny.context(job, tmp_path / "scratch")
        return setup.load(setup.read(job.spec, context), context.ranks).masters

    for pull in ("0", "2"):
        made = masters(pull)
        began = {name: view.clone() for name, view in made.trained().items()}
        made.weights += 1.0
        made.step(0, [0.1] * len(made.groups), 0.0)  # without gradients only the pull moves
        for name, view in made.trained().items():
            left = 1.0 if pull == "0" or name.startswith("score.") else 1 - 0.1 * 2
            torch.testing.assert_close(view - began[name], torch.full_like(view, left), rtol=0, atol=1e-5)


def test_l2_sp_resumes_towards_where_the_first_run_began(tmp_path: Path, llama: Path) -> None:
    digests = []
    for name, stop_at in (("whole", None), ("stopped", 3)):
        place = tmp_path / "job"
        regularised = {"l2Sp": "1", "neftuneNoise": "5", "labelSmoothing": "0.1"}
        job = make(place, llama, method={"full": {}}, training=regularised)
        if stop_at:
            assert run(job, place, reporter=tiny.Recorder(stop_at=stop_at)).code == ExitCode.STOPPED
        assert run(job, place, run_id="second").code == 0
        digests.append(json.loads((place / "output/finetune.json").read_text())["files"])
        place.rename(tmp_path / name)
    assert digests[0] == digests[1]
    assert np.isfinite([float.fromhex(loss) for loss in tiny.losses(tmp_path / "whole/output")]).all()


def test_what_is_to_be_measured_needs_rows_to_measure_it_on(tmp_path: Path, llama: Path) -> None:
    """Of a few rows none is held out unasked: said before anything is trained."""
    data = tiny.write_rows(tmp_path / "train.jsonl", texts(6))
    gates_ = [{"metric": "eval_loss", "max": "9"}]
    job = tiny.job(tmp_path, llama, data, training=QUICK, dataset={"evaluation": None}, evaluation={"gates": gates_})
    verdict = run(job, tmp_path)
    assert (verdict.code, verdict.step) == (ExitCode.DATA_ERROR, 0)
    assert "of 6 rows none is held out" in verdict.message
