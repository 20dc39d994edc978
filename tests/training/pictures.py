"""Tiny random models of images of each family, and images to train them on, whose colour is their class."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .tiny import kept

COLOURS = ("red", "green", "blue")
SIDE = 32

_VIT = {"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_SWIN = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
_TEXTS = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
_CLIP = {
    "vision_config": _VIT | {"image_size": SIDE, "initializer_range": 0.1},
    "text_config": _TEXTS | {"max_position_embeddings": 4},
}
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1]}
_PYRAMID = _STAGES | {"num_encoder_blocks": 2, "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
_LATENTS = {
    "num_latents": 8,
    "d_latents": 32,
    "num_self_attends_per_block": 2,
    "num_blocks": 2,
    "num_self_attention_heads": 2,
}
_SEEN = {"input_size": [3, SIDE, SIDE], "crop_pct": 0.9, "interpolation": "bicubic"}
"""What timm's config.json says of images."""
SHAPES: dict[str, dict[str, Any]] = {
    "beit": _VIT | {"use_relative_position_bias": True, "layer_scale_init_value": 1.0},
    "bit": _STAGES | {"embedding_size": 16, "num_groups": 4},
    "clip": _CLIP,
    "convnext": _STAGES | {"patch_size": 4, "num_stages": 2, "layer_scale_init_value": 1.0},
    "convnextv2": _STAGES | {"patch_size": 4, "num_stages": 2},
    "cvt": {
        "patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1], "embed_dim": [16, 32], "num_heads": [1, 2], "depth": [1, 2],
        "cls_token": [False, True], "drop_path_rate": [0.0, 0.1],
    },
    "data2vec-vision": _VIT | {"use_relative_position_bias": True, "layer_scale_init_value": 1.0},
    "deit": _VIT,
    "dinov2": _VIT | {"mlp_ratio": 2},
    "dinov2_with_registers": _VIT | {"mlp_ratio": 2},
    "donut-swin": _SWIN,
    "efficientnet": {
        "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128, "in_channels": [32, 16], "out_channels": [16, 24],
        "kernel_sizes": [3, 5], "strides": [1, 2], "num_block_repeats": [1, 1], "expand_ratios": [1, 6], "dropout_rate": 0.1,
    },
    "focalnet": _STAGES | {"embed_dim": 16, "focal_levels": [1, 1], "focal_windows": [3, 3]},
    "hgnet_v2": _STAGES | {
        "embedding_size": 16, "stem_channels": [3, 8, 16], "stage_in_channels": [16, 16], "stage_mid_channels": [8, 8],
        "stage_out_channels": [16, 32], "stage_num_blocks": [1, 1], "stage_numb_of_layers": [1, 1], "stage_light_block": [False, True],
        "stage_downsample": [False, True], "stage_downsample_strides": [2, 2], "stage_kernel_size": [3, 3],
    },
    "hiera": {
        "image_size": [SIDE, SIDE], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1, "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, False],
    },
    "ijepa": _VIT,
    "imagegpt": {"vocab_size": 28, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "levit": {"hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1], "key_dim": [8, 8, 8]},
    "metaclip_2": _CLIP,
    "mobilenet_v1": {"depth_multiplier": 0.125, "classifier_dropout_prob": 0.1},
    "mobilenet_v2": {"depth_multiplier": 0.125, "output_stride": 8, "classifier_dropout_prob": 0.1},
    "mobilevit": {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 128], "num_attention_heads": 1, "output_stride": 8},
    "mobilevitv2": {"width_multiplier": 0.125, "n_attn_blocks": [1, 1, 1], "output_stride": 8},
    "perceiver": _LATENTS | {"num_cross_attention_heads": 2, "architectures": ["PerceiverForImageClassificationLearned"]},
    "poolformer": _STAGES | {"num_encoder_blocks": 2, "layer_scale_init_value": 1.0},
    "pvt": _PYRAMID | {"sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]},
    "pvt_v2": _PYRAMID | {"sr_ratios": [2, 1], "patch_sizes": [7, 3]},
    "regnet": _STAGES | {"embedding_size": 16, "groups_width": 8},
    "resnet": _STAGES | {"embedding_size": 16, "layer_type": "basic"},
    "segformer": _PYRAMID | {"sr_ratios": [2, 1], "patch_sizes": [7, 3]},
    "siglip": _CLIP,
    "siglip2": {
        "vision_config": _VIT | {"num_patches": 16}, "text_config": _TEXTS | {"max_position_embeddings": 4},
    },
    "swiftformer": {"depths": [2, 1], "embed_dims": [16, 32], "layer_scale_init_value": 1.0},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "textnet": {
        "stem_out_channels": 16, "hidden_sizes": [16, 16, 32], "conv_layer_kernel_sizes": [[[3, 3]], [[3, 1]]], "conv_layer_strides": [[1], [2]],
    },
    "timm_wrapper": {
        "architecture": "vit_tiny_patch16_224", "pretrained_cfg": _SEEN,
        "model_args": {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.1},
    },
    "vit": _VIT,
    "vit_msn": _VIT,
}  # fmt: skip
TIMM: dict[str, dict[str, Any]] = {
    f"timm_wrapper {architecture}": {"architecture": architecture, "pretrained_cfg": _SEEN, "model_args": shape}
    for architecture, shape in {
        "convnext_tiny": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]},
        "resnet18": {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32], "stem_width": 8},
        "test_efficientnet": {"drop_rate": 0.1},
    }.items()
}
"""The same of other architectures of timm, each of which is built in its own way."""
PERCEIVERS: dict[str, dict[str, Any]] = {
    f"perceiver {kind}": _LATENTS
    | {"num_cross_attention_heads": 1, "architectures": [f"PerceiverForImageClassification{kind}"]}
    for kind in ("Fourier", "ConvProcessing")
}
"""The same of the other classes of Perceiver."""
FADING = (
    "efficientnet",
    "hgnet_v2",
    "levit",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilevit",
    "mobilevitv2",
    "swiftformer",
    "timm_wrapper test_efficientnet",
)
"""Families whose weights, as transformers draws them, let no difference between images through to the head."""
NO_CHECKPOINTING = (
    "bit",
    "convnext",
    "convnextv2",
    "cvt",
    "efficientnet",
    "hgnet_v2",
    "levit",
    "mobilenet_v1",
    "mobilenet_v2",
    "perceiver",
    "poolformer",
    "pvt",
    "regnet",
    "resnet",
    "textnet",
)
"""Families of which transformers keeps all activations, whatever training.gradientCheckpointing says."""
COUNTING = ("mobilevit", "mobilevitv2", "swiftformer", "timm_wrapper resnet18", "timm_wrapper test_efficientnet")
"""Families whose blocks have batch normalisation, which would count what is computed once more."""
PER_STAGE = dict.fromkeys(TIMM, 3) | {
    "levit": 2, "mobilenet_v1": 13, "mobilenet_v2": 8, "mobilevit": 3, "mobilevitv2": 3, "swiftformer": 2,
}  # fmt: skip
"""method.gradualUnfreezing.blocksPerStage for families with more blocks than the others."""


@kept
def make_model(folder: Path, family: str = "vit", *, classes: list[str] | None = None, **overrides: Any) -> Path:
    """A model with random weights of seed 20, without a head unless it has classes (or is a Perceiver), and its image processor."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    torch.manual_seed(20)
    config = AutoConfig.for_model(
        family.partition(" ")[0],
        **(
            {"image_size": side(family), "initializer_range": 0.02 if family in FADING else 0.1}
            | (SHAPES | TIMM | PERCEIVERS)[family]
            | overrides
        ),
    )
    if classes:
        config.num_labels = len(classes)
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
    kind = AutoModelForImageClassification if classes or config.model_type == "perceiver" else AutoModel
    model: Any = kind.from_config(config, dtype=torch.float32)
    if family in FADING:
        _strengthen(model, image_processor(family))
    model.save_pretrained(folder)
    image_processor(family).save_pretrained(folder)
    return folder


def _strengthen(model: Any, processor: Any) -> None:
    """Draws larger weights, and lets batch normalisation see images."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    norms = [one for one in model.modules() if isinstance(one, torch.nn.modules.batchnorm._BatchNorm)]
    usual = [one.momentum for one in norms]
    for one in norms:
        one.momentum = None
        torch.nn.init.ones_(one.weight)
    seen = [picture(name, number) for name in COLOURS for number in range(3)]
    model.train()(**processor(seen, return_tensors="pt"))
    for one, momentum in zip(norms, usual, strict=True):
        one.momentum = momentum


def side(family: str) -> int:
    """Of its images, in pixels."""
    return {"mobilenet_v1": 2 * SIDE, "imagegpt": SIDE // 4}.get(family, SIDE)


def image_processor(family: str, pixels: int | None = None) -> Any:
    """The family's own, for images with sides of so many pixels; without, for small ones."""
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    if family.startswith("timm_wrapper"):
        return transformers.TimmWrapperImageProcessor(_SEEN | {"input_size": [3, pixels or SIDE, pixels or SIDE]})
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(family.partition(" ")[0], {"torchvision": "BitImageProcessor"})
    kind = getattr(transformers, names["torchvision"])
    usual = kind()
    given: dict[str, Any] = {"do_center_crop": True} if family == "textnet" else {}
    if family == "imagegpt":
        given["clusters"] = [[red, green, blue] for red in (-1, 0, 1) for green in (-1, 0, 1) for blue in (-1, 0, 1)]
    if family == "siglip2" and not pixels:
        given |= {"patch_size": _VIT["patch_size"], "max_num_patches": 14}
    for name in ("size", "crop_size"):
        sides = getattr(usual, name, None)
        if sides:
            given[name] = {edge: pixels or side(family) for edge, found in dict(sides).items() if found}
    return kind(**given)


def inputs(family: str, side: int) -> dict[str, Any]:
    """What the family takes of two images, for sides of so many pixels."""
    if family == "siglip2":
        patches = (side // _VIT["patch_size"]) ** 2
        seen = [picture("red", 0), picture("blue", 1)]
        return dict(image_processor(family)(seen, max_num_patches=patches, return_tensors="pt"))
    if family == "imagegpt":
        return {"input_ids": torch.randint(0, 27, (2, side * side))}
    return {"pixel_values": torch.rand(2, 3, side, side)}


def picture(name: str, number: int) -> Image.Image:
    """A noisy image of no particular shape, with more of a colour."""
    channel = COLOURS.index(name)
    draw = np.random.default_rng([channel, number])
    height, width = (int(side) for side in draw.integers(30, 50, 2))
    pixels = draw.integers(0, 156, (height, width, 3))
    pixels[:, :, channel] += 100
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """The file."""
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def write_folder(folder: Path, each: int = 5) -> Path:
    """Images in folders by class."""
    for name in COLOURS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            (folder / name / f"{number}.png").write_bytes(encoded(picture(name, number)))
    return folder
