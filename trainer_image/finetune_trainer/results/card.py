"""README.md of an output: the model card, as the hub reads it and as somebody who knows the trade would ask. Called by publish."""

import re
from collections.abc import Iterable
from typing import Any, Final

import yaml

from finetune_crds import locations
from finetune_crds.v1alpha1.status import Baseline

from ..local.manifests import Dumper
from ..methods.method import Method, hub_name
from ..modelling.models import PROBLEMS
from ..modelling.tasks import TASKS
from .outputs import RECORD, Record

ADAPTER = "adapter"
"""Folder in a merged output with the adapter alone."""
BEFORE: Final[dict[Baseline, str]] = {"model": "before", "majority": "always the most frequent or mean"}
"""What a result is compared with, in a few words."""


def model_card(
    what: Record, method: Method, *, chats: bool = False, summary: str = "", grown: int | None = None
) -> str:
    """README.md.

    Args:
        what: the record, whose values it shows.
        method: what was trained.
        chats: whether the tokenizer has a template for conversations.
        summary: of what was trained.
        grown: rows of the embedding, if it grew.
    """
    base, _ = hub_name(what.base)
    prefix, adapter = method.spec.dataset.prefix, method.spec.model.adapter
    loading = _with_rows(_how_to_load(what, method, base), grown)
    asked = f" Each source began with `{prefix}`: write the same before yours." if prefix else ""
    adapter_alone = f"The adapter alone is in `{ADAPTER}`. " if method.spec.output.merged else ""
    return f"""---
{_yaml(_front_matter(what, method)).rstrip()}
---
# A fine-tuned {base.rsplit("/", 1)[-1]}

{"All weights of" if what.format == "transformers" else "An adapter for"} `{what.base}`, trained by finetune-operator (`{what.method}`) for {what.task}{f" (`{what.objective}`)" if what.objective else ""} on {what.rows} rows
{f"({what.tokens} tokens) " if what.tokens else ""}in {what.total_steps} steps, {what.epochs:.4g} epochs. These are the weights of step {what.step}.{asked}{f" {summary}" if summary else ""}

## Use

```python
{_imports(loading)}
{loading}
```{_SCORE[chats] if what.objective == "reward" else ""}

{adapter_alone}`{RECORD}` holds what this page says, and the sha256 of each file; `metrics.jsonl` the loss of each step,
`data-report.html` what became of the rows, with examples of them, `evaluation.html` whether the result is better than what there was.

## Results

{_results(what)}

## Data

{_table(["for", "source", "rows", "tokens", "digest"], _data(what))}

{what.evaluation_rows} rows were held out of training. Digest of all data, as it was prepared: `{what.dataset}`.

## Base

`{what.base}`{f", with the adapter `{adapter.uri}`" if adapter else ""}; digest `{what.model}`.

## Configuration

What decided the result, defaults included: with an `output`, the `spec` of a FineTuneJob. References to Secrets, prompts and initial texts are left out.

{_fenced(_yaml(what.configuration))}

Made with {", ".join(f"{name} {version}" for name, version in what.versions.items())}.
"""


def _front_matter(what: Record, method: Method) -> dict[str, Any]:
    """What the hub reads; it knows models and datasets that lie there."""
    base, _ = hub_name(what.base)
    datasets = [locations.parse(uri).root for one in what.sources for uri in one.uris if uri.startswith("hf://")]
    return {
        **({"base_model": base} if what.base.startswith("hf://") else {}),
        "library_name": "peft" if what.format == "peft" else "transformers",
        "pipeline_tag": method.spec.head,
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
        "tags": [what.method, *([what.objective] if what.objective else []), "finetune-operator"],
    }


def _results(what: Record) -> str:
    before, after = what.before or {}, what.after or {}
    if not before or not after:
        return "Nothing was held out."
    rows = [[name, f"{before[name]:.4g}", f"{after[name]:.4g}"] for name in sorted(after)]
    return _table(["metric", BEFORE[what.baseline], "after"], rows)


def _data(what: Record) -> Iterable[list[str]]:
    for one in what.sources:
        places = ", ".join(f"`{uri}`" for uri in one.uris)
        yield [one.use, places, str(one.rows), str(one.tokens or ""), f"`{one.digest}`" if one.digest else ""]


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _yaml(value: dict[str, Any]) -> str:
    return str(yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def _fenced(text: str) -> str:
    """A block that no text in it can end."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}yaml\n{text}{fence}"


_SCORE = {
    True: """

The score of an answer; the better of two has the higher one:

```python
tokenizer = transformers.AutoTokenizer.from_pretrained("this folder")
chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
text = tokenizer.apply_chat_template(chat, tokenize=False)
score = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0].item()
```""",
    False: """

The score of an answer; the better of two has the higher one:

```python
tokenizer = transformers.AutoTokenizer.from_pretrained("this folder")
text = "a question\n\nan answer" + tokenizer.eos_token
score = model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()
```""",
}
"""How to use a reward model, with and without a chat template."""


def _imports(code: str) -> str:
    return f"import {', '.join(name for name in ('peft', 'transformers') if f'{name}.' in code)}"


def _with_rows(code: str, rows: int | None) -> str:
    """An adapter's base gets rows for added tokens, which the adapter fills; the tokenizer that has them is in the same folder."""
    grow = f"\nbase.resize_token_embeddings({rows}, mean_resizing=False)" if rows else ""
    return code.replace("\nmodel = peft.", f"{grow}\nmodel = peft.")


def _how_to_load(what: Record, method: Method, base: str) -> str:
    images = method.spec.task == "image-classification"
    processor = '\nprocessor = transformers.AutoImageProcessor.from_pretrained("this folder")' if images else ""
    return _how_to_load_model(what, method, base, images) + processor


def _how_to_load_model(what: Record, method: Method, base: str, images: bool) -> str:
    kind = TASKS[method.spec.head].kind
    # The head's size and the names of its outputs are the base's to know; an adapter only brings the weights.
    if method.spec.output.merged:
        return f'model = transformers.{kind}.from_pretrained("this folder")'
    names = f", num_labels={len(what.classes)}, id2label={dict(enumerate(what.classes))}" if what.classes else ""
    if method.spec.problem == "multiLabel":
        names += f', problem_type="{PROBLEMS[method.spec.problem]}"'
    if images:
        names += ", ignore_mismatched_sizes=True"  # the base may have a head for other classes
    if method.spec.problem == "regression":
        names = f', num_labels=1, problem_type="{PROBLEMS[method.spec.problem]}"'
    return method.how_to_load(what.model_type, kind, base, names)
