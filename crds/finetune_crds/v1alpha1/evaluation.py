"""How good it is, and how good it must be."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from .. import support
from .common import (
    ApiModel,
    Decimal,
    Rule,
    SetName,
    SignedDecimal,
    Text,
    at_most_one,
    cel_list,
    spelled,
)
from .model import Location

if TYPE_CHECKING:
    Metric = str
else:
    Metric = Literal[tuple(support.METRICS)]


class EarlyStopping(ApiModel):
    """Stop when the metric no longer improves."""

    patience: Annotated[int, Field(ge=1, le=1000)]
    """Evaluations without improvement before training ends."""
    min_delta: Decimal | None = None
    """Improvement that counts. Default "0"."""


class FewShot(ApiModel):
    """What prompting alone gives: the model before training, with examples from the training rows in its prompt. Taken once, before the first step; evaluation.html compares it with the result."""

    examples: Annotated[int, Field(ge=0, le=32)] | None = None
    """Examples in the prompt, as many of them as half of sequenceLength holds. Default 4; 0 leaves it out."""
    rows: Annotated[int, Field(ge=0, le=2000)] | None = None
    """Held-out rows whose answers are measured after the examples, and at the end without them, for text-generation. Default 64, 0 where nothing is held out."""


class Slice(ApiModel):
    """Held-out rows with a value in a column, measured apart so that harm to a group is seen."""

    name: SetName
    """What its metrics are called by: eval_loss.NAME."""
    column: Text
    """Column of the rows."""
    value: Text
    """Its value; of numbers and booleans as JSON writes them."""


class Benchmark(Location):
    """A task of lm-evaluation-harness: a folder with its YAML file and its data, asked of the model before and after training."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Location.rules,
        Rule(
            "self.uri.matches('^(pvc|s3|configmap|file)://')",
            "evaluation.benchmarks: a task is a folder of files: use pvc://, s3:// or configmap://",
        ),
    )

    name: SetName
    """What its metrics are called by: benchmark/NAME/acc."""
    task: Text | None = None
    """Which task, as its file calls it. Default: the only one there."""
    few_shot: Annotated[int, Field(ge=0, le=64)] | None = None
    """Solved examples before each question, drawn from the task's few-shot or training split. Default: what the task says, else 0."""
    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Ask so many of its first questions only. Default: all."""
    chat_template: bool | None = None
    """Ask through the model's chat template. Default false, as in the harness."""
    allow_user_code: bool | None = None
    """Run Python of the folder, which tasks name with !function, in the training container with all that it may do. Default false: such a task is refused."""


class Gate(ApiModel):
    """What the result must reach to be published."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.min) || has(self.max) || has(self.maxRegression)",
            "a gate of evaluation.gates needs min, max or maxRegression",
        ),
        Rule(
            "!has(self.min) || !has(self.max) || double(self.min) <= double(self.max)",
            "a gate of evaluation.gates has a min above its max, and nothing would pass it: correct one of them",
        ),
        at_most_one(
            "set",
            "slice",
            "benchmark",
            sentence="a gate of evaluation.gates names a set, a slice or a benchmark, only one of them",
        ),
        Rule(
            f"has(self.benchmark) || self.metric in {cel_list(tuple(support.METRICS))}",
            f"a gate of evaluation.gates judges {', '.join(support.METRICS)}, or with benchmark a metric of its task",
        ),
    )

    metric: Annotated[str, spelled(r"^[a-zA-Z][-._a-zA-Z0-9]*$", "the name of a metric", min_length=1, max_length=64)]
    """What is judged: one of the metrics that evaluation.metric may be, or with benchmark one of its task, such as acc or exact_match.FILTER."""
    set: SetName | None = None
    """One of dataset.evaluation.sets, or general. Default: the held-out rows."""
    slice: SetName | None = None
    """One of evaluation.slices."""
    benchmark: SetName | None = None
    """One of evaluation.benchmarks."""
    min: SignedDecimal | None = None
    """Least value."""
    max: SignedDecimal | None = None
    """Largest value."""
    max_regression: Decimal | None = None
    """How much worse than before training it may be: "0" for not at all. A head that is new is compared with always answering with the training rows' most frequent class or mean."""

    @property
    def name(self) -> str:
        """The metric's full name."""
        if self.benchmark:
            return f"benchmark/{self.benchmark}/{self.metric}"
        name = self.metric.replace("eval_", f"eval_{self.set}_", 1) if self.set else self.metric
        return f"{name}.{self.slice}" if self.slice else name


class Evaluation(ApiModel):
    """When and how to evaluate."""

    every_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Evaluate each time this many steps are done; before the first and after the last step it is done always."""
    metric: Metric | None = None
    """What decides the best checkpoint and early stopping, of evaluations by everySteps, and what evaluation.html judges the result by. Default eval_loss. eval_perplexity, its exponential, for sft and pretrain, eval_accuracy and eval_f1 (macro) for text-classification and image-classification, eval_f1, eval_precision and eval_recall of whole entities and eval_accuracy of tags for token-classification, eval_f1 and eval_exact_match as in SQuAD for question-answering, eval_pearson and eval_mse for problem regression (in place of accuracy and F1), eval_rouge1, eval_rouge2 and eval_rougeL for summarization, eval_chrf and eval_bleu for translation, eval_accuracy (pairs whose better answer wins; not kto) and eval_margin (by how much) for dpo, orpo, kto and reward; eval_reward for grpo, whose default it is."""
    early_stopping: EarlyStopping | None = None
    """Stop early. Needs everySteps."""
    publish: Literal["best", "last"] | None = None
    """Which weights become the output: those of the best evaluation (default with everySteps) or the last."""
    prompts: Annotated[list[Annotated[str, Field(min_length=1, max_length=8192)]], Field(max_length=32)] | None = None
    """Your own questions, answered before training, at each evaluation and after it; the model's chat template is applied when it has one. For summarization and translation the texts to read. The answers are in samples.jsonl in the output, and side by side in evaluation.html."""
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Longest answer to a prompt, in tokens; for summarization and translation also of what is written to be measured. Default 64, for these two 128."""
    few_shot: FewShot | None = None
    """Compare the result with prompting the model as it was. For objective sft, summarization and translation."""
    generate: Literal["everyEvaluation", "beforeAndAfter"] | None = None
    """When the model writes held-out targets to be measured by ROUGE, chrF or BLEU, which takes far longer than their loss, for summarization and translation. Default beforeAndAfter: before training and of what is published; everyEvaluation where metric is one of them."""
    slices: Annotated[list[Slice], Field(min_length=1, max_length=8)] | None = None
    """Parts of the held-out rows to measure apart."""
    benchmarks: Annotated[list[Benchmark], Field(min_length=1, max_length=8)] | None = None
    """Tasks of lm-evaluation-harness to ask of the model before training, and of what would be published. For text-generation."""
    gates: Annotated[list[Gate], Field(min_length=1, max_length=16)] | None = None
    """What must hold of the weights that would be published. If one fails, nothing is published and the job has failed with cause GateFailed; its checkpoints stay."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.slices) || self.slices.all(s, self.slices.exists_one(t, t.name == s.name))",
            "each of evaluation.slices needs a name of its own",
        ),
        Rule(
            "!has(self.gates) || self.gates.all(g, !has(g.slice) || (has(self.slices) && self.slices.exists(s, s.name == g.slice)))",
            "evaluation.gates: a gate's slice must be one of evaluation.slices",
        ),
        Rule(
            "!has(self.benchmarks) || self.benchmarks.all(b, self.benchmarks.exists_one(c, c.name == b.name))",
            "each of evaluation.benchmarks needs a name of its own",
        ),
        Rule(
            "!has(self.gates) || self.gates.all(g, !has(g.benchmark) || (has(self.benchmarks) && self.benchmarks.exists(b, b.name == g.benchmark)))",
            "evaluation.gates: a gate's benchmark must be one of evaluation.benchmarks",
        ),
        Rule(
            "!has(self.earlyStopping) || has(self.everySteps)", "evaluation.earlyStopping needs evaluation.everySteps"
        ),
        Rule(
            "!(has(self.publish) && self.publish == 'best') || has(self.everySteps)",
            "evaluation.publish: best needs evaluation.everySteps",
        ),
    )
