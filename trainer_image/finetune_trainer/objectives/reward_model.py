"""Reward models as judges: classifiers with one output, whole or as an adapter with its base, as objective reward publishes them. Called by grpo.

A conversation is tokenised as objective reward does, with the reward model's own tokenizer and template. What that makes longer than the
model has positions for loses the beginning of its prompt.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from finetune_crds.resolved import ResolvedFineTune

from ..data.encoding.language import Language
from ..data.formats import Chat, Instruction
from ..errors import UserError
from ..modelling import anatomy, models
from .rewards import Answer, Judge

AT_A_TIME: Final = 16
"""Conversations in one forward pass."""


class JudgeFolders(NamedTuple):
    """Where a reward model lies on this machine."""

    model: Path
    adapter: Path | None


def reward_models(
    spec: ResolvedFineTune, folders: Mapping[str, JudgeFolders], device: torch.device
) -> dict[str, Judge]:
    """Loads them, in the type that training computes in.

    Raises:
        UserError: one is no reward model.
    """
    length = spec.training.sequence_length
    assert length, "setup decides it"
    return {name: _judge(name, both, length, models.compute_type(spec), device) for name, both in folders.items()}


def _judge(name: str, folders: JudgeFolders, length: int, dtype: torch.dtype, device: torch.device) -> Judge:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    where = f"objective.grpo.rewards: {name}"
    try:
        config = AutoConfig.from_pretrained(folders.model, local_files_only=True)
        named = any(one.endswith("ForSequenceClassification") for one in config.architectures or ())
        if (named or folders.adapter is None) and not (named and config.num_labels == 1):
            raise UserError(f"{where}: model must be a classifier with one output, as objective reward publishes it")
        if folders.adapter is not None and not named:
            _check_head(where, folders.adapter)
        positions = _positions(config, folders.adapter)
        if positions < length:
            raise UserError(
                f"{where}: model has {positions:g} positions, and prompt and answer may have {length} tokens; "
                "lower training.sequenceLength, or take a model with more"
            )
        tokenizer = models.load_tokenizer(folders.adapter or folders.model, where)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folders.model, num_labels=1, pad_token_id=pad, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        if folders.adapter:
            from peft import PeftModel

            if len(tokenizer) > len(model.get_input_embeddings().weight):  # model.addTokens
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            model = PeftModel.from_pretrained(model, str(folders.adapter))
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise UserError(f"{where}: model cannot be read as a reward model in transformers' or PEFT's format") from error
    model.to(device).eval().requires_grad_(False)
    language = Language(tokenizer, None, int(min(positions, sys.maxsize)))

    def scores(answers: Sequence[Answer]) -> list[float]:
        listed = [_whole(answer) for answer in answers]
        tokens = [torch.tensor(row.tokens) for (row,) in language.encode(listed, [where] * len(listed))]
        found: list[float] = []
        with torch.no_grad():
            for start in range(0, len(tokens), AT_A_TIME):
                part = tokens[start : start + AT_A_TIME]
                mask = pad_sequence([torch.ones_like(one) for one in part], batch_first=True)
                inputs = pad_sequence(part, batch_first=True, padding_value=pad)
                logits = model(input_ids=inputs.to(device), attention_mask=mask.to(device)).logits
                found += logits[:, 0].float().tolist()
        return found

    return scores


def _check_head(where: str, adapter: Path) -> None:
    """A base without a head gets one at random: the adapter must bring the trained one."""
    from peft import PeftConfig

    given = PeftConfig.from_pretrained(str(adapter))
    if given.task_type != "SEQ_CLS" or "score" not in (getattr(given, "modules_to_save", None) or ()):
        raise UserError(
            f"{where}: model.adapter brings no head that scores answers; name one that objective reward has published"
        )


def _positions(config: Any, adapter: Path | None) -> float:
    """Of a conversation's tokens; infinite where a model counts none."""
    from peft import PeftConfig

    virtual = getattr(PeftConfig.from_pretrained(str(adapter)), "num_virtual_tokens", None) if adapter else None
    most = getattr(config, "max_position_embeddings", None)
    return math.inf if most is None else most - anatomy.first_position(config) - (virtual or 0)


def _whole(answer: Answer) -> Chat | Instruction:
    if isinstance(answer.asked, str):
        return Instruction(answer.asked, answer.text)
    return Chat([*answer.asked, {"role": "assistant", "content": answer.text}], given=len(answer.asked))
