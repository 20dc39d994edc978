"""Defaults: what an expert would choose, chosen once."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_crds.resolution import Defaults, Published, learning_rate, resolve
from finetune_crds.resolved import ResolvedFineTune, ResolvedJob, ResolvedProgram
from finetune_crds.schema import openapi
from finetune_crds.support import OBJECTIVES
from finetune_crds.v1alpha1 import FineTuneJob
from finetune_crds.v1alpha1.methods import METHODS
from manifests import manifest

DEFAULTS = Defaults(trainer_image="example/trainer:1")


def resolved(**spec: Any) -> ResolvedJob:
    return resolve(FineTuneJob.model_validate(manifest(**spec)), DEFAULTS)


def fine_tune(**spec: Any) -> ResolvedFineTune:
    inner = resolved(**spec).spec
    assert isinstance(inner, ResolvedFineTune)
    return inner


def test_the_smallest_manifest_becomes_a_lora_on_one_gpu() -> None:
    spec = fine_tune()
    assert spec.method.lora is not None
    assert (spec.method.lora.rank, spec.method.lora.alpha, spec.method.lora.targets) == (16, 32, ["all-linear"])
    assert (spec.resources.nodes, spec.resources.gpus_per_node, spec.resources.gpus) == (1, 1, 1)
    assert (spec.training.learning_rate, spec.training.precision, spec.training.epochs) == (None, "bf16", "3")
    assert spec.checkpoints.storage is not None
    assert spec.checkpoints.storage.uri == "pvc://models/support-bot.checkpoints"
    assert spec.runtime.image == "example/trainer:1"


@pytest.mark.parametrize(
    ("given", "path", "expected"),
    [
        ({"method": {"full": {}}}, ("training", "learning_rate"), "2e-5"),
        ({"method": {"full": {}}}, ("training", "weight_decay"), "0.01"),
        ({"method": {"lora": {"rank": 4}}}, ("method", "lora", "alpha"), 8),
        ({"resources": {"gpusPerNode": 0}}, ("training", "precision"), "fp32"),
        ({"resources": {"gpusPerNode": 0}}, ("resources", "cpu"), 2),
        ({}, ("preflight",), "Required"),
        ({"preflight": "Skip"}, ("preflight",), "Skip"),
        ({"resources": {"gpusPerNode": 0}}, ("preflight",), "Skip"),
        ({"resources": {"gpusPerNode": 0}, "preflight": "Required"}, ("preflight",), "Required"),
        ({"resources": {"gpusPerNode": 8}}, ("resources", "memory"), "256Gi"),
        ({"training": {"maxSteps": 5}}, ("training", "epochs"), None),
        ({"training": {"tokensPerStep": 4096}}, ("training", "batch_size"), None),
        ({"training": {"warmupSteps": 7}}, ("training", "warmup_ratio"), None),
        ({"checkpoints": {"everySteps": 10}}, ("checkpoints", "every_minutes"), None),
        ({"task": "text-classification"}, ("objective", "classification", "problem"), "singleLabel"),
        ({"task": "question-answering"}, ("objective",), None),
        ({"objective": {"dpo": {}}}, ("objective", "dpo", "beta"), "0.1"),
        ({"objective": {"dpo": {}}, "method": {"full": {}}}, ("training", "learning_rate"), "1e-6"),
        ({"objective": {"orpo": {}}}, ("training", "learning_rate"), None),
        ({"objective": {"kto": {}}, "method": {"prompt": {}}}, ("training", "learning_rate"), "1.5e-3"),
        ({"objective": {"pretrain": {}}}, ("training", "epochs"), "1"),
        ({"objective": {"pretrain": {}}}, ("training", "packing"), None),
        ({"objective": {"kto": {}}}, ("training", "packing"), False),
        ({"objective": {"reward": {}}}, ("head",), "text-classification"),
        ({"objective": {"reward": {}}}, ("problem",), "regression"),
        ({"task": "text-classification"}, ("training", "packing"), False),
        (
            {
                "dataset": {"train": [{"uri": "pvc://d/t"}], "evaluation": {"fraction": "0.1"}},
                "evaluation": {"everySteps": 5},
            },
            ("evaluation", "publish"),
            "best",
        ),
    ],
)
def test_defaults_follow_method_task_and_hardware(
    given: dict[str, Any], path: tuple[str, ...], expected: object
) -> None:
    value: Any = fine_tune(**given)
    for part in path:
        value = getattr(value, part)
    assert value == expected


def test_what_makes_one_text_of_another_has_longer_answers_and_rows_of_their_own() -> None:
    for task, tokens in (("summarization", 128), ("translation", 128), ("text-generation", 64)):
        spec = fine_tune(task=task)
        assert spec.evaluation.max_new_tokens == tokens
        assert (spec.training.packing, spec.objective is None) == ((None, False) if tokens == 64 else (False, True))


def test_an_adapter_keeps_its_own_shape() -> None:
    spec = fine_tune(model={"uri": "pvc://m/base", "adapter": {"uri": "pvc://m/adapter"}})
    assert spec.method.lora is not None
    assert (spec.method.lora.rank, spec.method.lora.targets) == (None, None)


def test_a_program_of_the_users_resolves_without_training_fields() -> None:
    job = resolved(
        model=None, dataset=None, output=None, runtime={"image": "mine:1", "command": ["python", "train.py"]}
    )
    assert isinstance(job.spec, ResolvedProgram)
    assert job.spec.runtime.image == "mine:1"
    assert job.spec.checkpoints.storage is None


def test_json_brings_back_the_same_job() -> None:
    for job in (resolved(), resolved(runtime={"image": "mine:1", "command": ["true"]})):
        assert ResolvedJob.model_validate_json(json.dumps(job.to_wire())) == job


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"output": {"uri": "pvc://models/elsewhere"}}, True),
        ({"output": {"uri": "pvc://models/support-bot", "merged": True}}, False),
        ({"retries": 9}, True),
        ({"resources": {"nodes": 2}}, True),
        ({"training": {"schedule": "cosine"}}, True),
        ({"training": {"learningRate": "1e-4"}}, False),
        ({"training": {"learningRate": "2e-4"}}, False),
        ({"training": {"optimizer": {"adamw": {"paged": True}}}}, True),
        ({"training": {"gradientCheckpointing": True}}, True),
        ({"training": {"optimizer": {"adamw": {"bits": 8}}}}, False),
        ({"dataset": {"train": [{"uri": "pvc://datasets/other.jsonl"}]}}, False),
        ({"runtime": {"image": "mine:1"}}, False),
    ],
)
def test_the_digest_is_over_what_decides_the_outcome(change: dict[str, Any], same: bool) -> None:
    assert (resolved(**change).digest == resolved().digest) is same


def test_an_upgrade_of_the_trainer_keeps_the_digest() -> None:
    job = FineTuneJob.model_validate(manifest())
    assert resolve(job, Defaults(trainer_image="example/trainer:2")).digest == resolve(job, DEFAULTS).digest


def told_defaults(node: dict[str, Any], wire: dict[str, Any], path: str = "spec") -> Iterator[tuple[str, str, Any]]:
    """Path, the default that `kubectl explain` names, and what it resolves to; for plain values."""
    for name, child in node.get("properties", {}).items():
        value = wire.get(name)
        told = re.search(r'Default "?([-\w./]+?)"?(?=[ ;,]|\.?(?: |$))', child.get("description", ""))
        if isinstance(value, dict):
            yield from told_defaults(child, value, f"{path}.{name}")
        elif told and value is not None and not isinstance(value, list):
            yield f"{path}.{name}", told[1], value


NEEDED: dict[str, Any] = {
    "freeze": {"trainHead": True},
    "gradualUnfreezing": {"everySteps": 1},
    "grpo": {"rewards": [{"name": "form", "regex": {"pattern": "x"}}]},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_that_kubectl_explain_names_are_those_that_a_job_gets(method: str) -> None:
    spec = resolved(method={method: NEEDED.get(method, {})}).spec.to_wire()
    found = list(told_defaults(openapi()["properties"]["spec"], spec))
    by_method = {"spec.training.learningRate", "spec.training.weightDecay"} if method != "lora" else set()
    wrong = [
        f"{path}: told {told}, is {value}"
        for path, told, value in found
        if path not in by_method
        and not (path.endswith("lora.alpha") and told == "twice")  # the rank
        and told != str(value).replace("True", "true").replace("False", "false")
    ]
    assert not wrong
    assert len(found) > 20


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_defaults_of_objectives_are_those_that_kubectl_explain_names(objective: str) -> None:
    task = OBJECTIVES[objective][0]
    wire = resolved(task=task, objective={objective: NEEDED.get(objective, {})}).spec.to_wire()["objective"]
    for path, told, value in told_defaults(openapi()["properties"]["spec"]["properties"]["objective"], wire):
        assert told == str(value).lower().replace("singlelabel", "singleLabel"), path


@pytest.mark.parametrize("method", METHODS)
def test_the_learning_rate_of_a_method_is_told(method: str) -> None:
    """By kubectl explain; it is the operator's to choose, or by the model's size the trainer's."""
    description = openapi()["properties"]["spec"]["properties"]["training"]["properties"]["learningRate"]["description"]
    rates = {
        name: rate
        for rate, names in re.findall(r'"([^"]+)" for ([\w ]+?)(?: of models up to 13B)?(?:,|\.)', description)
        for name in names.split(" and ")
    }
    by_size = method in ("lora", "qlora")
    chosen = fine_tune(method={method: NEEDED.get(method, {})}).training.learning_rate
    assert chosen == (None if by_size else rates[method])
    assert learning_rate(method, "sft", 13_015_864_320) == rates[method], "Llama 2 13B"
    (large,) = re.findall(r'"([^"]+)" of larger ones', description)
    assert learning_rate(method, "sft", 32_528_943_616) == (large if by_size else rates[method]), "LLaMA 33B"


@pytest.mark.parametrize(
    ("objective", "small", "large"),
    [("dpo", "1e-5", "5e-6"), ("orpo", "8e-5", "4e-5"), ("reward", "1e-4", "5e-5"), ("pretrain", "2e-4", "1e-4")],
)
def test_an_objective_takes_its_part_of_the_rate_for_the_size(objective: str, small: str, large: str) -> None:
    assert [learning_rate("lora", objective, weights) for weights in (10**9, 10**11)] == [small, large]


def test_every_method_resolves_to_something_whole() -> None:
    for method in METHODS:
        chosen = fine_tune(method={method: NEEDED.get(method, {})}).method
        assert chosen.name == method


def test_the_output_of_a_job_takes_the_place_of_its_name() -> None:
    job = FineTuneJob.model_validate(manifest(model={"job": "first", "adapter": {"job": "second"}}))
    there = {"second": Published("s3://b/second", "sha256:2", "http://minio:9000", None)}
    spec = resolve(job, DEFAULTS, there).spec
    assert spec.model is not None and spec.model.adapter is not None
    assert (spec.model.uri, spec.model.digest) == ("job://first", None), "not known yet"
    assert (spec.model.adapter.uri, spec.model.adapter.digest) == ("s3://b/second", "sha256:2")
    assert spec.model.adapter.endpoint == "http://minio:9000"


def test_answers_of_grpo_are_generated_where_it_is_evaluated_and_saved() -> None:
    grpo = NEEDED["grpo"] | {"iterations": 4, "epsilon": "0.1", "loss": "dr_grpo"}
    spec = fine_tune(objective={"grpo": grpo}, evaluation={"everySteps": 5}, checkpoints={"everySteps": 8})
    assert (spec.evaluation.every_steps, spec.checkpoints.every_steps) == (8, 8)
    assert spec.evaluation.metric == "eval_reward" and spec.training.packing is False
    assert spec.objective and spec.objective.grpo
    assert (spec.objective.grpo.epsilon_high, spec.objective.grpo.scale_rewards) == ("0.1", "none")
    assert spec.objective.grpo.rewards[0].weight == "1"


def test_what_an_earlier_operator_resolved_is_still_read() -> None:
    """status.resolved of a job that runs while the operator is upgraded lacks the fields that came later."""
    wire = fine_tune(objective={"sft": {}}).to_wire()
    del wire["preflight"], wire["evaluation"]["benchmarks"], wire["evaluation"]["fewShot"]
    job = {"name": "a", "namespace": "b", "uid": "c", "digest": "d", "spec": wire}
    assert isinstance(ResolvedJob.model_validate(job).spec, ResolvedFineTune)
