"""What timm says of its models, which transformers wraps as the family timm_wrapper. Called by anatomy and models.

The family is some thousand architectures, and each calls its parts as it likes: where head and blocks are is asked of timm, not listed here.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from ..errors import UserError

FAMILY: Final = "timm_wrapper"
_INSIDE: Final = "timm_model"
"""Where the wrapper holds timm's model."""
_CLASSES: Final = "num_classes"
"""Of model_args."""
_NO_SHAPE: Final = frozenset(
    {
        # of timm's create_model and build_model_with_cfg
        "cache_dir", "checkpoint_path", "exportable", "feature_cfg", "kwargs_filter", "model_cfg", "model_cls", "model_name", "no_jit", "pretrained",
        "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_filter_fn", "pretrained_model_args", "pretrained_strict", "scriptable", "variant",
        # what they look for besides
        "cfg", "device", "dtype", "feature_cls", "features_only", "out_indices", "out_map", "pruned",
        # of a pretrained_cfg: where weights are read from
        "file", "hf_hub_filename", "hf_hub_id", "source", "state_dict", "url",
    }
)  # fmt: skip
"""What model_args may not have: it fetches or opens something, or makes something else than a classifier of a shape."""


def refusal(config: Any) -> str | None:
    """Why the architecture cannot be trained, as a sentence for the user, or None if it can."""
    import timm

    strange = _strange(config.model_args)
    if strange:
        return f"model_args in its config.json has {', '.join(strange)}, which says nothing of the architecture's shape; remove it there: weights are read from the model's own folder only"
    if not timm.is_model(config.architecture):
        return f"timm {timm.__version__} knows no architecture {config.architecture!r}; correct architecture in its config.json, or name another model"
    try:
        of_images = channels(config)
        heads = head(config)
        model = _hollow(config)
        slow = any(isinstance(one, nn.RNNBase) for one in model.modules())  # on meta a minute: step by step
        one_of_each_class = slow or not heads or _logits(config, model=model).shape == (1, 1)
    except Exception as error:  # timm checks little of what it is given
        return f"timm makes no {config.architecture!r} with the model_args of its config.json ({type(error).__name__}); correct them"
    if of_images not in (1, 3):
        return f"takes images of {of_images} channels, and there are only those of 3, and grey ones of 1; correct in_chans in model_args of its config.json, or name another model"
    if not heads:
        return f"{config.architecture!r} of timm is an encoder that no head can be put on; name another model"
    if not one_of_each_class:
        return f"{config.architecture!r} of timm does not give one number for each class with the model_args of its config.json (global_pool); correct them"
    return None


def head(config: Any) -> tuple[str, ...]:
    """Names of the layers that tell classes, from the transformers model: of models that learned from a teacher there are two, whose mean counts."""
    return _registered(config)[0]


def fixed_size(config: Any) -> tuple[int, int] | None:
    """Height and width that images should have, where timm does not say that the model takes any."""
    defaults, given = _defaults(config), config.model_args or {}
    if not defaults.get("fixed_input_size") or given.get("dynamic_img_size"):
        return None
    size = given.get("img_size") or defaults["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def takes(config: Any, size: tuple[int, int]) -> bool:
    """Whether the model takes images of this height and width: several do of which timm says that they take one size only."""
    try:
        _logits(config, size)
    except Exception:  # of what kind is up to the architecture
        return False
    return True


def channels(config: Any) -> int:
    """Of its images."""
    return int((config.model_args or {}).get("in_chans") or 3)


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
    never = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in list(never):
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: never.discard(name))
    _logits(config, model=model)
    return {f"{_INSIDE}.{name}" for name in never}


def _strange(given: Any) -> list[str]:
    """Names in model_args, at any depth, of what is no part of an architecture's shape."""
    if isinstance(given, list):
        return sorted({name for one in given for name in _strange(one)})
    if not isinstance(given, dict):
        return []
    return sorted({*_NO_SHAPE.intersection(given), *(name for one in given.values() for name in _strange(one))})


def _logits(config: Any, size: tuple[int, int] | None = None, model: nn.Module | None = None) -> Tensor:
    """Of one image for the hollow model, of the size that the architecture is for unless another is given."""
    model = model or _hollow(config)
    height, width = size or fixed_size(config) or _defaults(config)["input_size"][1:]
    with torch.no_grad():
        logits: Tensor = model.eval()(torch.zeros(1, channels(config), height, width, device="meta"))
    return logits


def _hollow(config: Any) -> nn.Module:
    """timm's model without weights, with a head of one class."""
    return _build(config.architecture, _shape(config), 1)


def _shape(config: Any) -> dict[str, Any]:
    return {name: value for name, value in (config.model_args or {}).items() if name != _CLASSES}


def _build(architecture: str, shape: dict[str, Any], classes: int) -> nn.Module:
    import timm

    with torch.device("meta"):
        model: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=classes, **shape)
    return model


def _defaults(config: Any) -> dict[str, Any]:
    """What timm has registered for the architecture, or for what has taken the place of its name."""
    return _registered(config)[1]


def _registered(config: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return _look_at(config.architecture, json.dumps(_shape(config)))


@functools.cache
def _look_at(architecture: str, shape: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The layers whose weights' shapes follow the number of classes, since timm does not name all of them, and what is registered."""
    model, other = (_build(architecture, json.loads(shape), classes) for classes in (1, 2))
    theirs = dict(other.named_parameters())
    differ = (name for name, weight in model.named_parameters() if weight.shape != theirs[name].shape)
    heads = dict.fromkeys(f"{_INSIDE}.{name.rpartition('.')[0]}" for name in differ)
    return tuple(heads), cast(dict[str, Any], model.pretrained_cfg)
