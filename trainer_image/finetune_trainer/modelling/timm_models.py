"""What timm says of its models, which transformers wraps as the family timm_wrapper. Called by anatomy and models.

The family is some thousand architectures, and each calls its parts as it likes: where head and blocks are is asked of timm, not listed here.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from ..errors import UserError

FAMILY: Final = "timm_wrapper"
_INSIDE: Final = "timm_model"
"""Where the wrapper holds timm's model."""
_CLASSES: Final = "num_classes"
"""Of model_args."""


def refusal(config: Any) -> str | None:
    """Why the architecture cannot be trained, as a sentence for the user, or None if it can."""
    import timm

    if not timm.is_model(config.architecture):
        return f"timm {timm.__version__} knows no architecture {config.architecture!r}; correct architecture in its config.json, or name another model"
    try:
        model = _hollow(config)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        return f"timm makes no {config.architecture!r} with the model_args of its config.json ({error}); correct them"
    inside = {f"{_INSIDE}.{name}" for name, _ in model.named_modules()}
    if not head(config) or not inside.issuperset(head(config)):
        return f"{config.architecture!r} of timm is an encoder that no head can be put on; name another model"
    return None


def head(config: Any) -> tuple[str, ...]:
    """Names of the layers that tell classes, from the transformers model: of models that learned from a teacher there are two, whose mean counts."""
    names = getattr(_defaults(config), "classifier", None) or ()
    return tuple(f"{_INSIDE}.{name}" for name in ((names,) if isinstance(names, str) else names))


def fixed_size(config: Any) -> tuple[int, int] | None:
    """Height and width that images must have, where the model does not take any."""
    defaults, given = _defaults(config), config.model_args or {}
    if not getattr(defaults, "fixed_input_size", False) or given.get("dynamic_img_size"):
        return None
    size = given.get("img_size", defaults.input_size[1:])
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def channels(config: Any) -> int:
    """Of its images."""
    return int((config.model_args or {}).get("in_chans", 3))


def has_classes(config: Any) -> bool:
    """Whether a config.json of timm's own, which names no class of transformers, is of a model with a head."""
    return config.model_type == FAMILY and not config.architectures and config.num_labels > 0


def says_classes_twice(config: Any) -> bool:
    """Whether model_args has the number of classes too, as timm writes it now, and transformers passes it on beside its own."""
    return config.model_type == FAMILY and _CLASSES in (config.model_args or {})


def name_classes(config: Any, classes: Sequence[str]) -> None:
    """Puts names in place of all that timm says of a model's classes: transformers would read it before its own."""
    config.label_names = list(classes)
    if config.model_args:
        config.model_args = {name: value for name, value in config.model_args.items() if name != _CLASSES}
    if hasattr(config, "label_descriptions"):
        del config.label_descriptions


def blocks(inner: Any) -> nn.ModuleList:
    """Lists of weights, lowest first: stages, or the layers of a model without, as timm divides models for learning rates that fall with depth.

    Raises:
        UserError: timm does not divide this architecture.
    """
    from timm.models import group_parameters
    from timm.models._manipulate import MATCH_PREV_GROUP

    model = getattr(inner, _INSIDE)
    try:
        matcher = model.group_matcher(coarse=True)
    except (AttributeError, AssertionError) as error:  # it has none, or none of stages
        raise UserError(
            f"spec.model: timm does not say what the blocks of {inner.config.architecture!r} are; use method full without layerDecay, lora, or freeze with trainModules"
        ) from error
    if isinstance(matcher, dict):  # what lies between the last block and the head is no part of a block
        matcher = {
            part: rules if isinstance(rules, str) else [rule for rule in rules if rule[1] != MATCH_PREV_GROUP]
            for part, rules in matcher.items()
        }
    weights = dict(model.named_parameters())
    _, *between, _ = group_parameters(model, matcher).values()  # below them, and above
    return nn.ModuleList(nn.ParameterList(weights[name] for name in names) for names in between)


def uncalled(inner: Any) -> set[str]:
    """Names of linear layers whose weights are used without calling them, as EVA-02 does: an adapter beside one would do nothing."""
    config = inner.config
    model = _hollow(config)
    size = fixed_size(config) or _defaults(config).input_size[1:]
    never = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in list(never):
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: never.discard(name))
    with torch.no_grad():
        model.eval()(torch.zeros(1, channels(config), *size, device="meta"))
    return {f"{_INSIDE}.{name}" for name in never}


def _hollow(config: Any) -> nn.Module:
    """timm's model without weights, with a head of one class."""
    import timm

    given = {name: value for name, value in (config.model_args or {}).items() if name != _CLASSES}
    with torch.device("meta"):
        model: nn.Module = timm.create_model(config.architecture, num_classes=1, **given)
    return model


def _defaults(config: Any) -> Any:
    """What timm has registered for the architecture."""
    from timm.models import get_pretrained_cfg

    return get_pretrained_cfg(config.architecture)
