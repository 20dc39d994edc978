"""What is minimised."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .. import support
from .common import (
    ApiModel,
    Decimal,
    Fraction,
    Rule,
    SetName,
    SignedDecimal,
    Text,
    at_most_one,
    exactly_one,
    spelled,
)
from .model import FOLDERS, Adapter, Reference

_BETA = "beta must be above 0, or nothing would be learned"


class Sft(ApiModel):
    """Supervised fine-tuning: next-token cross-entropy."""

    loss_on: Literal["assistant", "all"] | None = None
    """Which tokens are learned: the assistant's answers (default for chat and instruction rows) or all (plain text)."""


class Pretrain(ApiModel):
    """Next-token cross-entropy of plain text, to learn a domain or a language. A text longer than sequenceLength becomes several rows; no token is lost."""


class Dpo(ApiModel):
    """Direct preference optimisation: the better of two answers gains on the worse, relative to the model before training (Rafailov et al. 2023)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("!has(self.beta) || double(self.beta) > 0.0", f"objective.dpo.{_BETA}"),
        Rule(
            "!has(self.labelSmoothing) || double(self.labelSmoothing) < 0.5",
            "objective.dpo.labelSmoothing is the part of pairs that are the wrong way round: below 0.5",
        ),
        Rule(
            "!has(self.labelSmoothing) || !has(self.loss) || self.loss == 'sigmoid'",
            "objective.dpo.labelSmoothing is for loss sigmoid: remove it",
        ),
    )

    loss: Literal["sigmoid", "ipo", "hinge"] | None = None
    """sigmoid (the paper's), ipo (Azar et al. 2023: a margin to reach, not to exceed, of answers' mean log-probabilities) or hinge (Zhao et al. 2023). Default sigmoid."""
    beta: Decimal | None = None
    """Strength of the pull towards the model before training: small values let it go far. Default "0.1"."""
    label_smoothing: Fraction | None = None
    """Part of the pairs taken to be the wrong way round (conservative DPO, Mitchell 2023). Default "0"."""


class Orpo(ApiModel):
    """Odds ratio preference optimisation: learn the better answer and tell it from the worse in one go, without a reference (Hong et al. 2024)."""

    beta: Decimal | None = None
    """Weight of the odds ratio, the paper's lambda. Default "0.1"."""


class Kto(ApiModel):
    """Kahneman-Tversky optimisation: single answers, each marked good or bad (Ethayarajh et al. 2024)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("!has(self.beta) || double(self.beta) > 0.0", f"objective.kto.{_BETA}"),
        Rule(
            "!has(self.desirableWeight) || !has(self.undesirableWeight) || double(self.desirableWeight) > 0.0 || double(self.undesirableWeight) > 0.0",
            "objective.kto: both weights are 0, so nothing would be learned: raise one",
        ),
    )

    beta: Decimal | None = None
    """Strength of the pull towards the model before training. Default "0.1"."""
    desirable_weight: Decimal | None = None
    """Weight of good answers. The paper advises that weight times count of the good be 1 to 4/3 that of the bad. Default "1"."""
    undesirable_weight: Decimal | None = None
    """Weight of bad answers. Default "1"."""


class Reward(ApiModel):
    """A reward model: a classifier with one output, the score of a conversation, higher for the better of two answers (Bradley and Terry 1952)."""

    centering: Decimal | None = None
    """Weight of the squared sum of both scores, which keeps scores around 0 (Eisenstein et al. 2023, who use "0.01"). Default "0"."""


class RegexReward(ApiModel):
    """1 where a regular expression matches the answer, else 0."""

    pattern: Annotated[str, Field(min_length=1, max_length=1024)]
    """The expression, in Python's syntax; a dot matches line breaks too. Ten seconds on an answer are the most that it may take."""
    match: Literal["search", "full"] | None = None
    """Whether it must match somewhere in the answer (search, the default) or the whole of it (full)."""


class JsonSchemaReward(ApiModel):
    """1 where the answer is JSON, and nothing but JSON, that a schema holds for, else 0."""

    json_schema: Annotated[str, Field(alias="schema", min_length=2, max_length=16_384)]
    """The JSON schema, as text, by its own $schema or draft 2020-12. It may refer to parts of itself only."""


class ReferenceReward(ApiModel):
    """1 where the answer is that of a column of the data, else 0: numbers by value, other text letter by letter."""

    column: Text
    """Column that holds the right answer."""
    pattern: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Regular expression whose first group (without groups, the whole match) is the answer; its last match counts. Applied to what the model says and, where it matches there, to the column: "#### (.+)" for GSM8K. Default: the whole text."""


class RewardModel(Reference):
    """A model that scores conversations: a transformers folder of a classifier with one output and a tokenizer, or an adapter that makes one of its base."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Reference.rules,
        exactly_one(
            "uri",
            "job",
            sentence="a reward model of objective.grpo.rewards needs exactly one of model.uri and model.job",
        ),
        *FOLDERS,
    )

    adapter: Adapter | None = None
    """The adapter in PEFT format that objective reward with method lora publishes: its place, or the job that made it; the model itself is then its base. Not needed where uri or job is an adapter, and its base the one that it was trained on."""


class RewardSource(ApiModel):
    """One reward of an answer. Exactly one kind."""

    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one(
            "regex",
            "jsonSchema",
            "reference",
            "model",
            "entryPoint",
            sentence="each of objective.grpo.rewards needs exactly one of: regex, jsonSchema, reference, model, entryPoint",
        ),
        Rule(
            "has(self.entryPoint) == (has(self.allowUserCode) && self.allowUserCode)",
            "objective.grpo.rewards: entryPoint runs code of yours with the trainer's rights, and needs allowUserCode: true (and nothing else does)",
        ),
    )

    name: SetName
    """What its metric is called by: reward_NAME, and eval_reward_NAME of held-out prompts."""
    weight: SignedDecimal | None = None
    """Its weight in the sum of all rewards; below 0 for what should not be, "0" for what is only measured. Default "1"."""
    regex: RegexReward | None = None
    """A regular expression."""
    json_schema: JsonSchemaReward | None = None
    """A JSON schema."""
    reference: ReferenceReward | None = None
    """The right answer, in a column of the data."""
    model: RewardModel | None = None
    """A reward model, such as objective reward publishes."""
    entry_point: (
        Annotated[
            str,
            spelled(r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$", "package.module:function", max_length=256),
        ]
        | None
    ) = None
    """A Python function of runtime.image, "package.module:function", called as TRL calls reward functions: with prompts, completions, completion_ids and each column of the rows as lists. It returns a number for each completion, or None where it does not judge it, and must be a function of them alone, or a resumed run would not end as one that was never stopped."""
    allow_user_code: bool | None = None
    """Must be true with entryPoint."""

    @property
    def kind(self) -> str:
        """Which kind is set."""
        return next(
            kind for kind in ("regex", "json_schema", "reference", "model", "entry_point") if getattr(self, kind)
        )


class Grpo(ApiModel):
    """Group relative policy optimisation: the model answers each prompt several times, and answers with a higher reward than the others' mean become likelier (Shao et al. 2024)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.rewards.all(r, self.rewards.exists_one(s, s.name == r.name))",
            "each of objective.grpo.rewards needs a name of its own",
        ),
        Rule(
            "size(self.rewards) == 0 || self.rewards.exists(r, !has(r.weight) || double(r.weight) != 0.0)",
            "objective.grpo.rewards: all weights are 0, so nothing would be learned: give one a weight",
        ),
        Rule(
            "!has(self.temperature) || double(self.temperature) > 0.0",
            "objective.grpo.temperature must be above 0: without chance all answers to a prompt would be the same",
        ),
        Rule(
            "!has(self.epsilonHigh) || !has(self.epsilon) || double(self.epsilonHigh) >= double(self.epsilon)",
            "objective.grpo.epsilonHigh is the upper bound and must not be below epsilon: raise it, or remove it",
        ),
    )

    rewards: Annotated[list[RewardSource], Field(min_length=1, max_length=8)]
    """What answers are judged by. The reward of an answer is their weighted sum."""
    generations: Annotated[int, Field(ge=2, le=256)] | None = None
    """Answers to each prompt, the group. Default 8."""
    max_completion_length: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Longest answer in tokens; the prompt has what it leaves of training.sequenceLength. Default 512, or half of sequenceLength where that is less."""
    temperature: Decimal | None = None
    """Of sampling; held-out prompts are answered greedily. Default "1"."""
    loss: Literal["dapo", "grpo", "dr_grpo"] | None = None
    """What the mean is over: dapo (Yu et al. 2025), all tokens of the step; grpo, the tokens of each answer and then the answers; dr_grpo (Liu et al. 2025), answers of maxCompletionLength. Default dapo."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """Advantages are divided by the standard deviation of the group's rewards, of all rewards of the step, or not. Default group; none with loss dr_grpo, as its authors advise."""
    beta: Decimal | None = None
    """Weight of the KL divergence from the model before training. Default "0"."""
    epsilon: Fraction | None = None
    """The ratio of probabilities counts down to 1 - epsilon. Without effect with iterations 1. Default "0.2"."""
    epsilon_high: Decimal | None = None
    """It counts up to 1 + epsilonHigh; DAPO's authors use "0.28". Default: epsilon."""
    iterations: Annotated[int, Field(ge=1, le=64)] | None = None
    """Optimizer steps on each set of answers. Evaluations and checkpoints come between sets: their intervals are rounded up to a multiple. Default 1."""
    generation_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Answers that one GPU writes at a time. Changes memory and speed, never the result beyond rounding. Default 64."""


class Classification(ApiModel):
    """Cross-entropy of classes, or squared error of numbers."""

    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one(
            "balanceClasses",
            "classWeights",
            sentence="objective.classification takes balanceClasses or classWeights, not both",
        ),
        Rule(
            "!(has(self.problem) && self.problem == 'regression') || !(has(self.balanceClasses) || has(self.classWeights))",
            "objective.classification: problem regression has no classes to weigh: remove balanceClasses and classWeights",
        ),
    )

    problem: support.Problem | None = None
    """What a text has: one class (default), any number of classes, or a number. Tokens and images have one class."""
    balance_classes: bool | None = None
    """Weigh each class by rows / (classes x rows of the class), so that rare ones count as much as frequent ones. Default false."""
    class_weights: Annotated[dict[str, Decimal], Field(min_length=1, max_length=256)] | None = None
    """Weights in the loss by class; those not named have 1."""


class Objective(ApiModel):
    """What is optimised. Exactly one."""

    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one(
            *support.OBJECTIVES,
            sentence=f"objective needs exactly one of: {', '.join(support.OBJECTIVES)}; one without settings is written {{}}: objective: {{sft: {{}}}}",
        ),
    )

    sft: Sft | None = None
    """Supervised fine-tuning: for text-generation."""
    pretrain: Pretrain | None = None
    """Plain text, to learn a domain: for text-generation."""
    dpo: Dpo | None = None
    """Pairs of answers, relative to the model before training: for text-generation."""
    orpo: Orpo | None = None
    """Pairs of answers, learned and told apart in one go: for text-generation."""
    kto: Kto | None = None
    """Single answers marked good or bad: for text-generation."""
    reward: Reward | None = None
    """Pairs of answers, to learn a score from: for text-generation. The result is a classifier with one output."""
    grpo: Grpo | None = None
    """Reinforcement learning from rewards of the model's own answers: for text-generation."""
    classification: Classification | None = None
    """For text-classification, token-classification and image-classification."""

    @property
    def name(self) -> str:
        """The one that is set."""
        (name,) = self.to_wire()
        return name
