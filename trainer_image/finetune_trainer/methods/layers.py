"""Which layers of a model method.lora and method.qlora name, checked before anything is put on them. Called by low_rank and factors.

A name stands for every module whose path ends with it: `q_proj`, `layers.3.mlp.up_proj`. The experts of a mixture are no modules but two
weights of three dimensions in each block, and get an adapter only if that is asked for.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..modelling import anatomy
from . import quantized

ALL_LINEAR = "all-linear"
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
"""Ends of the names of a mixture's experts."""
LINEAR: Final = (nn.Linear, Conv1D)
"""Conv1D is GPT-2's linear layer, whose weight lies the other way round."""


def linear_below(inner: Any, modules: Sequence[str]) -> list[str]:
    """Names of the linear layers in some modules. peft goes by the ends of names, which a head shares with the blocks."""
    return [
        f"{name}.{child}".rstrip(".")
        for name in modules
        for child, layer in inner.get_submodule(name).named_modules()
        if isinstance(layer, LINEAR)
    ]


class Layers:
    """The layers of one model that can have an adapter: all linear ones but the head, which is trained in full or not at all."""

    def __init__(self, inner: Any, head: Sequence[str], field: str, uri: str) -> None:
        """Args: inner: the model; head: names of a classifier's head; field, uri: what messages call the method and the model."""
        uncalled = anatomy.uncalled(inner)
        excluded = uncalled.union(linear_below(inner, head))
        self._inner, self._field, self._uri = inner, field, uri
        self._linear: dict[str, Any] = {
            name: module
            for name, module in inner.named_modules()
            if isinstance(module, LINEAR) and name not in excluded and module is not inner.get_output_embeddings()
        }
        self._taken = {
            end
            for name, module in inner.named_modules()
            if not isinstance(module, LINEAR) or name in uncalled
            for end in _ends(name)
        }

    def targets(self, wanted: Iterable[str]) -> list[str]:
        """Names for peft, sorted.

        Raises:
            UserError: one is no layer that can have an adapter, or stands beside all-linear.
        """
        if not self._linear:
            raise UserError(
                f"{self._field}: {self._uri} has no linear layer but its head, so an adapter has nothing to stand beside; use method full, freeze or gradualUnfreezing"
            )
        names = sorted(wanted)
        ends = sorted({next(end for end in _ends(name) if end not in self._taken) for name in self._linear})
        if ALL_LINEAR in names:
            if others := set(names) - {ALL_LINEAR}:
                raise UserError(
                    f"{self._field}.targets: {ALL_LINEAR} is every layer that can have an adapter; remove {', '.join(sorted(others))}, or {ALL_LINEAR}"
                )
            return ends
        unknown = [name for name in names if not _named(self._linear, name)]
        if unknown:
            raise UserError(
                f"{self._field}.targets: {', '.join(unknown)} is no linear layer of this model that can have an adapter; it has {', '.join(ends)}"
            )
        return names

    def adapted(self, targets: Sequence[str]) -> dict[str, Any]:
        """The layers that get an adapter, by name."""
        return {name: self._linear[name] for target in targets for name in _named(self._linear, target)}

    def saved(self, wanted: Sequence[str], adapted: dict[str, Any]) -> list[str]:
        """Full names of the modules that are trained beside the adapter.

        Raises:
            UserError: one is no module, half of a tied pair, quantised, or has to do with a layer that gets an adapter.
        """
        field, inner = f"{self._field}.modulesToSave", self._inner
        modules = {name: module for name, module in inner.named_modules() if name}
        chosen: list[str] = []
        for name in wanted:
            found = _named(modules, name)
            if not any(True for one in found for _ in modules[one].parameters()):
                raise UserError(f"{field}: {name} is no module of this model with weights")
            chosen += found
        for name in chosen:
            module = modules[name]
            if anatomy.has_tied_head(inner) and module in (
                inner.get_input_embeddings(),
                inner.get_output_embeddings(),
            ):
                raise UserError(
                    f"{field}: the head of {self._uri} is its embedding (tie_word_embeddings), and an adapter would hold two that drift apart; remove {name}, or use method.freeze with trainModules"
                )
            other = self._shared(module)
            if other:
                raise UserError(
                    f"{field}: the weights of {name} are those of {other} too, and an adapter would hold two that drift apart; remove {name}, or use method.freeze with trainModules"
                )
            if any(f"{layer}.".startswith(f"{name}.") or f"{name}.".startswith(f"{layer}.") for layer in adapted):
                raise UserError(f"{field}: {name} also gets an adapter; name the other layers in {self._field}.targets")
            if any(quantized.is_quantized(part) for part in module.modules()):
                raise UserError(f"{field}: {name} is quantised and cannot be trained; remove it, or use method.lora")
        return chosen

    def _shared(self, module: nn.Module) -> str | None:
        """A module outside of this one that has a weight of it."""
        own, inside = {id(parameter) for parameter in module.parameters()}, set(module.modules())
        return next(
            (
                name
                for name, other in self._inner.named_modules()
                if other not in inside and any(id(one) in own for one in other.parameters(recurse=False))
            ),
            None,
        )

    def check_patterns(self, field: str, patterns: dict[str, int], adapted: dict[str, Any]) -> None:
        """Each pattern is for some layer, and no layer has two: which of them counts would depend on their order.

        Raises:
            UserError: with the pattern.
        """
        whose: dict[str, str] = {}
        for pattern in patterns:
            try:
                found = [name for name in adapted if re.match(rf"(.*\.)?({pattern})$", name)]  # as peft does
            except re.error as error:
                raise UserError(f"{self._field}.{field}: {pattern!r} is no regular expression") from error
            if not found:
                raise UserError(f"{self._field}.{field}: {pattern!r} is the name of no layer with an adapter")
            for name in found:
                other = whose.setdefault(name, pattern)
                if other != pattern:
                    raise UserError(f"{self._field}.{field}: {name} fits {other!r} and {pattern!r}; only one may")

    def check_rank(self, rank: int, patterns: dict[str, int], adapted: dict[str, Any]) -> None:
        """No rank exceeds its layer's smaller side: PiSSA and OLoRA take parts of the weights, and there are no more.

        Raises:
            UserError: with the layer.
        """
        for name, layer in adapted.items():
            own = next((r for pattern, r in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), rank)
            most = min(layer.weight.shape)
            if own > most:
                raise UserError(
                    f"{self._field}.rank: {own} exceeds the {most} components of {name}, and PiSSA and OLoRA begin with as many; lower it, also by rankPattern"
                )


def experts(inner: Any) -> dict[str, nn.Parameter]:
    """(experts, out, in): the weights of a mixture's experts, by name; none of a dense model."""
    plain = ((name.replace(".base_layer", ""), one) for name, one in inner.named_parameters())
    return {name: one for name, one in plain if name.endswith(EXPERTS) and one.ndim == 3}


def _ends(name: str) -> Iterator[str]:
    """Ends of a module's path, the shortest first."""
    parts = name.split(".")
    return (".".join(parts[at:]) for at in reversed(range(len(parts))))


def _named(modules: dict[str, Any], wanted: str) -> list[str]:
    return [name for name in modules if f".{name}".endswith(f".{wanted}")]
