"""The CRD: structural, described, small; the same rules hold without an API server."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_crds.generate import files
from finetune_crds.schema import crd, openapi
from finetune_crds.validation import InvalidJob, check
from manifests import FUNCTION, MALFORMED, NAMES, REGEX, Malformed, manifest

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
        {"name": "schema", "weight": "-1", "jsonSchema": {"schema": '{"type": "object"}'}},
        {"name": "judge", "model": {"uri": "pvc://m/base", "adapter": {"uri": "pvc://m/reward"}}},
    ]  # fmt: skip
    grpo = {"rewards": rewards, "beta": "0.04", "epsilonHigh": "0.28"}
    check(manifest(objective={"grpo": grpo}, runtime={"image": "mine"}, method={"qlora": {}}), cluster=True)
    with pytest.raises(InvalidJob, match="eval_reward is for objective grpo"):
        check(manifest(evaluation={"metric": "eval_reward"}), cluster=True)
