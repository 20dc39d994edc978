"""An adapter merged into the model it was trained on, in fp32, layer by layer. Called by publish.

Of a quantised model that is the dequantised one: into the weights as they were before, the adapter would not fit.
"""

import warnings
from pathlib import Path
from typing import Any

import torch

from ..modelling.models import Model
from . import quantized


def merge(model: Model, adapter: Path) -> Any:
    """The merged transformers model, on the CPU, in the type that the model is stored in; one layer at a time is there in fp32.

    Args:
        model: as it was trained; gives the quantised weights.
        adapter: its adapter as it is published.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from transformers.pytorch_utils import Conv1D

    assert model.reload
    base = model.reload()
    with warnings.catch_warnings():
        # Quantised, GPT-2's layers lie as others do; peft turns the update of what is read here, and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        outer: Any = PeftModel.from_pretrained(base, str(adapter))
    layers = dict(outer.base_model.model.named_modules())
    trained = {
        name.removesuffix(".base_layer"): module
        for name, module in model.inner.named_modules()
        if quantized.is_quantized(module)
    }
    with torch.no_grad():
        for name, layer in layers.items():
            is_adapted = isinstance(layer, BaseTunerLayer)
            if not is_adapted and name not in trained:
                continue
            plain = layer.get_base_layer() if is_adapted else layer
            parameter = getattr(plain, getattr(layer, "parameter_name", "weight"))  # of experts, one of their two
            weight = parameter.data
            if name in trained:
                found = quantized.dequantized(trained[name])
                weight = found.T.contiguous() if isinstance(plain, Conv1D) else found
            parameter.data = weight.to("cpu", torch.float32)
            if is_adapted:
                layer.merge()
            parameter.data = parameter.data.to(model.dtype)
    for name, module in layers.items():
        if isinstance(
            module, ModulesToSaveWrapper
        ):  # peft puts back layers that are linear, and a head need not be one
            parent, _, child = name.rpartition(".")
            setattr(layers[parent], child, module.modules_to_save["default"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        # Of T5 1.1, whose config says so although they never were.
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        return outer.merge_and_unload()
