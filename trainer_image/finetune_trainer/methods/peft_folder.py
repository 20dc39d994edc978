"""peft's adapters: switching one off, and writing it in PEFT format, the same bytes each time. Called by the methods that use them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune_crds.resolved import ResolvedFineTune

from ..modelling.models import Model
from .method import hub_name


@contextmanager
def switched_off(model: Model) -> Iterator[Model]:
    """The model without its adapter, for a while; what peft trains beside it is as it was too. The gradients' way through the adapter is
    open again afterwards, so this must end before the forward pass that is learned from."""
    tuner = model.outer.base_model
    tuner.disable_adapter_layers()
    try:
        yield model
    finally:
        tuner.enable_adapter_layers()


def save_adapter(
    folder: Path, spec: ResolvedFineTune, model: Model, weights: dict[str, Tensor], config: dict[str, Any]
) -> None:
    """Writes a PEFT folder, the same bytes each time.

    Args:
        folder: where to.
        spec: names the model.
        model: holds the adapter.
        weights: its weights by name, in fp32.
        config: of the adapter.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(
        model.outer,
        state_dict={name: tensor.cpu() for name, tensor in weights.items()},
        save_embedding_layers=False,  # "auto" would ask the hub whether the vocabulary has grown
    )
    write_adapter(folder, spec, state, config)


def write_adapter(folder: Path, spec: ResolvedFineTune, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Writes adapter_model.safetensors and adapter_config.json."""
    from safetensors.torch import save_file

    save_file(
        {name: state[name].contiguous().clone() for name in sorted(state)},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    base, revision = hub_name(spec.model.uri)
    complete = {**config, "base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(_plain(complete), sort_keys=True, indent=1) + "\n")


def _plain(value: Any) -> Any:
    """Sets sorted: their order differs from process to process."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(one) for one in value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
