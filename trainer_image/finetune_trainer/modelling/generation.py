"""Answers to many prompts at a time, with a cache of keys and values. Called by objectives that learn from what the model writes.

Prompts of unlike lengths stand behind padding that nobody sees. What is drawn for an answer's next token is a function of the answer's key
and the token's place in it, so that it does not depend on which answers are written together, or where.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .models import Model

LOOK_EVERY: Final = 16
"""Tokens between looks at whether all answers have ended: the host waits for the device then."""
NOISE_AT_A_TIME: Final = 1 << 24
"""Random numbers that exist at a time."""


class Written(NamedTuple):
    """An answer."""

    tokens: NDArray[np.int64]
    """With the token that ends it, if one does."""
    ended: bool
    """Whether it came to an end before it was as long as it may be."""


def ends(model: Model, tokenizer: Any) -> list[int]:
    """Tokens that end an answer."""
    given = getattr(model.inner.generation_config, "eos_token_id", None)
    listed = given if isinstance(given, list) else [given]
    return sorted({token for token in (*listed, tokenizer.eos_token_id) if token is not None})


def write(
    model: Model,
    prompts: Sequence[NDArray[np.int64]],
    keys: NDArray[np.uint64] | None,
    most: int,
    ends: Sequence[int],
    temperature: float,
    device: torch.device,
) -> list[list[Written]]:
    """Answers to each prompt.

    Args:
        model: without virtual tokens.
        prompts: tokens of each.
        keys: (prompts, answers to each): of what is drawn; None: one answer to each, of the most likely token each time.
        most: tokens of the longest answer.
        ends: tokens that end one.
        temperature: of what is drawn.
        device: where the model is.
    """
    assert model.virtual is None
    answers = 1 if keys is None else keys.shape[1]
    drawn = None if keys is None else torch.from_numpy(keys.reshape(-1).view(np.int64)).to(device)
    width = max(map(len, prompts))
    tokens = np.zeros((len(prompts), width), dtype=np.int64)
    visible = np.zeros((len(prompts), width + most), dtype=np.bool_)
    visible[:, width:] = True
    for i, prompt in enumerate(prompts):
        tokens[i, width - len(prompt) :] = prompt
        visible[i, width - len(prompt) : width] = True
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(answers)
    seen = None if visible.all() else torch.from_numpy(visible).to(device)
    ending = torch.tensor(list(ends), device=device)
    training = model.outer.training
    model.outer.eval()
    with torch.no_grad():
        positions = np.maximum(np.cumsum(visible[:, :width], axis=1) - 1, 0)
        output = model.inner.base_model(
            input_ids=torch.from_numpy(tokens).to(device),
            position_ids=torch.from_numpy(positions).to(device),
            visible=None if seen is None else seen[:, :width],
            use_cache=True,
        )
        cache, states = output.past_key_values, output.last_hidden_state[:, -1].repeat_interleave(answers, dim=0)
        if answers > 1:  # the prompt is read once
            cache.batch_repeat_interleave(answers)
            seen = None if seen is None else seen.repeat_interleave(answers, dim=0)
        done = torch.zeros(len(states), dtype=torch.bool, device=device)
        said: list[Tensor] = []
        while True:
            token = _next(model.logits(states).float(), drawn, temperature, len(said))
            said.append(token)
            done |= torch.isin(token, ending)
            if len(said) == most or (len(said) % LOOK_EVERY == 0 and bool(done.all())):
                break
            output = model.inner.base_model(
                input_ids=token[:, None],
                position_ids=(lengths + len(said) - 1)[:, None],
                visible=None if seen is None else seen[:, : width + len(said)],
                past_key_values=cache,
                use_cache=True,
            )
            states = output.last_hidden_state[:, -1]
    model.outer.train(training)
    found = [_up_to_end(row, ends) for row in torch.stack(said, dim=1).cpu().numpy()]
    return [found[i : i + answers] for i in range(0, len(found), answers)]


def _up_to_end(tokens: NDArray[np.int64], ends: Sequence[int]) -> Written:
    at = np.flatnonzero(np.isin(tokens, ends))
    return Written(tokens[: at[0] + 1], True) if len(at) else Written(tokens, False)


def _next(logits: Tensor, keys: Tensor | None, temperature: float, place: int) -> Tensor:
    """(answers): the most likely token, or one drawn by the Gumbel-max trick. logits: (answers, vocabulary)."""
    if keys is None:
        return logits.argmax(dim=-1)
    rows = max(1, NOISE_AT_A_TIME // logits.shape[1])
    return torch.cat(
        [
            (part.double() / temperature + gumbel(own, place, part.shape[1])).argmax(dim=-1)
            for part, own in zip(torch.split(logits, rows), torch.split(keys, rows), strict=True)
        ]
    )


def gumbel(keys: Tensor, place: int, count: int) -> Tensor:
    """(keys, count), fp64: standard Gumbel noise, for each key and place the same on any device up to how it takes logarithms.

    Each (key, place) seeds a SplitMix64 (Steele et al. 2014), of which these are the first numbers: integers only, computed all at once.
    """
    streams = _mixed(keys + _GOLDEN * torch.tensor(place + 1, device=keys.device))
    steps = _GOLDEN * torch.arange(1, count + 1, device=keys.device)
    bits = _shifted(_mixed(streams[:, None] + steps), 12)
    return bits.double().add_(0.5).mul_(2.0**-52).log_().neg_().log_().neg_()


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


_GOLDEN: Final = _signed(0x9E3779B97F4A7C15)
_MIX: Final = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left: torch has no unsigned arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    return x ^ _shifted(x, 31)
