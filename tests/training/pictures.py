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

SHAPES: dict[str, dict[str, Any]] = {
    "vit": {"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "deit": {"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "swin": {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    "convnext": {"patch_size": 4, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_scale_init_value": 1.0},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
}  # fmt: skip


@kept
def make_model(folder: Path, family: str = "vit", *, classes: list[str] | None = None, **overrides: Any) -> Path:
    """A model with random weights of seed 20, without a head unless it has classes, and its image processor."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageClassification,
        ConvNextImageProcessor,
        ViTImageProcessor,
    )

    torch.manual_seed(20)
    own = {} if family == "resnet" else {"image_size": SIDE}
    config = AutoConfig.for_model(family, **(own | SHAPES[family] | {"initializer_range": 0.1} | overrides))
    if classes:
        config.num_labels = len(classes)
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
    kind = AutoModelForImageClassification if classes else AutoModel
    kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    if family in ("convnext", "resnet"):
        ConvNextImageProcessor(size={"shortest_edge": SIDE}).save_pretrained(folder)
    else:
        ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


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
        (folder / name).mkdir(parents=True)
        for number in range(each):
            (folder / name / f"{number}.png").write_bytes(encoded(picture(name, number)))
    return folder
