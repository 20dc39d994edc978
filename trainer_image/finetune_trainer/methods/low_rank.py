"""LoRA and QLoRA: peft's adapters beside frozen weights.

PiSSA and OLoRA begin with a part of the weights in the adapter and only the rest frozen. What is published is nevertheless an adapter
for the untouched model: W - s B0 A0 + s B A = W + s [B, -B0] [A; A0], a plain LoRA of twice the rank.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune_crds.resolution import ResolvedFineTune, ResolvedLowRank

from ..errors import UserError
from ..modelling import anatomy
from ..modelling.masters import Group
from ..modelling.models import Model
from . import quantized
from .method import Base, Format, Method
from .peft_folder import save_adapter

ALL_LINEAR = "all-linear"
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

        kept = {"llm_int8_skip_modules": _not_quantized(model_type)}
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

    def groups(self, model: Model, names: Sequence[str], steps_per_epoch: int, total_steps: int) -> list[Group]:
        """LoRA+ gives the B matrices, and vectors, a rate of their own."""
        ratio = float(self.lora.lora_plus_ratio)
        if ratio == 1:
            return [Group(tuple(names))]
        shapes = {name: parameter.ndim for name, parameter in model.outer.named_parameters()}
        fast = [name for name in names if "lora_B" in name or shapes[name] < 2]
        return [Group(tuple(name for name in names if name not in fast)), Group(tuple(fast), ratio)]

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
        plain = not (config.use_dora or config.modules_to_save or own_scales or config.bias != "none")
        return ["vllm"] if plain and self.spec.task == "text-generation" else []

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
        options += f",\n    llm_int8_skip_modules={_not_quantized(model_type)}"
        return (
            f"quantization = transformers.BitsAndBytesConfig({options})\n"
            f'base = transformers.{kind}.from_pretrained("{base}", quantization_config=quantization{names})\n'
            'model = peft.PeftModel.from_pretrained(base, "this folder")'
        )

    def _fresh(self, base: Base) -> Any:
        from peft import LoraConfig, get_peft_model

        lora, inner = self.lora, base.inner
        initialization = _INITIALIZATIONS[getattr(lora, "initialization", None)]
        targets = self._targets(inner, lora.targets or [ALL_LINEAR])
        saved = [*base.head_modules, *self._modules_to_save(inner, targets)]
        for field, patterns in (("rankPattern", lora.rank_pattern), ("alphaPattern", lora.alpha_pattern)):
            for pattern in patterns or ():
                self._check_pattern(inner, targets, field, pattern)
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
            task_type="SEQ_CLS" if base.is_classifier else "CAUSAL_LM",
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

    def _continued(self, base: Base, adapter: Path) -> Any:
        from peft import PeftModel

        given = load_adapter_config(self.spec, adapter)
        self._targets(
            base.inner, given.target_modules if isinstance(given.target_modules, set | list) else [ALL_LINEAR]
        )
        given.lora_dropout = float(self.lora.dropout)
        try:
            return PeftModel.from_pretrained(base.inner, str(adapter), config=given, is_trainable=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            assert self.spec.model.adapter
            raise UserError(
                f"spec.model.adapter: {self.spec.model.adapter.uri} does not fit {self.spec.model.uri}: it was made for another model"
            ) from error

    def _targets(self, inner: Any, wanted: Sequence[str] | set[str]) -> list[str]:
        """Names of the modules that get an adapter, sorted. The head never does: it is trained in full or not at all."""
        linear = _linear(inner, self._head(inner))
        if ALL_LINEAR in wanted:
            return sorted(linear)
        unknown = sorted(name for name in wanted if name.rsplit(".", 1)[-1] not in linear)
        if unknown:
            raise UserError(
                f"{self._field}.targets: {', '.join(unknown)} is no linear layer of this model that can have an adapter; it has {', '.join(sorted(linear))}"
            )
        return sorted(wanted)

    def _head(self, inner: Any) -> Sequence[str]:
        return anatomy.of(inner.config.model_type).classifier if self.spec.task == "text-classification" else ()

    def _modules_to_save(self, inner: Any, targets: Sequence[str]) -> list[str]:
        """Checked: each names a module, which is no target, and not half of a tied pair."""
        wanted = list(self.lora.modules_to_save or ())
        names = {name.rsplit(".", 1)[-1] for name, _ in inner.named_modules() if name}
        unknown = [name for name in wanted if name.rsplit(".", 1)[-1] not in names]
        if unknown:
            raise UserError(f"{self._field}.modulesToSave: {', '.join(unknown)} is no module of this model")
        tied = {"embed_tokens", "lm_head"} & set(wanted)
        if tied and inner.config.tie_word_embeddings:
            raise UserError(
                f"{self._field}.modulesToSave: the head of {self.spec.model.uri} is its embedding (tie_word_embeddings), and an adapter would hold two that drift apart; remove {', '.join(sorted(tied))}, or use method.freeze with trainModules"
            )
        both = sorted(set(wanted) & set(targets))
        if both:
            raise UserError(
                f"{self._field}.modulesToSave: {', '.join(both)} also gets an adapter; name the other layers in {self._field}.targets"
            )
        return wanted

    def _check_pattern(self, inner: Any, targets: Sequence[str], field: str, pattern: str) -> None:
        names = [
            name for name, _ in inner.named_modules() if any(f".{name}".endswith(f".{target}") for target in targets)
        ]
        try:
            matched = any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)  # as peft does
        except re.error as error:
            raise UserError(f"{self._field}.{field}: {pattern!r} is no regular expression") from error
        if not matched:
            raise UserError(f"{self._field}.{field}: {pattern!r} is the name of no layer with an adapter")

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


def _not_quantized(model_type: str) -> list[str]:
    """Heads: they are trained in full, or make the logits."""
    return [*anatomy.of(model_type).classifier, "lm_head"]


def linear_below(inner: Any, modules: Sequence[str]) -> list[str]:
    """Names of the linear layers in some modules. peft goes by the ends of names, which a head shares with the blocks."""
    return [
        f"{name}.{child}".rstrip(".")
        for name in modules
        for child, layer in inner.get_submodule(name).named_modules()
        if isinstance(layer, nn.Linear)
    ]


def _linear(inner: Any, head: Sequence[str]) -> set[str]:
    """Ends of the names of the linear layers that can have an adapter: all but the head's."""
    excluded = set(linear_below(inner, head))
    return {
        name.rsplit(".", 1)[-1]
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear) and name not in excluded and module is not inner.get_output_embeddings()
    }
