"""Answers to many prompts at a time, with a cache of keys and values. Called by objectives that learn from what the model writes.

Prompts of unlike lengths stand behind padding that nobody sees. What is drawn for an answer's next token is a function of the answer's key
and the token's place in it, so that it does not depend on which answers are written together, or where.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import Interrupted
from . import added_tokens
from .cache import Cache
from .capture import Repeated
from .models import Model, inference

LOOK_EVERY: Final = 16
"""Tokens between looks at whether all answers have ended: the host waits for the device then."""
FEWEST_SLOTS: Final = 64
"""Of the cache that attention looks at."""
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
    stopping: Callable[[], bool] = lambda: False,
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
        stopping: whether to give up; asked at each token.

    Raises:
        Interrupted: it was time to.
    """
    assert model.virtual is None
    answers = 1 if keys is None else keys.shape[1]
    drawn = None if keys is None else torch.from_numpy(keys.reshape(-1).view(np.int64)).to(device)
    with inference(model), added_tokens.in_place(model.inner):
        step = _Step(model, prompts, answers, drawn, most, ends, temperature, device)
        said = torch.empty(most, len(prompts) * answers, dtype=torch.int64, device=device)
        repeated, bound = Repeated(step, device), 0
        for count in range(1, most + 1):
            said[count - 1].copy_(step.token)
            if count == most or (count % LOOK_EVERY == 0 and bool(step.done.all())):
                break
            if stopping():
                raise Interrupted
            if (needed := step.bound(count)) != bound:
                repeated, bound = Repeated(step, device), needed
                step.cache.bound = needed
            repeated()
            step.cache.keep(count - 1)
    found = [_up_to_end(row, ends) for row in said[:count].T.cpu().numpy()]
    return [found[i : i + answers] for i in range(0, len(found), answers)]


def imagine(
    model: Model,
    prompts: Sequence[NDArray[np.int64]],
    answers: int,
    most: int,
    temperature: float,
    device: torch.device,
) -> None:
    """What of `write` holds most memory, for that to be counted: prompts are read, and a token looks at the whole cache."""
    keys = torch.zeros(len(prompts) * answers, dtype=torch.int64, device=device)
    with inference(model), added_tokens.in_place(model.inner):
        step = _Step(model, prompts, answers, keys, most, [0], temperature, device)
        step.cache.bound = step.cache.slots
        step()


class _Step:
    """One token more of each answer, on tensors that stay where they are: the first is there when the prompts have been read."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[NDArray[np.int64]],
        answers: int,
        keys: Tensor | None,
        most: int,
        ends: Sequence[int],
        temperature: float,
        device: torch.device,
    ) -> None:
        """Args: as of `write`; answers: to each prompt; keys: (prompts * answers)."""
        self._base, self._head = model.inner.base_model, model.head
        self._keys, self._temperature = keys, temperature
        width, count = max(map(len, prompts)), len(prompts) * answers
        tokens, visible = (
            np.zeros((len(prompts), width), dtype=np.int64),
            np.zeros((len(prompts), width), dtype=np.bool_),
        )
        for i, prompt in enumerate(prompts):
            tokens[i, width - len(prompt) :] = prompt
            visible[i, width - len(prompt) :] = True
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.cache = Cache(model.inner.config.num_hidden_layers, answers, width, most)
        self.token = torch.zeros(count, dtype=torch.int64, device=device)
        """(sequences): the newest of each answer."""
        self.done = torch.zeros(count, dtype=torch.bool, device=device)
        """(sequences): whether it has ended."""
        self._place = torch.zeros((), dtype=torch.int64, device=device)
        """Tokens that have been written of each."""
        self._ending = torch.tensor(list(ends), device=device)
        positions = np.maximum(np.cumsum(visible, axis=1) - 1, 0)
        seen = torch.from_numpy(visible).to(device)
        output = self._base(
            input_ids=torch.from_numpy(tokens).to(device),
            position_ids=torch.from_numpy(positions).to(device),
            attention_mask=seen,
            visible=None if visible.all() else seen,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache.reads = False
        self._lengths = lengths.repeat_interleave(answers)
        self._first = (width - self._lengths)[:, None] + 1
        """(sequences, 1): slot of the prompt's first token."""
        self._slots = torch.arange(self.cache.slots, device=device)
        self._mask = torch.ones(count, 1, dtype=torch.bool, device=device)
        """For GPT-2, which without one looks for padding among the tokens, and the host would wait for that."""
        self._width = width
        self._choose(output.last_hidden_state[:, -1].repeat_interleave(answers, dim=0))

    def bound(self, count: int) -> int:
        """Slots to look at with so many tokens written: few different numbers, each of which is another graph."""
        return min(self.cache.slots, max(FEWEST_SLOTS, 1 << (self._width + count).bit_length()))

    def __call__(self) -> None:
        """The next token."""
        slots = self._slots[: self.cache.bound]
        ages = self._width + self._place - slots
        ages = torch.where((slots >= self._first) & (ages > 0), ages, -1)
        ages[:, 0] = 0
        output = self._base(
            input_ids=self.token[:, None],
            position_ids=(self._lengths + self._place - 1)[:, None],
            attention_mask=self._mask,
            ages=ages,
            past_key_values=self.cache,
            use_cache=True,
        )
        self._choose(output.last_hidden_state[:, -1])

    def _choose(self, states: Tensor) -> None:
        """states: (sequences, size)."""
        self.token.copy_(_next(self._head(states).float(), self._keys, self._temperature, self._place))
        self.done |= (self.token[:, None] == self._ending).any(dim=1)
        self._place += 1


def _up_to_end(tokens: NDArray[np.int64], ends: Sequence[int]) -> Written:
    at = np.flatnonzero(np.isin(tokens, ends))
    return Written(tokens[: at[0] + 1], True) if len(at) else Written(tokens, False)


def _next(logits: Tensor, keys: Tensor | None, temperature: float, place: Tensor) -> Tensor:
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


def gumbel(keys: Tensor, place: Tensor, count: int) -> Tensor:
    """(keys, count), fp64: standard Gumbel noise, for each key and place the same on any device up to how it takes logarithms.

    Each (key, place) seeds a SplitMix64 (Steele et al. 2014), of which these are the first numbers: integers only, computed all at once.
    """
    streams = _mixed(keys + _GOLDEN * (place + 1))
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
