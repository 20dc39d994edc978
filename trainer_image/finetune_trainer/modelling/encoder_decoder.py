"""Models whose encoder reads a text and whose decoder writes another: T5, BART. Called by models, objectives.pairs and samples.

Rows are padded here, and attention is transformers' own: what a row computes does not depend on what it was padded with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.batches import Batch


def hidden(inner: Any, batch: Batch) -> Tensor:
    """(targets, size): what the head makes logits of, for each token behind the rows' splits in turn.

    The decoder sees the tokens before it, behind decoder_start_token_id (label shifting, as transformers does it).
    """
    rows = torch.split(batch.tokens[0], list(batch.documents.lengths))
    sources = [row[:split] for row, split in zip(rows, batch.splits, strict=True)]
    targets = [row[split:] for row, split in zip(rows, batch.splits, strict=True)]
    start = batch.tokens.new_tensor([inner.config.decoder_start_token_id])
    shifted = [torch.cat([start, target[:-1]]) for target in targets]
    states, mask = _read(inner, sources)
    written = inner.get_decoder()(
        input_ids=_padded(inner, shifted), encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False
    ).last_hidden_state
    flat = torch.cat([row[: len(target)] for row, target in zip(written, targets, strict=True)])
    return _scaled(inner, flat)


def write(
    inner: Any, logits: Callable[[Tensor], Tensor], sources: Sequence[Tensor], most: int, ends: Sequence[int]
) -> list[list[int]]:
    """The most likely token each time, for all sources together.

    Args:
        inner: the transformers model.
        logits: of hidden states.
        sources: tokens of each.
        most: tokens of the longest answer.
        ends: tokens that end one.

    Returns:
        Tokens of each answer, without that which ends it.
    """
    states, mask = _read(inner, sources)
    decoder, cache = inner.get_decoder(), None
    device = states.device
    token = torch.full((len(sources), 1), inner.config.decoder_start_token_id, device=device)
    ending = torch.tensor(list(ends), device=device)
    done = torch.zeros(len(sources), dtype=torch.bool, device=device)
    said: list[Tensor] = []
    while len(said) < most and not bool(done.all()):
        output = decoder(
            input_ids=token,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        token = logits(_scaled(inner, output.last_hidden_state[:, -1:])).argmax(dim=-1)
        done |= torch.isin(token[:, 0], ending)
        said.append(token[:, 0])
    return [_before(row, ends) for row in torch.stack(said, dim=1).tolist()]


def _read(inner: Any, sources: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The encoder's states, (rows, longest, size), and the mask that says what of it is padding, (rows, longest)."""
    mask = pad_sequence([torch.ones_like(source) for source in sources], batch_first=True)
    states: Tensor = inner.get_encoder()(input_ids=_padded(inner, sources), attention_mask=mask).last_hidden_state
    return states, mask


def _padded(inner: Any, rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=inner.config.pad_token_id or 0)


def _scaled(inner: Any, states: Tensor) -> Tensor:
    """The first T5 scales what its head takes, since that is its embedding; later ones do not (T5ForConditionalGeneration)."""
    return states * inner.config.d_model**-0.5 if getattr(inner.config, "scale_decoder_outputs", False) else states


def _before(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
