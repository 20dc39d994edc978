"""Objectives that compare answers: they learn (with every method: test_objectives), resume exactly, do not depend on batching, and open with plain libraries."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import logsigmoid

from finetune_trainer import train
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.modelling import head_loss

from . import tiny
from .runs import EVERY_3, finish, journal, loaded, opened_as_its_card_says, prepared, resumed
from .spawn import run_ranks
from .variants import VARIANTS

ROWS = 12
RATES = {"prefix": "5e-2", "prompt": "5e-2", "ia3": "5e-2"}


def pairs(count: int, seed: int = 7) -> list[dict[str, Any]]:
    """Ragged prompts; the better answer repeats the last word, the worse says something else, longer or shorter."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        asked = rng.choices(tiny.WORDS, k=rng.randint(1, 5))
        worse = rng.choices(tiny.WORDS, k=rng.randint(1, 4))
        rows.append({"prompt": " ".join(asked), "chosen": f"{asked[-1]} {asked[-1]}", "rejected": " ".join(worse)})
    return rows


def feedback(count: int) -> list[dict[str, Any]]:
    """The same as single answers."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, row in enumerate(pairs(count))
    ]


def make(folder: Path, model: Path, objective: dict[str, Any], method: dict[str, Any], /, **spec: Any) -> Any:
    """A job of eight steps that is evaluated on what it trains on."""
    data = tiny.write_rows(folder / "train.jsonl", feedback(ROWS) if "kto" in objective else pairs(ROWS))
    (name,) = method
    training = {"maxSteps": 8, "batchSize": 6, "microBatchSize": 2, "learningRate": RATES.get(name, "5e-3")}
    training |= spec.pop("training", {})
    dataset = {"evaluation": {"sources": [{"uri": f"file://{data}"}]}}
    return tiny.job(folder, model, data, objective=objective, method=method, training=training, dataset=dataset, **spec)


def trained(folder: Path, model: Path, objective: dict[str, Any], method: dict[str, Any], /, **spec: Any) -> list[Any]:
    """Lines of the journal."""
    finish(make(folder, model, objective, method, **spec), folder)
    return journal(folder)


def evaluations(found: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [line for line in found if "eval_loss" in line]


CASES = [
    *((objective, "lora") for objective in ("dpo", "orpo", "kto", "reward")),
    *(("dpo", variant) for variant in ("full", "lora-pissa", "prefix-text")),
    ("kto", "full"),
]


@pytest.mark.parametrize(("objective", "variant"), CASES)
def test_it_learns_which_answer_is_better_and_resumes_exactly(
    tmp_path: Path, llama: Path, objective: str, variant: str
) -> None:
    """The same bytes, whether the reference is switched off or was computed before."""
    resumed(make(tmp_path, llama, {objective: {}}, VARIANTS[variant], checkpoints=EVERY_3), tmp_path, 3)
    before, after = evaluations(journal(tmp_path))
    assert after["eval_loss"] < before["eval_loss"] - 0.001
    assert after["eval_margin"] > before["eval_margin"]


@pytest.mark.parametrize(
    ("objective", "variant"),
    [
        *(("dpo", name) for name in ("lora", "qlora", "adapter-houlsby", "ia3", "full", "lora-olora", "continued")),
        *(("kto", name) for name in ("lora", "full")),
    ],
)
def test_nothing_is_won_before_the_first_step(tmp_path: Path, llama: Path, objective: str, variant: str) -> None:
    """To the bit where the adapter is switched off; with numbers computed before, up to what other batches round to."""
    method, model = VARIANTS.get(variant, {"lora": {}}), {}
    if variant == "continued":
        trained(tmp_path / "first", llama, {"orpo": {}}, method)
        model = {"adapter": {"uri": f"file://{tmp_path}/first/output"}}
    found = trained(tmp_path, llama, {objective: {}}, method, training={"maxSteps": 1}, model=model)
    start = evaluations(found)[0]
    at_once = {"dpo": math.log(2), "kto": 0.5}[objective]
    exact = variant in ("lora", "qlora", "adapter-houlsby", "ia3")
    assert abs(start["eval_margin"]) <= (0 if exact else 1e-5)
    assert math.isclose(start["eval_loss"], at_once, abs_tol=1e-6)
    step = next(line for line in found if "loss" in line)
    assert math.isclose(step["loss"], at_once, abs_tol=1e-6)
    assert objective == "kto" or abs(step["margin"]) <= (0 if exact else 1e-5)


@pytest.mark.parametrize(
    ("objective", "method"),
    [("dpo", "lora"), ("dpo", "full"), ("kto", "full"), ("orpo", "lora"), ("reward", "lora")],
)
def test_losses_do_not_depend_on_batching_and_ranks(tmp_path: Path, llama: Path, objective: str, method: str) -> None:
    """KTO's z0 and ORPO's mean over tokens are of the whole step; steps of five rows leave ranks unequal parts."""
    found = {}
    for size, world in ((5, 1), (1, 1), (2, 2)):
        folder = tmp_path / f"{size}-{world}"
        training = {"maxSteps": 5, "batchSize": 5, "microBatchSize": size}
        job = make(folder, llama, {objective: {}}, {method: {}}, training=training)
        verdict = run_ranks(job, folder, world)
        assert verdict.code == 0, verdict.message
        names = ("loss", "accuracy", "margin", "eval_loss", "eval_margin", "eval_accuracy")
        found[folder] = [[line.get(name, 0.0) for name in names] for line in journal(folder)]
    first, *others = found.values()
    for other in others:
        np.testing.assert_allclose(other, first, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "full", "prefix"])
def test_a_reward_model_scores_as_its_card_says(tmp_path: Path, llama: Path, variant: str) -> None:
    """The plain library, on one answer after the other, finds the held-out loss that training ended with."""
    found = trained(tmp_path, llama, {"reward": {}}, VARIANTS[variant], evaluation={"metric": "eval_accuracy"})
    last = evaluations(found)[-1]
    output = tmp_path / "output"
    model = opened_as_its_card_says(output)
    assert model.config.num_labels == 1
    rows = prepared(tmp_path)
    scores = torch.tensor([score(model, tokens) for both in held_out(rows) for tokens, _ in both]).view(-1, 2)
    assert math.isclose(float(-logsigmoid(scores[:, 0] - scores[:, 1]).mean()), last["eval_loss"], abs_tol=2e-5)
    assert float((scores[:, 0] > scores[:, 1]).double().mean()) == last["eval_accuracy"]

    code = (output / "README.md").read_text().split("```python\n")[2].split("```")[0]
    names: dict[str, Any] = {"transformers": transformers, "model": model}
    row = pairs(1)[0]
    for said, answer in (("a question", row["prompt"]), ("an answer", row["chosen"]), ("this folder", str(output))):
        code = code.replace(said, answer)
    exec(code, names)
    assert math.isclose(float(names["score"]), float(scores[0, 0]), abs_tol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "full"])
def test_a_tuned_model_prefers_what_its_metrics_say(tmp_path: Path, llama: Path, variant: str) -> None:
    """The loss by hand, of the plain model that the card opens and the plain base."""
    last = evaluations(trained(tmp_path, llama, {"dpo": {"labelSmoothing": "0.1"}}, VARIANTS[variant]))[-1]
    models = opened_as_its_card_says(tmp_path / "output"), transformers.AutoModelForCausalLM.from_pretrained(llama)
    rows = prepared(tmp_path)
    gains = [
        log_probability(models[0], *answer) - log_probability(models[1].eval(), *answer)
        for both in held_out(rows)
        for answer in both
    ]
    margins = 0.1 * (torch.tensor(gains)[::2] - torch.tensor(gains)[1::2])
    loss = -0.9 * logsigmoid(margins) - 0.1 * logsigmoid(-margins)
    assert math.isclose(float(loss.mean()), last["eval_loss"], abs_tol=2e-5)
    assert math.isclose(float(margins.mean()), last["eval_margin"], abs_tol=2e-5)


Sequence = tuple[torch.Tensor, np.ndarray[Any, Any]]


def held_out(rows: RowSet) -> list[tuple[Sequence, Sequence]]:
    """Tokens and masks of both sequences of each row."""
    found = []
    for row in np.flatnonzero(rows.sources < 0):
        start, end = int(rows.offsets[row]), int(rows.offsets[row + 1])
        middle = start + int(rows.splits[row])
        first, second = (
            (torch.from_numpy(rows.tokens[span].astype(np.int64)), rows.learned[span])
            for span in (slice(start, middle), slice(middle, end))
        )
        found.append((first, second))
    return found


def score(model: Any, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=tokens[None], attention_mask=torch.ones(1, len(tokens))).logits[0, 0])


def log_probability(model: Any, tokens: torch.Tensor, learned: Any) -> float:
    with torch.no_grad():
        each = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
    at = np.flatnonzero(learned)
    return float(each[at - 1, tokens[at]].sum())


def test_log_probabilities_in_chunks_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And their gradients; three tokens a chunk, which does not divide them."""
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 3 * 4 * 17)
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 17), torch.randn(10, 8, requires_grad=True)
    targets, slope = torch.randint(17, (10,)), torch.randn(10)
    found = []
    for ours in (True, False):
        if ours:
            each = head_loss.head_log_probabilities(hidden, head, targets)
        else:
            each = head(hidden).log_softmax(-1)[torch.arange(10), targets]
        found.append([each, *torch.autograd.grad(each @ slope, [hidden, head.weight, head.bias])])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_how_far_a_model_has_moved_does_not_depend_on_dropout(tmp_path: Path, llama: Path) -> None:
    """Else a resumed run, which draws anew, would not end as one that was never stopped."""
    job = make(tmp_path, llama, {"kto": {}}, {"lora": {"dropout": "0.5"}})
    context, made = tiny.context(job, tmp_path / "scratch"), loaded(job, tmp_path)
    made.masters.weights.add_(0.1 * torch.randn(made.masters.weights.shape, generator=torch.Generator().manual_seed(8)))
    made.masters.refresh()
    step = [np.array([row]) for row in range(8)]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.objective.begin_step(made.model, made.rows, step, [step], context.ranks)
        with torch.no_grad():
            made.model.outer.eval()
            found.append(
                float(made.objective.loss(made.model, made.objective.batch(made.rows, step, context.ranks.device)))
            )
            made.model.outer.train()
    made.objective.begin_step(made.model, made.rows, step, [], context.ranks)  # as if it had not moved
    with torch.no_grad():
        made.model.outer.eval()
        still = float(made.objective.loss(made.model, made.objective.batch(made.rows, step, context.ranks.device)))
    assert found[0] == found[1] != still


def test_a_stop_while_the_reference_is_computed_leaves_nothing(tmp_path: Path, llama: Path) -> None:
    job = make(tmp_path, llama, {"dpo": {}}, {"full": {}})
    context, made = tiny.context(job, tmp_path / "scratch"), loaded(job, tmp_path)
    asked = iter([False, False, True])
    with pytest.raises(train.Stopped, match="before training began"):
        made.objective.begin(made.model, made.rows, 2, context.ranks, lambda: next(asked))
    assert made.objective.files() == {}
