"""How it is minimised."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .common import (
    ApiModel,
    Decimal,
    Fraction,
    Rule,
    at_most_one,
    exactly_one,
)


class AdamW(ApiModel):
    """AdamW (Loshchilov and Hutter 2019)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "(!has(self.beta1) || double(self.beta1) < 1.0) && (!has(self.beta2) || double(self.beta2) < 1.0)",
            "training.optimizer.adamw.beta1 and beta2 must be below 1, or the means would stay at 0, where they begin",
        ),
        Rule(
            "!has(self.epsilon) || double(self.epsilon) > 0.0",
            "training.optimizer.adamw.epsilon must be above 0: a weight without a gradient is divided by it",
        ),
    )

    beta1: Fraction | None = None
    """Decay of the mean of gradients. Default "0.9"."""
    beta2: Fraction | None = None
    """Decay of the mean of their squares. Default "0.999"."""
    epsilon: Decimal | None = None
    """Added to the root of the latter. Default "1e-8"."""
    bits: Literal[8, 32] | None = None
    """Bits of each of the two means: 8 (Dettmers et al. 2022) takes two bytes a trained weight in place of eight, and rounds. Default 32."""
    paged: bool | None = None
    """Keep the two means in memory that GPU and host share: what does not fit beside a peak of activations moves to the host, and comes back for the update, in place of running out of GPU memory. The same results to the last bit. Needs a GPU. Default false."""


class Optimizer(ApiModel):
    """Which optimizer. Exactly one."""

    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one("adamw", sentence="training.optimizer needs exactly one of: adamw"),
    )

    adamw: AdamW | None = None
    """AdamW (Loshchilov and Hutter 2019): the default."""


class Training(ApiModel):
    """Hyperparameters."""

    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one("epochs", "maxSteps", sentence="training takes epochs or maxSteps, not both"),
        Rule(
            "!has(self.epochs) || double(self.epochs) > 0.0",
            "training.epochs must be above 0, or nothing would be learned",
        ),
        Rule(
            "!has(self.learningRate) || !self.learningRate.matches('^0+([.]0+)?([eE].*)?$')",
            "training.learningRate must be above 0, or nothing would be learned",
        ),
        Rule(
            "!has(self.labelSmoothing) || double(self.labelSmoothing) < 1.0",
            "training.labelSmoothing must be below 1, or nothing of the targets would be left",
        ),
        Rule(
            "!has(self.dropout) || double(self.dropout) < 1.0",
            "training.dropout must be below 1, or nothing would get through",
        ),
        at_most_one(
            "batchSize", "tokensPerStep", sentence="training takes batchSize (sequences) or tokensPerStep, not both"
        ),
        at_most_one("warmupRatio", "warmupSteps", sentence="training takes warmupRatio or warmupSteps, not both"),
        Rule(
            "!has(self.warmupSteps) || !has(self.maxSteps) || self.warmupSteps <= self.maxSteps",
            "training.warmupSteps is more than maxSteps, and the learning rate would never be reached: lower it",
        ),
        at_most_one(
            "microBatchSize",
            "accumulationSteps",
            sentence="training takes microBatchSize or accumulationSteps, not both: each follows from the other",
        ),
    )

    epochs: Decimal | None = None
    """Passes over the training rows. Default "3"; one for objective pretrain, dpo, orpo, kto, reward and grpo."""
    max_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Optimizer steps, instead of epochs."""
    learning_rate: Decimal | None = None
    """Peak learning rate. Default "2e-4" for lora and qlora of models up to 13B, "1e-4" of larger ones, "2e-5" for full and gradualUnfreezing, "5e-5" for freeze, "1e-4" for adapter, "1e-2" for prefix, "5e-5" for prefix with projection, "3e-2" for prompt, "1e-3" for pTuning, "3e-3" for ia3. Objective dpo, kto and grpo: a twentieth of that, orpo two fifths, reward half."""
    schedule: Literal["cosine", "linear", "constant"] | None = None
    """How the learning rate falls after warm-up: to 0 along a cosine (default) or a line, or not."""
    warmup_ratio: Fraction | None = None
    """Part of all steps in which the learning rate rises from 0. Default "0.03"."""
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    """Steps in which the learning rate rises, instead of a ratio."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Rows in one optimizer step over all GPUs (a row is a sequence, with packing a pack of them, of objective grpo a prompt with all its answers). Default 16."""
    tokens_per_step: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Most non-padding input tokens in one optimizer step over all GPUs, instead of batchSize."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Rows in one forward pass of one GPU. Changes memory and speed, and the result only by rounding, unless batch normalisation is trained, which takes its statistics from these rows, or dropout or neftuneNoise is drawn. Default: 1 when packed, 1 prompt with its answers of objective grpo, 4 pairs of answers, 32 images, else 8; of text on a GPU, but for grpo, as many more as fit its memory when they are tried before the first step, up to 16,384 tokens. Evaluation of rows that are not packed keeps to the former."""
    accumulation_steps: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Forward passes of one GPU in one optimizer step, instead of microBatchSize."""
    sequence_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Longest row in tokens, of a pair of answers each with its prompt; longer ones are cut, and status says how many. Default: 1024, or what the model has positions for where that is less."""
    packing: bool | None = None
    """Put several rows into one sequence without letting them see each other. Default true for objective sft and pretrain."""
    gradient_checkpointing: bool | None = None
    """Keep of each block its input only, and compute the rest once more in the backward pass (Chen et al. 2016): activations take a fraction of the memory, and a step longer. The same results to the last bit. Default false."""
    precision: Literal["bf16", "fp32"] | None = None
    """What forward and backward compute in. Trained weights always have fp32 masters. Default bf16 on GPUs, fp32 without."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] | None = None
    """Data order, initial adapter and dropout are functions of it. Default 42."""
    optimizer: Optimizer | None = None
    """The optimizer and its numbers. Default adamw."""
    weight_decay: Decimal | None = None
    """AdamW's decay, on matrices only. Default "0" for adapters, "0.01" where the model's own weights are trained (full, freeze, gradualUnfreezing)."""
    label_smoothing: Fraction | None = None
    """Part of each target that is spread over all tokens or classes (Szegedy et al. 2016): "0.1". Held-out losses are without. Default "0"."""
    dropout: Fraction | None = None
    """Dropout (Srivastava et al. 2014) of the model itself, in place of each rate in its config.json; of most models since Llama that is dropout of attention scores. The output's config.json keeps the model's own. Default: what config.json says."""
    neftune_noise: Decimal | None = None
    """NEFTune (Jain et al. 2023): uniform noise on the embeddings of training rows, scaled by this over the root of tokens times width; 5 is usual. Default "0"."""
    l2_sp: Decimal | None = None
    """L2-SP (Li et al. 2018): decay towards the weights that training began with in place of 0, against forgetting; a fresh head is left out. Decoupled from the gradient as AdamW's decay is. Default "0"."""
    max_grad_norm: Decimal | None = None
    """Gradients are scaled down to this global L2 norm; "0" switches it off. Default "1"."""
