"""model.addTokens: tokens that the tokenizer gets, and their rows in embedding and head. Called by setup and models.

A new row begins as the mean of the rows of what the tokenizer made of the token before, so that the model reads it nearly as it did.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from finetune_crds.resolved import ResolvedFineTune

from ..errors import UserError
from ..storage.places import materialise

log = logging.getLogger("finetune.tokens")

MOST = 65_536
"""Tokens; more is another tokenizer."""


class AddedTokens(NamedTuple):
    """What the tokenizer has got."""

    ids: list[int]
    parts: list[list[int]]
    """Of each token the tokens that stood for it before."""


def fetch(spec: ResolvedFineTune, scratch: Path) -> Path | None:
    """The file of model.addTokens on this machine, if there is one."""
    wanted = spec.model.add_tokens
    return materialise(wanted.file, scratch / "tokens") if wanted and wanted.file else None


def add(spec: ResolvedFineTune, tokenizer: Any, file: Path | None) -> AddedTokens | None:
    """Adds them to the tokenizer.

    Raises:
        UserError: one is empty, comes twice, or is there already.
    """
    from tokenizers import AddedToken

    wanted = spec.model.add_tokens
    if wanted is None:
        return None
    field = "model.addTokens.file" if file else "model.addTokens.tokens"
    tokens = _lines(file, field) if file else list(wanted.tokens or ())
    there, seen = tokenizer.get_vocab(), set[str]()
    for i, token in enumerate(tokens):
        place = f"{field} line {i + 1}" if file else f"{field}[{i}]"
        if not token.strip():
            raise UserError(f"{place} is empty; remove it")
        if token in there:
            raise UserError(f"{place}: {token!r} is a token of {spec.model.uri} already; remove it")
        if token in seen:
            raise UserError(f"{place}: {token!r} comes twice; remove one")
        seen.add(token)
    parts = tokenizer(tokens, add_special_tokens=False)["input_ids"]
    if nothing := [token for token, ids in zip(tokens, parts, strict=True) if not ids]:
        raise UserError(f"{field}: {nothing[0]!r} is nothing to the tokenizer of {spec.model.uri}; remove it")
    special = bool(wanted.special)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in tokens], special_tokens=special)  # fmt: skip
    return AddedTokens(tokenizer.convert_tokens_to_ids(tokens), parts)


def grow(inner: Any, added: AddedTokens) -> None:
    """Gives a model rows for the tokens. Those that a vocabulary was padded with are taken first."""
    if max(added.ids) >= inner.get_input_embeddings().weight.shape[0]:
        with torch.random.fork_rng(devices=[]):  # it draws rows that are written over
            inner.resize_token_embeddings(max(added.ids) + 1, mean_resizing=False)
    layers = (inner.get_input_embeddings(), inner.get_output_embeddings())
    weights = {id(layer.weight): layer.weight.data for layer in layers if layer is not None}
    for weight in weights.values():
        for row, parts in zip(added.ids, added.parts, strict=True):
            weight[row] = weight[torch.tensor(parts)].float().mean(dim=0).to(weight.dtype)


@contextmanager
def in_place(inner: Any) -> Iterator[None]:
    """Has the trained rows in the weights themselves, for a while: peft makes the whole matrix anew each time that one row of it is used."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    layers = [one for one in inner.modules() if isinstance(one, TrainableTokensLayer) and not one.disable_adapters]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()


def _lines(file: Path, field: str) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{field} must be a text file in UTF-8 with a token a line") from error
    if not 0 < len(lines) <= MOST:
        raise UserError(f"{field} has {len(lines)} lines; between 1 and {MOST} tokens can be added")
    return lines
