"""What is published: a plain PEFT or transformers folder with tokenizer or image processor, template, model card and journal. Called by train."""

import functools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from finetune_crds.resolved import ResolvedFineTune, ResolvedJob
from finetune_crds.v1alpha1 import Inputs, OutputStatus
from finetune_crds.v1alpha1.status import Baseline, FewShotStatus

from ..methods import merging
from ..methods.method import Method, hub_name
from ..modelling.models import PROBLEMS, Model
from ..modelling.tasks import TASKS
from ..storage.stores import FolderStore, WholeStore
from . import outputs
from .outputs import RECORD, Record
from .state import Metrics

ADAPTER = "adapter"
"""Folder in a merged output with the adapter alone."""
BEFORE: Final[dict[Baseline, str]] = {"model": "before", "majority": "always the most frequent or mean"}
"""What a result is compared with, in a few words."""


def record(
    job: ResolvedJob,
    spec: ResolvedFineTune,
    inputs: Inputs,
    method: Method,
    model: Model,
    *,
    classes: list[str],
    baseline: Baseline,
    few_shot: FewShotStatus | None,
    step: int,
    total_steps: int,
    epochs: float,
    before: Metrics | None,
    after: Metrics | None,
) -> Record:
    """The record of what is about to be published."""
    return Record(
        job=job.digest,
        dataset=inputs.dataset_digest or "",
        model=inputs.model_digest or "",
        base=spec.model.uri,
        model_type=model.inner.config.model_type,
        task=spec.task,
        objective=spec.objective.name if spec.objective else None,
        method=spec.method.name,
        classes=classes,
        baseline=baseline,
        few_shot=few_shot,
        format=method.output_format,
        servable_by=method.output_servable_by(model),
        step=step,
        total_steps=total_steps,
        epochs=epochs,
        rows=inputs.rows or 0,
        evaluation_rows=inputs.evaluation_rows or 0,
        tokens=inputs.tokens or 0,
        before=before,
        after=after,
        versions={name: _version(name) for name in ("torch", "transformers", "peft", "finetune-operator")},
    )


def publish(
    store: FolderStore | WholeStore,
    scratch: Path,
    method: Method,
    model: Model,
    weights: dict[str, Tensor],
    processor: Any,
    journal: dict[str, bytes],
    what: Record,
    confirm: Callable[[], None],
) -> OutputStatus:
    """Writes the output.

    Args:
        store: where to.
        scratch: for staging when the store is no volume.
        method: says how weights are saved.
        model: gives shape and configuration.
        weights: the trained weights by name, in fp32.
        processor: the model's tokenizer, or its image processor.
        journal: metrics.jsonl, samples.jsonl and the reports.
        what: the record.
        confirm: called before the output is replaced; raises to leave what is there.
    """
    with outputs.staging(store, scratch) as folder:
        if method.spec.output.merged:
            (folder / ADAPTER).mkdir()
            method.save(folder / ADAPTER, model, weights)
            whole = merging.merge(model, folder / ADAPTER)
            whole.config.dtype = model.dtype
            whole.save_pretrained(folder)
        else:
            method.save(folder, model, weights)
        processor.save_pretrained(folder)
        for name, content in journal.items():
            (folder / name).write_bytes(content)
        (folder / "README.md").write_text(
            model_card(
                what,
                method,
                chats=bool(getattr(processor, "chat_template", None)),
                summary=method.summary(model),
                grown=model.rows,
            ),
            encoding="utf-8",
        )
        return outputs.put(store, folder, what, confirm)


def model_card(
    what: Record, method: Method, *, chats: bool = False, summary: str = "", grown: int | None = None
) -> str:
    """README.md as the hub reads it. `chats`: whether the tokenizer has a template for conversations; `summary`: of what was trained; `grown`: rows of the embedding, if it grew."""
    before = what.before or {}
    rows = [
        f"| {name} | {before[name]:.4g} | {value:.4g} |" for name, value in sorted((what.after or {}).items()) if before
    ]
    table = (
        "\n".join([f"| metric | {BEFORE[what.baseline]} | after |", "|---|---|---|", *rows])
        if rows
        else "Nothing was held out."
    )
    base, _ = hub_name(what.base)
    prefix = method.spec.dataset.prefix
    loading = _with_rows(_how_to_load(what, method, base), grown)
    asked = f" Each source began with `{prefix}`: write the same before yours." if prefix else ""
    head = [
        *([f"base_model: {base}"] if what.base.startswith("hf://") else []),
        f"library_name: {'peft' if what.format == 'peft' else 'transformers'}",
        f"pipeline_tag: {method.spec.head}",
        f"tags: [{what.method}, finetune-operator]",
    ]
    return f"""---
{chr(10).join(head)}
---
# A fine-tuned {base.rsplit("/", 1)[-1]}

{"All weights of" if what.format == "transformers" else "An adapter for"} `{what.base}`, trained by finetune-operator (`{what.method}`) for {what.task}{f" (`{what.objective}`)" if what.objective else ""} on {what.rows} rows
{f"({what.tokens} tokens) " if what.tokens else ""}in {what.total_steps} steps, {what.epochs:.4g} epochs. These are the weights of step {what.step}.{asked}{f" {summary}" if summary else ""}

{table}

```python
{_imports(loading)}
{loading}
```{_SCORE[chats] if what.objective == "reward" else ""}

{f"The adapter alone is in `{ADAPTER}`. " if method.spec.output.merged else ""}`{RECORD}` holds the digests of the model, the dataset and each file; `metrics.jsonl` the loss of each step,
`data-report.html` what became of the rows, with examples of them, `evaluation.html` whether the result is better than what there was.
"""


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


@functools.cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
