"""IA3: trained factors on what keys, values and the feed-forward network compute (Liu et al. 2022)."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..modelling.models import Model
from .layers import linear_below
from .method import Base, Format, Method
from .peft_folder import save_adapter, switched_off


class Ia3Method(Method):
    """peft's IA3."""

    format: ClassVar[Format] = "peft"

    def put_on(self, base: Base) -> Model:
        """See Method. The layers are those that peft chooses, and the paper's for families that it has no choice for."""
        from peft import IA3Config, get_peft_model
        from peft.utils.constants import (
            TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
            TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
        )

        family: str = base.inner.config.model_type
        assert base.anatomy.factors
        multiplied, inputs = (list(names) for names in base.anatomy.factors)
        config = IA3Config(
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.inner.modules()),
            target_modules=TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(family, multiplied),
            feedforward_modules=TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(family, inputs),
            task_type=base.peft_task,
            modules_to_save=base.head_modules or None,
            exclude_modules=linear_below(base.inner, base.head_modules) or None,
        )
        outer: Any = get_peft_model(base.inner, config)
        return Model(outer, base.inner, base.stored, reload=base.reload)

    def untouched(self, model: Model) -> AbstractContextManager[Model] | None:
        """See Method."""
        return switched_off(model)

    def save(self, folder: Path, model: Model, weights: dict[str, Tensor]) -> None:
        """See Method."""
        save_adapter(folder, self.spec, model, weights, model.outer.peft_config["default"].to_dict())
