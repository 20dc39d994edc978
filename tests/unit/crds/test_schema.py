"""The CRD: structural, described, small; the same rules hold without an API server."""

import itertools
import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from finetune_crds import locations
from finetune_crds.generate import files
from finetune_crds.schema import crd, openapi
from finetune_crds.v1alpha1 import MUST_BE
from finetune_crds.validation import InvalidJob, check
from manifests import FUNCTION, MALFORMED, NAMES, REGEX, ROWS, Malformed, manifest

CLIENT_SIDE_APPLY_MAX = 200 * 1024
"""Bytes; `kubectl apply` keeps a copy, as JSON, in annotations of at most 256 KiB."""


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


def test_every_field_has_a_description() -> None:
    missing = [
        p
        for p, n in nodes(openapi())
        if p.split(".")[-1] not in ("", "metadata") and not p.endswith("[]") and not n.get("description")
    ]
    assert missing == []


def test_the_schema_is_structural() -> None:
    for path, node in nodes(openapi()):
        assert not {"$ref", "allOf", "oneOf", "default", "title"} & node.keys(), path
        assert node.get("type") or node.get("x-kubernetes-int-or-string") or path == "", path
        assert node.get("type") != "number", f"{path}: floats do not survive every client"


def test_the_crd_fits_into_a_client_side_apply() -> None:
    copy = json.dumps(crd(), separators=(",", ":"), ensure_ascii=False)
    escaped = sum(copy.count(letter) for letter in "&<>")  # of which Go writes six bytes each
    assert len(copy.encode()) + 5 * escaped < CLIENT_SIDE_APPLY_MAX


def test_helm_sees_no_braces_of_its_own_in_the_crd() -> None:
    (template,) = (text for path, text in files().items() if path.name == "crds.yaml")
    assert template.replace('{{ "{{" }}', "").count("{{") == 2, "only the condition around the CRD is Helm's"


@pytest.mark.parametrize("wrong", MALFORMED, ids=NAMES)
def test_a_malformed_manifest_is_told_what_to_mend(wrong: Malformed) -> None:
    with pytest.raises(InvalidJob) as refused:
        check(manifest(**wrong.spec), cluster=True)
    assert wrong.sentence in str(refused.value)


def test_an_image_takes_the_output_where_checkpoints_lie_elsewhere() -> None:
    to_image = {"uri": "oci://registry:5000/team/bot:v1", "secretRef": {"name": "push"}, "endpoint": "http://r:5000"}
    spec = check(manifest(output=to_image, checkpoints={"storage": {"uri": "pvc://work/bot"}}), cluster=True).spec
    assert spec.output is not None


def test_file_locations_are_for_local_runs() -> None:
    assert check(manifest(model={"uri": "file:///data/model"}), cluster=False).spec.model is not None


def test_what_grpo_can_do_is_not() -> None:
    rewards = [
        REGEX,
        FUNCTION,
        {"name": "length", "weight": "0", "regex": {"pattern": ".{80}"}},
        {"name": "schema", "weight": "-1", "jsonSchema": {"schema": '{"type": "object"}'}},
        {"name": "judge", "model": {"uri": "pvc://m/base", "adapter": {"uri": "pvc://m/reward"}}},
    ]  # fmt: skip
    grpo = {"rewards": rewards, "beta": "0.04", "epsilonHigh": "0.28"}
    check(manifest(objective={"grpo": grpo}, runtime={"image": "mine"}, method={"qlora": {}}), cluster=True)
    with pytest.raises(InvalidJob, match="are judged by eval_loss, eval_perplexity"):
        check(manifest(evaluation={"metric": "eval_reward"}), cluster=True)


@pytest.mark.parametrize(
    "spec",
    [
        {"output": {"uri": "pvc://m/out/"}, "checkpoints": {"storage": {"uri": "pvc://m/output"}}},
        {"output": {"uri": "s3://b/..a/v1.0"}, "checkpoints": {"storage": {"uri": "pvc://m"}}},
        {"training": {"warmupSteps": 50, "maxSteps": 50}},
        {"objective": {"kto": {"desirableWeight": "0"}}},
        {"resources": {"cpu": "+0.5", "memory": ".5Gi", "scratch": 10, "sharedMemory": "1e9"}},
        {"evaluation": {"gates": [{"metric": "eval_loss", "min": "-1", "max": "-1.0"}]}},
        {"dataset": {"train": [{"uri": "hf://org/name/dev/*.csv@refs/convert/parquet"}]}},
        {"runtime": {"image": "x", "command": ["x"]}, "output": {"uri": "s3://b/out"}},
    ],
    ids=str,
)
def test_what_is_near_to_a_mistake_passes(spec: dict[str, Any]) -> None:
    check(manifest(**spec), cluster=True)


PATTERNS = {node["pattern"] for _, node in nodes(openapi()["properties"]["spec"]) if node.get("type") == "string" and "pattern" in node}  # fmt: skip


def test_every_pattern_is_told_in_words() -> None:
    assert PATTERNS
    assert MUST_BE.keys() >= PATTERNS


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"method": "lora"}, "spec.method: must be an object, such as method: {lora: {}}"),
        ({"model": "org/x"}, "spec.model: must be an object, such as model: {uri: ...}"),
        ({"dataset": {"train": ["pvc://d/x"]}}, "spec.dataset.train[0]: must be an object, such as {uri: pvc://d/x}"),
        ({"model": {"uri": "hf://o/n", "secretRef": "hub"}}, "must be an object, such as secretRef: {name: hub}"),
        ({"evaluation": {"earlyStopping": True}}, "must be an object, such as earlyStopping: {patience: ...}"),
        ({"evaluation": {"fewShot": 4}}, "must be an object, such as fewShot: {examples: 4}"),
        ({"method": {"ia3": 1}}, "must be an object, such as ia3: {}"),
        ({"method": {"ia3": {"targets": ["k"]}}}, "there is no such field; ia3 has none: write ia3: {}"),
        ({"model": {"uri": "hf://o/n", "secretRef": {"name": "s", "key": "k"}}}, "there is only name: Name of the Secret. Keys read: "),
        ({"model": {"uri": "hf://o/n", "revision": "main"}}, "write it behind the name: hf://org/name@revision"),
        ({"resources": {"gpu": 1}}, "there is no such field; use resources.gpusPerNode"),
        ({"training": {"fsdp": True}}, "there is no such field; remove it: GPUs divide what training takes"),
        ({"dataset": ROWS | {"columns": {"response": "r"}}}, "there is no such field; use completion"),
        ({"dataset": ROWS | {"response": "r"}}, "there is no such field; there are format, columns, prefix"),
        ({"objective": {"ppo": {}}}, "there is no such field; use grpo"),
        ({"activeDeadlineSeconds": "24h"}, "must be a whole number of seconds, without a unit"),
        ({"checkpoints": {"everyMinutes": "10m"}}, "must be a whole number of minutes, without a unit"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_is_written_otherwise_elsewhere_is_told_how_it_is_written_here(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        check(manifest(**spec), cluster=True)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (manifest() | {"apiversion": "x"}, "apiversion: there is no such field; did you mean apiVersion?"),
        (manifest() | {"spec": "pvc://m/x"}, "spec: must be an object, such as spec: {"),
        (["pvc://m/x"], ": must be an object, such as {spec: ...}"),
    ],
    ids=["typo", "no object", "a list"],
)
def test_what_is_no_finetunejob_is_told_so(document: Any, said: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        check(document, cluster=True)
    assert said in str(refused.value)


def _lies_nowhere(uri: str) -> bool:
    try:
        locations.parse(uri)
    except ValueError:
        return True
    return False


def test_what_passes_lies_somewhere() -> None:
    texts = ["".join(text) for length in (1, 2, 3) for text in itertools.product("a/@", repeat=length)]
    nowhere = [
        uri for scheme in get_args(locations.Scheme) for text in texts if _lies_nowhere(uri := f"{scheme}://{text}")
    ]
    assert len(nowhere) > 32
    for few in (nowhere[i : i + 32] for i in range(0, len(nowhere), 32)):
        with pytest.raises(InvalidJob) as refused:
            check(manifest(dataset={"train": [{"uri": uri} for uri in few]}), cluster=True)
        said = "\n".join(refused.value.problems)
        assert [uri for i, uri in enumerate(few) if f"spec.dataset.train[{i}]: " not in said] == []
