"""Pages made from the API: docs/reference.md of the schema, a section an object; docs/support.md of the table of what is supported."""

from typing import Any, get_args

from .schema import openapi
from .support import FAMILIES, LEFT_OUT, OBJECTIVE_METHODS, OBJECTIVES, MethodName, Task
from .v1alpha1 import API_VERSION, KIND


def _type(node: dict[str, Any]) -> str:
    if node.get("x-kubernetes-int-or-string"):
        return "quantity"
    if node.get("x-kubernetes-preserve-unknown-fields"):
        return "object"
    if node.get("type") == "array":
        return f"[]{_type(node['items'])}"
    if "enum" in node:
        return " \\| ".join(f"`{value}`" for value in node["enum"])
    if "additionalProperties" in node:
        return "map of string"
    return str(node.get("format") or node.get("type", "object"))


def _limits(node: dict[str, Any]) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    return f" {low} to {high}." if low is not None and high is not None else ""


def _children(node: dict[str, Any]) -> dict[str, Any] | None:
    inner = node.get("items", node)
    return inner if inner.get("properties") else None


def _section(path: str, node: dict[str, Any], lines: list[str]) -> None:
    required = set(node.get("required", ()))
    lines += [f"### {path}", "", str(node.get("description", "")), "", "| field | type | meaning |", "|---|---|---|"]
    below: list[tuple[str, dict[str, Any]]] = []
    for name, child in node["properties"].items():
        inner = _children(child)
        anchor = f"{path}.{name}" + ("[]" if "items" in child else "")
        link = f"[{_type(child)}](#{anchor.lower().replace('.', '').replace('[]', '')})" if inner else _type(child)
        star = " (required)" if name in required else ""
        lines.append(f"| `{name}`{star} | {link} | {child.get('description', '')}{_limits(child)} |")
        if inner:
            below.append((anchor, inner))
    rules = node.get("x-kubernetes-validations", ())
    if rules:
        lines += ["", "The API server refuses:", "", *(f"- {rule['message']}" for rule in rules)]
    lines.append("")
    for anchor, inner in below:
        _section(anchor, inner, lines)


def markdown() -> str:
    """The whole page."""
    schema = openapi()
    lines = [
        f"# {KIND} ({API_VERSION})",
        "",
        "Generated from the models in `crds/finetune_crds/v1alpha1` by `make generate`; `kubectl explain finetunejob.spec` prints the same.",
        "",
    ]
    for part in ("spec", "status"):
        lines += [f"## {part}", ""]
        _section(part, schema["properties"][part], lines)
    return "\n".join(lines).rstrip() + "\n"


def support_markdown() -> str:
    """What works with what: a table a task, a row for each family of models, a column for each method."""
    lines = [
        "# What works with what",
        "",
        "Generated from `crds/finetune_crds/support.py` by `make generate`. A family is the `model_type` of the model's config.json. What has",
        "a ✓ is trained by tests, on small models of that family: by `make test` each family with each of its tasks, each family with each of its",
        "methods and each task with each method, by `make soak` all three together. Everything else is refused by name when the job starts.",
        "Which method for what: [methods.md](methods.md); which objective: [objectives.md](objectives.md).",
    ]
    methods = get_args(MethodName)
    lines += ["", "## Objectives", "", "| objective | tasks | methods |", "|---|---|---|"]
    for name, tasks in OBJECTIVES.items():
        those = ", ".join(f"`{method}`" for method in OBJECTIVE_METHODS.get(name, ())) or "all of its tasks"
        lines.append(f"| `{name}` | {', '.join(tasks)} | {those} |")
    for task in get_args(Task):
        lines += ["", f"## {task}", "", f"| model_type | such as | {' | '.join(f'`{method}`' for method in methods)} |"]
        lines.append("|---" * (2 + len(methods)) + "|")
        for name, family in FAMILIES.items():
            if task in family.tasks:
                cells = " | ".join("✓" if method in family.methods else "–" for method in methods)
                lines.append(f"| `{name}` | {family.models} | {cells} |")
    lines += ["", "Of AutoModelForImageClassification these are left out:", ""]
    lines += [f"- `{name}`: {why}." for name, why in LEFT_OUT.items()]
    return "\n".join(lines) + "\n"
