"""Virtual tokens in a flat batch of documents: embeddings before each, or keys and values that each attends to. Called by models.

Each document sees its own copy and no other document, so rows are packed as with any other method.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch
from .attention import Documents


@dataclass(frozen=True)
class VirtualTokens:
    """What peft holds, for our forward pass."""

    outer: Any
    """The PeftModel."""
    length: int
    """Virtual tokens."""
    as_keys: bool
    """Keys and values (prefix), not embeddings."""

    def inputs(self, inner: Any, batch: Batch) -> dict[str, Any]:
        """The model's arguments for a batch."""
        if self.as_keys:
            return {
                "input_ids": batch.tokens,
                "position_ids": batch.positions + self.length,
                "documents": batch.documents._replace(prefixes=self._keys_and_values()),
            }
        rows = torch.split(inner.get_input_embeddings()(batch.tokens)[0], list(batch.documents.lengths))
        prompt = self._embeddings().to(rows[0].dtype)
        lengths = [self.length + length for length in batch.documents.lengths]
        positions = torch.cat([torch.arange(length, device=batch.tokens.device) for length in lengths])
        return {
            "inputs_embeds": torch.cat([part for row in rows for part in (prompt, row)])[None],
            "position_ids": positions[None],
            "documents": Documents.of(lengths, batch.tokens.device),
        }

    def moved(self, batch: Batch) -> Tensor:
        """Where the batch's targets are predicted from, behind the embeddings that were put before each document."""
        if self.as_keys:
            return batch.predict_at
        document = torch.bucketize(batch.predict_at, batch.documents.cumulative[1:], right=True)
        return batch.predict_at + self.length * (document + 1)

    def beginning(self, inner: Any, tokens: Tensor) -> tuple[dict[str, Any], int]:
        """The model's arguments for the first tokens of an answer, (1, tokens), and how many positions they take."""
        count = tokens.shape[1]
        if self.as_keys:
            positions = torch.arange(self.length, self.length + count, device=tokens.device)
            past = self.outer.get_prompt(1)
            return {"input_ids": tokens, "position_ids": positions[None], "past_key_values": past}, self.length + count
        embeddings = inner.get_input_embeddings()(tokens)
        both = torch.cat([self._embeddings().to(embeddings.dtype)[None], embeddings], dim=1)
        positions = torch.arange(self.length + count, device=tokens.device)
        return {"inputs_embeds": both, "position_ids": positions[None]}, self.length + count

    def _embeddings(self) -> Tensor:
        """(length, size)."""
        prompt: Tensor = self.outer.get_prompt(1)[0]
        return prompt

    def _keys_and_values(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """For each layer (1, key heads, length, size) twice."""
        return tuple((layer.keys, layer.values) for layer in self.outer.get_prompt(1).layers)
