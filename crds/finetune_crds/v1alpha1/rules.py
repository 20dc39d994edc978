"""What fits together across the sections of a spec, as CEL; sentences name the field and the fix."""

from collections.abc import Callable, Iterator
from typing import Final, get_args

from .. import support
from . import methods
from .common import (
    Rule,
    cel_list,
)

_SHAPE = (
    "rank",
    "alpha",
    "targets",
    "rankPattern",
    "alphaPattern",
    "modulesToSave",
    "useDora",
    "useRslora",
    "initialization",
    "experts",
)
"""What an adapter that is continued says itself."""


def _brings_its_own(method: str) -> Rule:
    fields = [
        name
        for name in _SHAPE
        if name in {field.alias for field in getattr(methods, method.title()).model_fields.values()}
    ]
    given = ", ".join(f"has(self.method.{method}.{name})" for name in fields)
    return Rule(
        f"!(has(self.model) && has(self.model.adapter) && has(self.method) && has(self.method.{method})) || [{given}].filter(x, x).size() == 0",
        f"model.adapter brings its own {', '.join(fields[:-1])} and {fields[-1]}: remove them from method.{method}",
    )


_NOTHING_HELD_OUT = "has(self.dataset) && has(self.dataset.evaluation) && has(self.dataset.evaluation.fraction) && double(self.dataset.evaluation.fraction) == 0.0"
_LABEL_SMOOTHING = (*support.WRITING, "text-classification", "token-classification", "image-classification")
"""Tasks that learn classes or tokens."""
_NOISE = ("text-generation", "text-classification", "token-classification", "question-answering")
"""Tasks whose rows are embedded in one piece."""
_PROGRAM = "has(self.runtime) && has(self.runtime.command)"
_TASK = "(has(self.task) ? self.task : 'text-generation')"
_PROBLEM = "(has(self.objective) && has(self.objective.classification) && has(self.objective.classification.problem) ? self.objective.classification.problem : 'singleLabel')"


_WITH_EXPERTS = tuple(
    task
    for task in get_args(support.Task)
    if any(family.experts and task in family.tasks for family in support.FAMILIES.values())
)
_HAS_PROMPTS = "(has(self.evaluation) && has(self.evaluation.prompts) && size(self.evaluation.prompts) > 0)"


def _objective_fits(name: str, tasks: tuple[str, ...]) -> Rule:
    return Rule(
        f"!(has(self.objective) && has(self.objective.{name})) || {_TASK} in {cel_list(tasks)}",
        f"objective.{name} is for {' and '.join(tasks)}: remove it, or correct task",
    )


def _has_objective(names: tuple[str, ...]) -> str:
    """CEL for whether the objective is one of these; sft is it where none is said."""
    chosen = " || ".join(f"has(self.objective.{name})" for name in names)
    if "sft" in names:
        return f"(has(self.objective) ? ({chosen}) : {_TASK} == 'text-generation')"
    return f"(has(self.objective) && ({chosen}))"


def _kinds() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Jobs that are measured alike: CEL for whether a job is one, its name, and its metrics."""
    for problem in get_args(support.Problem):
        cel = f"({_TASK} == 'text-classification' && {_PROBLEM} == '{problem}')"
        yield (
            cel,
            f"text-classification of problem {problem}",
            support.metrics_of("text-classification", problem=problem),
        )
    for objective, tasks in support.OBJECTIVES.items():
        if "text-generation" in tasks:
            metrics = support.metrics_of("text-generation", objective=objective)
            yield _has_objective((objective,)), f"objective {objective}", metrics
    for task in get_args(support.Task):
        if task not in ("text-classification", "text-generation"):
            yield f"{_TASK} == '{task}'", task, support.metrics_of(task)


def _metrics_fit() -> Iterator[Rule]:
    alike: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for cel, name, metrics in _kinds():
        alike.setdefault(metrics, []).append((cel, name))
    for metrics, kinds in alike.items():
        known = cel_list(metrics)
        yield Rule(
            f"!(has(self.evaluation) && ({' || '.join(cel for cel, _ in kinds)})) || ((!has(self.evaluation.metric) || self.evaluation.metric in {known}) && (!has(self.evaluation.gates) || self.evaluation.gates.all(g, has(g.benchmark) || g.metric in {known})))",
            f"evaluation.metric and gates: jobs of {', '.join(name for _, name in kinds)} are judged by {', '.join(metrics)}: correct it, or task and objective",
        )


def _method_fits(task: support.Task) -> Rule:
    known = support.methods_of(task)
    others = [name for name in get_args(support.MethodName) if name not in known]
    chosen = " || ".join(f"has(self.method.{name})" for name in others)
    return Rule(
        f"!(has(self.task) && self.task == '{task}' && has(self.method)) || !({chosen})",
        f"task {task} is supported with method {', '.join(known)}",
    )


def _only_generates(given: str, field: str) -> Rule:
    return Rule(f"!({given}) || {_TASK} == 'text-generation'", f"{field} is for text-generation: remove it")


def _objective_method_fits(name: str, methods_: tuple[support.MethodName, ...]) -> Rule:
    others = [method for method in get_args(support.MethodName) if method not in methods_]
    chosen = " || ".join(f"has(self.method.{method})" for method in others)
    return Rule(
        f"!({_has_objective((name,))} && has(self.method)) || !({chosen})",
        f"objective.{name} is supported with method {', '.join(methods_)}",
    )


_GRPO = "has(self.objective) && has(self.objective.grpo)"
_GRPO_FITS = (
    *(_objective_method_fits(name, those) for name, those in support.OBJECTIVE_METHODS.items()),
    Rule(
        f"!({_GRPO}) || !self.objective.grpo.rewards.exists(r, has(r.entryPoint)) || (has(self.runtime) && has(self.runtime.image))",
        "objective.grpo.rewards: entryPoint is a function in an image of your own, built from the trainer's: name it in runtime.image",
    ),
    Rule(
        f"!({_GRPO} && has(self.objective.grpo.beta) && double(self.objective.grpo.beta) > 0.0) || !(has(self.model) && has(self.model.adapter)) && !(has(self.method) && (has(self.method.full) || has(self.method.freeze) || has(self.method.gradualUnfreezing) || (has(self.method.lora) && has(self.method.lora.initialization) && self.method.lora.initialization != 'zero')))",
        "objective.grpo.beta compares with the model before training, which is the one with the adapter switched off: remove it with model.adapter, method full, freeze and gradualUnfreezing, and lora.initialization pissa and olora",
    ),
    Rule(
        f"!({_GRPO} && has(self.objective.grpo.maxCompletionLength) && has(self.training) && has(self.training.sequenceLength)) || self.objective.grpo.maxCompletionLength < self.training.sequenceLength",
        "objective.grpo.maxCompletionLength leaves no token of training.sequenceLength for a prompt: lower it, or raise sequenceLength",
    ),
    Rule(
        f"!({_GRPO} && has(self.training) && has(self.training.tokensPerStep))",
        "training.tokensPerStep: how long answers will be is not known beforehand; use batchSize, in prompts, with objective grpo",
    ),
    Rule(
        f"!({_GRPO} && has(self.dataset) && has(self.dataset.columns) && has(self.dataset.columns.completion))",
        "dataset.columns.completion: objective grpo has the model answer itself and reads none: remove it, or name it as objective.grpo.rewards[].reference.column",
    ),
)


def _rows_that(take: Callable[[tuple[support.Format, ...]], bool]) -> tuple[str, str]:
    """CEL for whether a job is of a task or an objective whose formats of rows are such, and which those are, in words."""
    tasks = tuple(name for name in get_args(support.Task) if name != "text-generation" and take(support.FORMATS[name]))
    objectives = tuple(
        name
        for name, those in support.OBJECTIVES.items()
        if "text-generation" in those and take(support.formats_of("text-generation", name))
    )
    told = [f"{_TASK} in {cel_list(tasks)}"] * bool(tasks) + [_has_objective(objectives)] * bool(objectives)
    return " || ".join(told), ", ".join([*tasks, *(f"objective {name}" for name in objectives)])


def _format_fits(formats: tuple[support.Format, ...]) -> Rule:
    told, those = _rows_that(lambda taken: taken == formats)
    return Rule(
        f"!(has(self.dataset) && has(self.dataset.format)) || !({told}) || self.dataset.format in {cel_list(formats)}",
        f"dataset.format: rows of {those} are of format {' or '.join(formats)}: correct it, or task and objective",
    )


def _columns_fit(formats: tuple[support.Format, ...]) -> Rule:
    columns = [name for name, those in support.COLUMNS.items() if those == formats]
    given = " || ".join(f"has(self.dataset.columns.{name})" for name in columns)
    told, _ = _rows_that(lambda taken: not set(taken).isdisjoint(formats))
    return Rule(
        f"!(has(self.dataset) && has(self.dataset.columns) && ({given})) || (has(self.dataset.format) ? self.dataset.format in {cel_list(formats)} : ({told}))",
        f"dataset.columns: only rows of format {' or '.join(formats)} have {', '.join(columns)}: remove what is not read, or correct dataset.format, task or objective",
    )


_ROWS_FIT = (
    *(
        _format_fits(formats)
        for formats in dict.fromkeys((*support.FORMATS.values(), *support.OBJECTIVE_FORMATS.values()))
    ),
    *(_columns_fit(formats) for formats in dict.fromkeys(support.COLUMNS.values())),
    Rule(
        "!(has(self.objective) && has(self.objective.sft) && has(self.objective.sft.lossOn) && self.objective.sft.lossOn == 'assistant' && has(self.dataset) && has(self.dataset.format)) || self.dataset.format != 'text'",
        "objective.sft.lossOn: assistant needs rows in which one answers, and dataset.format is text: remove lossOn, or use format chat or instruction",
    ),
)
_DATASET_FITS = (
    *_ROWS_FIT,
    Rule(
        "!(has(self.task) && self.task == 'image-classification' && has(self.dataset)) || !(has(self.dataset.tooLong) || has(self.dataset.minTokens) || has(self.dataset.tokenBudget) || (has(self.dataset.deduplicate) && self.dataset.deduplicate == 'near'))",
        "dataset.tooLong, minTokens, tokenBudget and deduplicate: near are of text: remove them for image-classification",
    ),
    Rule(
        "!(has(self.dataset) && has(self.dataset.tooLong) && has(self.task) && self.task == 'question-answering')",
        "dataset.tooLong: question-answering reads a long context in windows: remove it",
    ),
    Rule(
        "!(has(self.dataset) && has(self.dataset.tooLong) && self.dataset.tooLong == 'split') || ((!has(self.task) || self.task == 'text-generation') && (!has(self.objective) || has(self.objective.sft) || has(self.objective.pretrain)) && (!has(self.dataset.format) || self.dataset.format == 'text'))",
        "dataset.tooLong: split is for plain text of text-generation: use truncate or drop",
    ),
    Rule(
        "!(has(self.dataset) && has(self.dataset.deduplicate) && self.dataset.deduplicate == 'near' && has(self.task) && self.task == 'question-answering')",
        "dataset.deduplicate: near would take questions about one context for the same: use exact",
    ),
    Rule(
        "!(has(self.dataset) && has(self.dataset.minTokens) && has(self.training) && has(self.training.sequenceLength)) || self.dataset.minTokens <= self.training.sequenceLength",
        "dataset.minTokens is more than training.sequenceLength: no row would be left",
    ),
)


_FEW_SHOT = "has(self.evaluation) && has(self.evaluation.fewShot)"
_GENERATE = "has(self.evaluation) && has(self.evaluation.generate)"
_COMPARISONS = (
    Rule(
        f"!({_FEW_SHOT}) || {_TASK} in {cel_list(support.PAIRS)} || ({_TASK} == 'text-generation' && (!has(self.objective) || has(self.objective.sft)))",
        f"evaluation.fewShot is for objective sft, {' and '.join(support.PAIRS)}: remove it",
    ),
    Rule(
        f"!({_FEW_SHOT} && has(self.evaluation.fewShot.rows) && self.evaluation.fewShot.rows > 0) || ({_TASK} == 'text-generation' && !({_NOTHING_HELD_OUT}))",
        "evaluation.fewShot.rows are held-out rows of text-generation: remove it, or raise dataset.evaluation.fraction",
    ),
    Rule(
        f"!({_FEW_SHOT} && {_TASK} in {cel_list(support.PAIRS)}) || {_HAS_PROMPTS}",
        f"evaluation.fewShot of {' and '.join(support.PAIRS)} is of answers to evaluation.prompts: add prompts or remove it",
    ),
    Rule(
        f"!({_GENERATE}) || {_TASK} in {cel_list(support.PAIRS)}",
        f"evaluation.generate is for {' and '.join(support.PAIRS)}: remove it",
    ),
    Rule(
        f"!({_GENERATE} && self.evaluation.generate == 'beforeAndAfter') || !has(self.evaluation.metric) || !(self.evaluation.metric in {cel_list(support.WRITTEN)})",
        "evaluation.generate: beforeAndAfter leaves evaluation.metric unmeasured on the way: use everyEvaluation, or metric eval_loss",
    ),
)

RULES: Final[tuple[Rule, ...]] = (
    Rule(
        f"({_PROGRAM}) || (has(self.model) && has(self.dataset) && has(self.output))",
        "spec needs model, dataset and output (only a program of your own, runtime.command, may do without)",
    ),
    Rule(
        f"!({_PROGRAM}) || !(has(self.task) || has(self.objective) || has(self.method) || has(self.training) || has(self.evaluation))",
        "task, objective, method, training and evaluation are read by our trainer only: remove them, or remove runtime.command",
    ),
    *(_objective_fits(name, tasks) for name, tasks in support.OBJECTIVES.items()),
    *_metrics_fit(),
    *(
        _method_fits(task)
        for task in get_args(support.Task)
        if support.methods_of(task) != get_args(support.MethodName)
    ),
    Rule(
        f"!(has(self.method) && has(self.method.lora) && has(self.method.lora.experts) && self.method.lora.experts) || {_TASK} in {cel_list(_WITH_EXPERTS)}",
        f"method.lora.experts is for mixtures of experts, which are supported for {' and '.join(_WITH_EXPERTS)}: remove it",
    ),
    _only_generates("has(self.training) && has(self.training.packing) && self.training.packing", "training.packing"),
    Rule(
        f"!{_HAS_PROMPTS} || {_TASK} in {cel_list(support.WRITING)}",
        f"evaluation.prompts is for {', '.join(support.WRITING)}: remove it",
    ),
    *_COMPARISONS,
    Rule(
        f"!(has(self.evaluation) && has(self.evaluation.maxNewTokens)) || {_HAS_PROMPTS} || ({_TASK} in {cel_list(support.PAIRS)})",
        "evaluation.maxNewTokens is the length of answers to evaluation.prompts: add prompts or remove it",
    ),
    Rule(
        f"!(has(self.dataset) && has(self.dataset.prefix)) || {_TASK} in {cel_list(support.PAIRS)}",
        f"dataset.prefix is for {' and '.join(support.PAIRS)}: remove it",
    ),
    Rule(
        f"!(has(self.training) && has(self.training.packing) && self.training.packing) || !{_has_objective(support.UNPACKED)}",
        f"training.packing is for objective sft and pretrain: remove it (rows of {', '.join(support.UNPACKED)} are not padded either)",
    ),
    Rule(
        f"!(has(self.evaluation) && has(self.evaluation.prompts) && size(self.evaluation.prompts) > 0) || !{_has_objective(('reward',))}",
        "evaluation.prompts needs a model that writes: remove them, a reward model gives a score",
    ),
    _only_generates("has(self.evaluation) && has(self.evaluation.benchmarks)", "evaluation.benchmarks"),
    Rule(
        f"!(has(self.evaluation) && has(self.evaluation.benchmarks)) || !{_has_objective(('reward',))}",
        "evaluation.benchmarks need a model that writes: remove them, a reward model gives a score",
    ),
    Rule(
        f"!(has(self.dataset) && has(self.dataset.columns) && has(self.dataset.columns.margin)) || {_has_objective(('reward',))}",
        "dataset.columns.margin is for objective reward: remove it",
    ),
    Rule(
        "!(has(self.task) && self.task == 'image-classification' && has(self.training)) || !(has(self.training.tokensPerStep) || has(self.training.sequenceLength) || has(self.training.packing) || has(self.training.neftuneNoise))",
        "training.tokensPerStep, sequenceLength, packing and neftuneNoise are of tokens, which images have none of: remove them, and use batchSize",
    ),
    Rule(
        "!(has(self.dataset) && has(self.dataset.augmentation)) || (has(self.task) && self.task in ['image-classification', 'text-classification'])",
        "dataset.augmentation is for image-classification and text-classification: remove it",
    ),
    Rule(
        "!(has(self.task) && self.task == 'text-classification' && has(self.dataset) && has(self.dataset.augmentation)) || !(has(self.dataset.augmentation.randomResizedCrop) || has(self.dataset.augmentation.horizontalFlip) || has(self.dataset.augmentation.randAugment) || has(self.dataset.augmentation.mixup) || has(self.dataset.augmentation.cutmix))",
        "dataset.augmentation: of text-classification there are wordDropout, wordSwap and synonyms: remove the others, which are of images",
    ),
    Rule(
        "!(has(self.task) && self.task == 'image-classification' && has(self.dataset) && has(self.dataset.augmentation)) || !(has(self.dataset.augmentation.wordDropout) || has(self.dataset.augmentation.wordSwap) || has(self.dataset.augmentation.synonyms))",
        "dataset.augmentation: wordDropout, wordSwap and synonyms are of text: remove them for image-classification",
    ),
    *_DATASET_FITS,
    *_GRPO_FITS,
    Rule(
        "!(has(self.objective) && has(self.objective.classification) && has(self.objective.classification.problem) && self.objective.classification.problem != 'singleLabel') || self.task == 'text-classification'",
        "objective.classification.problem multiLabel and regression are for text-classification: remove it",
    ),
    Rule(
        f"!({_NOTHING_HELD_OUT}) || !(has(self.evaluation) && (has(self.evaluation.everySteps) || has(self.evaluation.gates) || has(self.evaluation.slices)))",
        "evaluation.everySteps, gates and slices need held-out rows, and dataset.evaluation.fraction is 0: raise it",
    ),
    Rule(
        "!(has(self.evaluation) && has(self.evaluation.gates)) || self.evaluation.gates.all(g, !has(g.set) || (has(self.dataset) && has(self.dataset.evaluation) && ((g.set == 'general' && has(self.dataset.evaluation.general)) || (has(self.dataset.evaluation.sets) && self.dataset.evaluation.sets.exists(s, s.name == g.set)))))",
        "evaluation.gates: a gate's set must be one of dataset.evaluation.sets, or general",
    ),
    Rule(
        f"!(has(self.dataset) && has(self.dataset.evaluation) && has(self.dataset.evaluation.general)) || ({_TASK} == 'text-generation' && !{_has_objective(support.UNPACKED)})",
        "dataset.evaluation.general is for objectives sft and pretrain: use dataset.evaluation.sets",
    ),
    Rule(
        f"!(has(self.training) && has(self.training.labelSmoothing)) || ({_TASK} in {cel_list(_LABEL_SMOOTHING)} && !{_has_objective(support.UNPACKED)})",
        f"training.labelSmoothing is for {', '.join(_LABEL_SMOOTHING)}, not with objective {', '.join(support.UNPACKED)}: remove it",
    ),
    Rule(
        f"!(has(self.training) && has(self.training.neftuneNoise)) || ({_TASK} in {cel_list(_NOISE)} && !{_has_objective(support.UNPACKED)})",
        f"training.neftuneNoise is for {', '.join(_NOISE)}, not with objective {', '.join(support.UNPACKED)}: remove it",
    ),
    Rule(
        "!(has(self.training) && has(self.training.labelSmoothing) && has(self.objective) && has(self.objective.classification) && has(self.objective.classification.problem)) || self.objective.classification.problem == 'singleLabel'",
        "training.labelSmoothing is for problem singleLabel: remove it",
    ),
    Rule(
        "!(has(self.training) && has(self.training.l2Sp)) || (has(self.method) && (has(self.method.full) || has(self.method.freeze) || has(self.method.gradualUnfreezing)))",
        "training.l2Sp pulls the model's own weights to where they began: use method full, freeze or gradualUnfreezing; an adapter's weightDecay does the same",
    ),
    Rule(
        "!(has(self.model) && has(self.model.adapter) && has(self.method)) || has(self.method.lora) || has(self.method.qlora)",
        "model.adapter continues a LoRA adapter: use method.lora or method.qlora",
    ),
    Rule(
        "!(has(self.output) && has(self.output.merged) && self.output.merged && has(self.method)) || has(self.method.lora) || has(self.method.qlora) || has(self.method.ia3)",
        "output.merged is for method lora, qlora and ia3: full, freeze and gradualUnfreezing publish a whole model anyway, and the others cannot be merged",
    ),
    Rule(
        f"!({_PROGRAM} && has(self.dataset)) || !(has(self.dataset.tooLong) || has(self.dataset.minTokens) || has(self.dataset.deduplicate) || has(self.dataset.tokenBudget) || has(self.dataset.augmentation) || has(self.dataset.prefix) || has(self.dataset.format) || has(self.dataset.columns) || (has(self.dataset.evaluation) && (has(self.dataset.evaluation.fraction) || has(self.dataset.evaluation.groupBy))) || self.dataset.train.exists(s, has(s.weight) || has(s.split) || has(s.config)))",
        "dataset.tooLong, minTokens, deduplicate, tokenBudget, augmentation, prefix, format, columns, evaluation.fraction, evaluation.groupBy and weight, split and config of train are read by our trainer only: remove them, or remove runtime.command",
    ),
    Rule(
        f"!({_PROGRAM} && has(self.checkpoints)) || !(has(self.checkpoints.everySteps) || has(self.checkpoints.everyMinutes) || has(self.checkpoints.keep))",
        "checkpoints.everySteps, everyMinutes and keep are read by our trainer only: remove them, or remove runtime.command",
    ),
    Rule(
        f"!({_PROGRAM} && has(self.output)) || !self.output.uri.matches('^(oci|hf)://')",
        "output.uri: with runtime.command your program writes the result itself, and nobody publishes it: name where it does, pvc://claim/path or s3://bucket/prefix",
    ),
    Rule(
        f"!(has(self.preflight) && self.preflight == 'Required' && {_PROGRAM})",
        "preflight: Required checks what our trainer would do and knows nothing of a program of your own: remove it, or remove runtime.command",
    ),
    Rule(
        f"!(has(self.output) && has(self.output.merged) && self.output.merged && {_PROGRAM})",
        "output.merged is read by our trainer only: remove it, or remove runtime.command",
    ),
    *(_brings_its_own(method) for method in ("lora", "qlora")),
    Rule(
        "!(has(self.model) && has(self.model.addTokens) && has(self.method)) || has(self.method.full) || has(self.method.gradualUnfreezing) || has(self.method.lora) || has(self.method.qlora)",
        "model.addTokens needs a method that trains rows of the embedding: full, gradualUnfreezing, lora or qlora",
    ),
    Rule(
        f"!(has(self.model) && has(self.model.addTokens)) || !({_PROGRAM}) && !(has(self.task) && self.task in ['summarization', 'translation', 'image-classification'])",
        "model.addTokens is for tasks text-generation, text-classification, token-classification and question-answering, by our trainer: remove it",
    ),
    Rule(
        "!(has(self.output) && self.output.uri.matches('^(oci|hf)://')) || (has(self.checkpoints) && has(self.checkpoints.storage))",
        "checkpoints.storage is required with an oci:// or hf:// output, beside which no checkpoint can lie: pvc://claim/path or s3://bucket/prefix",
    ),
    Rule(
        "!(has(self.resources) && has(self.resources.gpusPerNode) && self.resources.gpusPerNode == 0 && has(self.training) && has(self.training.optimizer) && has(self.training.optimizer.adamw) && has(self.training.optimizer.adamw.paged) && self.training.optimizer.adamw.paged)",
        "training.optimizer.adamw.paged is for GPUs, and resources.gpusPerNode is 0: remove one of the two",
    ),
    Rule(
        "!(has(self.output) && has(self.checkpoints) && has(self.checkpoints.storage)) || !(self.checkpoints.storage.uri + '/').startsWith(self.output.uri + (self.output.uri.endsWith('/') ? '' : '/'))",
        "checkpoints.storage must not lie inside output.uri, which is replaced as a whole: choose a place beside it",
    ),
)
"""All of them."""
