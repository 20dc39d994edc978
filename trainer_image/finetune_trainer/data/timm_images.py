"""timm's image processor, called as transformers' others are. Used by pixels.

transformers' wrapper takes neither images that are cut already nor integers in a tensor, and is written with the model alone.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LAST = 2
"""Steps that are none of size: into a tensor, and normalised."""


class TimmProcessor:
    """Makes what the wrapper makes of an image, step by step."""

    written_in = "config.json (pretrained_cfg.input_size)"
    """Where the size of its images stands."""

    def __init__(self, processor: Any) -> None:
        """Args: processor: transformers' TimmWrapperImageProcessor."""
        from timm.data.transforms import str_to_pil_interp

        self._steps = processor.val_transforms.transforms
        self._written = {
            "architecture": processor.architecture,
            "num_classes": 0,  # transformers wants to read some
            "pretrained_cfg": dict(processor.data_config),
        }
        self.resample = str_to_pil_interp(processor.data_config["interpolation"])
        """PIL's number of how it interpolates."""

    def __call__(self, image: Any, *, do_resize: bool = True, **_: Any) -> dict[str, Tensor]:
        """`pixel_values`, (1, channels, height, width), of one image.

        Args:
            image: of PIL, or integers of 0 to 255, (channels, height, width).
            do_resize: whether it is to be brought to its size.
        """
        from torchvision.transforms.functional import to_pil_image

        made = to_pil_image(image) if isinstance(image, torch.Tensor) else image
        for step in self._steps if do_resize else self._steps[-_LAST:]:
            made = step(made)
        return {"pixel_values": made[None]}

    def save_pretrained(self, folder: Path) -> None:
        """Beside an adapter. A model's own config.json says it already."""
        config = folder / "config.json"
        if not config.exists():
            config.write_text(json.dumps(self._written, indent=2) + "\n", encoding="utf-8")
