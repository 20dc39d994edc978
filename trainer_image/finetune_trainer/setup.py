"""From a resolved job to everything that the loop needs: inputs fetched and prepared, model loaded, steps planned. Called by train."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from finetune_crds import resolution, support
from finetune_crds.resolved import ResolvedFineTune, ResolvedObjective
from finetune_crds.v1alpha1 import Inputs, JobOutput
from finetune_crds.v1alpha1.dataset import Source
from finetune_crds.v1alpha1.status import Baseline

from . import methods, objectives
from .benchmarks.files import TaskFile, find
from .benchmarks.harness import Benchmarks
from .context import RunContext
from .data import few_shot
from .data.holdout import Division, divide, empty_slices, slice_rows
from .data.order import Batching, Order
from .data.prepare import Dataset, prepare
from .data.prepared import RowSet
from .errors import DataError, UserError
from .evaluate import Evaluator
from .judges import fetch as fetch_judges
from .methods.low_rank import load_adapter_config
from .methods.method import Base, Method
from .modelling import added_tokens, anatomy, models
from .modelling.added_tokens import AddedTokens
from .modelling.masters import Masters
from .modelling.models import Model
from .objectives import JudgeFolders, Objective
from .prompting import Prompting
from .ranks import Ranks
from .results import outputs
from .storage import digests
from .storage.places import materialise
from .storage.sources import LocalFile, local_file, room_for_file, source_files
from .storage.trees import SourceFile

log = logging.getLogger("finetune.setup")

IMAGES_AT_A_TIME: Final = 32
"""Images in one forward pass, when nobody says."""
USUAL_LENGTH: Final = 1024
"""Tokens of the longest row, when nobody says."""
USUAL_ANSWER: Final = 512
"""Tokens of the longest answer of objective.grpo, when nobody says."""


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
    judges: dict[str, JudgeFolders]
    """Reward models, by the name of the reward."""
    files: Dataset | None
    """The rows' files; on the first rank of each node."""
    scratch: Path
    benchmarks: Sequence[TaskFile] = ()
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
    benchmarks: Benchmarks
    order: Order
    total_steps: int
    micro_batch: int | None
    """Sequences in one forward pass; None: as many as accumulationSteps makes of it."""
    baseline: Baseline
    """What training is compared with: the model as it was, or what fits best without reading."""

    prompting: Prompting
    """What training is compared with besides."""

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each set that is evaluated, by name, and of each slice, by .NAME."""
        slices = {f".{name}": count for name, count in slice_rows(self.spec, self.rows, self.held_out).items()}
        return {"": len(self.held_out), **slices, **{name: len(ids) for name, ids in self.division.sets.items()}}

    def of_micro_batch(self, size: int) -> "Setup":
        """The same with so many sequences in a forward pass of training, and of evaluation where rows are packed, so that no sequence is longer there."""
        evaluate = self.evaluate.of_size(size) if self.spec.training.packing else self.evaluate
        return dataclasses.replace(self, micro_batch=size, evaluate=evaluate)

    def untouched(self) -> AbstractContextManager[Model]:
        """The model without what it is given to train, before the first step: virtual tokens begin as something."""
        return self.method.untouched(self.model) or nullcontext(self.model)


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
        image_processor = models.load_image_processor(folder, spec.model.uri, config)
    else:
        spec = _with_length(spec, config)
        tokenizer = models.load_tokenizer(folder, spec.model.uri, generates=spec.task in support.WRITING)
        added = added_tokens.add(spec, tokenizer, token_file)
    if adapter is not None:
        load_adapter_config(spec, adapter)
    judges, rewards_from = ranks.once(lambda: fetch_judges(spec, scratch / "rewards"), each_node=True)
    folders = [folder, adapter, *(place for both in judges.values() for place in both)]
    model_digest = ranks.once(lambda: digests.joined(*(digests.folder_digest(place) for place in folders if place)))

    listed: list[Dataset] = []

    def make() -> tuple[Path, list[TaskFile]]:
        held_out = spec.dataset.evaluation
        tasks = [find(one, materialise(one, scratch / "benchmarks" / one.name)) for one in spec.evaluation.benchmarks]
        most = room_for_file(spec.resources.scratch)

        def listed_in(sources: Sequence[Source], *into: str, evaluation: bool = True) -> list[Sequence[SourceFile]]:
            return [
                source_files(source, scratch.joinpath(*into, str(i)), images=images, evaluation=evaluation, room=most)
                for i, source in enumerate(sources)
            ]

        files = Dataset(
            train=listed_in(spec.dataset.train, "train", evaluation=False),
            evaluation=listed_in((held_out and held_out.sources) or [], "evaluation"),
            sets=[listed_in(sources, "sets", str(i)) for i, sources in enumerate(_sets(spec))],
            synonyms=_synonyms(spec, scratch / "synonyms"),
            benchmarks=[
                local_file(f"{task.benchmark.name}/{path.relative_to(task.root)}", path)
                for task in tasks
                for path in task.files
            ],
        )
        context.check_stop()
        listed.append(files)
        rows = prepare(
            spec,
            files,
            tokenizer,
            scratch / "prepared",
            classes=_known_classes(spec, config, adapter),
            check_stop=context.check_stop,
        )
        return rows.folder, tasks

    prepared, tasks = ranks.once(make, each_node=True)
    rows = RowSet.open(prepared)
    if len(set(ranks.gather(rows.index.digest))) > 1:
        raise UserError(
            "dataset: nodes of this job read different content by the same URIs; let all read the same files"
        )
    division = divide(spec, rows)
    for sentence in empty_slices(slice_rows(spec, rows, division.held_out)) if ranks.first else ():
        log.warning("%s", sentence)
    selection = division.selection
    inputs = Inputs(
        model_digest=model_digest,
        model=model_from,
        adapter=adapter_from,
        rewards=rewards_from or None,
        dataset_digest=rows.index.digest,
        rows=len(division.train),
        evaluation_rows=len(division.held_out),
        tokens=int(rows.lengths[division.train].sum()) or None,
        truncated_rows=None if images else int(rows.truncated.sum()),
        dropped_rows=selection.dropped + sum(tally.dropped for tally in rows.index.tallies.values()),
        duplicate_rows=len(selection.duplicates),
        leaked_rows=len(selection.leaked),
    )
    there = listed[0] if listed else None
    return Reading(
        spec, folder, adapter, config, tokenizer, image_processor, rows, division, inputs,
        judges, there, scratch, tasks, added,
    )  # fmt: skip


def load(
    reading: Reading, ranks: Ranks, stopping: Callable[[], bool] = lambda: False, *, world: int | None = None
) -> Setup:
    """Loads the model and plans the steps.

    Args:
        reading: the inputs.
        ranks: that do it.
        stopping: whether this rank was asked to stop.
        world: ranks that train, where this is for counting memory only.
    """
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
    grpo = spec.objective and spec.objective.grpo
    pack = spec.task == "text-generation" if training.packing is None else training.packing
    order = Order(
        rows=division.train,
        lengths=rows.lengths if tokenizer is not None else np.ones(len(rows.targets), dtype=np.int64),
        sources=rows.sources,
        weights=weights,
        seed=training.seed,
        batching=Batching(training.sequence_length or 0, pack, training.batch_size, training.tokens_per_step),
        repeats=grpo.iterations if grpo else 1,
    )
    total_steps = training.max_steps or order.total_steps(float(training.epochs or 0))
    method, model, head_is_new, size = _loaded(spec, reading, pad, ranks)
    spec = _with_rate(spec, size, packing=pack)
    if ranks.first and training.learning_rate is None and world is None:
        log.info(
            "training.learningRate is %s: the default for a model of %.3g weights", spec.training.learning_rate, size
        )
    model = dataclasses.replace(model, noise=float(training.neftune_noise))
    names = [name for name, parameter in model.outer.named_parameters() if parameter.requires_grad]
    groups = method.groups(model, names, len(order.epoch(0)), total_steps)
    objective = objectives.chosen(
        spec, reading.config, rows, tokenizer, reading.image_processor, method, reading.judges, ranks.device, stopping
    )
    micro_batch = training.micro_batch_size or (None if training.accumulation_steps else _usual_rows(spec, pack))
    masters = Masters(
        model.outer,
        models.compute_type(spec),
        training.optimizer.adamw,
        groups,
        pull=float(training.l2_sp),
        fresh=tuple(anatomy.head(reading.config, spec.head)),
        ranks=dataclasses.replace(ranks, world=world or ranks.world),
    )
    model.outer.to(ranks.device)
    guess = objective.guess(rows, division.train) if head_is_new else None
    sets = {"": division.held_out, **division.sets}
    slices = [one.name for one in spec.evaluation.slices]
    return Setup(
        spec=spec,
        method=method,
        model=model,
        tokenizer=tokenizer,
        image_processor=reading.image_processor,
        masters=masters,
        objective=objective,
        rows=rows,
        division=division,
        held_out=division.held_out,
        evaluate=Evaluator(
            objective,
            rows,
            sets,
            slices,
            order.batching,
            grpo.generation_batch_size if grpo else micro_batch or 1,
            ranks,
            guess,
        ),
        benchmarks=Benchmarks(
            reading.benchmarks,
            tokenizer,
            (training.sequence_length or 0) * (micro_batch or 1),
            ranks,
        ),
        order=order,
        total_steps=total_steps,
        micro_batch=micro_batch,
        baseline="model" if guess is None else "majority",
        prompting=Prompting(spec, _few_shot(reading, ranks), tokenizer, micro_batch or 1),
    )


def _few_shot(reading: Reading, ranks: Ranks) -> RowSet | None:
    """Rows behind examples, prepared once a node."""
    spec, asked = reading.spec, reading.spec.evaluation.few_shot
    if (
        not asked
        or not asked.examples
        or not (spec.evaluation.prompts or (asked.rows and len(reading.division.held_out)))
    ):
        return None

    def make() -> Path | None:
        assert reading.files
        return few_shot.prepare(
            spec, reading.files, reading.rows, reading.division, reading.tokenizer, reading.scratch / "few-shot"
        )

    folder = ranks.once(make, each_node=True)
    return RowSet.open(folder) if folder else None


def _usual_rows(spec: ResolvedFineTune, pack: bool) -> int:
    """In one forward pass: about as many tokens whatever a row is."""
    if spec.task == "image-classification":
        return IMAGES_AT_A_TIME
    if spec.objective and spec.objective.grpo:
        return 1
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
    return spec.model_copy(update={"training": training, "objective": _with_answers(spec, length)})


def _with_rate(spec: ResolvedFineTune, weights: int, *, packing: bool) -> ResolvedFineTune:
    """With the learning rate for a model of so many weights decided, and whether rows are packed."""
    objective = spec.objective.name if spec.objective else None
    rate = spec.training.learning_rate or resolution.learning_rate(spec.method.name, objective, weights)
    training = spec.training.model_copy(update={"learning_rate": rate, "packing": packing})
    return spec.model_copy(update={"training": training})


def _with_answers(spec: ResolvedFineTune, length: int) -> ResolvedObjective | None:
    """With the longest answer of objective.grpo decided."""
    objective = spec.objective
    if objective is None or objective.grpo is None:
        return objective
    most = objective.grpo.max_completion_length or min(USUAL_ANSWER, length // 2)
    if most >= length:
        raise UserError(
            f"objective.grpo.maxCompletionLength {most} leaves none of {length} tokens for a prompt; lower it, or raise training.sequenceLength"
        )
    return objective.model_copy(update={"grpo": objective.grpo.model_copy(update={"max_completion_length": most})})


def _loaded(spec: ResolvedFineTune, reading: Reading, pad: int | None, ranks: Ranks) -> tuple[Method, Model, bool, int]:
    """The model on the device, or still in the host's memory if its own weights are trained, with what the method trains on it; whether its head is new, which that of a continued adapter is not; and how many weights it has by itself.

    On the meta device the same without a weight, and not quantised.
    """
    method = methods.chosen(spec)
    quantization = None if ranks.device.type == "meta" else method.quantization(reading.config.model_type)
    inner, reload, stored, head_is_new = models.load(
        spec,
        reading.model,
        reading.config,
        reading.rows.index.classes,
        pad,
        own_weights=method.learns_the_model,
        quantization=quantization,
        device=ranks.device,
        added=reading.added,
    )
    weights = int(inner.num_parameters())  # of quantised ones not those that are stored
    if quantization is None and not method.learns_the_model:
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
    if spec.training.gradient_checkpointing:
        models.checkpoint_blocks(model.inner)
    if ranks.first and (summary := method.summary(model)):
        log.info("%s", summary)
    if not method.learns_the_model:  # else masters move what is trained, and then comes the rest
        model.outer.to(ranks.device)
    model.outer.train()
    return method, model, head_is_new and not _brings_head(reading.adapter, reading.rows.index.classes), weights


def _brings_head(adapter: Path | None, classes: list[str]) -> bool:
    """Whether the adapter that is continued has a head that has learned these classes; one that names none is believed."""
    if adapter is None:
        return False
    record = adapter / outputs.RECORD
    named = outputs.Record.model_validate_json(record.read_bytes()).classes if record.is_file() else []
    return named in ([], classes)


def _known_classes(spec: ResolvedFineTune, config: Any, adapter: Path | None) -> list[str] | None:
    """Names of the classes that there is a trained head for: of the adapter that is continued, or of the model."""
    record = adapter / outputs.RECORD if adapter else None
    if record is not None and record.is_file():
        return outputs.Record.model_validate_json(record.read_bytes()).classes or None
    return models.known_classes(config, spec.head)


def _synonyms(spec: ResolvedFineTune, into: Path) -> list[LocalFile]:
    listed = spec.dataset.augmentation and spec.dataset.augmentation.synonyms
    return [local_file(file.uri, file.fetch()) for file in (source_files(listed, into) if listed else [])]


def _sets(spec: ResolvedFineTune) -> list[list[Source]]:
    """Sources of the sets beside the held-out rows, in the order of holdout.set_names."""
    evaluation = spec.dataset.evaluation
    if evaluation is None:
        return []
    return [one.sources for one in evaluation.sets or ()] + ([evaluation.general] if evaluation.general else [])
