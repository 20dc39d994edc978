"""Answers to the user's fixed prompts, greedily, with the model as it is. Called by train on the first rank."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune_crds import support
from finetune_crds.resolved import ResolvedFineTune

from ..data.encoding.pairs import Pairs
from ..data.templates import rendered
from . import encoder_decoder
from .generation import ends
from .models import Model, inference


def answers(spec: ResolvedFineTune, model: Model, tokenizer: Any, device: torch.device) -> list[str]:
    """Answers to evaluation.prompts; of tasks that make one text of another, what the prompts become."""
    prompts, most = spec.evaluation.prompts, spec.evaluation.max_new_tokens
    if spec.task not in support.PAIRS:
        return answer(model, tokenizer, prompts, most, device)
    assert spec.training.sequence_length
    rows = Pairs(tokenizer, spec.dataset.prefix or "", spec.training.sequence_length)
    with inference(model):  # one by one, as the other tasks: a prompt may be as long as a row
        sources = [torch.tensor(rows.source(prompt), device=device) for prompt in prompts]
        said = [text for source in sources for text in write(model, tokenizer, [source], most)]
    return said


def write(model: Model, tokenizer: Any, sources: Sequence[Tensor], most: int) -> list[str]:
    """What an encoder-decoder writes of sources in tokens: at most `most` tokens, the most likely one each time."""
    found = encoder_decoder.write(model.inner, model.logits, sources, most, ends(model, tokenizer))
    return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in found]


def answer(
    model: Model, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, device: torch.device
) -> list[str]:
    """One answer for each prompt, which goes through the chat template if there is one. The most likely token each time: no randomness."""
    with inference(model):
        return [say(model, tokenizer, _asked(tokenizer, prompt), max_new_tokens, device) for prompt in prompts]


def say(model: Model, tokenizer: Any, asked: list[int], max_new_tokens: int, device: torch.device) -> str:
    """What a decoder in evaluation mode says next."""
    tokens = _answer(model, asked, max_new_tokens, ends(model, tokenizer), device)
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _asked(tokenizer: Any, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        text = rendered(tokenizer, [{"role": "user", "content": prompt}], ask=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt + "\n\n")["input_ids"])


def go_on(
    model: Model, tokenizer: Any, asked: list[int], most: int, device: torch.device, until: Sequence[str]
) -> list[int]:
    """What the model writes behind some tokens, the most likely one each time, to the first of these texts or the end of its answer. Evaluation mode is the caller's."""

    def is_over(said: list[int]) -> bool:
        text = tokenizer.decode(said, skip_special_tokens=True)
        return any(stop in text for stop in until)

    return _answer(model, asked, most, ends(model, tokenizer), device, is_over)


def _answer(
    model: Model,
    asked: list[int],
    most: int,
    ends: Sequence[int],
    device: torch.device,
    is_over: Callable[[list[int]], bool] = lambda said: False,
) -> list[int]:
    arguments, position = model.beginning(torch.tensor([asked], device=device))
    head, said = model.head, list[int]()
    while len(said) < most:
        output = model.inner.base_model(**arguments, use_cache=True)
        token = int(head(output.last_hidden_state[:, -1]).argmax(dim=-1))
        if token in ends:
            break
        said.append(token)
        if is_over(said):
            break
        arguments = {
            "input_ids": torch.tensor([[token]], device=device),
            "position_ids": torch.tensor([[position]], device=device),
            "past_key_values": output.past_key_values,
        }
        position += 1
    return said
