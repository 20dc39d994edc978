"""Log-probabilities of answers, and what they were before training. Called by dpo and kto.

No second model is loaded. Where the method can be switched off (an adapter that begins as nothing, virtual tokens), the reference is the
model without it, in the same batch, and so at step 0 equal to the bit. Elsewhere every row's log-probabilities are computed once before the
first step; checkpoints keep them, so a resumed run uses the same numbers.
"""

import io
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data import batches
from ..data.batches import Batch, on_device
from ..data.order import share
from ..data.packing import Sequence as Rows
from ..data.packing import singly
from ..data.prepared import RowSet
from ..errors import Stopped
from ..methods.method import Method
from ..modelling.head_loss import head_log_probabilities
from ..modelling.models import Model, inference
from ..ranks import Ranks

FILE = "reference.npy"
"""In a checkpoint: (rows, 2), fp32."""
BOTH = (0, 1)

log = logging.getLogger("finetune.reference")


def answers_batch(rows: RowSet, sequences: Sequence[Rows], parts: Sequence[int], device: torch.device) -> Batch:
    """These parts of rows, to predict the tokens of their answers."""
    flat = batches.flat(rows, sequences, parts)
    learned = [after_first(rows.learned[start:end]) for start, end in flat.spans]
    at = np.flatnonzero(np.concatenate(learned))
    counts = [int(one.sum()) for one in learned]
    return flat.on(device, at - 1, flat.tokens[at], counts)


def after_first(learned: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A sequence's first token has nothing before it to be told from."""
    copy = np.array(learned)
    copy[:1] = False
    return copy


def token_log_probabilities(model: Model, batch: Batch) -> Tensor:
    """(predictions), fp32."""
    head = model.head
    assert isinstance(head, nn.Linear)
    return head_log_probabilities(model.hidden(batch), head, batch.targets)


def sums_of_answers(each: Tensor, counts: Sequence[int]) -> Tensor:
    """(documents): sums over the tokens of each."""
    return torch.stack([part.sum() for part in torch.split(each, list(counts))])


def log_probabilities(model: Model, batch: Batch) -> Tensor:
    """(documents), fp32: log-probability of each answer given its prompt."""
    return sums_of_answers(token_log_probabilities(model, batch), batch.targets_of_rows)


class Reference:
    """The model before training."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._known: NDArray[np.float32] | None = None

    def log_probabilities(self, model: Model, batch: Batch, parts: Sequence[int]) -> Tensor:
        """(documents), fp32: as the function of that name gave for the batch, which holds these parts of its rows."""
        untouched = self._method.untouched(model)
        if untouched is None and batch.tokens.is_meta and batch.rows is not None:  # only shapes are asked for
            return torch.zeros(len(batch.rows) * len(parts), device=batch.tokens.device)
        if untouched is None:
            assert self._known is not None and batch.rows is not None
            return on_device(self._known[batch.rows][:, list(parts)].reshape(-1), batch.tokens.device)
        with inference(model), untouched as before:
            return log_probabilities(before, batch)

    def begin(self, model: Model, rows: RowSet, size: int, ranks: Ranks, stopping: Callable[[], bool]) -> None:
        """See Objective."""
        if self._method.untouched(model) is not None:
            return
        log.info("computing what the model says of %d rows before it is trained", len(rows.targets))
        known = torch.zeros(len(rows.targets), len(BOTH), dtype=torch.float64)
        stopped = False
        with inference(model):
            for sequences in share(
                singly(np.arange(len(rows.targets))), ranks.rank, ranks.world, size=size, forwards=None
            ):
                if stopped := stopping():
                    break
                batch = answers_batch(rows, sequences, BOTH, ranks.device)
                known[np.concatenate(sequences)] = log_probabilities(model, batch).view(-1, len(BOTH)).double().cpu()
        if ranks.any(stopped):
            raise Stopped("stopped before training began")
        ranks.sum_(known)
        self._known = known.float().numpy()

    def files(self) -> dict[str, bytes]:
        """See Objective."""
        if self._known is None:
            return {}
        content = io.BytesIO()
        np.save(content, self._known)
        return {FILE: content.getvalue()}

    def restore(self, files: dict[str, bytes]) -> None:
        """See Objective."""
        self._known = np.load(io.BytesIO(files[FILE])) if FILE in files else None
