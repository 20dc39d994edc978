"""One text made of another: summarization and translation, measured by what the model writes of held-out sources."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune_crds.resolved import ResolvedFineTune

from ..data import batches
from ..data.batches import Batch
from ..data.packing import Sequence as Rows
from ..data.prepared import RowSet
from ..modelling import samples
from ..modelling.head_loss import head_loss
from ..modelling.models import Model
from .objective import Accumulator, Objective


class Texts(Accumulator):
    """Statistics of what was written, beside what was meant."""

    @abstractmethod
    def add_texts(self, written: Sequence[str], meant: Sequence[str]) -> None:
        """Adds the texts of some rows."""


class LossAlone(Accumulator):
    """eval_loss, for which nothing has to be written."""

    def __init__(self) -> None:
        super().__init__(0)

    def metrics(self) -> dict[str, float]:
        """See Accumulator."""
        return {"eval_loss": self.loss}


class Summaries(Texts):
    """eval_rouge1, eval_rouge2, eval_rougeL: mean F-measures over rows (Lin 2004), without stemming, from 0 to 1."""

    NAMES = ("rouge1", "rouge2", "rougeL")

    def __init__(self) -> None:
        super().__init__(1 + len(self.NAMES))

    def add_texts(self, written: Sequence[str], meant: Sequence[str]) -> None:
        """See Texts."""
        from torchmetrics.functional.text import rouge_score

        found = rouge_score(list(written), list(meant), rouge_keys=self.NAMES)  # means over these rows
        means = torch.stack([found[f"{name}_fmeasure"].double() for name in self.NAMES])
        self.sums[2] += len(written)
        self.sums[3:] += len(written) * means

    def metrics(self) -> dict[str, float]:
        """See Accumulator."""
        means = (self.sums[3:] / self.sums[2].clamp(min=1)).tolist()
        return {"eval_loss": self.loss} | {f"eval_{name}": mean for name, mean in zip(self.NAMES, means, strict=True)}


class Translations(Texts):
    """eval_chrf (Popovic 2015) and eval_bleu (Papineni et al. 2002) of the whole set, as sacrebleu computes them (Post 2018), from 0 to 100."""

    def __init__(self) -> None:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        bleu, chrf = BLEU(), CHRF()
        self._measures: dict[str, Any] = {"eval_chrf": chrf, "eval_bleu": bleu}
        self._sizes = [3 * (chrf.char_order + chrf.word_order), 2 + 2 * bleu.max_ngram_order]
        super().__init__(sum(self._sizes))

    def add_texts(self, written: Sequence[str], meant: Sequence[str]) -> None:
        """See Texts. Each measure is a function of counts that texts add up to."""
        counts = [measure._extract_corpus_statistics(written, [meant]) for measure in self._measures.values()]
        both = np.concatenate([np.sum(rows, axis=0) for rows in counts])
        self.sums[2:] += torch.from_numpy(both.astype(np.float64))

    def metrics(self) -> dict[str, float]:
        """See Accumulator."""
        found = {"eval_loss": self.loss}
        for (name, measure), sums in zip(self._measures.items(), torch.split(self.sums[2:], self._sizes), strict=True):
            found[name] = float(measure._compute_score_from_stats([int(count) for count in sums]).score)
        return found


class PairLoss(Objective):
    """Cross-entropy of each token of the target."""

    def __init__(self, spec: ResolvedFineTune, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._most = spec.evaluation.max_new_tokens
        self._smoothing = float(spec.training.label_smoothing)
        self._accumulator = Summaries if spec.task == "summarization" else Translations

    def batch(self, rows: RowSet, sequences: Sequence[Rows], device: torch.device) -> Batch:
        """See Objective."""
        flat = batches.flat(rows, sequences)
        at = np.flatnonzero(np.concatenate([rows.learned[start:end] for start, end in flat.spans]))
        splits = [int(rows.splits[row]) for row in flat.rows]
        notes = [rows.note(row).decode() for row in flat.rows]
        return flat.on(device, at, flat.tokens[at], notes=notes, splits=splits)

    def extent(self, rows: RowSet, ids: NDArray[np.int64]) -> int:
        """See Objective. Sources and targets are padded to the longest."""
        sources = rows.splits[ids]
        return len(ids) * int(sources.max() + (rows.lengths[ids] - sources).max())

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """See Objective."""
        head = model.head
        assert isinstance(head, nn.Linear)
        smoothing = self._smoothing if model.outer.training else 0.0
        return head_loss(model.hidden(batch), head, batch.targets, smoothing, model.logits_bias)

    def measure(self, model: Model, batch: Batch, into: Accumulator) -> None:
        """See Objective."""
        into.add(self.loss(model, batch), len(batch.targets))
        if not isinstance(into, Texts):
            return
        rows = torch.split(batch.tokens[0], list(batch.documents.lengths))
        sources = [row[:split] for row, split in zip(rows, batch.splits, strict=True)]
        into.add_texts(samples.write(model, self._tokenizer, sources, self._most), batch.notes)

    def accumulator(self) -> Accumulator:
        """See Objective."""
        return self._accumulator()

    def accumulator_on_the_way(self) -> Accumulator:
        """See Objective."""
        return LossAlone()
