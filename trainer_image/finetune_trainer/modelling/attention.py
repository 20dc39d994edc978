"""Attention that never looks across documents: causal, or both ways in an encoder; registered with transformers under the name NAME.

Batches are never padded: the documents of a micro-batch lie behind each other in one row, and `Documents` says where each ends. On CUDA
one variable-length kernel does them all, or, with dropout or in fp32, one call those of like lengths; elsewhere the same function loops over
them, so what a document computes does not depend on what it was packed with (on CUDA but for rounding). Without `documents` (reading what is to be answered) it is plain causal attention over each sequence, and `visible` says
what of it is no padding; `ages` say what the newest token of each sequence sees of a cache.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

NAME: Final = "finetune_documents"


class Documents(NamedTuple):
    """Where the documents of a flat batch lie."""

    lengths: tuple[int, ...]
    """Tokens of each document."""
    cumulative: Tensor
    """int32, on the device: 0 and the end of each document."""
    prefixes: tuple[tuple[Tensor, Tensor], ...] = ()
    """For each layer keys and values, (1, key heads, tokens, size), that every document sees before its own; or nothing."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Documents":
        """Documents of these lengths."""
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return cls(tuple(lengths), ends.to(device, non_blocking=True))


def register() -> None:
    """Makes attn_implementation=NAME known to transformers; it then builds no attention mask of its own."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, documents_attention)


def documents_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    visible: Tensor | None = None,
    ages: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the layer that calls.
        query: (1, heads, tokens, size).
        key: (1, key heads, tokens, size); the number of heads is a multiple of it.
        value: as key.
        attention_mask: always None; transformers builds none for us.
        scaling: of the scores; default 1 / sqrt(size).
        dropout: of the scores, as the model's config or training.dropout says.
        sliding_window: tokens that a token sees, itself included.
        documents: where documents end.
        visible: (sequences, tokens): what of each sequence is no padding; then the first size is that of sequences.
        ages: (sequences, keys): by how many tokens each key is older than the only query; below 0 it is not seen.

    Returns:
        (1, tokens, heads, size), and no scores.
    """
    assert attention_mask is None
    by_kernel = (
        _kernel is not None
        and (query.is_cuda or query.is_meta)
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and not dropout
    )
    packed = documents if by_kernel else None
    causal = getattr(module, "is_causal", True)
    prefix = documents.prefixes[int(module.layer_idx)] if documents and documents.prefixes else None  # type: ignore[arg-type]
    if packed is not None:
        return _in_one(query, key, value, scaling, sliding_window, packed, prefix, causal), None
    if documents is not None and prefix is None and len(documents.lengths) > 1 and not query.is_cpu:
        return _side_by_side(query, key, value, scaling, dropout, sliding_window, documents, causal), None
    if not causal:
        return _both_ways(query, key, value, scaling, dropout, sliding_window, documents), None
    if ages is not None:
        return _newest(query, key, value, scaling, dropout, sliding_window, ages), None
    if visible is not None:
        return _behind_padding(query, key, value, scaling, dropout, sliding_window, visible), None
    if documents is None:
        return _attend(query, key, value, scaling, dropout, sliding_window).transpose(1, 2), None
    if prefix is not None:
        return _behind_prefix(query, key, value, scaling, dropout, sliding_window, documents, prefix), None
    pieces = zip(*(torch.split(tensor, list(documents.lengths), dim=2) for tensor in (query, key, value)), strict=True)
    attended = [_attend(q, k, v, scaling, dropout, sliding_window) for q, k, v in pieces]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def _both_ways(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    documents: Documents | None,
) -> Tensor:
    """Each token of a document sees all of it, or fewer than `window` tokens to each side: an encoder's attention."""
    lengths = list(documents.lengths) if documents else [query.shape[2]]
    pieces = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attended = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=_near(q, window), dropout_p=dropout, scale=scaling)
        for q, k, v in pieces
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()


def _behind_padding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    visible: Tensor,
) -> Tensor:
    """Sequences behind padding, which sees itself, since a token that sees nothing computes no number."""
    tokens = query.shape[2]
    at, seen = torch.arange(tokens, device=query.device)[:, None], torch.arange(tokens, device=query.device)[None, :]
    causal = (seen <= at) & (seen > at - (window or tokens))
    mask = ((causal & visible[:, None]) | (seen == at))[:, None]
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).contiguous()


def _newest(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int | None, ages: Tensor
) -> Tensor:
    """One token of each sequence. Heads that share keys are to the kernel so many tokens of one head: no key is copied."""
    mask = ages >= 0 if window is None else (ages >= 0) & (ages < window)
    shared = query.view(len(query), key.shape[1], -1, query.shape[3])
    out = F.scaled_dot_product_attention(
        shared, key, value, attn_mask=mask[:, None, None], dropout_p=dropout, scale=scaling
    )
    return out.reshape(len(query), 1, query.shape[1], -1)


def _near(query: Tensor, window: int | None) -> Tensor | None:
    """(tokens, tokens): which are nearer than `window`; None: all."""
    tokens = query.shape[2]
    if window is None or tokens <= window:
        return None
    at = torch.arange(tokens, device=query.device)
    return (at[:, None] - at[None, :]).abs() < window


def _in_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    documents: Documents,
    prefix: tuple[Tensor, Tensor] | None,
    causal: bool,
) -> Tensor:
    """All documents by one kernel, each behind its own copy of the prefix."""
    assert _kernel is not None
    of_keys = documents
    if prefix is not None:
        before = prefix[0].shape[2]
        more = before * torch.arange(len(documents.lengths) + 1, dtype=torch.int32, device=query.device)
        of_keys = Documents(tuple(before + length for length in documents.lengths), documents.cumulative + more)
        key, value = (
            torch.cat(
                [one for own in torch.split(tensor, list(documents.lengths), dim=2) for one in (first, own)], dim=2
            )
            for first, tensor in zip(prefix, (key, value), strict=True)
        )
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _kernel(q, k, v, documents, of_keys, scaling, window, causal)[None]


def _side_by_side(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    documents: Documents,
    causal: bool,
) -> Tensor:
    """Documents of like lengths side by side, padded behind their ends: for what the kernel of all documents does not know, such as dropout."""
    layout = _Layout.of(documents.lengths, query.device)
    padded = [_Moved.apply(tensor[0].transpose(0, 1), layout.at, layout.order, None) for tensor in (query, key, value)]
    parts = zip(
        *(tensor.split([count * longest for count, longest in layout.groups]) for tensor in padded), strict=True
    )
    found = []
    for size, mask, group in zip(layout.groups, layout.masks(causal, window), parts, strict=True):
        q, k, v = (part.unflatten(0, size).transpose(1, 2) for part in group)
        k, v = _for_each_head(q, k, v, mask)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        found.append(out.transpose(1, 2).flatten(0, 1))
    flat: Tensor = _Moved.apply(torch.cat(found), layout.order, layout.at, layout.inside)
    return flat[None]


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where the tokens of documents lie that are padded to the longest of their group, of which none is twice as long as another."""

    groups: tuple[tuple[int, int], ...]
    """Of each: documents, and the tokens of the longest."""
    at: Tensor
    """(padded tokens): where each is in the flat row; padding is the last token of its document once more."""
    inside: Tensor
    """(padded tokens): which are no padding."""
    order: Tensor
    """(tokens): where each token of the flat row is among the padded ones."""

    @classmethod
    @functools.lru_cache(maxsize=2)  # every layer asks
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> "_Layout":
        """That of documents of these lengths."""
        sizes, starts = np.array(lengths), np.cumsum([0, *lengths[:-1]])
        classes = np.array([(length - 1).bit_length() for length in lengths])
        groups, ats, insides = [], [], []
        for one in np.unique(classes):
            own = np.flatnonzero(classes == one)
            tokens, ends = np.arange(sizes[own].max()), sizes[own][:, None]
            groups.append((len(own), len(tokens)))
            insides.append((tokens < ends).ravel())
            ats.append((starts[own][:, None] + np.minimum(tokens, ends - 1)).ravel())
        at, inside = np.concatenate(ats), np.concatenate(insides)
        order = np.empty(sizes.sum(), dtype=np.int64)
        order[at[inside]] = np.flatnonzero(inside)
        return cls(tuple(groups), *(torch.from_numpy(found).to(device) for found in (at, inside, order)))

    @functools.lru_cache(maxsize=2)  # noqa: B019  # every layer asks, of one batch for one mask or two
    def masks(self, causal: bool, window: int | None) -> list[Tensor | None]:
        """Of each group what sees what, (documents or 1, 1, tokens, tokens); None: each token all before it. Padding sees itself, or it would compute no number."""
        masks: list[Tensor | None] = []
        start = 0
        for count, longest in self.groups:
            inside = self.inside[start : start + count * longest].view(count, 1, longest)
            start += count * longest
            tokens = torch.arange(longest, device=inside.device)
            behind = tokens[:, None] - tokens[None, :]
            near = behind.abs() < (window or longest)
            if not causal:
                masks.append((near & inside | (behind == 0))[:, None])
            elif window is not None and window < longest:
                masks.append((near & (behind >= 0))[None, None])
            else:
                masks.append(None)
        return masks


class _Moved(torch.autograd.Function):
    """Rows from elsewhere: padded ones of a flat row, or the other way. A gradient is read from where its row went: nothing is added up, in no order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sources: Tensor, back: Tensor, wanted: Tensor | None) -> Tensor:
        """Rows at `sources`. `back`: where each row that is given went; `wanted`: which of those take a gradient, None: all."""
        ctx.back, ctx.wanted = back, wanted
        return rows.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        found = gradient.index_select(0, ctx.back)
        return found if ctx.wanted is None else found.mul_(ctx.wanted[:, None, None]), None, None, None


def _behind_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    documents: Documents,
    prefix: tuple[Tensor, Tensor],
) -> Tensor:
    """Each document behind the layer's prefix, as behind a cache."""
    pieces = zip(*(torch.split(tensor, list(documents.lengths), dim=2) for tensor in (query, key, value)), strict=True)
    attended = [
        _attend(q, torch.cat([prefix[0], k], dim=2), torch.cat([prefix[1], v], dim=2), scaling, dropout, window)
        for q, k, v in pieces
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float, window: int | None) -> Tensor:
    """One document, or the newest tokens of one behind a cache of its beginning."""
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if (window is not None and keys > window) or 1 < queries < keys:
        at = torch.arange(keys - queries, keys, device=q.device)[:, None]
        seen = torch.arange(keys, device=q.device)[None, :]
        mask = (seen <= at) & (seen > at - (window or keys))
    k, v = _for_each_head(q, k, v, mask)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and queries > 1,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _for_each_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values, repeated where no kernel shares them but the slowest, which holds all scores: behind a mask, and in fp32 on GPUs."""
    repeats = q.shape[1] // k.shape[1]
    if repeats == 1 or (mask is None and (q.is_cpu or q.dtype != torch.float32)):
        return k, v
    return k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)


Kernel = Callable[[Tensor, Tensor, Tensor, Documents, Documents, float | None, int | None, bool], Tensor]


def _variable_length_kernel() -> Kernel | None:
    """torch's kernel, whose way to say "causal" has changed between releases; None if this torch has none that will do.

    Of a document with more keys than queries, the last query sees the last key.
    """
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    known = inspect.signature(varlen.varlen_attn).parameters
    if "scale" not in known or not {"window_size", "is_causal"} & set(known):
        return None

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Documents,
        keys: Documents,
        scaling: float | None,
        window: int | None,
        causal: bool,
    ) -> Tensor:
        options: dict[str, Any] = {"scale": scaling}
        if "window_size" in known:
            before = window - 1 if window else -1
            options["window_size"] = (before, 0 if causal else before)
        elif window is None:
            options["is_causal"] = causal
        else:
            raise RuntimeError("this torch has no sliding window in varlen_attn")
        if "enable_gqa" in known:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # cuDNN's would come first, and promises no order of its sums
            out = varlen.varlen_attn(
                q, k, v, queries.cumulative, keys.cumulative, max(queries.lengths), max(keys.lengths), **options
            )
        assert isinstance(out, Tensor)
        return out

    return kernel


_kernel = _variable_length_kernel()
