"""What judges answers, one kind after the other; and a reward model that objective reward made, as a judge."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pytest

from finetune_crds.resolution import Published
from finetune_crds.resolved import ResolvedJob, ResolvedRewardSource
from finetune_crds.v1alpha1 import JobOutput, Location
from finetune_crds.v1alpha1.model import SecretReference
from finetune_crds.v1alpha1.status import RewardInput
from finetune_crds.verdict import ExitCode
from finetune_trainer import judges, preflight, setup, train
from finetune_trainer.objectives.rewards import Answer, panel

from . import tiny
from .test_grpo import make, trained
from .test_preference import ROWS, pairs
from .test_preference import make as preference


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


def test_an_answer_that_cannot_be_judged_by_a_schema_does_not_hold() -> None:
    """Runaway digits and depths are what models write."""
    cents = {"jsonSchema": {"schema": '{"multipleOf": 0.01}'}}
    assert scores(cents, "1e400", "9" * 400, "1") == [0, 0, 1]
    nested = {"jsonSchema": {"schema": '{"items": {"anyOf": [{"$ref": "#"}, {"type": "number"}]}}'}}
    assert scores(nested, "[" * 400 + "]" * 400, "[[1]]") == [0, 1]


@pytest.mark.parametrize(
    "schema",
    ['{"$ref": "#/$defs/none"}', '{"anyOf": [{"pattern": "^x{e}$"}]}', '{"$ref": "#"}'],
    ids=["nowhere", "pattern", "itself"],
)
def test_a_schema_that_cannot_be_used_is_told_of_at_once(schema: str) -> None:
    with pytest.raises(train.UserError, match=r"objective\.grpo\.rewards: it: "):
        scores({"jsonSchema": {"schema": schema}})


def test_a_schema_elsewhere_is_not_fetched() -> None:
    with pytest.raises(train.UserError, match=r"it can refer to what is within itself only"):
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


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"regex": {"pattern": "(a|aa)+$"}}, "a" * 80 + "b"),
        ({"regex": {"pattern": "(a|aa)+", "match": "full"}}, "a" * 80 + "b"),
        ({"reference": {"column": "right", "pattern": "(a|aa)+$"}}, "a" * 80 + "b"),
        ({"jsonSchema": {"schema": '{"pattern": "(a|aa)+$"}'}}, json.dumps("a" * 80 + "b")),
        ({"jsonSchema": {"schema": '{"patternProperties": {"(a|aa)+$": {}}}'}}, json.dumps({"a" * 80 + "b": 1})),
        (
            {"jsonSchema": {"schema": '{"$schema": "http://json-schema.org/draft-07/schema#", "pattern": "x", "anyOf": [true], "items": {"$ref": "#"}, "additionalProperties": {"pattern": "(a|aa)+$"}}'}},
            json.dumps([{"q": "a" * 80 + "b"}]),
        ),
    ],
    ids=["search", "full", "reference", "schema", "properties", "schema within itself"],
)  # fmt: skip
def test_a_pattern_that_takes_for_ever_is_stopped(
    monkeypatch: pytest.MonkeyPatch, source: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("finetune_trainer.objectives.patterns.SECONDS", 0.05)
    with pytest.raises(train.UserError, match=r"objective\.grpo\.rewards: it: a pattern took more than 0\.05 s"):
        scores(source, said, right="")


@pytest.mark.parametrize("pattern", ["(", r"\p{Lu}", "[[:alpha:]]", "(?:foo){e<=1}", "a{d}", "(?e)x", "[a-z--b]"])
def test_what_is_no_pattern_of_python_or_another_one_is_refused(pattern: str) -> None:
    with pytest.raises(train.UserError, match="it: pattern is no regular expression: "):
        scores({"regex": {"pattern": pattern}}, "x")


@pytest.mark.parametrize(
    "pattern",
    [r"\\boxed{(.+)}", r"a\{d\}", "a{2,3}", "{x}", r"[\[]", r"(?i)(?P<n>a)\w{,2}(?=b)", "a++b", r"^\s*\d+\.?$"],
)
def test_patterns_mean_what_they_mean_to_python(pattern: str) -> None:
    said = [r"\boxed{42}", "a{d}", "aab", "{x}", "[", "Axyb", "aaab", "7.\n", "", "é1", "a\nb"]
    expected = [float(bool(re.search(pattern, text, re.DOTALL))) for text in said]
    assert scores({"regex": {"pattern": pattern}}, *said) == expected


def test_schemas_are_those_of_jsonschema() -> None:
    schema = {
        "properties": {"a": {"type": "integer"}}, "patternProperties": {"^x": {"type": "string"}, "y$": True},
        "additionalProperties": {"type": "null", "pattern": "never"},
    }  # fmt: skip
    said: list[Any] = [
        {"a": 1},
        {"a": "1"},
        {"x": "1"},
        {"x": 1},
        {"xy": "1"},
        {"xy": 1},
        {"b": None},
        {"b": 1},
        {"by": 1},
        3,
    ]
    for inner in (schema, schema | {"additionalProperties": False}, {"pattern": "^a"}):
        expected = [float(jsonschema.validators.validator_for(inner)(inner).is_valid(one)) for one in said]
        assert scores({"jsonSchema": {"schema": json.dumps(inner)}}, *map(json.dumps, said)) == expected
    with pytest.raises(train.UserError, match="patternProperties beside unevaluatedProperties"):
        scores({"jsonSchema": {"schema": '{"patternProperties": {}, "unevaluatedProperties": false}'}}, "1")


def test_functions_are_called_as_trl_calls_them() -> None:
    source = {"entryPoint": "tests.training.judges:lengths", "allowUserCode": True}
    assert scores(source, "ab", "abc", hint="12") == [20202, 20303]
    assert scores(source, "ab", asked=[{"role": "user", "content": "q"}]) == [202]


def test_rewards_are_summed_with_their_weights() -> None:
    sources = [
        ResolvedRewardSource.model_validate({"name": name, "weight": weight, "regex": {"pattern": name}})
        for name, weight in (("a", "2"), ("b", "-0.5"))
    ]
    of_all = panel(sources, {})
    found = of_all.scores([Answer("q", text, [], {}) for text in ("a", "ab", "b", "")])
    assert of_all.totals(found).tolist() == [2, 1.5, -0.5, 0]


def test_none_is_no_judgement() -> None:
    """A sum is that of what was judged; what nobody judged has none."""
    sources = [
        ResolvedRewardSource.model_validate({"name": name, "weight": "2", "entryPoint": f"tests.training.judges:{name}", "allowUserCode": True})
        for name in ("vowels", "capitals")
    ]  # fmt: skip
    of_all = panel(sources, {})
    found = of_all.scores([Answer("q", text, [], {}) for text in ("ab", "A", "aB", "1")])
    np.testing.assert_equal(found, [[1, math.nan], [math.nan, 1], [1, 1], [math.nan, math.nan]])
    np.testing.assert_equal(of_all.totals(found), [2, 2, 4, math.nan])


def test_an_entry_point_sees_the_row(tmp_path: Path, llama: Path) -> None:
    """All its columns, in training and in evaluation."""
    reward = {"name": "f", "entryPoint": "tests.training.judges:lengths", "allowUserCode": True}
    rows = [{"prompt": "red", "hint": "x" * 3}, {"prompt": "blue", "hint": "x" * 3}]
    found = trained(tmp_path, llama, {"lora": {}}, rows=rows, grpo={"rewards": [reward]}, training={"maxSteps": 1, "batchSize": 2})  # fmt: skip
    assert all(30_000 < line.get("eval_reward_f", line.get("reward_f", 0)) < 40_000 for line in found)


class Liked(NamedTuple):
    """A reward model that objective reward has published."""

    job: ResolvedJob
    output: Path
    margin: float
    """What its own evaluation found the better answers' scores to be above the worse ones'."""
    digest: str


@pytest.fixture(scope="module", params=["lora", "full"])
def liked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Liked:
    folder = tmp_path_factory.mktemp("liked")
    added = {"addTokens": {"tokens": ["<blue>"]}}
    job = preference(folder, llama, {"reward": {}}, {request.param: {}}, training={"maxSteps": 3}, model=added)
    verdict = train.run(job, tiny.context(job, folder / "scratch"))
    assert verdict.code == 0, verdict.message
    assert verdict.evaluation and verdict.evaluation.after and verdict.output and verdict.output.digest
    (margin,) = [float(metric.value) for metric in verdict.evaluation.after if metric.name == "eval_margin"]
    return Liked(job, folder / "output", margin, verdict.output.digest)


def grpo_judged_by(folder: Path, model: Path, liked: Liked, place: dict[str, Any], **spec: Any) -> Any:
    """A job with that reward model, of which the operator would tell this."""
    base = liked.job.spec.model if (liked.output / "adapter_config.json").is_file() else None
    published = {"liked": Published(f"file://{liked.output}", liked.digest, base=base)}
    rewards = [{"name": "judge", "model": place}]
    return make(folder, model, {"lora": {}}, grpo={"rewards": rewards}, published=published, **spec)


@pytest.mark.parametrize("by", ["place", "job"])
def test_a_reward_model_of_objective_reward_judges_as_it_was_trained_to(
    tmp_path: Path, llama: Path, liked: Liked, by: str
) -> None:
    """The better answers' scores less the worse answers' are eval_margin; an adapter alone says itself what it is on."""
    place = {"uri": f"file://{liked.output}"} if by == "place" else {"job": "liked"}
    job = grpo_judged_by(tmp_path, llama, liked, place)
    context = tiny.context(job, tmp_path / "scratch")
    reading = setup.read(job.spec, context)
    judge = setup.load(reading, context.ranks).objective._panel  # type: ignore[attr-defined]
    rows = pairs(ROWS)
    better, worse = (
        judge.scores([Answer(row["prompt"], row[name], [], {}) for row in rows])[:, 0]
        for name in ("chosen", "rejected")
    )
    assert math.isclose(float((better - worse).mean()), liked.margin, rel_tol=1e-4, abs_tol=1e-5)
    assert (reading.inputs.rewards is not None) == (by == "job")


def test_a_reward_model_by_job_is_the_one_that_was_published(tmp_path: Path, llama: Path, liked: Liked) -> None:
    """The chain's end: status names it, and another one is refused."""
    job = grpo_judged_by(tmp_path, llama, liked, {"job": "liked"}, training={"maxSteps": 1})
    verdict = train.run(job, tiny.context(job, tmp_path / "scratch"))
    assert verdict.code == 0, verdict.message
    assert verdict.inputs and verdict.inputs.rewards
    made_by, others = JobOutput(job="liked", digest=liked.digest), liked.job.spec.method.full is not None  # type: ignore[union-attr]
    assert verdict.inputs.rewards == [RewardInput(name="judge", **{"model" if others else "adapter": made_by})]
    assert "reward_judge" in (tmp_path / "output/metrics.jsonl").read_text()

    (weights,) = liked.output.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    verdict = train.run(job, tiny.context(job, tmp_path / "other"))
    weights.write_bytes(content)
    assert verdict.code == ExitCode.USER_ERROR
    assert "spec.objective.grpo.rewards[0].model." in verdict.message
    assert "no longer holds what FineTuneJob liked published" in verdict.message


def test_an_adapter_whose_base_is_elsewhere_is_told_of(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "adapter").mkdir()
    config = {"base_model_name_or_path": "pvc://models/base", "peft_type": "LORA"}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    place = {"uri": f"file://{tmp_path}/adapter"}
    job = make(tmp_path, llama, {"lora": {}}, grpo={"rewards": [{"name": "judge", "model": place}]})
    verdict = train.run(job, tiny.context(job, tmp_path / "scratch"))
    assert "is an adapter on pvc://models/base, which cannot be read here" in (verdict.message or "")
    assert "name the model by model.uri and the adapter by model.adapter.uri" in (verdict.message or "")


@pytest.mark.parametrize(
    ("says", "uri"),
    [
        ({"base_model_name_or_path": "org/base", "revision": "v1"}, "hf://org/base@v1"),
        ({"base_model_name_or_path": "org/base", "revision": None}, "hf://org/base"),
        ({"base_model_name_or_path": "/models/größte base"}, "file:///models/größte base"),
        ({"base_model_name_or_path": "s3://bucket/base"}, "s3://bucket/base"),
    ],
)
def test_credentials_of_an_adapter_are_shown_to_its_own_server_alone(
    tmp_path: Path, says: dict[str, Any], uri: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(says))
    assert judges._base_uri(tmp_path) == uri
    store = Location(uri="s3://bucket/adapter", secret_ref=SecretReference(name="s"), endpoint="http://minio:9000")
    same = uri.startswith("s3://")
    assert judges._beside(store, uri) == (store.model_copy(update={"uri": uri}) if same else Location(uri=uri))


def test_a_reward_model_with_too_few_positions_is_refused_before_training(tmp_path: Path, llama: Path) -> None:
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(llama, num_labels=1, max_position_embeddings=100)
    model.save_pretrained(tmp_path / "short")
    tiny.tokenizer().save_pretrained(tmp_path / "short")
    rewards = [{"name": "judge", "model": {"uri": f"file://{tmp_path}/short"}}]
    job = make(tmp_path, llama, {"lora": {}}, grpo={"rewards": rewards}, training={"sequenceLength": 101})
    verdict = preflight.run(job, tiny.context(job, tmp_path / "scratch"))
    assert verdict.code == ExitCode.USER_ERROR
    assert "judge: model has 100 positions, and prompt and answer may have 101 tokens; lower" in verdict.message
    job = make(tmp_path, llama, {"lora": {}}, grpo={"rewards": rewards}, training={"sequenceLength": 100})
    context = tiny.context(job, tmp_path / "scratch")
    judge = setup.load(setup.read(job.spec, context), context.ranks).objective._panel  # type: ignore[attr-defined]
    long, cut = (judge.scores([Answer(asked, "blue", [], {})])[0, 0] for asked in ("x" * 500, "x" * 76))
    assert long == cut, "the prompt has lost its beginning"


def test_what_is_held_out_must_be_judged(tmp_path: Path, llama: Path) -> None:
    """Or there would be no eval_reward; told before anything is trained."""
    rewards = [{"name": "f", "entryPoint": "tests.training.judges:nothing", "allowUserCode": True}]
    job = make(tmp_path, llama, {"lora": {}}, grpo={"rewards": rewards})
    verdict = train.run(job, tiny.context(job, tmp_path / "scratch"))
    assert verdict.code == ExitCode.USER_ERROR and verdict.step == 0
    assert "no answer was judged" in (verdict.message or "")


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
