"""The yardstick: fine-tuning as one would write it by hand with transformers and peft. It shares no code with the trainer but the order
of rows, which it is given. Padded batches, the model's own forward pass and attention, torch's own AdamW and clipping."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

Encoded = tuple[list[int], list[int]]
"""Tokens and labels."""


class Kind(NamedTuple):
    """A kind of model."""

    model: Any
    encode: Callable[[Any, Any], Encoded]
    count: Callable[[list[int]], int]
    """Labels that are learned."""
    loss: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """Sum of the loss, of tokens, labels and mask, each padded."""


def train(
    folder: Path, rows: Sequence[Any], steps: Sequence[Sequence[int]], *, adapt: Callable[[Any], Any], seed: int, rate: float, decay: float, clip: float,
    micro_batch: int, multiple: Callable[[str], float] = lambda name: 1.0, quantization: Any = None, kind: Kind | None = None,
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:  # fmt: skip
    """Losses and gradient norms of each step, and the trained weights.

    `steps` holds the indices of each step's rows; `adapt` puts a method on the model; `multiple` is a weight's learning rate by its name.
    """
    kind = kind or CHATS
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    options = {"quantization_config": quantization} if quantization else {}
    model: Any = adapt(kind.model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options))
    model.train()  # quantised layers take another kernel in evaluation
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p], "lr": rate * multiple(name), "weight_decay": decay if p.ndim >= 2 else 0.0}
        for name, p in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: (s + 1) / 2 if s < 2 else 0.5 + 0.5 * math.cos(math.pi * (s - 2) / (len(steps) - 2))
    )
    losses, norms = [], []
    for step in steps:
        encoded = [kind.encode(tokenizer, rows[i]) for i in step]
        count = sum(kind.count(labels) for _, labels in encoded)
        total = 0.0
        for start in range(0, len(encoded), micro_batch):
            part = encoded[start : start + micro_batch]
            inputs = padded([tokens for tokens, _ in part], 0)
            labels = padded([labels for _, labels in part], -100)
            mask = padded([[1] * len(tokens) for tokens, _ in part], 0)
            loss = kind.loss(model, inputs, labels, mask)
            (loss / count).backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), clip)))
        losses.append(total / count)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, norms, trained


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows of one length."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> Encoded:
    """Tokens and labels, turn by turn: the assistant's words and its end of turn are learned."""
    tokens: list[int] = []
    labels: list[int] = []
    for message in messages:
        head = tokenizer(f"<|im_start|>{message['role']}\n", add_special_tokens=False)["input_ids"]
        body = tokenizer(f"{message['content']}<|im_end|>", add_special_tokens=False)["input_ids"]
        tail = tokenizer("\n", add_special_tokens=False)["input_ids"]
        tokens += head + body + tail
        learned = message["role"] == "assistant"
        labels += [-100] * len(head) + (body if learned else [-100] * len(body)) + [-100] * len(tail)
    return tokens, labels


def _next_tokens(model: Any, inputs: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=inputs, attention_mask=mask).logits[:, -inputs.shape[1] :]  # virtual tokens come first
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def _targets(model: Any, inputs: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The library's own loss is the mean over the labels of a batch."""
    mean: torch.Tensor = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
    return mean * (labels >= 0).sum()


CHATS = Kind(
    AutoModelForCausalLM, encode, lambda labels: sum(label != -100 for label in labels[1:]), _next_tokens
)  # fmt: skip
PAIRS = Kind(
    AutoModelForSeq2SeqLM,
    lambda tokenizer, row: (tokenizer(row["source"])["input_ids"], tokenizer(text_target=row["target"])["input_ids"]),
    len,
    _targets,
)
