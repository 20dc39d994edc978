"""What is published: a plain PEFT or transformers folder with tokenizer, template, model card and journal. Called by train."""

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune_crds import locations
from finetune_crds.resolution import ResolvedFineTune, ResolvedJob
from finetune_crds.v1alpha1 import Inputs, OutputStatus

from ..modelling.models import Model
from ..storage.stores import FolderStore
from . import outputs
from .outputs import RECORD, Record
from .state import Metrics


def record(
    job: ResolvedJob,
    spec: ResolvedFineTune,
    inputs: Inputs,
    model: Model,
    *,
    classes: list[str],
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
        task=spec.task,
        method="lora" if spec.method.lora else "full",
        classes=classes,
        format="peft" if model.is_adapter else "transformers",
        servable_by=servable_by(spec, model),
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


def servable_by(spec: ResolvedFineTune, model: Model) -> list[str]:
    """Servers that take the output as it is. vLLM takes plain LoRA without DoRA and without layers trained in full, and text models."""
    if spec.task != "text-generation":
        return []
    if model.is_adapter:
        config = model.outer.peft_config["default"]
        if config.use_dora or config.modules_to_save or config.bias != "none":
            return []
    return ["vllm"]


def publish(
    store: FolderStore,
    scratch: Path,
    spec: ResolvedFineTune,
    model: Model,
    weights: dict[str, Tensor],
    tokenizer: Any,
    journal: dict[str, bytes],
    what: Record,
    confirm: Callable[[], None],
) -> OutputStatus:
    """Writes the output.

    Args:
        store: where to.
        scratch: for staging when the store is no volume.
        spec: the resolved job.
        model: gives shape and configuration.
        weights: the trained weights by name, in fp32.
        tokenizer: of the model.
        journal: metrics.jsonl and samples.jsonl.
        what: the record.
        confirm: called before the output is replaced; raises to leave what is there.
    """
    with outputs.staging(store, scratch) as folder:
        _save_weights(folder, spec, model, weights)
        tokenizer.save_pretrained(folder)
        for name, content in journal.items():
            (folder / name).write_bytes(content)
        (folder / "README.md").write_text(model_card(what), encoding="utf-8")
        return outputs.put(store, folder, what, confirm)


def model_card(what: Record) -> str:
    """README.md as the hub reads it."""
    before = what.before or {}
    rows = [
        f"| {name} | {before[name]:.4g} | {value:.4g} |" for name, value in sorted((what.after or {}).items()) if before
    ]
    table = "\n".join(["| metric | before | after |", "|---|---|---|", *rows]) if rows else "Nothing was held out."
    base, _ = hub_name(what.base)
    head = [
        *([f"base_model: {base}"] if what.base.startswith("hf://") else []),
        f"library_name: {what.format}",
        f"pipeline_tag: {what.task}",
        f"tags: [{what.method}, finetune-operator]",
    ]
    return f"""---
{chr(10).join(head)}
---
# A fine-tuned {base.rsplit("/", 1)[-1]}

{"A LoRA adapter for" if what.format == "peft" else "All weights of"} `{what.base}`, trained by finetune-operator for {what.task} on {what.rows} rows
({what.tokens} tokens), {what.total_steps} steps, {what.epochs:.4g} epochs. These are the weights of step {what.step}.

{table}

```python
{_how_to_load(what, base)}
```

`{RECORD}` holds the digests of the model, the dataset and each file; `metrics.jsonl` the loss of each step.
"""


def _how_to_load(what: Record, base: str) -> str:
    kind = "AutoModelForSequenceClassification" if what.classes else "AutoModelForCausalLM"
    if what.format == "transformers":
        return f'model = transformers.{kind}.from_pretrained("this folder")'
    # The head's size and the names of its outputs are the base's to know; an adapter only brings the weights.
    names = f", num_labels={len(what.classes)}, id2label={dict(enumerate(what.classes))}" if what.classes else ""
    return (
        f'base = transformers.{kind}.from_pretrained("{base}"{names})\n'
        'model = peft.PeftModel.from_pretrained(base, "this folder")'
    )


def hub_name(uri: str) -> tuple[str, str | None]:
    """org/name and revision of a hub model; of another place its URI and nothing."""
    place = locations.parse(uri)
    return (place.root, place.revision) if place.scheme == "hf" else (uri, None)


def _save_weights(folder: Path, spec: ResolvedFineTune, model: Model, weights: dict[str, Tensor]) -> None:
    if not model.is_adapter:
        # Parameters, not state_dict: a tied head is saved once.
        complete = {
            name: weights.get(name, parameter).to("cpu", model.dtype)
            for name, parameter in model.inner.named_parameters()
        }
        model.inner.config.dtype = model.dtype
        model.inner.save_pretrained(folder, state_dict=complete)
        return
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(
        model.outer,
        state_dict={name: tensor.cpu() for name, tensor in weights.items()},
        save_embedding_layers=False,  # "auto" would ask the hub whether the vocabulary has grown
    )
    save_file(
        {name: state[name].contiguous().clone() for name in sorted(state)},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    config = model.outer.peft_config["default"].to_dict()
    config["base_model_name_or_path"], config["revision"] = hub_name(spec.model.uri)
    config["inference_mode"] = True
    (folder / "adapter_config.json").write_text(json.dumps(_plain(config), sort_keys=True, indent=1) + "\n")


def _plain(value: Any) -> Any:
    """Sets sorted: their order differs from process to process."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(one) for one in value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
