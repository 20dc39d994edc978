"""Examples to tokens, masks and labels: an encoder for each task. Called by prepare."""

from typing import Any

from finetune_crds.resolved import ResolvedFineTune

from .classes import TextClasses
from .language import Language
from .pairs import Pairs
from .pictures import Pictures
from .preference import Feedbacks, Preferences
from .prompts import Prompts
from .row import EncodedRow, Encoder
from .spans import Spans
from .tags import Tags

__all__ = ["EncodedRow", "Encoder", "encoder"]


def encoder(spec: ResolvedFineTune, tokenizer: Any) -> Encoder:
    """The encoder of a job's task; tokenizer is None for images."""
    if spec.task == "image-classification":
        return Pictures()
    limit = spec.training.sequence_length
    assert limit, "setup decides it"
    match spec.task:
        case "text-classification":
            return TextClasses(tokenizer, limit, keeps_texts=spec.dataset.augmentation is not None)
        case "token-classification":
            return Tags(tokenizer, limit)
        case "question-answering":
            return Spans(tokenizer, limit)
        case "summarization" | "translation":
            return Pairs(tokenizer, spec.dataset.prefix or "", limit)
        case "text-generation":
            assert spec.objective
            match spec.objective.name:
                case "dpo" | "orpo" | "reward":
                    return Preferences(tokenizer, limit)
                case "kto":
                    return Feedbacks(tokenizer, limit)
                case "grpo":
                    assert spec.objective.grpo
                    return Prompts(tokenizer, spec.objective.grpo, limit)
            loss_on = spec.objective.sft.loss_on if spec.objective.sft else None
            return Language(tokenizer, loss_on, limit, spec.dataset.too_long or "truncate")
