"""Answers to the user's fixed prompts, greedily, with the model as it is. Called by train on the first rank."""

from collections.abc import Sequence
from typing import Any

import torch

from .models import Model


def answer(
    model: Model, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, device: torch.device
) -> list[str]:
    """One answer for each prompt, which goes through the chat template if there is one. The most likely token each time: no randomness."""
    ends = _ends(model, tokenizer)
    model.outer.eval()
    answers = []
    with torch.no_grad():
        for prompt in prompts:
            tokens = _answer(model, _asked(tokenizer, prompt), max_new_tokens, ends, device)
            answers.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    model.outer.train()
    return answers


def _asked(tokenizer: Any, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt + "\n\n")["input_ids"])


def _answer(model: Model, asked: list[int], most: int, ends: set[int], device: torch.device) -> list[int]:
    arguments, position = model.beginning(torch.tensor([asked], device=device))
    said: list[int] = []
    while len(said) < most:
        output = model.inner.base_model(**arguments, use_cache=True)
        token = int(model.head(output.last_hidden_state[:, -1]).argmax(dim=-1))
        if token in ends:
            break
        said.append(token)
        arguments = {
            "input_ids": torch.tensor([[token]], device=device),
            "position_ids": torch.tensor([[position]], device=device),
            "past_key_values": output.past_key_values,
        }
        position += 1
    return said


def _ends(model: Model, tokenizer: Any) -> set[int]:
    given = getattr(model.inner.generation_config, "eos_token_id", None)
    listed = given if isinstance(given, list) else [given]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}
