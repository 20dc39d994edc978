"""Training: `run` is what a rank does from its input to its verdict, `train` is the loop. Called by worker and by tests.

Every rank runs the same code and decides alike: what one rank alone can know (a stop signal, the clock, an error) goes through `Ranks`.
"""

import logging
import math
import time
import traceback

import numpy as np
import torch

from finetune_crds.resolved import ResolvedFineTune, ResolvedJob, ResolvedTraining
from finetune_crds.support import METRICS
from finetune_crds.v1alpha1 import Inputs, OutputStatus
from finetune_crds.verdict import ExitCode, Verdict

from . import gates, micro_batches
from .context import RunContext
from .data.order import Step, share
from .errors import (
    Diverged,
    Fenced,
    GateFailed,
    InternalError,
    Interrupted,
    OutOfGpuMemory,
    Stopped,
    UserError,
    classified,
    lacks_gpu_memory,
    verdict_of,
)
from .modelling import samples, schedule
from .modelling.masters import Group
from .modelling.models import Model
from .ranks import Ranks
from .reporting import data_report, evaluation_report
from .reporting.story import Story
from .results import outputs, publish
from .results.checkpoints import Checkpoints, Committed
from .results.journal import Journal
from .results.state import Metrics, TrainingState, joined
from .setup import Setup, load, read

log = logging.getLogger("finetune.train")

NAMED_ROWS = 8


def run(job: ResolvedJob, context: RunContext) -> Verdict:
    """One run, from the input to the verdict. Never raises: an error is a verdict."""
    story = Story(context.reporter, context.attempt)
    try:
        _run(job, context, story)
        return story.verdict(Verdict(code=ExitCode.FINISHED))
    except Exception as error:
        return failed(story, error)


def failed(story: Story, error: Exception) -> Verdict:
    """The verdict of a run that an error has ended."""
    found = classified(error)
    if isinstance(found, InternalError) or error is not found:
        # Frames only: the text of a foreign exception may quote data.
        log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    log.info("%s: %s", type(found).__name__, found)
    return story.verdict(verdict_of(error))


def _run(job: ResolvedJob, context: RunContext, story: Story) -> None:
    spec = job.spec
    assert isinstance(spec, ResolvedFineTune), "a user's own program is not ours to run"
    ranks = context.ranks
    story.metric = spec.evaluation.metric
    story.tell(stage="Preparing")
    reading = read(spec, context)
    story.inputs(reading.inputs)
    if _reuse(job, context, story, reading.inputs):
        return
    if ranks.any(context.asked_to_stop()):
        raise Stopped("stopped before training began")

    story.tell(stage="Loading")
    setup = load(reading, ranks, context.asked_to_stop)
    story.baseline = setup.baseline
    checkpoints = Checkpoints(
        context.checkpoints,
        job,
        ranks,
        attempt=context.attempt,
        run_id=ranks.once(lambda: context.run_id),
        keep=spec.checkpoints.keep,
        scratch=context.scratch,
    )
    journal = Journal(context.scratch / "journal" / str(ranks.rank))
    state = resume(setup, checkpoints, journal, ranks, reading.inputs)
    if checkpoints.latest is None:
        setup.objective.begin(setup.model, setup.rows, setup.micro_batch or 1, ranks, context.asked_to_stop)
        with setup.untouched() as before:
            setup.prompting.begin(before, ranks, context.asked_to_stop)
    if checkpoints.latest is None or state.micro_batch:
        state.micro_batch = micro_batches.fitting(setup, ranks, state.micro_batch, context.asked_to_stop)
    if state.micro_batch:
        setup = setup.of_micro_batch(state.micro_batch.size)
    if setup.benchmarks and state.benchmarks is None:
        story.tell(stage="Evaluating")
        with setup.untouched() as before:
            state.benchmarks = _benchmarked(setup, before, state.step, journal, context)
        gates.check_known(spec.evaluation.gates, state.benchmarks, benchmarks=True)
    story.committed(checkpoints.latest, checkpoints.best)
    story.begins(state, setup.total_steps)
    if ranks.first:
        log.info("%d weights are trained, in %d steps", len(setup.masters), setup.total_steps)

    try:
        train(setup, state, checkpoints, journal, context, story, reading.inputs)
    except RuntimeError as error:
        if state.micro_batch is None or not lacks_gpu_memory(error):
            raise
        raise OutOfGpuMemory(
            f"the GPU ran out of memory with {state.micro_batch.size} sequences in a forward pass, which seemed to fit; set training.microBatchSize to fewer"
        ) from error

    story.tell(stage="Publishing", total_steps=state.step)
    publish_result(job, setup, state, checkpoints, journal, context, story, reading.inputs)


def _reuse(job: ResolvedJob, context: RunContext, story: Story, inputs: Inputs) -> bool:
    """Whether the output is there already, from an equal job with equal inputs. If not, its place must be free for one."""
    there = context.ranks.once(lambda: outputs.of_equal_job(context.output, job, inputs))
    if there is None:
        return False
    spec = job.spec
    assert isinstance(spec, ResolvedFineTune)
    log.info("%s is the output of this very job already: nothing is trained", context.output.uri)
    gates.check(spec.evaluation.gates, there.before, there.after)
    story.baseline, story.few_shot = there.baseline, there.few_shot
    total = there.total_steps
    story.tell(step=total, first_step=total, total_steps=total, epoch=f"{there.epochs:.2f}")
    story.finished(outputs.status(context.output, there, reused=True), there.before, there.after)
    return True


def resume(setup: Setup, checkpoints: Checkpoints, journal: Journal, ranks: Ranks, inputs: Inputs) -> TrainingState:
    """Takes the storage over and continues from its newest checkpoint, if there is one."""

    def find() -> tuple[Committed | None, Committed | None]:
        checkpoints.claim()
        checkpoints.newest(inputs.dataset_digest or "", inputs.model_digest or "")
        return checkpoints.latest, checkpoints.best

    checkpoints.latest, checkpoints.best = ranks.once(find)
    if checkpoints.latest is None:
        return TrainingState(beginning=setup.method.beginning)
    if ranks.any(checkpoints.latest.index.state.beginning != setup.method.beginning):
        raise UserError(
            f"method.{setup.spec.method.name}.initialization: this kind of processor computes other factors of the weights than the one that wrote {checkpoints.latest.uri}; resume on the kind of before (resources.nodeSelector), or create another FineTuneJob"
        )
    checkpoints.restore(checkpoints.latest, setup.masters)
    files = checkpoints.journal(checkpoints.latest)
    journal.restore(files)
    setup.objective.restore(files)
    setup.prompting.restore(files)
    state = checkpoints.latest.index.state.model_copy(deep=True)
    log.info("resuming behind step %d of %d", state.step, setup.total_steps)
    return state


def train(
    setup: Setup,
    state: TrainingState,
    checkpoints: Checkpoints,
    journal: Journal,
    context: RunContext,
    story: Story,
    inputs: Inputs,
) -> None:
    """Trains from `state` to the end, or raises why not. All ranks alike."""
    spec, ranks, masters, lengths = setup.spec, context.ranks, setup.masters, setup.rows.lengths
    training, total = spec.training, setup.total_steps
    walk = setup.order.walk(state.step)
    saved_at, saved_step = time.monotonic(), checkpoints.latest and state.step
    stopping = False
    if state.step == 0 and not len(setup.held_out):  # else they are taken with the first evaluation
        with setup.untouched() as before:
            _sample(setup, 0, "before", journal, ranks, before)

    def save(*, is_best: bool) -> None:
        nonlocal saved_at, saved_step
        story.tell(stage="Saving")
        began = time.monotonic()
        checkpoints.save(
            masters,
            state,
            journal.files() | setup.objective.files() | setup.prompting.files(),
            dataset=inputs.dataset_digest or "",
            model=inputs.model_digest or "",
            is_best=is_best,
        )
        saved_at, saved_step = time.monotonic(), state.step
        story.committed(checkpoints.latest, checkpoints.best, saved_at - began)
        story.tell(stage="Training")

    while True:
        # 1. At a step boundary: evaluate, save, stop.
        is_best = False
        done = state.step >= total
        if not stopping and _evaluation_due(setup, state, done):
            story.tell(stage="Evaluating")
            metrics = _measured(setup, state, done, context)
            if metrics is None:
                stopping = True
            else:
                is_best = _note_evaluation(setup, state, metrics, journal, ranks, done)
                story.evaluated(state, metrics)
            story.tell(stage="Training")
        done = done or state.stopped_early
        save_due = is_best or (_save_by_step(spec, state.step) and state.step != saved_step)
        if save_due or ((stopping or done) and saved_step != state.step):
            save(is_best=is_best)
        if stopping:
            reason = context.reporter.stop_requested or "asked to stop"
            raise Stopped(f"{reason}: stopped at step {state.step} of {total}, which is saved")
        if done:
            return

        # 2. One step: forward and backward over this rank's part, gradients added up over ranks.
        began = time.monotonic()
        epoch, step = next(walk)
        targets = sum(int(setup.rows.targets[sequence].sum()) for sequence in step)
        tokens = sum(int(lengths[sequence].sum()) for sequence in step)
        shares = [
            share(step, rank, ranks.world, size=setup.micro_batch, forwards=training.accumulation_steps)
            for rank in range(ranks.world)
        ]
        own, most = shares[ranks.rank], max(len(each) for each in shares)
        masters.begin(state.step)
        try:
            setup.objective.begin_step(setup.model, setup.rows, step, own, ranks, state.step)
        except Interrupted:
            stopping = True
            continue
        losses = [torch.zeros((), device=ranks.device)]
        for i, sequences in enumerate(own):
            _seed_dropout(training.seed, state.step, ranks, i)
            batch = setup.objective.train_batch(setup.rows, sequences, ranks.device, state.step)
            loss = setup.objective.loss(setup.model, batch)
            (loss / targets).backward()  # type: ignore[no-untyped-call]
            masters.collect()
            losses.append(loss.detach())
        masters.add_up(most - len(own))

        # 3. What all ranks must agree on before anything is applied.
        local = torch.stack(losses).sum().item()
        overdue = _save_by_clock(spec, time.monotonic() - saved_at)
        told = setup.objective.told()
        squared = float(masters.norm()) ** 2
        flags = [context.asked_to_stop(), ranks.first and overdue, context.reporter.fenced]
        loss_sum, squares, stop, due, fenced, *sums = ranks.sums([local, squared, *flags, *told.values()])
        norm = math.sqrt(squares)
        if not np.isfinite(loss_sum) or not np.isfinite(norm):
            raise Diverged(_diverged(setup, state, own, losses, norm))
        if fenced:
            raise Fenced("another run has taken this one's place; nothing more is committed")
        here = setup.objective.may_stop(state.step + 1)
        stopping = stop > 0 and here

        # 4. The update.
        limit = float(training.max_grad_norm)
        scale = limit / (norm + 1e-6) if 0 < limit < norm else 1.0
        rates = [_learning_rate(training, group, state.step, total) for group in masters.groups]
        masters.step(state.step, rates, float(training.weight_decay), scale)
        state.step += 1
        state.epoch = epoch
        numbers: Metrics = {"loss": loss_sum / targets, "grad_norm": norm, "learning_rate": rates[0]}
        numbers |= {name: value / targets for name, value in zip(told, sums, strict=True)}
        journal.step(state.step, {**numbers, "tokens": tokens, "targets": targets, "epoch": epoch})
        story.step(state, numbers | setup.objective.speeds(), tokens, time.monotonic() - began)
        if due and here and state.step < total and not stopping:
            save(is_best=False)


def publish_result(
    job: ResolvedJob,
    setup: Setup,
    state: TrainingState,
    checkpoints: Checkpoints,
    journal: Journal,
    context: RunContext,
    story: Story,
    inputs: Inputs,
) -> None:
    """Publishes the last or the best weights. The model holds them afterwards."""
    ranks, spec = context.ranks, setup.spec
    published, after = state.step, state.last.metrics if state.last and state.last.step == state.step else None
    if spec.evaluation.publish == "best" and state.best and checkpoints.best:
        published, after = state.best.step, state.best.metrics
        if published != state.step:
            setup.masters.load_weights(checkpoints.weights(checkpoints.best))
    if (
        after and state.before and after.keys() < state.before.keys()
    ):  # evaluation.generate: what it writes is measured now
        story.tell(stage="Evaluating")
        after = setup.evaluate(setup.model, context.asked_to_stop)
        if after is None:
            raise Stopped(f"stopped before the result was measured; step {state.step} is saved")
        journal.step(published, dict(after))
        story.tell(stage="Publishing")

    if setup.benchmarks:
        story.tell(stage="Evaluating")
        after = joined(after, _benchmarked(setup, setup.model, published, journal, context))
        story.tell(stage="Publishing")
    compared = setup.prompting.compare(setup.model, ranks, context.asked_to_stop)
    story.few_shot = compared.status() if compared else None
    story.judged(state.began, after)
    _sample(setup, state.step, "after", journal, ranks)

    def confirm() -> None:
        if context.reporter.fenced:
            raise Fenced("another run has taken this one's place; nothing was published")
        checkpoints.check_owner()

    def reported() -> dict[str, bytes]:
        found = evaluation_report.report(
            spec, setup.counts, state, journal.files(),
            baseline=setup.baseline, published=published, after=after, compared=compared,
        )  # fmt: skip
        prompts, taken = spec.evaluation.prompts, setup.prompting.taken
        answers = evaluation_report.answers(journal.files(), prompts, taken.answers if taken else [])
        about_data = data_report.files(spec, setup.rows, setup.division, setup.tokenizer)
        return about_data | evaluation_report.files(found, spec, answers)

    try:
        gates.check(spec.evaluation.gates, state.began, after)
    except GateFailed as failed:  # the reports tell why, more than ever
        where = ranks.once(lambda: checkpoints.put_reports(reported()))
        raise GateFailed(f"{failed}; the reports are in {where}") from None

    weights = setup.masters.trained()

    def write() -> OutputStatus:
        what = publish.record(
            job, spec, inputs, setup.method, setup.model, setup.rows, setup.division,
            baseline=setup.baseline, few_shot=story.few_shot, step=published, total_steps=state.step, epochs=state.epoch, before=state.began, after=after,
            micro_batch=state.micro_batch.size if state.micro_batch else None,
        )  # fmt: skip
        told = journal.files() | reported()
        return publish.publish(
            context.output, context.scratch, setup.method, setup.model, weights,
            setup.image_processor or setup.tokenizer, told, what,
            confirm=confirm,
        )  # fmt: skip

    story.finished(ranks.once(write), state.began, after)


def _benchmarked(setup: Setup, model: Model, step: int, journal: Journal, context: RunContext) -> Metrics:
    """What evaluation.benchmarks say of a model. Raises Stopped: nothing is lost, the last checkpoint is of this step or there is none."""
    metrics = setup.benchmarks(model, context.scratch, context.asked_to_stop)
    if metrics is None:
        raise Stopped("asked to stop: stopped while benchmarks were run, and they will be run again")
    journal.step(step, dict(metrics))
    return metrics


def _evaluation_due(setup: Setup, state: TrainingState, done: bool) -> bool:
    if not len(setup.held_out):
        return False
    if state.step == 0:
        return state.before is None
    every = setup.spec.evaluation.every_steps
    here = done or bool(every and state.step % every == 0)
    return here and (state.last is None or state.last.step != state.step)


def _measured(setup: Setup, state: TrainingState, done: bool, context: RunContext) -> Metrics | None:
    """Metrics at this step; those before training are of the model without what it is given to train. None if asked to stop."""
    if state.step == 0:
        with setup.untouched() as before:
            return setup.evaluate.baseline(before, context.asked_to_stop)
    last = done and setup.spec.evaluation.publish == "last"
    on_the_way = setup.spec.evaluation.generate == "beforeAndAfter" and not last
    return setup.evaluate(setup.model, context.asked_to_stop, on_the_way=on_the_way)


def _note_evaluation(
    setup: Setup, state: TrainingState, metrics: Metrics, journal: Journal, ranks: Ranks, done: bool
) -> bool:
    """Takes an evaluation in; True if it is the best so far. What training has not touched yet is no candidate."""
    evaluation = setup.spec.evaluation
    journal.step(state.step, dict(metrics))
    if state.step == 0:
        if evaluation.metric not in metrics:
            there = ", ".join(sorted(METRICS.keys() & metrics.keys()))
            raise UserError(
                f"evaluation.metric: {evaluation.metric} is not measured of this job; choose one of {there}"
            )
        gates.check_known(evaluation.gates, metrics)
        state.before = metrics
        with setup.untouched() as before:
            _sample(setup, 0, "before", journal, ranks, before)
        return False
    stopping = evaluation.early_stopping
    best = state.note(
        metrics,
        evaluation.metric,
        float((stopping and stopping.min_delta) or 0),
        stopping.patience if stopping and not done else None,
    )
    if not (done or state.stopped_early):
        _sample(setup, state.step, "during", journal, ranks)
    return best


def _sample(setup: Setup, step: int, when: str, journal: Journal, ranks: Ranks, model: Model | None = None) -> None:
    prompts = setup.spec.evaluation.prompts
    if prompts and ranks.first:
        answers = samples.answers(setup.spec, model or setup.model, setup.tokenizer, ranks.device)
        journal.samples(step, when, prompts, answers)


def _learning_rate(training: ResolvedTraining, group: Group, step: int, total: int) -> float:
    """Of a group that has begun: its own warm-up and schedule, from its beginning to the end of training."""
    own = max(0, step - group.start)
    whole = total - group.start
    warmup = schedule.warmup_steps(whole, steps=training.warmup_steps, ratio=training.warmup_ratio)
    assert training.learning_rate is not None  # decided by setup
    return schedule.learning_rate(own, whole, float(training.learning_rate) * group.rate, warmup, training.schedule)


def _save_by_step(spec: ResolvedFineTune, step: int) -> bool:
    every = spec.checkpoints.every_steps
    return bool(every and step and step % every == 0)


def _save_by_clock(spec: ResolvedFineTune, seconds: float) -> bool:
    minutes = spec.checkpoints.every_minutes
    return bool(minutes and seconds >= 60 * minutes)


def _seed_dropout(seed: int, step: int, ranks: Ranks, micro_batch: int) -> None:
    """Dropout is a function of the step, so a resumed run draws what an uninterrupted one does, and there is no state to save."""
    drawn = np.random.SeedSequence([seed, 3, step, ranks.rank, micro_batch]).generate_state(1, np.uint64)[0]
    number = int(drawn >> 1)
    # torch.manual_seed also keeps a call and its stack for GPUs that may come: milliseconds and memory at each step on a CPU.
    torch.default_generator.manual_seed(number)
    if ranks.device.type == "cuda":
        torch.cuda.manual_seed(number)


def _diverged(setup: Setup, state: TrainingState, own: list[Step], losses: list[torch.Tensor], norm: float) -> str:
    """Names the step and the rows whose loss is not finite; of the gradient's norm nobody knows whose it is."""
    guilty = [rows for rows, loss in zip(own, losses[1:], strict=True) if not torch.isfinite(loss)]
    what = "the loss" if guilty else f"the gradient norm ({norm})"
    ids = [int(row) for sequences in guilty for sequence in sequences for row in sequence]
    named = ", ".join(setup.rows.place(row) for row in ids[:NAMED_ROWS])
    more = f" and {len(ids) - NAMED_ROWS} more" if len(ids) > NAMED_ROWS else ""
    where = f" of {named}{more}" if named else ""
    return f"{what}{where} is not finite in step {state.step + 1}; nothing of it was applied, and the last checkpoint is untouched"
