"""Where the parts of a family of models are: what transformers names differently from family to family. Called by models and methods.

A decoder tells a row's class from its last token, which alone has seen the row; an encoder from its first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from finetune_crds import support
from finetune_crds.support import Task

from ..errors import UserError
from . import timm_models

PERCEIVER: Final = "perceiver"
"""Its head and what reads its input are parts of what transformers has a class of its own for."""
PIXELS: Final = "pixel_values"
"""(channels, height, width) of an image, where a model takes nothing else."""
COLOURS: Final = "input_ids"
"""(pixels) of an image: the number of each one's colour."""


@dataclass(frozen=True)
class Anatomy:
    """Names in a family's modules. The defaults are those of Llama and all that is built like it."""

    blocks: tuple[str, ...] = ("layers",)
    """The lists of blocks, from the base model, in the order in which a row goes through them; none: see _highest."""
    attention: str = "self_attn"
    """In a block: the module whose output is attention's, right before the residual is added."""
    feed_forward: str = "mlp"
    """The same of the feed-forward network."""
    classifier: tuple[str, ...] = ("score",)
    """The head of a classifier of texts or images, from the model: what a model without one lacks. It is trained in full by every method."""
    logits: Callable[[Any, Tensor], Tensor] = lambda inner, states: inner.score(states)
    """(rows, size) -> (rows, classes): that head."""
    tagger: tuple[str, ...] = ("classifier",)
    """The same of a classifier of tokens."""
    tag_logits: Callable[[Any, Tensor], Tensor] = lambda inner, states: inner.classifier(inner.dropout(states))
    """(tokens, size) -> (tokens, classes)."""
    span: tuple[str, ...] = ("qa_outputs",)
    """The same of what finds answers."""
    span_logits: Callable[[Any, Tensor], Tensor] = lambda inner, states: inner.qa_outputs(states)
    """(tokens, size) -> (tokens, 2)."""
    is_encoder: bool = False
    """Whether each token sees the whole row, so that its class is told from its first."""
    factors: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """IA3: layers with factors, and those among them whose input is multiplied. None: as peft chooses."""
    inputs: tuple[str, ...] = (PIXELS,)
    """Of images: what image processors make of them and models take, by the names of transformers."""
    behind: tuple[str, ...] = ()
    """Modules behind the blocks whose names do not say so, from the model."""
    one_size: bool = False
    """Whether images must have the size of config.image_size."""
    padded_positions: bool = False
    """Whether positions begin behind that of padding."""


def _pooled(inner: Any, states: Tensor) -> Tensor:
    logits: Tensor = inner.classifier(inner.dropout(inner.bert.pooler(states[:, None])))
    return logits


def _own_head(inner: Any, states: Tensor) -> Tensor:
    logits: Tensor = inner.classifier(states[:, None])
    return logits


def _two_layers(inner: Any, states: Tensor) -> Tensor:
    logits: Tensor = inner.classifier(inner.dropout(torch.relu(inner.pre_classifier(states))))
    return logits


def _dense_head(inner: Any, states: Tensor) -> Tensor:
    logits: Tensor = inner.classifier(inner.drop(inner.head(states)))
    return logits


_LIKE_BERT: Final = {
    "blocks": ("encoder.layer",),
    "attention": "attention.output.dense",
    "feed_forward": "output.dense",
    "is_encoder": True,
    "factors": (("key", "value", "output.dense"), ("output.dense",)),
}
_LIKE_GPT2: Final = {
    "blocks": ("h",),
    "attention": "attn",
    "factors": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
}
_DECODER: Final = Anatomy(factors=(("k_proj", "v_proj", "down_proj"), ("down_proj",)))
_NORMED_BEHIND: Final = replace(
    _DECODER, attention="post_attention_layernorm", feed_forward="post_feedforward_layernorm"
)
"""A norm stands between a sublayer and its residual."""
_FUSED: Final = Anatomy(factors=(("qkv_proj", "down_proj"), ("down_proj",)))
_T5: Final = Anatomy(blocks=("encoder.block", "decoder.block"), factors=(("k", "v", "wo"), ("wo",)))
_IMAGES: Final = Anatomy(blocks=(), classifier=("classifier",))
_IMAGES_OF_ONE_SIZE: Final = replace(_IMAGES, one_size=True)
_DINO: Final = replace(_IMAGES, attention="attention", factors=(("k_proj", "v_proj", "fc2"), ("fc2",)))
_VIT: Final = replace(_DINO, one_size=True)
_CLIP: Final = replace(_VIT, attention="self_attn")
_FAMILIES: Final[dict[str, Anatomy]] = {
    **{name: _IMAGES for name, family in support.FAMILIES.items() if "image-classification" in family.tasks},
    "bart": Anatomy(blocks=("encoder.layers", "decoder.layers"), factors=(("q_proj", "v_proj", "fc2"), ("fc2",))),
    "beit": _DINO,
    "bert": Anatomy(**_LIKE_BERT, classifier=("bert.pooler", "classifier"), logits=_pooled),  # type: ignore[arg-type]
    "clip": _CLIP,
    "cvt": replace(_IMAGES, classifier=("layernorm", "classifier")),
    "data2vec-vision": replace(_IMAGES, classifier=("data2vec_vision.pooler", "classifier")),
    "deit": _VIT,
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
    "distilbert": Anatomy(
        blocks=("transformer.layer",),
        attention="attention",
        feed_forward="ffn",
        classifier=("pre_classifier", "classifier"),
        logits=_two_layers,
        span_logits=lambda inner, states: inner.qa_outputs(inner.dropout(states)),
        is_encoder=True,
        factors=(("k_lin", "v_lin", "lin2"), ("lin2",)),
    ),
    "gemma3_text": _NORMED_BEHIND,
    "gpt2": Anatomy(**_LIKE_GPT2),  # type: ignore[arg-type]
    "hgnet_v2": replace(_IMAGES, classifier=("fc",)),
    "hiera": _IMAGES_OF_ONE_SIZE,
    "ijepa": _VIT,
    "imagegpt": replace(_IMAGES, **_LIKE_GPT2, classifier=("score",), inputs=(COLOURS,)),  # type: ignore[arg-type]
    "levit": _IMAGES_OF_ONE_SIZE,
    "metaclip_2": _CLIP,
    "modernbert": Anatomy(
        attention="attn",
        classifier=("head", "classifier"),
        logits=_dense_head,
        tagger=("head", "classifier"),
        tag_logits=_dense_head,
        is_encoder=True,
        factors=(("Wqkv", "mlp.Wo"), ("mlp.Wo",)),
    ),
    "mt5": _T5,
    "olmo2": _NORMED_BEHIND,
    PERCEIVER: replace(_IMAGES, classifier=("perceiver.decoder.decoder.final_layer",), behind=("perceiver.decoder",)),
    "phi3": _FUSED,
    "poolformer": replace(_IMAGES, classifier=("norm", "classifier")),
    "pvt": _IMAGES_OF_ONE_SIZE,
    "roberta": Anatomy(**_LIKE_BERT, classifier=("classifier",), logits=_own_head, padded_positions=True),  # type: ignore[arg-type]
    "siglip": _CLIP,
    "siglip2": replace(_CLIP, one_size=False, inputs=(PIXELS, "pixel_attention_mask", "spatial_shapes")),
    "swiftformer": replace(_IMAGES, classifier=("norm", "head", "dist_head")),
    "t5": _T5,
    "textnet": replace(_IMAGES, classifier=("fc",)),
    "vit": _VIT,
    "vit_msn": _VIT,
    "xlm-roberta": Anatomy(**_LIKE_BERT, classifier=("classifier",), logits=_own_head, padded_positions=True),  # type: ignore[arg-type]
}


def of(model_type: str) -> Anatomy:
    """The anatomy of a family, by its `model_type`."""
    return _FAMILIES.get(model_type, _DECODER)


def head(config: Any, task: Task) -> tuple[str, ...]:
    """Names of the modules that a model has for a task only; none where the task needs no head of its own."""
    if config.model_type == timm_models.FAMILY:
        return timm_models.head(config)
    parts = of(config.model_type)
    heads: dict[Task, tuple[str, ...]] = {
        "text-classification": parts.classifier,
        "token-classification": parts.tagger,
        "question-answering": parts.span,
        "image-classification": parts.classifier,
    }
    return heads.get(task, ())


def heads(model_type: str) -> list[str]:
    """Names of all the heads that a family may have, that of tokens too."""
    parts = of(model_type)
    return [*dict.fromkeys([*parts.classifier, *parts.tagger, *parts.span, "lm_head"])]


def stacks(inner: Any) -> list[nn.ModuleList]:
    """The model's lists of transformer blocks, lowest first; of an encoder-decoder the encoder's, then the decoder's.

    Raises:
        UserError: it has none under the usual names.
    """
    if inner.config.model_type == timm_models.FAMILY:
        return [timm_models.blocks(inner)]
    names = of(inner.config.model_type).blocks
    try:
        found: list[Any] = (
            [inner.base_model.get_submodule(name) for name in names] if names else [_highest(inner.base_model)]
        )
    except AttributeError:
        found = [None]
    if not all(isinstance(one, nn.ModuleList) for one in found):
        raise UserError(f"spec.model: models of type {inner.config.model_type!r} have no list of blocks")
    return found


def _highest(base: nn.Module) -> nn.ModuleList | None:
    """Of a model of images: the list of modules that lies highest, of a hierarchy that of its stages. Lists beside one another, as those of PVT, hold
    parts of the same stages."""
    level = [base]
    while level:
        for module in level:
            lists = [
                one
                for one in module.children()
                if isinstance(one, nn.ModuleList) and any(True for _ in one.parameters())
            ]
            if lists:
                return lists[0] if len(lists) == 1 else nn.ModuleList(map(nn.ModuleList, zip(*lists, strict=True)))
        level = [child for module in level for child in module.children()]
    return None


def blocks(inner: Any) -> list[nn.Module]:
    """The model's transformer blocks, lowest first."""
    return [block for stack in stacks(inner) for block in stack]


def embedding(inner: Any) -> nn.Module:
    """The layer that embeds tokens or patches; a convolutional network and Perceiver have none, and an empty one stands for it."""
    try:
        found = inner.get_input_embeddings()
    except NotImplementedError:
        found = None
    return found if isinstance(found, nn.Module) else nn.Identity()


def of_images(config: Any) -> Any:
    """What of a configuration is of images: all of it, or a part of one that is of texts too, as that of CLIP."""
    return getattr(config, "vision_config", config)


def fixed_size(config: Any) -> tuple[int, int] | None:
    """Height and width that images must have, where a model does not take any."""
    if config.model_type == timm_models.FAMILY:
        return timm_models.fixed_size(config)
    if COLOURS in of(config.model_type).inputs:
        side = math.isqrt(config.n_positions)
        return side, side
    learned = config.model_type == PERCEIVER and any(name.endswith("Learned") for name in config.architectures or ())
    if not of(config.model_type).one_size and not learned:
        return None
    given = of_images(config).image_size
    height, width = given if isinstance(given, list | tuple) else (given, given)
    return height, width


def takes_size(config: Any, size: tuple[int, int]) -> bool:
    """Whether a model takes images of this height and width."""
    wanted = fixed_size(config)
    return wanted in (None, size) or (config.model_type == timm_models.FAMILY and timm_models.takes(config, size))


def takes_pixels(config: Any) -> bool:
    """Whether a model takes images as grids of pixels, all of one size."""
    return of(config.model_type).inputs == (PIXELS,)


def channels(config: Any) -> int:
    """Of a model's images: 3 of colours, 1 of grey."""
    if config.model_type == timm_models.FAMILY:
        return timm_models.channels(config)
    return int(getattr(of_images(config), "num_channels", 3))


def mode(config: Any) -> Literal["RGB", "L"]:
    """PIL's name of a model's images."""
    return "L" if channels(config) == 1 else "RGB"


def has_tied_head(inner: Any) -> bool:
    """Whether the layer that makes logits of tokens is the embedding; config.json says so of T5 1.1 too, where it is not."""
    head = inner.get_output_embeddings()
    return head is not None and head.weight is inner.get_input_embeddings().weight


def uncalled(inner: Any) -> set[str]:
    """Names of layers that an adapter could stand beside and would not be asked."""
    return timm_models.uncalled(inner) if inner.config.model_type == timm_models.FAMILY else set()


def lookups(inner: Any) -> list[nn.Module]:
    """What is looked up by number: the embedding, and learned positions."""
    return [module for module in inner.modules() if isinstance(module, nn.Embedding)]


def takes_mean(inner: Any) -> bool:
    """Whether the class of a row is told from the mean of its tokens, and not from one of them."""
    pooling = getattr(inner.config, "classifier_pooling", None)
    return pooling == "mean" and type(inner).__name__.endswith("ForSequenceClassification")


def first_position(config: Any) -> int:
    """Number of a row's first position."""
    return int(config.pad_token_id) + 1 if of(config.model_type).padded_positions else 0
