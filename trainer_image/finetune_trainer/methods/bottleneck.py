"""Bottleneck adapters: x + up(f(down(x))) behind the sublayers of each block, before their residual is added (Houlsby et al. 2019).

They are children of the modules behind which they stand, so every weight of the model keeps its name, and they are saved by theirs. `up`
begins as zero: at first the model computes what it computed before.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError
from ..modelling import anatomy
from ..modelling.anatomy import blocks
from ..modelling.models import Model
from .method import Base, Format, Method, hub_name

CONFIG = "bottleneck_config.json"
WEIGHTS = "bottleneck_model.safetensors"


class Bottleneck(nn.Module):
    """One adapter: 2 d m + d + m weights, for the model's width d and the bottleneck's m."""

    def __init__(self, width: int, narrow: int, non_linearity: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(width, narrow, dtype=dtype)
        self.up = nn.Linear(narrow, width, dtype=dtype)
        self.bend = getattr(functional, non_linearity)
        self.is_on = True
        nn.init.normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) to the same."""
        if not self.is_on:
            return hidden
        changed: Tensor = hidden + self.up(self.bend(self.down(hidden)))
        return changed


class BottleneckMethod(Method):
    """Houlsby's and Pfeiffer's placements."""

    format: ClassVar[Format] = "bottleneck"

    def put_on(self, base: Base) -> Model:
        """See Method."""
        adapter, inner = self.spec.method.adapter, base.inner
        assert adapter
        width: int = anatomy.of_images(inner.config).hidden_size
        narrow = width // adapter.reduction_factor
        if narrow < 1:
            raise UserError(
                f"method.adapter.reductionFactor {adapter.reduction_factor} leaves nothing of the hidden size {width}; lower it"
            )
        for parameter in inner.parameters():
            parameter.requires_grad_(False)
        for name in base.head_modules:
            inner.get_submodule(name).requires_grad_(True)
        places = {
            "houlsby": (base.anatomy.attention, base.anatomy.feed_forward),
            "pfeiffer": (base.anatomy.feed_forward,),
        }
        for block in blocks(inner):
            for name in places[adapter.placement]:
                behind = block.get_submodule(name)
                behind.adapter = Bottleneck(width, narrow, adapter.non_linearity, torch.float32)
                behind.register_forward_hook(_adapted)
        return Model(inner, inner, base.stored)

    def untouched(self, model: Model) -> AbstractContextManager[Model] | None:
        """See Method."""
        return _switched_off(model)

    def save(self, folder: Path, model: Model, weights: dict[str, Tensor]) -> None:
        """See Method."""
        from safetensors.torch import save_file

        adapter = self.spec.method.adapter
        assert adapter
        save_file(
            {name: weights[name].cpu().contiguous().clone() for name in sorted(weights)},
            folder / WEIGHTS,
            {"format": "pt"},
        )
        base, revision = hub_name(self.spec.model.uri)
        config = {
            "base_model_name_or_path": base,
            "revision": revision,
            "non_linearity": adapter.non_linearity,
            "placement": adapter.placement,
            "reduction_factor": adapter.reduction_factor,
            "width": anatomy.of_images(model.inner.config).hidden_size,
        }
        (folder / CONFIG).write_text(json.dumps(config, sort_keys=True, indent=1) + "\n")

    def how_to_load(self, model_type: str, kind: str, base: str, names: str) -> str:
        """See Method."""
        adapter = self.spec.method.adapter
        assert adapter
        return f'''\
import safetensors.torch, torch

def adapted(module, inputs, output):
    first, *rest = output if isinstance(output, tuple) else (output,)
    bent = torch.nn.functional.{adapter.non_linearity}(module.adapter["down"](first))
    first = first + module.adapter["up"](bent)
    return (first, *rest) if rest else first

model = transformers.{kind}.from_pretrained("{base}"{names})
weights = safetensors.torch.load_file("this folder/{WEIGHTS}")
for name in sorted({{name.split(".adapter.")[0] for name in weights if ".adapter." in name}}):
    narrow, width = weights[name + ".adapter.down.weight"].shape
    layer = model.get_submodule(name)
    two = {{"down": torch.nn.Linear(width, narrow), "up": torch.nn.Linear(narrow, width)}}
    layer.adapter = torch.nn.ModuleDict(two).to(model.dtype)
    layer.register_forward_hook(adapted)
assert not model.load_state_dict(weights, strict=False).unexpected_keys'''


@contextmanager
def _switched_off(model: Model) -> Iterator[Model]:
    adapters = [module for module in model.inner.modules() if isinstance(module, Bottleneck)]
    for adapter in adapters:
        adapter.is_on = False
    try:
        yield model
    finally:
        for adapter in adapters:
            adapter.is_on = True


def _adapted(module: nn.Module, _: Any, output: Any) -> Any:
    """Forward hook: what the module computes goes through its adapter."""
    adapter = module.adapter
    assert isinstance(adapter, Bottleneck)
    if isinstance(output, tuple):
        return (adapter(output[0]), *output[1:])
    return adapter(output)
