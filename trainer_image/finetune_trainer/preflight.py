"""Everything that can be found out before a GPU is asked for: the job's own path up to the first step, on a CPU and without a weight.

Inputs are fetched, digested and prepared as training does it (which also finds what is prepared here, on the same scratch); the model
is loaded as names and shapes from the files' headers, the method is put on it, the steps are planned, and one of them is run on the
meta device to count its memory. Nothing is written but a file in each place that must be writable, which is removed again. Called by
worker, in a pod of its own, and by local.
"""

import dataclasses
import logging

from finetune_crds.resolved import ResolvedFineTune, ResolvedJob
from finetune_crds.v1alpha1 import MemoryEstimate, PreflightReport
from finetune_crds.verdict import ExitCode, Verdict

from . import micro_batches
from .context import RunContext
from .modelling import footprint
from .reporting.story import Story
from .results import outputs
from .setup import Setup, load, read
from .train import failed

log = logging.getLogger("finetune.preflight")


def run(job: ResolvedJob, context: RunContext) -> Verdict:
    """The check, from the input to the verdict. Never raises: what is wrong is the verdict that training would have ended with."""
    story = Story(context.reporter, context.attempt)
    try:
        report = check(job, context, story)
        return story.verdict(Verdict(code=ExitCode.FINISHED, preflight=report))
    except Exception as error:
        return failed(story, error)


def check(job: ResolvedJob, context: RunContext, story: Story) -> PreflightReport:
    """What the job would do.

    Raises:
        TrainerError: as training would.
    """
    spec = job.spec
    assert isinstance(spec, ResolvedFineTune), "a user's own program is not ours to check"
    story.tell(stage="Preparing")
    reading = read(spec, context)
    story.inputs(reading.inputs)
    context.check_stop()
    exists = outputs.of_equal_job(context.output, job, reading.inputs) is not None
    if not exists:
        outputs.check_writable(context.output, context.checkpoints)
    story.tell(stage="Loading")
    world = max(1, spec.resources.gpus)
    setup = load(reading, dataclasses.replace(context.ranks, device=footprint.META), world=world)
    context.check_stop()
    weights = [parameter.numel() for parameter in setup.model.outer.parameters()]
    inputs, lengths = reading.inputs, setup.rows.lengths
    return PreflightReport(
        rows=inputs.rows or 0,
        evaluation_rows=inputs.evaluation_rows or 0,
        tokens=inputs.tokens,
        longest_row=None if setup.tokenizer is None else int(lengths.max()),
        steps=setup.total_steps,
        parameters=sum(weights),
        trained_parameters=len(setup.masters),
        learning_rate=setup.spec.training.learning_rate,
        memory=_memory(setup, world),
        output_exists=exists or None,
    )


def _memory(setup: Setup, world: int) -> MemoryEstimate | None:
    """None for what cannot be counted; on the CPU there is no GPU's memory."""
    if not setup.spec.resources.gpus:
        return None
    try:
        found = footprint.of(setup, world)
        sizes = list(micro_batches.tried(setup, world))
        fastest = footprint.of(setup.of_micro_batch(sizes[-1]), world) if sizes else None
    except Exception as error:  # an estimate is advice
        known = isinstance(error, NotImplementedError | RuntimeError)
        log.warning("the memory of a step cannot be counted: %s", type(error).__name__, exc_info=not known)
        return None
    return MemoryEstimate(
        weights=_mebibytes(found.weights),
        training=_mebibytes(found.training),
        activations=_mebibytes(found.activations),
        total=_mebibytes(found.total),
        micro_batch_tokens=found.tokens,
        full_speed=_mebibytes(fastest.total) if fastest else None,
    )


def _mebibytes(size: int) -> str:
    return f"{-(-size // 2**20)}Mi"
