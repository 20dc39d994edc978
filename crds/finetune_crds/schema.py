"""Pydantic models -> structural CRD. `python -m finetune_crds.schema` prints it; `make generate` writes crds/ and the chart's copy."""

import sys
from typing import Any

import yaml

from .v1alpha1 import GROUP, KIND, PLURAL, PRINTER_COLUMNS, VERSION, ApiModel, FineTuneJob

_LIST_KEYS: dict[str, list[str]] = {
    "status.conditions": ["type"],
    "status.metrics": ["name"],
    "status.attempts": ["number"],
    "status.causeCounts": ["cause"],
}
_DROPPED = ("title", "default", "$defs", "additionalProperties")


def reachable(model: type[ApiModel]) -> dict[str, type[ApiModel]]:
    """Every ApiModel reachable from one, by class name, which is also its name in $defs."""
    found: dict[str, type[ApiModel]] = {}

    def visit(candidate: Any) -> None:
        if isinstance(candidate, type) and issubclass(candidate, ApiModel):
            if candidate.__name__ in found:
                return
            found[candidate.__name__] = candidate
            for field in candidate.model_fields.values():
                visit(field.annotation)
        for argument in getattr(candidate, "__args__", ()):
            visit(argument)

    visit(model)
    return found


def _structural(
    node: dict[str, Any], definitions: dict[str, Any], models: dict[str, type[ApiModel]], path: str
) -> dict[str, Any]:
    """One schema node without $ref, null, title, default and allOf, and with the CEL rules of its model."""
    description = node.get("description")
    name = ""
    while "$ref" in node:
        name = node["$ref"].rsplit("/", 1)[1]
        node = definitions[name]
    if "anyOf" in node and not node.get("x-kubernetes-int-or-string"):
        choices = [choice for choice in node["anyOf"] if choice.get("type") != "null"]
        (only,) = choices
        return _structural({**only, **({"description": description} if description else {})}, definitions, models, path)
    out: dict[str, Any] = {}
    if description or node.get("description"):
        out["description"] = " ".join(str(description or node["description"]).split())
    for key, value in node.items():
        if key in _DROPPED or key == "description":
            continue
        if key == "properties":
            out[key] = {
                prop: _structural(child, definitions, models, f"{path}.{prop}".lstrip("."))
                for prop, child in value.items()
            }
        elif key == "items":
            out[key] = _structural(value, definitions, models, path)
        else:
            out[key] = value
    if "const" in out:
        out["enum"] = [out.pop("const")]
    extra = node.get("additionalProperties")
    if isinstance(extra, dict):
        out["additionalProperties"] = _structural(extra, definitions, models, path)
    if path in _LIST_KEYS and out.get("type") == "array":
        out |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": _LIST_KEYS[path]}
    if name in models:
        out |= _validations(models[name])
    return out


def _validations(model: type[ApiModel]) -> dict[str, Any]:
    rules = model.rules + getattr(model, "cluster_rules", ()) + getattr(model, "transition_rules", ())
    return (
        {"x-kubernetes-validations": [{"rule": rule.cel, "message": rule.message} for rule in rules]} if rules else {}
    )


def openapi() -> dict[str, Any]:
    """The openAPIV3Schema of FineTuneJob."""
    raw = FineTuneJob.model_json_schema(by_alias=True, mode="validation")
    models = reachable(FineTuneJob)
    schema = _structural(raw, raw.get("$defs", {}), models, "")
    schema |= _validations(FineTuneJob)
    schema["properties"]["metadata"] = {"type": "object"}
    schema["required"] = ["spec"]
    return schema


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["ftj"],
                "categories": ["all", "finetune"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": PRINTER_COLUMNS,
                    "subresources": {"status": {}},
                    "schema": {"openAPIV3Schema": openapi()},
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # a list used twice is written twice: people read this


def to_yaml(document: dict[str, Any]) -> str:
    """YAML in the order given, long sentences on one line, without anchors."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)


if __name__ == "__main__":
    sys.stdout.write(to_yaml(crd()))
