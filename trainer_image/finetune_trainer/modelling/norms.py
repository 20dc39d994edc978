"""Batch normalisation (Ioffe and Szegedy 2015), the one layer whose state training changes besides its weights.

Its weights and running statistics stay in fp32 whatever the model computes in. Called by models, masters and methods.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Layers with running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
