"""Methods with their settings, for tables of tests; the first of each method is the one that every family and task is tried with."""

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"full": {"layerDecay": "0.9"}},
    "freeze": {"freeze": {"trainLastBlocks": 1}},
    "freeze-biases": {"freeze": {"trainBiases": True}},
    "gradualUnfreezing": {"gradualUnfreezing": {"everySteps": 1}},
    "lora": {"lora": {"dropout": "0.1", "loraPlusRatio": "4"}},
    "lora-pissa": {"lora": {"initialization": "pissa", "rankPattern": {"(q_proj|query|c_attn)": 3}}},
    "lora-olora": {"lora": {"initialization": "olora", "useRslora": True}},
    "lora-dora": {"lora": {"useDora": True, "initialization": "pissa"}},
    "lora-modules": {"lora": {"targets": ["q_proj"], "modulesToSave": ["down_proj"]}},
    "lora-experts": {"lora": {"rank": 4, "experts": True, "rankPattern": {"q_proj": 2}}},
    "qlora": {"qlora": {"dropout": "0.1"}},
    "qlora-8": {"qlora": {"bits": 8}},
    "qlora-dora": {"qlora": {"useDora": True, "doubleQuantization": False}},
    "adapter-pfeiffer": {"adapter": {}},
    "adapter-houlsby": {"adapter": {"placement": "houlsby", "nonLinearity": "gelu", "reductionFactor": 4}},
    "prefix": {"prefix": {"length": 6}},
    "prefix-text": {"prefix": {"length": 6, "initialText": "a red stone"}},
    "prefix-projection": {"prefix": {"length": 6, "projection": True}},
    "prompt": {"prompt": {"length": 6}},
    "prompt-text": {"prompt": {"length": 6, "initialText": "a red stone"}},
    "pTuning": {"pTuning": {"length": 6}},
    "ia3": {"ia3": {}},
}


def method_of(variant: str) -> str:
    """Its name."""
    (name,) = VARIANTS[variant]
    return name


def spec_of(variant: str, *, plain: bool = False) -> dict[str, Any]:
    """`spec.method`; if plain, without the dropout of the method's own layers."""
    ((name, fields),) = VARIANTS[variant].items()
    return {name: {key: value for key, value in fields.items() if not (plain and key == "dropout")}}


FIRST = {method_of(variant): variant for variant in reversed(VARIANTS)}
"""The first variant of each method."""
LLAMA = tuple(variant for variant in VARIANTS if variant not in ("freeze-biases", "lora-experts"))
"""Those for a Llama, which has neither biases nor experts."""
