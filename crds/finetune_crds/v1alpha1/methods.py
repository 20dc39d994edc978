"""spec.method: which weights are trained. One class a method; docstrings are what `kubectl explain` prints.

A field is here only if it works. Defaults that an expert would choose are in `finetune_crds.resolution`, not in the schema.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .common import ApiModel, Decimal, Fraction, Rule, exactly_one

ModuleNames = Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1, max_length=64)]
VirtualTokens = Annotated[int, Field(ge=1, le=1024)]

_ABOVE_ZERO = "layerDecay must be above 0, or the blocks below the last would never move"


class Full(ApiModel):
    """Every weight is trained."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("!has(self.layerDecay) || double(self.layerDecay) > 0.0", f"method.full.{_ABOVE_ZERO}"),
    )

    layer_decay: Fraction | None = None
    """Learning rate of each block, as a part of the one above it: the lowest layers, which are the most general, move least. The head and the last block have the full rate. Default "1"."""


class Freeze(ApiModel):
    """Some of the model's own weights are trained; all others stay as they are, bit for bit. The whole model is the result."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.trainLastBlocks) || has(self.trainModules) || (has(self.trainHead) && self.trainHead) || (has(self.trainBiases) && self.trainBiases)",
            "method.freeze needs what is trained: trainLastBlocks, trainModules, trainHead or trainBiases",
        ),
    )

    train_last_blocks: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Train this many blocks, counted from the head."""
    train_modules: ModuleNames | None = None
    """Train the modules with these names, where * stands for anything: ["mlp.down_proj", "layers.3.*"]. A name is compared with the end of the module's path."""
    train_head: bool | None = None
    """Train the layer that makes logits. A new head of a classifier is trained always."""
    train_biases: bool | None = None
    """Train each bias (BitFit, Ben Zaken et al. 2022). For models that have some, such as Qwen2."""


class GradualUnfreezing(ApiModel):
    """The head is trained first, then block after block joins it downwards, each with a smaller learning rate (ULMFiT, Howard and Ruder 2018)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one(
            "everySteps",
            "everyEpochs",
            sentence="method.gradualUnfreezing needs exactly one of everySteps and everyEpochs: when the next blocks join",
        ),
        Rule("!has(self.layerDecay) || double(self.layerDecay) > 0.0", f"method.gradualUnfreezing.{_ABOVE_ZERO}"),
        Rule(
            "!has(self.everyEpochs) || double(self.everyEpochs) > 0.0",
            "method.gradualUnfreezing.everyEpochs must be above 0: use method full to train all from the start",
        ),
    )

    every_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Steps from one stage to the next."""
    every_epochs: Decimal | None = None
    """Passes over the training rows from one stage to the next, instead of steps."""
    blocks_per_stage: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Blocks that join at each stage. Default 1."""
    layer_decay: Fraction | None = None
    """Learning rate of each stage's weights, as a part of those of the stage before. Default "0.9"; the paper divides by 2.6 ("0.385"), for a model of three layers."""


class LowRank(ApiModel):
    """What LoRA and QLoRA have in common."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.loraPlusRatio) || double(self.loraPlusRatio) > 0.0",
            "loraPlusRatio must be above 0, or the B matrices, which begin as zero, would never move",
        ),
        Rule(
            "!has(self.dropout) || double(self.dropout) < 1.0",
            "dropout must be below 1, or nothing would reach the adapter",
        ),
    )

    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Rank r of each update. Default 16."""
    alpha: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Scale: the update is multiplied by alpha / rank. Default twice the rank."""
    dropout: Fraction | None = None
    """Dropout on the adapter's input. Default "0"."""
    targets: ModuleNames | None = None
    """Names of the modules that get an adapter, such as [q_proj, v_proj]. Default [all-linear]: every linear layer but the head."""
    rank_pattern: (
        Annotated[
            dict[str, Annotated[int, Field(ge=1, le=1024)]],
            Field(max_length=64),
        ]
        | None
    ) = None
    """Ranks of modules that differ, by name or regular expression: {"layers.[0-3].*q_proj": 32}."""
    alpha_pattern: (
        Annotated[
            dict[str, Annotated[int, Field(ge=1, le=4096)]],
            Field(max_length=64),
        ]
        | None
    ) = None
    """Alphas of modules that differ, as rankPattern."""
    modules_to_save: ModuleNames | None = None
    """Modules that are trained in full and saved with the adapter, such as [embed_tokens, lm_head]. Not servable as an adapter by vLLM."""
    use_dora: bool | None = None
    """Weight-decomposed LoRA (Liu et al. 2024). Better at low rank, slower, not servable as an adapter by vLLM. Default false."""
    use_rslora: bool | None = None
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023): stable at high rank. Default false."""
    lora_plus_ratio: Decimal | None = None
    """Learning rate of the B matrices, as a multiple of that of A (LoRA+, Hayou et al. 2024, who advise "16"). Default "1"."""


class Lora(LowRank):
    """Low-rank adapters beside frozen weights (Hu et al. 2021)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *LowRank.rules,
        Rule(
            "!(has(self.experts) && self.experts) || !((has(self.dropout) && double(self.dropout) > 0.0) || (has(self.useDora) && self.useDora) || (has(self.initialization) && self.initialization != 'zero'))",
            "method.lora.experts adapts weights that have no layer of their own, so dropout, useDora and initialization cannot go with it: remove them, or experts",
        ),
    )

    initialization: Literal["zero", "pissa", "olora"] | None = None
    """How the update begins: as nothing (zero), with the weights' principal components (PiSSA, Meng et al. 2024) or their QR factors (OLoRA, Büyükakyüz 2024). The last two are published as a plain adapter of twice the rank for the untouched model. Default zero."""
    experts: bool | None = None
    """Of a mixture of experts, adapt each expert too: they hold most of the weights and are no layers that targets could name. Costs rank times the number of experts, and memory for a second copy of them. Default false."""


class Qlora(LowRank):
    """LoRA beside weights that are frozen in 4 or 8 bits (Dettmers et al. 2023): a quarter of the memory for the model, slower steps."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *LowRank.rules,
        Rule(
            "!has(self.doubleQuantization) || !has(self.bits) || self.bits == 4",
            "method.qlora.doubleQuantization is of 4 bits: remove it for 8",
        ),
    )

    bits: Literal[4, 8] | None = None
    """4 (NF4) or 8 (LLM.int8). Default 4."""
    double_quantization: bool | None = None
    """Quantise the 4-bit scales too: 0.4 bits less for each weight. Default true."""


class BottleneckAdapter(ApiModel):
    """Small networks between frozen layers: down, non-linearity, up, added to what came in (Houlsby et al. 2019). They start as identity."""

    placement: Literal["houlsby", "pfeiffer"] | None = None
    """Behind attention and behind the feed-forward network (houlsby), or behind the latter only (pfeiffer, Pfeiffer et al. 2020). Default pfeiffer."""
    reduction_factor: Annotated[int, Field(ge=1, le=1024)] | None = None
    """The hidden size divided by the width of the bottleneck. Default 16."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] | None = None
    """Between down and up. Default relu."""


class Prefix(ApiModel):
    """Trained keys and values before each row, in every layer (Li and Liang 2021)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.projectionSize) || (has(self.projection) && self.projection)",
            "method.prefix.projectionSize is the width of the projection: set projection to true, or remove it",
        ),
        Rule(
            "!has(self.initialText) || !has(self.projection) || !self.projection",
            "method.prefix.initialText sets keys and values, which a projection makes itself: remove one of the two",
        ),
    )

    length: VirtualTokens | None = None
    """Virtual tokens. Default 20."""
    initial_text: Annotated[str, Field(min_length=1, max_length=8192)] | None = None
    """Begin with the keys and values of this text, cut or repeated to length: training starts where prompting with it would be. Default: random."""
    projection: bool | None = None
    """Train a small network that makes the prefix; only what it makes is saved. Default false."""
    projection_size: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Width of that network. Default: the hidden size."""


class Prompt(ApiModel):
    """Trained embeddings before each row (Lester et al. 2021)."""

    length: VirtualTokens | None = None
    """Virtual tokens. Default 20."""
    initial_text: Annotated[str, Field(min_length=1, max_length=8192)] | None = None
    """Begin with the embeddings of this text, cut or repeated to length. Default: of random tokens."""


class PTuning(ApiModel):
    """Trained embeddings before each row, made by a small network (Liu et al. 2021)."""

    length: VirtualTokens | None = None
    """Virtual tokens. Default 20."""
    encoder: Literal["mlp", "lstm"] | None = None
    """Kind of the network; only what it makes is saved. Default mlp."""
    hidden_size: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Its width. Default: the model's hidden size."""


class Ia3(ApiModel):
    """Trained factors for what attention and the feed-forward network compute (Liu et al. 2022): the fewest weights of all."""


METHODS = (
    "full",
    "freeze",
    "gradualUnfreezing",
    "lora",
    "qlora",
    "adapter",
    "prefix",
    "prompt",
    "pTuning",
    "ia3",
)
_LISTED = ", ".join(METHODS)


class Method(ApiModel):
    """Which weights are trained. Exactly one."""

    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one(
            *METHODS,
            sentence=f"method needs exactly one of: {_LISTED}; one without settings is written {{}}: method: {{lora: {{}}}}",
        ),
    )

    full: Full | None = None
    """Every weight is trained: the whole model is the result."""
    freeze: Freeze | None = None
    """Some of the model's own weights are trained, the rest is frozen: the whole model is the result."""
    gradual_unfreezing: GradualUnfreezing | None = None
    """From the head downwards, block after block joins training: the whole model is the result."""
    lora: Lora | None = None
    """Low-rank adapters beside frozen weights (Hu et al. 2021): the default, and the result is an adapter."""
    qlora: Qlora | None = None
    """LoRA beside weights that are frozen in 4 or 8 bits (Dettmers et al. 2023): the result is an adapter."""
    adapter: BottleneckAdapter | None = None
    """Bottleneck networks between frozen layers (Houlsby et al. 2019): the result is an adapter."""
    prefix: Prefix | None = None
    """Trained keys and values before each row (Li and Liang 2021): the result is an adapter."""
    prompt: Prompt | None = None
    """Trained embeddings before each row (Lester et al. 2021): the result is an adapter."""
    p_tuning: PTuning | None = None
    """Trained embeddings made by a small network (Liu et al. 2021): the result is an adapter."""
    ia3: Ia3 | None = None
    """Trained factors for what attention and the feed-forward network compute (Liu et al. 2022): the result is an adapter."""

    @property
    def name(self) -> str:
        """The field that is set, as the wire spells it."""
        (chosen,) = self.to_wire()
        return chosen
