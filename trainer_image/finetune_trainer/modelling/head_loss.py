"""Cross-entropy and log-probabilities of the layer that makes logits of tokens, without ever holding them all. Called by objectives."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_BYTES = 256 * 1024 * 1024
"""Size of the logits that exist at a time."""


class HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropy of a linear head, chunk by chunk.

    The logits of a large vocabulary are by far the largest tensor of a step. Here a chunk's logits live until its loss and gradients are
    taken, in the forward pass; the backward pass only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float
    ) -> Tensor:
        """Args: hidden (tokens, size); weight (vocabulary, size); bias (vocabulary) or None; targets (tokens); smoothing: part of each target that is spread over all."""
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part in _chunks(len(targets), weight):
            h, t = hidden[part], targets[part]
            logits = F.linear(h, weight, bias).float()
            log_normaliser = logits.logsumexp(dim=-1, keepdim=True)
            wanted = logits.gather(1, t[:, None])
            if smoothing:
                wanted = torch.lerp(wanted, logits.mean(dim=-1, keepdim=True), smoothing)
            total += (log_normaliser - wanted).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            slope = logits.sub_(log_normaliser).exp_()
            if smoothing:
                slope -= smoothing / slope.shape[1]
            slope[torch.arange(len(t), device=t.device), t] -= 1.0 - smoothing
            slope_low = slope.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = slope_low @ weight
            if grad_weight is not None:
                grad_weight += slope_low.T @ h
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Scales what forward found."""
        hidden, weight, bias = ctx.saved_tensors
        return (
            None if hidden is None else hidden * scale.to(hidden.dtype),
            None if weight is None else (weight * scale).to(ctx.dtype),
            None if bias is None else (bias * scale).to(ctx.dtype),
            None,
            None,
        )


class HeadLogProbabilities(torch.autograd.Function):
    """Log-probability of each target under a linear head, chunk by chunk.

    What is made of them is not known yet in the forward pass, so the backward pass makes each chunk's logits again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """Args: as in HeadLoss. Returns (tokens), fp32."""
        normaliser = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        chosen = torch.empty_like(normaliser)
        for part in _chunks(len(targets), weight):
            logits = F.linear(hidden[part], weight, bias).float()
            normaliser[part] = logits.logsumexp(dim=-1)
            chosen[part] = logits.gather(1, targets[part, None])[:, 0]
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        return chosen - normaliser

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Args: scale (tokens): slope of the loss at each log-probability."""
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        for part in _chunks(len(targets), weight):
            h, t = hidden[part], targets[part]
            slope = F.linear(h, weight, bias).float().sub_(normaliser[part, None]).exp_().neg_()
            slope[torch.arange(len(t), device=t.device), t] += 1.0
            slope *= scale[part, None]
            slope_low = slope.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = slope_low @ weight
            if grad_weight is not None:
                grad_weight += slope_low.T @ h
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            None,
        )


def head_loss(
    hidden: Tensor, head: nn.Linear, targets: Tensor, smoothing: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """Sum of the cross-entropy of `head(hidden)`, plus `bias` for a head without one, as fp32. Shapes as in HeadLoss."""
    weight: Tensor = head.weight
    bias = head.bias if head.bias is not None else bias
    if not torch.is_grad_enabled():  # inside forward one cannot tell, and gradients would be made for nobody
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    total: Tensor = HeadLoss.apply(hidden, weight, bias, targets, smoothing)
    return total


def head_log_probabilities(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """(tokens), fp32: log-probability of each target under `head(hidden)`. Shapes as in HeadLoss."""
    found: Tensor = HeadLogProbabilities.apply(hidden, head.weight, head.bias, targets)
    return found


def _chunks(tokens: int, weight: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return (slice(start, start + rows) for start in range(0, tokens, rows))
