"""ResolvedJob: a FineTuneJob with nothing left to decide, the input of a trainer.

Resolved models keep the shape of the spec, so there is no second configuration language; what is not optional here has a default in
`resolution`, or is decided by the trainer, which sees model and data.
"""

from typing import Literal

from pydantic import Field

from . import support
from .support import Problem, Task
from .v1alpha1 import (
    Adapter,
    ApiModel,
    FineTuneJobSpec,
    Location,
    Model,
    Output,
)
from .v1alpha1.common import Decimal, Fraction, Quantity, SignedDecimal
from .v1alpha1.dataset import Augmentation, Dataset, RandAugment, RandomResizedCrop, Synonyms
from .v1alpha1.evaluation import Benchmark, Evaluation, FewShot, Gate, Metric, Slice
from .v1alpha1.methods import (
    BottleneckAdapter,
    Freeze,
    Full,
    GradualUnfreezing,
    Lora,
    LowRank,
    Method,
    Prefix,
    Prompt,
    PTuning,
    Qlora,
)
from .v1alpha1.objective import Classification, Dpo, Grpo, Kto, Objective, Orpo, Reward, RewardModel, RewardSource
from .v1alpha1.pods import Resources, Runtime
from .v1alpha1.results import Checkpoints
from .v1alpha1.training import AdamW, Optimizer, Training


class ResolvedRandomResizedCrop(RandomResizedCrop):
    """Random parts of images with nothing left open."""

    min_scale: Fraction


class ResolvedRandAugment(RandAugment):
    """RandAugment with nothing left open."""

    operations: int
    magnitude: int


class ResolvedSynonyms(Synonyms):
    """The list with nothing left open."""

    probability: Fraction


class ResolvedAugmentation(Augmentation):
    """What is None is not done."""

    random_resized_crop: ResolvedRandomResizedCrop | None = None
    rand_augment: ResolvedRandAugment | None = None
    synonyms: ResolvedSynonyms | None = None


class ResolvedDataset(Dataset):
    """The data with nothing left open but what only reading it can tell.

    too_long stays None where nothing is cut: for question-answering and images; deduplicate, min_tokens and token_budget where every row is trained on.
    """

    augmentation: ResolvedAugmentation | None = None


class ResolvedAdapter(Adapter, Location):
    """The adapter's place; with job it is that of the job's output, which has this digest."""

    uri: str
    digest: str | None = None


class ResolvedModel(Model, Location):
    """The model's place; with job it is that of the job's output, which has this digest."""

    uri: str
    digest: str | None = None
    adapter: ResolvedAdapter | None = None


class ResolvedClassification(Classification):
    """classWeights stays None where every class weighs the same or balance_classes is set."""

    problem: Problem
    balance_classes: bool


class ResolvedDpo(Dpo):
    """DPO with nothing left open."""

    loss: Literal["sigmoid", "ipo", "hinge"]
    beta: Decimal
    label_smoothing: Fraction


class ResolvedOrpo(Orpo):
    """ORPO with nothing left open."""

    beta: Decimal


class ResolvedKto(Kto):
    """KTO with nothing left open."""

    beta: Decimal
    desirable_weight: Decimal
    undesirable_weight: Decimal


class ResolvedReward(Reward):
    """A reward model with nothing left open."""

    centering: Decimal


class ResolvedRewardModel(RewardModel, Location):
    """A reward model's place, or that of its base; with job it is that of the job's output, which has this digest."""

    uri: str
    digest: str | None = None
    adapter: ResolvedAdapter | None = None


class ResolvedRewardSource(RewardSource):
    """A reward with nothing left open; regex.match stays None for search."""

    weight: SignedDecimal
    model: ResolvedRewardModel | None = None


class ResolvedGrpo(Grpo):
    """GRPO with nothing left open but max_completion_length, where it is 512 or half of what the model has positions for."""

    rewards: list[ResolvedRewardSource]  # type: ignore[assignment]
    generations: int
    temperature: Decimal
    loss: Literal["dapo", "grpo", "dr_grpo"]
    scale_rewards: Literal["group", "batch", "none"]
    beta: Decimal
    epsilon: Fraction
    epsilon_high: Decimal
    iterations: int
    generation_batch_size: int


class ResolvedObjective(Objective):
    """Exactly one."""

    dpo: ResolvedDpo | None = None
    orpo: ResolvedOrpo | None = None
    kto: ResolvedKto | None = None
    reward: ResolvedReward | None = None
    grpo: ResolvedGrpo | None = None
    classification: ResolvedClassification | None = None


class ResolvedFull(Full):
    """Full fine-tuning with nothing left open."""

    layer_decay: Fraction


class ResolvedGradualUnfreezing(GradualUnfreezing):
    """Exactly one of every_steps and every_epochs is set."""

    blocks_per_stage: int
    layer_decay: Fraction


class ResolvedLowRank(LowRank):
    """With model.adapter rank, alpha, targets, patterns and switches are those of the adapter, and these are None."""

    dropout: Fraction
    lora_plus_ratio: Decimal


class ResolvedLora(ResolvedLowRank, Lora):
    """LoRA with nothing left open."""


class ResolvedQlora(ResolvedLowRank, Qlora):
    """QLoRA with nothing left open; double_quantization is None for 8 bits."""

    bits: Literal[4, 8]


class ResolvedBottleneckAdapter(BottleneckAdapter):
    """Bottleneck adapters with nothing left open."""

    placement: Literal["houlsby", "pfeiffer"]
    reduction_factor: int
    non_linearity: Literal["relu", "gelu", "silu", "tanh"]


class ResolvedPrefix(Prefix):
    """projection_size stays None where it is the hidden size."""

    length: int
    projection: bool


class ResolvedPrompt(Prompt):
    """initial_text stays None for random tokens."""

    length: int


class ResolvedPTuning(PTuning):
    """hidden_size stays None where it is the model's."""

    length: int
    encoder: Literal["mlp", "lstm"]


class ResolvedMethod(Method):
    """Exactly one."""

    full: ResolvedFull | None = None
    freeze: Freeze | None = None
    gradual_unfreezing: ResolvedGradualUnfreezing | None = None
    lora: ResolvedLora | None = None
    qlora: ResolvedQlora | None = None
    adapter: ResolvedBottleneckAdapter | None = None
    prefix: ResolvedPrefix | None = None
    prompt: ResolvedPrompt | None = None
    p_tuning: ResolvedPTuning | None = None


class ResolvedAdamW(AdamW):
    """AdamW with nothing left open."""

    beta1: Fraction
    beta2: Fraction
    epsilon: Decimal
    bits: Literal[8, 32]
    paged: bool


class ResolvedOptimizer(Optimizer):
    """Exactly one; there is one."""

    adamw: ResolvedAdamW


class ResolvedTraining(Training):
    """Exactly one of (epochs, max_steps), (batch_size, tokens_per_step), (warmup_ratio, warmup_steps) is set.

    What only the model can tell the trainer decides: packing stays None where it is to pack if it can, sequence_length where it is 1024 or as
    much as the model has positions for, learning_rate where it depends on the model's size.
    """

    schedule: Literal["cosine", "linear", "constant"]
    gradient_checkpointing: bool
    precision: Literal["bf16", "fp32"]
    seed: int
    optimizer: ResolvedOptimizer
    weight_decay: Decimal
    label_smoothing: Fraction
    neftune_noise: Decimal
    l2_sp: Decimal
    max_grad_norm: Decimal


class ResolvedFewShot(FewShot):
    """rows is 0 for tasks other than text-generation."""

    examples: int
    rows: int


class ResolvedEvaluation(Evaluation):
    """every_steps stays None when nothing is evaluated on the way, few_shot and generate where the task or the objective has no such thing."""

    few_shot: ResolvedFewShot | None = None

    metric: Metric
    publish: Literal["best", "last"]
    prompts: list[str]
    max_new_tokens: int
    slices: list[Slice]
    benchmarks: list[Benchmark] = []
    gates: list[Gate]


class ResolvedCheckpoints(Checkpoints):
    """Exactly one interval is set; storage is None only for a program without an output."""

    keep: int
    grace_period_seconds: int


class ResolvedResources(Resources):
    """What each pod gets."""

    nodes: int
    gpus_per_node: int
    gpu_resource_name: str
    cpu: Quantity
    memory: Quantity
    scratch: Quantity
    shared_memory: Quantity

    @property
    def gpus(self) -> int:
        """GPUs of all pods together."""
        return self.nodes * self.gpus_per_node


class ResolvedRuntime(Runtime):
    """The container."""

    image: str
    run_as_user: int


class ResolvedSpec(FineTuneJobSpec):
    """What our trainer and a user's program have in common."""

    model: ResolvedModel | None = None
    checkpoints: ResolvedCheckpoints
    resources: ResolvedResources
    retries: int
    runtime: ResolvedRuntime
    preflight: Literal["Required", "Skip"] = "Skip"
    """A job that was resolved before there was one has none."""


class ResolvedFineTune(ResolvedSpec):
    """The input of our trainer. objective is None for a task that has a loss of its own."""

    task: Task
    objective: ResolvedObjective | None = None
    model: ResolvedModel
    dataset: ResolvedDataset
    method: ResolvedMethod
    training: ResolvedTraining
    evaluation: ResolvedEvaluation
    output: Output

    @property
    def head(self) -> Task:
        """The task whose head the model has: the job's own, but a reward model's score is told like a number of a text."""
        return "text-classification" if self.objective and self.objective.reward else self.task

    @property
    def compares(self) -> bool:
        """Whether it learns which answer is the better one."""
        return self.objective is not None and self.objective.name in support.PREFERENCES

    @property
    def problem(self) -> Problem:
        """What rows of a classification have; a score is a number."""
        if self.head != self.task:
            return "regression"
        chosen = self.objective and self.objective.classification
        return chosen.problem if chosen else "singleLabel"


class ResolvedProgram(ResolvedSpec):
    """A user's own program."""


class ResolvedJob(ApiModel):
    """What is mounted as JOB_FILE and passed to the trainer."""

    name: str
    namespace: str
    uid: str
    """UID of the FineTuneJob; checkpoints of another object are never read."""
    digest: str
    """Outcome digest: sha256 over the resolved fields that decide the outcome, the output's place not among them."""
    spec: ResolvedFineTune | ResolvedProgram = Field(union_mode="left_to_right")
