"""What is published: a plain PEFT or transformers folder with tokenizer or image processor, template, model card and journal. Called by train."""

import functools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from finetune_crds import locations
from finetune_crds.resolved import ResolvedFineTune, ResolvedJob
from finetune_crds.v1alpha1 import Inputs, OutputStatus
from finetune_crds.v1alpha1.dataset import Source
from finetune_crds.v1alpha1.status import Baseline, FewShotStatus

from ..data.holdout import Division, set_names
from ..data.prepared import RowSet
from ..methods import merging
from ..methods.method import Method
from ..modelling.models import Model
from ..storage.stores import FolderStore, WholeStore
from . import outputs
from .card import ADAPTER, model_card
from .configuration import configuration
from .outputs import Record, RecordedSource
from .state import Metrics


def record(
    job: ResolvedJob,
    spec: ResolvedFineTune,
    inputs: Inputs,
    method: Method,
    model: Model,
    rows: RowSet,
    division: Division,
    *,
    baseline: Baseline,
    few_shot: FewShotStatus | None,
    step: int,
    total_steps: int,
    epochs: float,
    before: Metrics | None,
    after: Metrics | None,
    micro_batch: int | None,
) -> Record:
    """The record of what is about to be published."""
    found: dict[str, Any] = {} if micro_batch is None else {"micro_batch": micro_batch}
    return Record(
        job=job.digest,
        dataset=inputs.dataset_digest or "",
        model=inputs.model_digest or "",
        base=spec.model.uri,
        model_type=model.inner.config.model_type,
        task=spec.task,
        objective=spec.objective.name if spec.objective else None,
        method=spec.method.name,
        classes=rows.index.classes,
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
        sources=_sources(spec, rows, division),
        configuration=configuration(spec),
        before=before,
        after=after,
        versions={name: _version(name) for name in ("torch", "transformers", "peft", "finetune-operator")},
        **found,
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


def _sources(spec: ResolvedFineTune, rows: RowSet, division: Division) -> list[RecordedSource]:
    """What was trained and evaluated on, by where it came from."""
    given = spec.dataset.evaluation
    trained: list[tuple[str, list[Source]]] = [("train", [source]) for source in spec.dataset.train]
    more: list[list[Source]] = [*(one.sources for one in (given and given.sets) or ()), (given and given.general) or []]
    evaluated = [("evaluation", (given and given.sources) or []), *zip(set_names(spec), more, strict=False)]
    ids = np.concatenate([division.train, division.held_out, *division.sets.values()])
    found = []
    for number, (use, sources) in [*enumerate(trained), *((-1 - i, one) for i, one in enumerate(evaluated))]:
        among = division.train if number >= 0 else ids
        here = among[rows.sources[among] == number]
        if sources:
            found.append(
                RecordedSource(
                    use=use,
                    uris=[locations.public(source.uri) for source in sources],
                    rows=len(here),
                    tokens=int(rows.lengths[here].sum()),
                    digest=rows.index.digests.get(number),
                )
            )
    return found


@functools.cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
