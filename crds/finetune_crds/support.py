"""What works with what: task x method x model family. One table; the trainer refuses by it, docs and tests are made from it.

A family is transformers' `model_type`, as config.json spells it. It is here only if the tests train it: a model outside the table is
refused by name when the job starts, never run on a path that nobody has checked.
"""

from typing import Any, Final, Literal, NamedTuple, get_args

Task = Literal[
    "text-generation",
    "text-classification",
    "token-classification",
    "question-answering",
    "summarization",
    "translation",
    "image-classification",
]
Format = Literal[
    "chat",
    "instruction",
    "text",
    "preference",
    "unpairedPreference",
    "classification",
    "tags",
    "question",
    "pair",
    "image",
]
"""Shapes of rows."""
Problem = Literal["singleLabel", "multiLabel", "regression"]
"""What a text has: a class, any number of classes, or a number."""
MethodName = Literal[
    "full", "freeze", "gradualUnfreezing", "lora", "qlora", "adapter", "prefix", "prompt", "pTuning", "ia3"
]


class Family(NamedTuple):
    """A family of models."""

    models: str
    """Well-known models of it, for people."""
    tasks: tuple[Task, ...] = ("text-generation", "text-classification")
    methods: tuple[MethodName, ...] = get_args(MethodName)
    experts: bool = False
    """Whether it is a mixture of experts."""


_ENCODER: Final[dict[str, Any]] = {
    "tasks": ("text-classification", "token-classification", "question-answering"),
    "methods": ("full", "freeze", "gradualUnfreezing", "lora", "qlora", "adapter", "ia3"),
}
"""Encoders read and do not write; peft puts virtual tokens before the token that an encoder tells the class from."""

PAIRS: Final[tuple[Task, ...]] = ("summarization", "translation")
"""Tasks that make one text of another, with an encoder that reads and a decoder that writes."""
WRITING: Final[tuple[Task, ...]] = ("text-generation", *PAIRS)
"""Tasks whose models write text."""
_ENCODER_DECODER: Final[dict[str, Any]] = {
    "tasks": PAIRS,
    "methods": ("full", "freeze", "gradualUnfreezing", "lora", "qlora", "ia3"),
}
_IMAGES: Final[dict[str, Any]] = {
    "tasks": ("image-classification",),
    "methods": ("full", "freeze", "gradualUnfreezing", "lora"),
}
_VIT: Final[dict[str, Any]] = _IMAGES | {"methods": (*_IMAGES["methods"], "adapter", "ia3")}
_CONVOLUTIONS: Final[dict[str, Any]] = _IMAGES | {"methods": ("full", "freeze", "gradualUnfreezing")}
"""Without linear layers but the head: LoRA has nothing to stand beside."""
_RESIZED_POSITIONS: Final[dict[str, Any]] = _IMAGES | {"methods": ("freeze", "lora", "adapter", "ia3")}
"""Positions that are resized to the image with a smoothing filter, through which GPUs have no repeatable way back: they stay frozen."""

_EXPERTS: Final[dict[str, Any]] = {
    "methods": ("full", "freeze", "gradualUnfreezing", "lora", "adapter", "prefix", "prompt", "pTuning"),
    "experts": True,
}
"""Mixtures of experts: bitsandbytes leaves experts, nearly all of the weights, unquantised, and IA3 has no layer to multiply in them."""

FAMILIES: Final[dict[str, Family]] = {
    "bart": Family("BART, DistilBART", **_ENCODER_DECODER),
    "beit": Family("BEiT", **_VIT),
    "bert": Family("BERT, MiniLM, E5, BGE", **_ENCODER),
    "bit": Family("BiT (ResNetV2)", **_CONVOLUTIONS),
    "clip": Family("CLIP (its image encoder)", **_VIT),
    "convnext": Family("ConvNeXt", **_IMAGES),
    "convnextv2": Family("ConvNeXt V2", **_IMAGES),
    "cvt": Family("CvT", **_IMAGES),
    "data2vec-vision": Family("data2vec (images)", **_IMAGES),
    "deit": Family("DeiT", **_VIT),
    "dinov2": Family("DINOv2", **_VIT),
    "dinov2_with_registers": Family("DINOv2 with registers", **_RESIZED_POSITIONS),
    "distilbert": Family("DistilBERT", **_ENCODER),
    "donut-swin": Family("Donut's image encoder", **_IMAGES),
    "efficientnet": Family("EfficientNet B0 to B7", **_CONVOLUTIONS),
    "focalnet": Family("FocalNet", **_IMAGES),
    "gemma": Family("Gemma 1"),
    "gemma3_text": Family("Gemma 3 1B (text)"),
    "gpt2": Family("GPT-2, DistilGPT2"),
    "hgnet_v2": Family("HGNet V2", **_CONVOLUTIONS),
    "hiera": Family("Hiera", **_IMAGES),
    "ijepa": Family("I-JEPA", **_VIT),
    "imagegpt": Family("ImageGPT", **_VIT),
    "levit": Family("LeViT", **_IMAGES),
    "llama": Family("Llama 2, Llama 3, SmolLM, SmolLM2, TinyLlama"),
    "metaclip_2": Family("MetaCLIP 2 (its image encoder)", **_VIT),
    "mistral": Family("Mistral 7B, Mistral Nemo"),
    "mixtral": Family("Mixtral 8x7B, 8x22B (mixture of experts)", **_EXPERTS),
    "mobilenet_v1": Family("MobileNet V1", **_CONVOLUTIONS),
    "mobilenet_v2": Family("MobileNet V2", **_CONVOLUTIONS),
    "mobilevit": Family("MobileViT", **_IMAGES),
    "mobilevitv2": Family("MobileViT V2", **_CONVOLUTIONS),
    "modernbert": Family("ModernBERT", **_ENCODER | {"tasks": ("text-classification", "token-classification")}),
    "mt5": Family("mT5", **_ENCODER_DECODER),
    "olmo2": Family("OLMo 2"),
    "olmoe": Family("OLMoE (mixture of experts)", ("text-generation",), **_EXPERTS),
    "perceiver": Family("Perceiver IO (of images)", **_IMAGES),
    "phi3": Family("Phi 3, Phi 4"),
    "poolformer": Family("PoolFormer", **_CONVOLUTIONS),
    "pvt": Family("PVT", **_IMAGES),
    "pvt_v2": Family("PVT V2", **_IMAGES),
    "qwen2": Family("Qwen2, Qwen2.5"),
    "qwen3": Family("Qwen3 (dense)"),
    "qwen3_moe": Family("Qwen3 30B-A3B, 235B-A22B (mixture of experts)", **_EXPERTS),
    "regnet": Family("RegNet", **_CONVOLUTIONS),
    "resnet": Family("ResNet-18 to ResNet-152", **_CONVOLUTIONS),
    "roberta": Family("RoBERTa", **_ENCODER),
    "segformer": Family("SegFormer (its encoder, MiT)", **_IMAGES),
    "siglip": Family("SigLIP (its image encoder)", **_VIT),
    "siglip2": Family("SigLIP 2 NaFlex (its image encoder)", **_RESIZED_POSITIONS),
    "smollm3": Family("SmolLM3"),
    "swiftformer": Family("SwiftFormer", **_CONVOLUTIONS),
    "swin": Family("Swin Transformer", **_IMAGES),
    "swinv2": Family("Swin Transformer V2", **_IMAGES),
    "t5": Family("T5, T5 1.1, Flan-T5", **_ENCODER_DECODER),
    "textnet": Family("TextNet", **_CONVOLUTIONS),
    "timm_wrapper": Family("models of timm: ResNet, EfficientNet, ConvNeXt, ViT, EVA-02 and more", **_IMAGES),
    "vit": Family("ViT, DINO ViT", **_VIT),
    "vit_msn": Family("ViT-MSN", **_VIT),
    "xlm-roberta": Family("XLM-RoBERTa, multilingual E5", **_ENCODER),
}

LEFT_OUT: Final[dict[str, str]] = {
    "dinat": "it needs the package natten, which this trainer does not have",
    "pp_lcnet": "transformers' class for it returns no logits",
    "shieldgemma2": "it answers questions about an image in words, and has no head that could be trained",
}
"""Families that transformers has a classifier of images for, and why they are not in the table."""

OBJECTIVES: Final[dict[str, tuple[Task, ...]]] = {
    "sft": ("text-generation",),
    "pretrain": ("text-generation",),
    "dpo": ("text-generation",),
    "orpo": ("text-generation",),
    "kto": ("text-generation",),
    "reward": ("text-generation",),
    "grpo": ("text-generation",),
    "classification": ("text-classification", "token-classification", "image-classification"),
}
"""Tasks of each objective, a task's default first. A task without one has a loss of its own."""

PREFERENCES: Final = ("dpo", "orpo", "kto", "reward")
"""Objectives that learn which answer is the better one. Their rows are never packed."""

UNPACKED: Final = (*PREFERENCES, "grpo")
"""Objectives whose rows are never packed."""

OBJECTIVE_METHODS: Final[dict[str, tuple[MethodName, ...]]] = {
    "grpo": ("full", "freeze", "gradualUnfreezing", "lora", "qlora", "adapter", "ia3"),
}
"""Methods of an objective, where they are not all. Of grpo not prefix, prompt and pTuning: answers are generated for many prompts at a time, behind padding, and virtual tokens would stand before it."""

FORMATS: Final[dict[Task, tuple[Format, ...]]] = {
    "text-generation": ("chat", "instruction", "text"),
    "text-classification": ("classification",),
    "token-classification": ("tags",),
    "question-answering": ("question",),
    "summarization": ("pair",),
    "translation": ("pair",),
    "image-classification": ("image",),
}
"""Shapes of the rows that a task takes."""

OBJECTIVE_FORMATS: Final[dict[str, tuple[Format, ...]]] = {
    "pretrain": ("text",),
    "dpo": ("preference",),
    "orpo": ("preference",),
    "kto": ("unpairedPreference", "preference"),
    "reward": ("preference",),
    "grpo": ("chat", "instruction"),
}
"""Shapes of the rows of an objective, where they are not all those of its task."""

COLUMNS: Final[dict[str, tuple[Format, ...]]] = {
    "messages": ("chat",),
    "prompt": ("instruction", "preference", "unpairedPreference"),
    "input": ("instruction",),
    "completion": ("instruction", "unpairedPreference"),
    "system": ("instruction", "preference", "unpairedPreference"),
    "text": ("text", "classification"),
    "label": ("unpairedPreference", "classification", "image"),
    "chosen": ("preference",),
    "rejected": ("preference",),
    "margin": ("preference",),
    "tokens": ("tags",),
    "tags": ("tags",),
    "question": ("question",),
    "image": ("image",),
    "context": ("question",),
    "answers": ("question",),
    "source": ("pair",),
    "target": ("pair",),
}
"""Shapes of rows that each of dataset.columns is read of."""


class Metric(NamedTuple):
    """What an evaluation can be judged by."""

    tasks: tuple[Task, ...] = ()
    lower_is_better: bool = False
    problems: tuple[Problem, ...] = ()
    """Of text-classification, the problems that have it."""
    objectives: tuple[str, ...] = ()
    """Of text-generation, the objectives that have it."""


_CLASSES: Final[tuple[Problem, ...]] = ("singleLabel", "multiLabel")
METRICS: Final[dict[str, Metric]] = {
    "eval_loss": Metric(
        tuple(task for task in get_args(Task) if task != "text-generation"),
        lower_is_better=True,
        objectives=("sft", "pretrain", *PREFERENCES),
    ),
    "eval_perplexity": Metric(lower_is_better=True, objectives=("sft", "pretrain")),
    "eval_accuracy": Metric(
        ("token-classification", "image-classification"), problems=_CLASSES, objectives=("dpo", "orpo", "reward")
    ),
    "eval_f1": Metric(("token-classification", "question-answering", "image-classification"), problems=_CLASSES),
    "eval_precision": Metric(("token-classification",)),
    "eval_recall": Metric(("token-classification",)),
    "eval_exact_match": Metric(("question-answering",)),
    "eval_pearson": Metric(problems=("regression",)),
    "eval_mse": Metric(lower_is_better=True, problems=("regression",)),
    "eval_rouge1": Metric(("summarization",)),
    "eval_rouge2": Metric(("summarization",)),
    "eval_rougeL": Metric(("summarization",)),
    "eval_chrf": Metric(("translation",)),
    "eval_bleu": Metric(("translation",)),
    "eval_margin": Metric(objectives=PREFERENCES),
    "eval_reward": Metric(objectives=("grpo",)),
}
"""Metrics by name: what evaluation.metric and gates can be."""
WRITTEN: Final = tuple(name for name, metric in METRICS.items() if metric.tasks and set(metric.tasks) <= set(PAIRS))
"""Those of what a model writes of held-out rows."""


LOWER_IS_BETTER: Final = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")
"""Metrics of lm-evaluation-harness that are better when they are lower; all others are better when they are higher."""


def methods_of(task: Task) -> tuple[MethodName, ...]:
    """Methods that some family supports for a task."""
    return tuple(
        method
        for method in get_args(MethodName)
        if any(task in family.tasks and method in family.methods for family in FAMILIES.values())
    )


def metrics_of(task: Task, *, problem: Problem | None = None, objective: str | None = None) -> tuple[str, ...]:
    """Metrics of a task: of text-classification by problem, of text-generation by objective."""
    return tuple(
        name
        for name, metric in METRICS.items()
        if task in metric.tasks or problem in metric.problems or objective in metric.objectives
    )


def formats_of(task: Task, objective: str | None) -> tuple[Format, ...]:
    """Shapes of the rows that a task takes with an objective."""
    return OBJECTIVE_FORMATS.get(objective or "", FORMATS[task])


def refusal(model_type: str, task: str, method: str) -> str | None:
    """Why a combination is not supported, as a sentence for the user, or None if it is."""
    family = FAMILIES.get(model_type)
    if family is None and model_type in LEFT_OUT:
        return f"models of type {model_type!r} are not supported: {LEFT_OUT[model_type]}"
    if family is None:
        those = ", ".join(name for name, one in FAMILIES.items() if task in one.tasks)
        return f"models of type {model_type!r} are not supported; supported for {task} are {those}"
    if task not in family.tasks:
        return f"models of type {model_type!r} are supported for {', '.join(family.tasks)}, not for {task}"
    if method not in family.methods:
        return f"models of type {model_type!r} are supported with method {', '.join(family.methods)}, not with {method}"
    return None
