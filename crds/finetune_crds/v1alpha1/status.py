"""What the operator tells about a job. It survives the pods, and no line of it carries training text.

Two managers write it. `finetune-progress` (the replica that got the POST) owns progress, metrics, checkpoints, inputs and
evaluation; `finetune-operator` (the leader) owns the rest and, once a run has ended, takes those over with the final word.
"""

from typing import Annotated, Literal

from pydantic import Field

from .common import ApiModel, Raw, Text, Time

METRICS_MAX = 32
ATTEMPTS_MAX = 20
_FIRST_METRICS = (
    "loss",
    "eval_loss",
    "eval_reward",
    "reward",
    "eval_accuracy",
    "eval_f1",
    "eval_general_loss",
    "eval_perplexity",
    "learning_rate",
    "grad_norm",
    "generated_tokens_per_second",
)


def metric_rank(name: str) -> tuple[int, bool]:
    """To sort names of metrics by: what people look for comes first, and stays where status cannot take all."""
    known = name in _FIRST_METRICS
    return _FIRST_METRICS.index(name) if known else len(_FIRST_METRICS), not name.startswith("eval_")


Cause = Literal[
    "Suspended",
    "Disruption",
    "PeerLost",
    "UserError",
    "DataError",
    "Diverged",
    "GateFailed",
    "OutOfMemory",
    "OutOfGpuMemory",
    "StorageError",
    "InternalError",
    "Killed",
    "Fenced",
    "NoVerdict",
    "ProgramFailed",
    "DeadlineExceeded",
    "NodeLost",
]
"""Why a run or an attempt ended, when it was not by finishing. `finetune_crds.verdict` says which are retried."""


Baseline = Literal["model", "majority"]
"""What a result is compared with: the model as it was, or always giving the answer that fits the training rows best, where its head was new."""


class Condition(ApiModel):
    """metav1.Condition."""

    type: Annotated[str, Field(max_length=316)]
    """Complete, Failed, Suspended, Running, Waiting, SpecFrozen, PreflightPassed, Reconciling or Stalled."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, Field(min_length=1, max_length=1024)]
    """One word for programs."""
    message: Annotated[str, Field(max_length=4096)]
    """A sentence for people."""
    last_transition_time: Time
    """When status last changed."""
    observed_generation: int | None = None
    """Generation of the spec that this is about."""


class Progress(ApiModel):
    """How far training is."""

    attempt: int | None = None
    """Attempt that reported."""
    pod: Annotated[str, Field(max_length=253)] | None = None
    """Pod that reported: whose log to read."""
    stage: Annotated[str, Field(max_length=32)] | None = None
    """Preparing, Loading, Training, Evaluating, Saving, Publishing or Finished."""
    step: int | None = None
    """Optimizer steps done."""
    total_steps: int | None = None
    """Optimizer steps to do."""
    percentage: int | None = None
    """Share of the work done, 0 to 100."""
    display: Annotated[str, Field(max_length=64)] | None = None
    """The same for people: 40 % (120/300)."""
    epoch: Annotated[str, Field(max_length=32)] | None = None
    """Passes over the data done."""
    tokens_per_second: int | None = None
    """Non-padding input tokens a second over all GPUs."""
    estimated_completion_time: Time | None = None
    """When it should be done."""
    last_report_time: Time | None = None
    """When the trainer last reported."""


class Metric(ApiModel):
    """The latest value of one metric."""

    name: Annotated[str, Field(max_length=64)]
    """Name as the trainer gives it: loss, eval_loss, learning_rate."""
    value: Annotated[str, Field(max_length=64)]
    """Value."""


class Checkpoint(ApiModel):
    """A committed checkpoint."""

    step: int
    """Optimizer steps done."""
    uri: Text
    """Where it lies."""
    digest: Annotated[str, Field(max_length=80)]
    """sha256 of its index, which holds the digest of each file."""
    time: Time
    """When it was committed."""
    metric: Metric | None = None
    """The evaluation that made it the best."""


class CheckpointsStatus(ApiModel):
    """What would be left if the job were killed now."""

    latest: Checkpoint | None = None
    """Where the next run starts."""
    best: Checkpoint | None = None
    """Best evaluation so far."""
    longest_save_seconds: int | None = None
    """Longest save so far: pods of the next attempt get at least twice this to save."""


class JobOutput(ApiModel):
    """The output of another FineTuneJob, as it was read."""

    job: Annotated[str, Field(max_length=63)]
    """Its name."""
    digest: Annotated[str, Field(max_length=80)]
    """What its status.output.digest was, and what was found there."""


class RewardInput(ApiModel):
    """A reward model that another FineTuneJob made."""

    name: Annotated[str, Field(max_length=24)]
    """Of the reward."""
    model: JobOutput | None = None
    """Where the model, or the base of its adapter, came from."""
    adapter: JobOutput | None = None
    """Where its adapter came from."""


class Inputs(ApiModel):
    """Inputs resolved to what they were."""

    model_digest: Annotated[str, Field(max_length=80)] | None = None
    """sha256 over names, sizes and contents of the model's files and the adapter's, if there is one; of a large file its two ends are read."""
    model: JobOutput | None = None
    """Where the model came from, by model.job."""
    adapter: JobOutput | None = None
    """Where the adapter came from, by model.adapter.job."""
    rewards: Annotated[list[RewardInput], Field(max_length=8)] | None = None
    """Where reward models came from, by model.job or model.adapter.job of objective.grpo.rewards."""
    dataset_digest: Annotated[str, Field(max_length=80)] | None = None
    """sha256 over the files' contents and how they were prepared."""
    rows: int | None = None
    """Training rows."""
    evaluation_rows: int | None = None
    """Rows held out."""
    tokens: int | None = None
    """Training tokens of one epoch."""
    truncated_rows: int | None = None
    """Rows cut at sequenceLength."""
    dropped_rows: int | None = None
    """Rows left out, by dataset.tooLong, minTokens, deduplicate and tokenBudget; data-report.json beside the output says how many by each."""
    duplicate_rows: int | None = None
    """Training rows that equal an earlier one; with deduplicate: near also those that nearly do. Left out with dataset.deduplicate, else trained on."""
    leaked_rows: int | None = None
    """Training rows that equal a row of evaluation; with deduplicate: near also those that nearly do. Left out with dataset.deduplicate, else they make the evaluation too good."""


class FewShotStatus(ApiModel):
    """Prompting against tuning: losses in nats a token on the same answers of held-out rows."""

    examples: int
    """Training rows in the prompt."""
    rows: int
    """Held-out rows."""
    before: Annotated[str, Field(max_length=32)]
    """Of the model before training, without examples."""
    prompted: Annotated[str, Field(max_length=32)]
    """Of the model before training, with the examples in its prompt."""
    after: Annotated[str, Field(max_length=32)]
    """Of the result, without examples."""


class EvaluationStatus(ApiModel):
    """Held-out metrics."""

    before: Annotated[list[Metric], Field(max_length=METRICS_MAX)] | None = None
    """Of what baseline says."""
    baseline: Baseline | None = None
    """model: measured before training. majority: the head was new and says nothing yet, so what counts is always answering with the training rows' most frequent class, or their mean; its loss is that of their shares."""
    after: Annotated[list[Metric], Field(max_length=METRICS_MAX)] | None = None
    """Of what was published, or would have been."""
    forgetting: Annotated[str, Field(max_length=32)] | None = None
    """Loss on dataset.evaluation.general after training minus before, in nats a token: above 0 the model has forgotten."""
    few_shot: FewShotStatus | None = None
    """Whether prompting would have done; evaluation.html says it in a sentence."""


class Attempt(ApiModel):
    """One configuration's Job: all runs of its pods, disruptions included."""

    number: int
    """Counted from 1."""
    generation: int
    """Generation of the spec that it trains."""
    spec_digest: Annotated[str, Field(max_length=80)]
    """Digest of what decides the outcome."""
    template_digest: Annotated[str, Field(max_length=80)] | None = None
    """Digest of everything in the spec that shapes the pods: an edit that changes it needs another Job."""
    job_name: Annotated[str, Field(max_length=63)]
    """Name of its batch/v1 Job."""
    recorded_time: Time
    """When it was decided on, before any child existed."""
    start_time: Time | None = None
    """When its pods first ran."""
    end_time: Time | None = None
    """When it ended."""
    outcome: Literal["Finished", "Failed", "Stopped"] | None = None
    """How it ended."""
    cause: Cause | None = None
    """Why, when not by finishing."""
    image: Annotated[str, Field(max_length=512)] | None = None
    """Image that its pods run, by digest; a retry runs the same."""
    runs: int | None = None
    """Times that its pods were started."""
    run_id: Annotated[str, Field(max_length=36)] | None = None
    """UID of the first pod of its latest run."""
    run_start_time: Time | None = None
    """When that run got its GPUs; unset once it has ended and is in gpuSeconds."""
    first_step: int | None = None
    """Step at which its last run started."""
    last_step: int | None = None
    """Last step it did."""
    gpu_seconds: int | None = None
    """GPUs times seconds that its pods held them."""


Mebibytes = Annotated[str, Field(max_length=24, pattern=r"^[0-9]+Mi$")]
"""A Kubernetes quantity in Mi."""


class MemoryEstimate(ApiModel):
    """Memory of one GPU, counted without one: every tensor that a step makes, by its shape. docs/performance.md compares it with what was measured."""

    weights: Mebibytes
    """The model as it is loaded."""
    training: Mebibytes
    """fp32 copies of the trained weights, their gradients, and the optimizer's moments."""
    activations: Mebibytes
    """What forward and backward of the largest micro-batch add at their peak."""
    total: Mebibytes
    """Peak, of the fewest rows in a forward pass where the job does not say how many. The CUDA context, 0.5 GiB, and the allocator's fragments come on top: little, but for pairs of ragged lengths up to 5 GiB."""
    micro_batch_tokens: int | None = None
    """Tokens of the largest micro-batch; none for images."""
    full_speed: Mebibytes | None = None
    """Peak of as many rows in a forward pass as training takes where they fit, if the job does not say how many: more memory makes it no faster."""


class PreflightReport(ApiModel):
    """What a job would do, found without a GPU."""

    rows: int
    """Training rows."""
    evaluation_rows: int
    """Rows held out."""
    tokens: int | None = None
    """Training tokens of one epoch; none for images."""
    longest_row: int | None = None
    """Tokens of the longest row."""
    steps: int
    """Optimizer steps of the whole job."""
    parameters: int
    """Weights of the model, with what the method puts on it."""
    trained_parameters: int
    """Those that are trained."""
    learning_rate: Annotated[str, Field(max_length=32)] | None = None
    """Peak learning rate: training.learningRate, or the default of the method for a model of this size."""
    memory: MemoryEstimate | None = None
    """Of one GPU; absent where it cannot be counted without one."""
    output_exists: bool | None = None
    """True when the output is there already, from an equal job: nothing will be trained."""


class Preflight(ApiModel):
    """The check before GPUs are asked for: one pod without a GPU."""

    number: int
    """Counted from 1."""
    attempt: int
    """Number of the attempt that waits for it."""
    generation: int
    """Generation of the spec that it checks."""
    spec_digest: Annotated[str, Field(max_length=80)]
    """Digest of what decides the outcome. What has passed is not checked again."""
    template_digest: Annotated[str, Field(max_length=80)]
    """Digest of everything in the spec that shapes the pods: an edit that changes it while it runs needs another."""
    job_name: Annotated[str, Field(max_length=63)]
    """Name of its batch/v1 Job."""
    state: Literal["Running", "Passed", "Failed", "Stopped"]
    """Stopped: by a suspension, an edit or the loss of its pod."""
    recorded_time: Time
    """When it was decided on, before any child existed."""
    start_time: Time | None = None
    """When its pod first ran."""
    completion_time: Time | None = None
    """When it ended."""
    losses: int | None = None
    """Pods that were taken away since the last edit or retry. They cost nothing of spec.retries."""
    failures: int | None = None
    """Failures that may pass, since the last edit or retry: as many are tried again as spec.retries says, not counted there."""
    report: PreflightReport | None = None
    """What it found."""


class CauseCount(ApiModel):
    """How often a cause ended a run or an attempt."""

    cause: Cause
    """The cause."""
    count: int
    """How often."""


class OutputStatus(ApiModel):
    """The result."""

    uri: Text
    """Where it lies."""
    digest: Annotated[str, Field(max_length=80)] | None = None
    """sha256 of its finetune.json, which holds the digest of each file; of oci:// that of the image."""
    format: Literal["peft", "transformers", "bottleneck"] | None = None
    """What opens it."""
    servable_by: Annotated[list[Annotated[str, Field(max_length=32)]], Field(max_length=8)] | None = None
    """Servers that take it as it is: vllm."""
    reused: bool | None = None
    """True when it was already there from an equal job and nothing was trained."""
    step: int | None = None
    """Step of the weights that were published."""
    data_report: Text | None = None
    """A page about the rows: how many came in and were left out and why, how long they are, and ten of them as the model sees them."""
    data_report_json: Text | None = None
    """Its numbers, without any text of rows."""
    evaluation_report: Text | None = None
    """A page about the result: metrics against the baseline, slices, gates, the course of training, and answers to evaluation.prompts side by side."""
    evaluation_report_json: Text | None = None
    """Its numbers."""


class Usage(ApiModel):
    """What it cost."""

    gpu_seconds: int | None = None
    """GPU-seconds of all attempts."""
    lost_gpu_seconds: int | None = None
    """Those of attempts that failed."""
    waiting_seconds: int | None = None
    """Seconds from creation until all training pods ran, a preflight included."""


class Failure(ApiModel):
    """Why it failed and what to do."""

    cause: Cause
    """The cause."""
    exit_code: int | None = None
    """Exit code of the pod."""
    message: Annotated[str, Field(max_length=2048)]
    """What happened, naming the object or field."""
    evidence: Annotated[str, Field(max_length=1024)] | None = None
    """Type of the error, file and line; never values."""
    next_step: Annotated[str, Field(max_length=1024)]
    """What to do."""


class FineTuneJobStatus(ApiModel):
    """State of the job."""

    observed_generation: int | None = None
    """Generation of the spec that was last acted on."""
    phase: (
        Literal["Pending", "Waiting", "Preflight", "Starting", "Running", "Suspended", "Complete", "Failed"] | None
    ) = None
    """For display only; programs read conditions."""
    conditions: Annotated[list[Condition], Field(max_length=16)] | None = None
    """The truth."""
    resolved: Raw | None = None
    """The spec with the defaults filled in, as the trainer reads it. What only the model can tell it decides itself: the output's finetune.json has it."""
    gpus: int | None = None
    """GPUs of all pods together."""
    progress: Progress | None = None
    """How far training is."""
    metrics: Annotated[list[Metric], Field(max_length=METRICS_MAX)] | None = None
    """Latest values, one for each name."""
    checkpoints: CheckpointsStatus | None = None
    """Latest and best checkpoint."""
    inputs: Inputs | None = None
    """What went in."""
    evaluation: EvaluationStatus | None = None
    """Before and after."""
    attempts: Annotated[list[Attempt], Field(max_length=ATTEMPTS_MAX)] | None = None
    """First and last ten attempts."""
    preflight: Preflight | None = None
    """The latest check before GPUs are asked for."""
    cause_counts: Annotated[list[CauseCount], Field(max_length=32)] | None = None
    """Ends of runs and attempts by cause, complete."""
    counted_failures: int | None = None
    """Failures that count against spec.retries since the last edit or retry."""
    retry_handled: Annotated[str, Field(max_length=256)] | None = None
    """Value of the annotation finetune.dev/retry that was last acted on."""
    start_time: Time | None = None
    """When the first child was made."""
    completion_time: Time | None = None
    """When it ended."""
    active_seconds: int | None = None
    """Time under activeDeadlineSeconds used up by ended attempts."""
    output: OutputStatus | None = None
    """The result."""
    usage: Usage | None = None
    """What it cost."""
    failure: Failure | None = None
    """Why it failed."""
