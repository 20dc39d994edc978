"""From a resolved job to everything that the loop needs: inputs fetched and prepared, model loaded, steps planned. Called by train."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from finetune_crds import support
from finetune_crds.resolution import ResolvedFineTune
from finetune_crds.v1alpha1 import Inputs, JobOutput
from finetune_crds.v1alpha1.spec import Source

from . import methods, objectives
from .context import RunContext
from .data.holdout import Division, divide
from .data.order import Batching, Order
from .data.prepare import Dataset, named_images, prepare
from .data.prepared import RowSet
from .errors import DataError, UserError
from .evaluate import Evaluator
from .methods.low_rank import load_adapter_config
from .methods.method import Base, Method
from .modelling import added_tokens, anatomy, models
from .modelling.added_tokens import AddedTokens
from .modelling.masters import Masters
from .modelling.models import Model
from .objectives import Objective
from .ranks import Ranks
from .results import outputs
from .storage import digests
from .storage.places import materialise, source_file, source_files

log = logging.getLogger("finetune.setup")

IMAGES_AT_A_TIME: Final = 32
"""Images in one forward pass, when nobody says."""
USUAL_LENGTH: Final = 1024
"""Tokens of the longest row, when nobody says."""


@dataclass(frozen=True)
class Reading:
    """The inputs on this machine, and their digests."""

    spec: ResolvedFineTune
    """The job's, with what only the model can tell."""
    model: Path
    adapter: Path | None
    config: Any
    tokenizer: Any
    """None for images."""
    image_processor: Any
    """None for text."""
    rows: RowSet
    division: Division
    inputs: Inputs
    added: AddedTokens | None = None
    """model.addTokens, which the tokenizer has got."""


@dataclass(frozen=True)
class Setup:
    """Everything that training needs, loaded."""

    spec: ResolvedFineTune
    method: Method
    model: Model
    tokenizer: Any
    """None for images."""
    image_processor: Any
    """None for text."""
    masters: Masters
    objective: Objective
    rows: RowSet
    division: Division
    held_out: NDArray[np.int64]
    evaluate: Evaluator
    order: Order
    total_steps: int
    micro_batch: int | None
    """Sequences in one forward pass; None: as many as accumulationSteps makes of it."""


def read(spec: ResolvedFineTune, context: RunContext) -> Reading:
    """Fetches the inputs and prepares the dataset, once a node."""
    scratch, ranks = context.scratch, context.ranks

    def fetch() -> tuple[Path, Path | None, Path | None, JobOutput | None, JobOutput | None]:
        given = spec.model.adapter
        model = materialise(spec.model, scratch / "model")
        adapter = materialise(given, scratch / "adapter") if given else None
        context.check_stop()
        model_from = outputs.verify(model, "model.job", spec.model)
        adapter_from = outputs.verify(adapter, "model.adapter.job", given) if adapter and given else None
        return model, adapter, added_tokens.fetch(spec, scratch), model_from, adapter_from

    folder, adapter, token_file, model_from, adapter_from = ranks.once(fetch, each_node=True)
    config = models.load_config(spec, folder)
    images = spec.task == "image-classification"
    tokenizer = image_processor = added = None
    if images:
        image_processor = models.load_image_processor(folder, spec.model.uri)
    else:
        spec = _with_length(spec, config)
        tokenizer = models.load_tokenizer(folder, spec.model.uri, generates=spec.task in support.WRITING)
        added = added_tokens.add(spec, tokenizer, token_file)
    if adapter is not None:
        load_adapter_config(spec, adapter)
    model_digest = ranks.once(
        lambda: digests.joined(*(digests.folder_digest(place) for place in (folder, adapter) if place))
    )

    def make() -> str:
        held_out = spec.dataset.evaluation
        files = Dataset(
            train=[
                source_files(source, scratch / "train" / str(i), images=images)
                for i, source in enumerate(spec.dataset.train)
            ],
            evaluation=[
                source_files(source, scratch / "evaluation" / str(i), images=images)
                for i, source in enumerate((held_out and held_out.sources) or [])
            ],
            sets=[
                [
                    source_files(source, scratch / "sets" / str(i) / str(j), images=images)
                    for j, source in enumerate(sources)
                ]
                for i, sources in enumerate(_sets(spec))
            ],
        )
        context.check_stop()
        if images:
            named = named_images(spec, (listed for _, listed in files.numbered))
            files = files._replace(images=[source_file(uri, path) for uri, path in named])
        rows = prepare(
            spec,
            files,
            tokenizer,
            scratch / "prepared",
            classes=_known_classes(spec, config, adapter),
            check_stop=context.check_stop,
        )
        return rows.index.digest

    digest = ranks.once(make, each_node=True)
    rows = RowSet.open(scratch / "prepared" / digest.removeprefix("sha256:")[:16])
    division = divide(spec, rows)
    selection = division.selection
    inputs = Inputs(
        model_digest=model_digest,
        model=model_from,
        adapter=adapter_from,
        dataset_digest=digest,
        rows=len(division.train),
        evaluation_rows=len(division.held_out),
        tokens=int(rows.lengths[division.train].sum()) or None,
        truncated_rows=None if images else int(rows.truncated.sum()),
        dropped_rows=selection.dropped + sum(tally.dropped for tally in rows.index.tallies.values()),
        duplicate_rows=len(selection.duplicates),
        leaked_rows=len(selection.leaked),
    )
    return Reading(spec, folder, adapter, config, tokenizer, image_processor, rows, division, inputs, added)


def load(reading: Reading, ranks: Ranks) -> Setup:
    """Loads the model and plans the steps."""
    spec, rows, training = reading.spec, reading.rows, reading.spec.training
    tokenizer = reading.tokenizer
    pad = None
    if tokenizer is not None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    division = reading.division
    if not len(division.train):
        raise DataError("dataset.evaluation: every row is held out and none is left to train on; lower the fraction")
    evaluation = spec.evaluation
    if not len(division.held_out) and (
        evaluation.every_steps or evaluation.gates or evaluation.slices or division.sets
    ):
        raise DataError(
            f"dataset.evaluation: of {len(division.train)} rows none is held out, and there is something to measure; set a fraction, or give sources"
        )
    if training.tokens_per_step and training.tokens_per_step < int(rows.lengths.max()):
        raise UserError(
            f"training.tokensPerStep {training.tokens_per_step} is less than the longest row ({int(rows.lengths.max())} tokens); raise it"
        )
    weights = [float(source.weight) for source in spec.dataset.train if source.weight is not None] or None
    if weights and not sum(weights) > 0:
        raise UserError("dataset.train: all weights are 0; give at least one source a share")
    pack = spec.task == "text-generation" if training.packing is None else training.packing
    order = Order(
        rows=division.train,
        lengths=rows.lengths if tokenizer is not None else np.ones(len(rows.targets), dtype=np.int64),
        sources=rows.sources,
        weights=weights,
        seed=training.seed,
        batching=Batching(training.sequence_length or 0, pack, training.batch_size, training.tokens_per_step),
    )
    total_steps = training.max_steps or order.total_steps(float(training.epochs or 0))
    method, model = _loaded(spec, reading, pad, ranks)
    model = dataclasses.replace(model, noise=float(training.neftune_noise))
    names = [name for name, parameter in model.outer.named_parameters() if parameter.requires_grad]
    groups = method.groups(model, names, len(order.epoch(0)), total_steps)
    objective = objectives.chosen(spec, reading.config, rows, tokenizer, reading.image_processor, method)
    micro_batch = training.micro_batch_size or (None if training.accumulation_steps else _usual_rows(spec, pack))
    sets = {"": division.held_out, **division.sets}
    slices = [one.name for one in spec.evaluation.slices]
    return Setup(
        spec=spec,
        method=method,
        model=model,
        tokenizer=tokenizer,
        image_processor=reading.image_processor,
        masters=Masters(
            model.outer,
            models.compute_type(spec),
            training.optimizer.adamw,
            groups,
            pull=float(training.l2_sp),
            fresh=tuple(anatomy.head(reading.config.model_type, spec.head)),
        ),
        objective=objective,
        rows=rows,
        division=division,
        held_out=division.held_out,
        evaluate=Evaluator(objective, rows, sets, slices, order.batching, micro_batch or 1, ranks),
        order=order,
        total_steps=total_steps,
        micro_batch=micro_batch,
    )


def _usual_rows(spec: ResolvedFineTune, pack: bool) -> int:
    """In one forward pass: about as many tokens whatever a row is."""
    if spec.task == "image-classification":
        return IMAGES_AT_A_TIME
    return 1 if pack else 4 if spec.compares else 8


def _with_length(spec: ResolvedFineTune, config: Any) -> ResolvedFineTune:
    """With the longest row decided: what the user says, or what is usual and fits the model."""
    virtual = spec.method.prefix or spec.method.prompt or spec.method.p_tuning
    taken = anatomy.first_position(config) + (virtual.length if virtual else 0)
    positions = getattr(config, "max_position_embeddings", 0) - taken
    given = spec.training.sequence_length
    if positions <= 0 and hasattr(config, "max_position_embeddings"):
        raise UserError(f"method.{spec.method.name}.length leaves no position of {spec.model.uri} for a row; lower it")
    if given and 0 < positions < given:
        raise UserError(
            f"training.sequenceLength {given} exceeds the {positions} positions that {spec.model.uri} has for a row; lower it"
        )
    if spec.task in support.PAIRS and 0 < positions < spec.evaluation.max_new_tokens:
        raise UserError(
            f"evaluation.maxNewTokens {spec.evaluation.max_new_tokens} exceeds the {positions} positions that {spec.model.uri} has for an answer; lower it"
        )
    length = given or (min(USUAL_LENGTH, positions) if positions > 0 else USUAL_LENGTH)
    training = spec.training.model_copy(update={"sequence_length": length})
    return spec.model_copy(update={"training": training})


def _loaded(spec: ResolvedFineTune, reading: Reading, pad: int | None, ranks: Ranks) -> tuple[Method, Model]:
    """The model on the device, with what the method trains on it."""
    method = methods.chosen(spec)
    inner, reload, stored = models.load(
        spec,
        reading.model,
        reading.config,
        reading.rows.index.classes,
        pad,
        own_weights=method.learns_the_model,
        quantization=method.quantization(reading.config.model_type),
        added=reading.added,
    )
    if method.quantization(reading.config.model_type) is None:
        inner.to(ranks.device)  # before, since what begins with parts of the weights computes them there
    model = method.put_on(
        Base(
            inner,
            reading.model,
            reading.adapter,
            stored=stored,
            compute=models.compute_type(spec),
            reload=reload,
            task=spec.head,
            added=reading.added.ids if reading.added else [],
        )
    )
    if reading.added and inner.config.vocab_size > reading.config.vocab_size:
        model = dataclasses.replace(model, rows=inner.config.vocab_size)
    if len(set(ranks.gather(method.beginning))) > 1:
        raise UserError(
            f"method.{spec.method.name}.initialization: the processors of this job's pods compute other factors of the same weights; use nodes of one kind, or initialization: zero"
        )
    if ranks.first and (summary := method.summary(model)):
        log.info("%s", summary)
    model.outer.to(ranks.device)
    model.outer.train()
    return method, model


def _known_classes(spec: ResolvedFineTune, config: Any, adapter: Path | None) -> list[str] | None:
    """Names of the classes that there is a trained head for: of the adapter that is continued, or of the model."""
    record = adapter / outputs.RECORD if adapter else None
    if record is not None and record.is_file():
        return outputs.Record.model_validate_json(record.read_bytes()).classes or None
    return models.known_classes(config, spec.head)


def _sets(spec: ResolvedFineTune) -> list[list[Source]]:
    """Sources of the sets beside the held-out rows, in the order of holdout.set_names."""
    evaluation = spec.dataset.evaluation
    if evaluation is None:
        return []
    return [one.sources for one in evaluation.sets or ()] + ([evaluation.general] if evaluation.general else [])
