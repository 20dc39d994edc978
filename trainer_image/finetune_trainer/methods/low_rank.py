"""LoRA and QLoRA: peft's adapters beside frozen weights.

PiSSA and OLoRA begin with a part of the weights in the adapter and only the rest frozen. What is published is nevertheless an adapter
for the untouched model: W - s B0 A0 + s B A = W + s [B, -B0] [A; A0], a plain LoRA of twice the rank.
"""

import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from finetune_crds.resolved import ResolvedFineTune, ResolvedLowRank

from ..errors import UserError
from ..modelling import anatomy
from ..modelling.masters import Group
from ..modelling.models import Model
from . import quantized
from .layers import ALL_LINEAR, EXPERTS, Layers, experts, linear_below
from .method import Base, Format, Method
from .peft_folder import save_adapter, switched_off

_INITIALIZATIONS: dict[str | None, Any] = {None: True, "zero": True, "pissa": "pissa_niter_16", "olora": "olora"}
"""peft's init_lora_weights. PiSSA by randomised SVD, which takes seconds where the exact one takes hours on a large model."""


class LowRankMethod(Method):
    """LoRA, beside weights as they are (lora) or quantised (qlora)."""

    format: ClassVar[Format] = "peft"

    def __init__(self, spec: ResolvedFineTune) -> None:
        super().__init__(spec)
        chosen = spec.method.lora or spec.method.qlora
        assert chosen
        self.lora: ResolvedLowRank = chosen
        self._field = f"method.{spec.method.name}"
        self._begun: dict[str, Tensor] = {}
        """A0 and B0 by the names of the adapter's weights, on the CPU; empty unless they are to be taken off again."""

    def quantization(self, model_type: str) -> Any:
        """See Method."""
        qlora = self.spec.method.qlora
        if qlora is None:
            return None
        from transformers import BitsAndBytesConfig

        from ..modelling.models import compute_type

        kept = {"llm_int8_skip_modules": anatomy.heads(model_type)}
        if qlora.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, **kept)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=qlora.double_quantization,
            bnb_4bit_compute_dtype=compute_type(self.spec),
            **kept,
        )

    def put_on(self, base: Base) -> Model:
        """See Method."""
        if self.spec.method.qlora:
            quantized.settle(base.inner)
        outer = self._continued(base, base.adapter) if base.adapter else self._fresh(base)
        return Model(outer, base.inner, base.stored, reload=base.reload)

    def untouched(self, model: Model) -> AbstractContextManager[Model] | None:
        """See Method. An adapter that was continued, or holds a part of the weights, is not nothing at the beginning."""
        begins_as_nothing = self.spec.model.adapter is None and not self._begun
        return switched_off(model) if begins_as_nothing else None

    def groups(self, model: Model, names: Sequence[str], steps_per_epoch: int, total_steps: int) -> list[Group]:
        """LoRA+ gives the B matrices, and DoRA's vectors, a rate of their own."""
        ratio = float(self.lora.lora_plus_ratio)
        if ratio == 1:
            return [Group(tuple(names))]
        shapes = {name: parameter.ndim for name, parameter in model.outer.named_parameters()}
        fast = [name for name in names if "lora_B" in name or ("lora_" in name and shapes[name] < 2)]
        return [Group(tuple(name for name in names if name not in fast)), Group(tuple(fast), ratio)]

    @property
    def beginning(self) -> str:
        """See Method. The factors of PiSSA and OLoRA are computed, and processors differ in their signs."""
        digest = hashlib.sha256()
        for tensor in self._begun.values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path, model: Model, weights: dict[str, Tensor]) -> None:
        """See Method."""
        config = model.outer.peft_config["default"].to_dict()
        if self._begun:
            weights = {name: self._without_beginning(name, tensor, config) for name, tensor in weights.items()}
            config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"], "init_lora_weights": True}
            for pattern in ("rank_pattern", "alpha_pattern"):
                config[pattern] = {name: 2 * number for name, number in config[pattern].items()}
        save_adapter(folder, self.spec, model, weights, config)

    def servable_by(self, model: Model) -> list[str]:
        """vLLM takes plain LoRA of one rank and scale, without DoRA and without layers trained in full, and text models."""
        config = model.outer.peft_config["default"]
        own_scales = config.rank_pattern or config.alpha_pattern
        beside_layers = config.modules_to_save or config.target_parameters or config.trainable_token_indices
        plain = not (config.use_dora or beside_layers or own_scales or config.bias != "none")
        return ["vllm"] if plain and self.spec.head == "text-generation" else []

    def summary(self, model: Model) -> str:
        """See Method. `all-linear` does not reach experts, which may be nearly all of a model."""
        config = model.outer.peft_config["default"]
        adapted = sorted({name for name, module in model.inner.named_modules() if hasattr(module, "lora_A")})
        kinds = sorted({name.removesuffix(".base_layer").rsplit(".", 1)[-1] for name in adapted} - {"experts"})
        beside = sum(not name.removesuffix(".base_layer").endswith(".experts") for name in adapted)
        told = f"The adapter stands beside {beside} layers ({', '.join(kinds)})"
        mixture = experts(model.inner)
        if mixture:
            whole = sum(one.numel() for name, one in model.inner.named_parameters() if "lora_" not in name)
            share = sum(one.numel() for one in mixture.values()) / whole
            if config.target_parameters:
                told += f" and the experts, which hold {share:.0%} of the model's weights; the routers are frozen"
            else:
                told += f". Experts and routers are frozen; the experts hold {share:.0%} of the model's weights (method.lora.experts adapts them)"
        return told + "."

    def how_to_load(self, model_type: str, kind: str, base: str, names: str) -> str:
        """See Method. An adapter of QLoRA belongs to the weights as they were quantised."""
        qlora = self.spec.method.qlora
        if qlora is None:
            return super().how_to_load(model_type, kind, base, names)
        compute = "bfloat16" if self.spec.training.precision == "bf16" else "float32"
        options = {
            8: "load_in_8bit=True",
            4: f"""load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant={qlora.double_quantization}, bnb_4bit_compute_dtype="{compute}\"""",
        }[qlora.bits]
        options += f",\n    llm_int8_skip_modules={anatomy.heads(model_type)}"
        return (
            f"quantization = transformers.BitsAndBytesConfig({options})\n"
            f'base = transformers.{kind}.from_pretrained("{base}", quantization_config=quantization{names})\n'
            'model = peft.PeftModel.from_pretrained(base, "this folder")'
        )

    def _fresh(self, base: Base) -> Any:
        from peft import LoraConfig, get_peft_model

        lora, inner = self.lora, base.inner
        initialization = _INITIALIZATIONS[getattr(lora, "initialization", None)]
        layers = self._layers(base)
        targets = layers.targets(lora.targets or [ALL_LINEAR])
        adapted = layers.adapted(targets)
        saved = [*base.head_modules, *layers.saved(lora.modules_to_save or [], adapted)]
        wants_experts = bool(getattr(lora, "experts", None))
        if wants_experts and not experts(inner):
            raise UserError(f"{self._field}.experts: {self.spec.model.uri} is no mixture of experts; remove it")
        layers.check_patterns("rankPattern", lora.rank_pattern or {}, adapted)
        layers.check_patterns("alphaPattern", lora.alpha_pattern or {}, adapted)
        if initialization is not True:
            layers.check_rank(lora.rank or 0, lora.rank_pattern or {}, adapted)
        if inner.device.type == "meta":  # there are no weights that they could begin with
            initialization = True
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=float(lora.dropout),
            use_dora=bool(lora.use_dora),
            use_rslora=bool(lora.use_rslora),
            rank_pattern=lora.rank_pattern or {},
            alpha_pattern=lora.alpha_pattern or {},
            init_lora_weights=initialization,
            target_modules=targets,
            trainable_token_indices=self._rows(base, saved) or None,
            target_parameters=list(EXPERTS) if wants_experts else None,
            fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in adapted.values()),
            task_type=base.peft_task,
            modules_to_save=saved or None,
            exclude_modules=linear_below(inner, base.head_modules) or None,
        )
        outer = get_peft_model(inner, config)
        if initialization is not True:
            self._begun = {
                name: parameter.detach().float().cpu().clone()
                for name, parameter in outer.named_parameters()
                if "lora_A" in name or "lora_B" in name
            }
        return outer

    @staticmethod
    def _rows(base: Base, saved: Sequence[str]) -> dict[str, list[int]]:
        """Of embedding and head, unless they are one or trained in full, the rows of added tokens."""
        inner, ids = base.inner, list(base.added)
        if not ids:
            return {}
        tied = anatomy.has_tied_head(inner)
        parts = [inner.get_input_embeddings(), None if tied else inner.get_output_embeddings()]
        return {
            name: ids
            for name, module in inner.named_modules()
            if name not in saved and any(module is one for one in parts)
        }

    def _continued(self, base: Base, adapter: Path) -> Any:
        from peft import PeftModel

        assert self.spec.model.adapter
        uri = self.spec.model.adapter.uri
        given = load_adapter_config(self.spec, adapter)
        task_type = base.peft_task
        head = [name.rsplit(".", 1)[-1] for name in base.head_modules]
        saved = {name.rsplit(".", 1)[-1] for name in given.modules_to_save or ()}
        if given.task_type not in (None, task_type) or not saved.issuperset(head):
            raise UserError(
                f"spec.model.adapter: {uri} was not made for task {self.spec.head}; continue it with its own task, or merge it into a model first"
            )
        if given.trainable_token_indices:
            raise UserError(
                f"spec.model.adapter: {uri} brings tokens of its own (model.addTokens), which the model lacks; merge it first (output.merged)"
            )
        given.task_type = task_type
        targets = given.target_modules
        self._layers(base).targets(targets if isinstance(targets, set | list) else [ALL_LINEAR])
        given.lora_dropout = float(self.lora.dropout)
        if given.target_parameters and given.lora_dropout:
            raise UserError(f"{self._field}.dropout: {uri} adapts experts, which have none; remove it")
        try:
            return PeftModel.from_pretrained(base.inner, str(adapter), config=given, is_trainable=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(
                f"spec.model.adapter: {uri} does not fit {self.spec.model.uri}: it was made for another model"
            ) from error

    def _layers(self, base: Base) -> Layers:
        return Layers(base.inner, base.head_modules, self._field, self.spec.model.uri)

    def _without_beginning(self, name: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
        """A with A0 below it, or B with -B0 beside it. rsLoRA's scale grows with the root of the rank only, which B makes good."""
        if name not in self._begun:
            return tensor
        begun = self._begun[name].to(tensor)
        if "lora_A" in name:
            return torch.cat([tensor, begun], dim=0)
        factor = math.sqrt(0.5) if config["use_rslora"] else 1.0
        return factor * torch.cat([tensor, -begun], dim=1)


def load_adapter_config(spec: ResolvedFineTune, adapter: Path) -> Any:
    """The configuration of the adapter to continue from.

    Raises:
        UserError: it cannot be read, or is of a type that cannot be continued.
    """
    from peft import PeftConfig

    assert spec.model.adapter
    uri = spec.model.adapter.uri
    try:
        if not (adapter / "adapter_config.json").is_file():
            raise OSError("peft would look for it on the hub")
        given = PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"spec.model.adapter: {uri} is no adapter in PEFT format (adapter_config.json)") from error
    if given.peft_type != "LORA":
        raise UserError(f"spec.model.adapter: {uri} is of type {given.peft_type}; only LORA can be continued")
    return given
