"""spec.method: which weights are trained, and what of them is saved. One module a family of methods.

method.py      what the loop, the loader and the publisher ask of any method
weights.py     the model's own weights: full, freeze, gradualUnfreezing
low_rank.py    lora, qlora
factors.py     ia3
bottleneck.py  adapter
virtual.py     prefix, prompt, pTuning
"""

from finetune_crds.resolved import ResolvedFineTune

from .bottleneck import BottleneckMethod
from .factors import Ia3Method
from .low_rank import LowRankMethod
from .method import Method
from .virtual import VirtualTokensMethod
from .weights import FreezeMethod, FullMethod, GradualUnfreezingMethod

_METHODS: dict[str, type[Method]] = {
    "full": FullMethod,
    "freeze": FreezeMethod,
    "gradualUnfreezing": GradualUnfreezingMethod,
    "lora": LowRankMethod,
    "qlora": LowRankMethod,
    "adapter": BottleneckMethod,
    "prefix": VirtualTokensMethod,
    "prompt": VirtualTokensMethod,
    "pTuning": VirtualTokensMethod,
    "ia3": Ia3Method,
}


def chosen(spec: ResolvedFineTune) -> Method:
    """The method of a resolved job."""
    return _METHODS[spec.method.name](spec)
