"""What judges answers, one kind after the other; and a reward model that objective reward made, as a judge."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from finetune_crds.resolved import ResolvedRewardSource
from finetune_trainer import setup, train
from finetune_trainer.objectives.rewards import Answer, panel

from . import tiny
from .test_grpo import make, trained
from .test_preference import make as preference
from .test_preference import pairs


def scores(source: dict[str, Any], *texts: str, asked: Any = "q", **columns: Any) -> list[float]:
    given = ResolvedRewardSource.model_validate({"name": "it", "weight": "1"} | source)
    answers = [Answer(asked, text, [1] * len(text), columns) for text in texts]
    return [float(one) for one in panel([given], {}).scores(answers)[:, 0]]


def test_regular_expressions() -> None:
    texts = ("a 42", "42", "4\n2", "no")
    assert scores({"regex": {"pattern": r"\d+"}}, *texts) == [1, 1, 1, 0]
    assert scores({"regex": {"pattern": r"\d.?\d", "match": "full"}}, *texts) == [0, 1, 1, 0]


def test_json_schemas() -> None:
    schema = {
        "type": "object", "required": ["n"], "properties": {"n": {"$ref": "#/$defs/whole"}}, "$defs": {"whole": {"type": "integer"}},
    }  # fmt: skip
    texts = (
        '{"n": 1}',
        ' {"n": 2}\n',
        '{"n": 1.5}',
        "{}",
        '```json\n{"n": 1}\n```',
        '{"n": 1} and more',
        "[" * 100_000,
    )
    assert scores({"jsonSchema": {"schema": json.dumps(schema)}}, *texts) == [1, 1, 0, 0, 0, 0, 0]
    assert scores({"jsonSchema": {"schema": "{}"}}, "NaN", "1") == [0, 1]


def test_a_schema_elsewhere_is_not_fetched() -> None:
    with pytest.raises(train.UserError, match=r"objective\.grpo\.rewards: it failed with"):
        scores({"jsonSchema": {"schema": '{"$ref": "http://127.0.0.1:9/schema"}'}}, "1")


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [
        ("so #### 42", "because #### 42", 1),
        ("#### 1,234", "#### 1234.0", 1),
        ("#### $7.", "#### 7", 1),
        ("#### 41 no, #### 42", "#### 42", 1),
        ("42", "#### 42", 0),
        ("#### 420", "#### 42", 0),
        ("#### x", "x", 1),
        ("#### 1,2", "#### 12", 0),
    ],
)
def test_right_answers(said: str, right: str, score: float) -> None:
    assert scores({"reference": {"column": "a", "pattern": r"#### (\S+)"}}, said, a=right) == [score]
    assert scores({"reference": {"column": "a"}}, f" {right} ", a=right) == [1]


def test_functions_are_called_as_trl_calls_them() -> None:
    source = {"entryPoint": "tests.training.judges:lengths", "allowUserCode": True}
    assert scores(source, "ab", "abc", hint="12") == [20202, 20303]
    assert scores(source, "ab", asked=[{"role": "user", "content": "q"}]) == [202]


def test_rewards_are_summed_with_their_weights() -> None:
    sources = [
        ResolvedRewardSource.model_validate({"name": name, "weight": weight, "regex": {"pattern": name}})
        for name, weight in (("a", "2"), ("b", "-0.5"))
    ]
    judges = panel(sources, {})
    found = judges.scores([Answer("q", text, [], {}) for text in ("a", "ab", "b", "")])
    assert judges.totals(found).tolist() == [2, 1.5, -0.5, 0]


def test_an_entry_point_sees_the_row(tmp_path: Path, llama: Path) -> None:
    """All its columns, in training and in evaluation."""
    reward = {"name": "f", "entryPoint": "tests.training.judges:lengths", "allowUserCode": True}
    rows = [{"prompt": "red", "hint": "x" * 3}, {"prompt": "blue", "hint": "x" * 3}]
    found = trained(tmp_path, llama, {"lora": {}}, rows=rows, grpo={"rewards": [reward]}, training={"maxSteps": 1, "batchSize": 2})  # fmt: skip
    assert all(30_000 < line.get("eval_reward_f", line.get("reward_f", 0)) < 40_000 for line in found)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_reward_model_of_objective_reward_judges_as_it_was_trained_to(
    tmp_path: Path, llama: Path, method: str
) -> None:
    """Its scores are those that its own evaluation found: the better answers' less the worse answers' is eval_margin."""
    job = preference(tmp_path / "reward", llama, {"reward": {}}, {method: {}}, training={"maxSteps": 3})
    verdict = train.run(job, tiny.context(job, tmp_path / "reward/scratch"))
    assert verdict.code == 0, verdict.message
    last = {metric.name: float(metric.value) for metric in (verdict.evaluation and verdict.evaluation.after) or []}
    output = f"file://{tmp_path}/reward/output"
    place = {"uri": output} if method == "full" else {"uri": f"file://{llama}", "adapter": {"uri": output}}
    spec = make(tmp_path, llama, {"lora": {}}, grpo={"rewards": [{"name": "judge", "model": place}]})
    context = tiny.context(spec, tmp_path / "scratch")
    made = setup.load(setup.read(spec.spec, context), context.ranks)
    judge = made.objective._panel  # type: ignore[attr-defined]
    rows = pairs(24)
    better, worse = (
        judge.scores([Answer(row["prompt"], row[name], [], {}) for row in rows])[:, 0]
        for name in ("chosen", "rejected")
    )
    assert math.isclose(float((better - worse).mean()), last["eval_margin"], rel_tol=1e-4, abs_tol=1e-5)


def test_a_model_that_writes_is_no_judge(tmp_path: Path, llama: Path) -> None:
    place = {"uri": f"file://{llama}"}
    job = make(tmp_path, llama, {"lora": {}}, grpo={"rewards": [{"name": "judge", "model": place}]})
    verdict = train.run(job, tiny.context(job, tmp_path / "scratch"))
    assert "judge: model must be a classifier with one output" in (verdict.message or "")


def test_an_adapter_without_a_head_is_no_judge(tmp_path: Path, llama: Path) -> None:
    """The head would be drawn at random."""
    job = preference(tmp_path / "dpo", llama, {"dpo": {}}, {"lora": {}}, training={"maxSteps": 1})
    assert train.run(job, tiny.context(job, tmp_path / "dpo/scratch")).code == 0
    place = {"uri": f"file://{llama}", "adapter": {"uri": f"file://{tmp_path}/dpo/output"}}
    job = make(tmp_path, llama, {"lora": {}}, grpo={"rewards": [{"name": "judge", "model": place}]})
    verdict = train.run(job, tiny.context(job, tmp_path / "scratch"))
    assert "judge: model.adapter brings no head that scores answers" in (verdict.message or "")
