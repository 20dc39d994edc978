"""The yardstick: fine-tuning as one would write it by hand with transformers and peft. It shares no code with the trainer but the order
of rows, which it is given. Padded batches, the model's own forward pass and attention, torch's own AdamW and clipping."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


def train(
    folder: Path, rows: list[list[dict[str, str]]], steps: Sequence[Sequence[int]], *, adapt: Callable[[Any], Any], seed: int, rate: float, decay: float, clip: float,
    micro_batch: int, multiple: Callable[[str], float] = lambda name: 1.0, quantization: Any = None,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:  # fmt: skip
    """Losses and gradient norms of each step, and the trained weights.

    `steps` holds the indices of each step's rows; `adapt` puts a method on the model; `multiple` is a weight's learning rate by its name.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"quantization_config": quantization} if quantization else {}
    if device != "cpu":
        options["device_map"] = {"": device}
    model: Any = adapt(
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **options)
    )
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
        encoded = [encode(tokenizer, rows[i]) for i in step]
        count = sum(label != -100 for _, labels in encoded for label in labels[1:])
        total = 0.0
        for start in range(0, len(encoded), micro_batch):
            part = encoded[start : start + micro_batch]
            width = max(len(tokens) for tokens, _ in part)
            inputs = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in part])
            labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in part])
            mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in part])
            inputs, labels, mask = (tensor.to(device) for tensor in (inputs, labels, mask))
            logits = (
                model(input_ids=inputs, attention_mask=mask).logits[:, -width:].float()
            )  # virtual tokens come first
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            (loss / count).backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), clip)))
        losses.append(total / count)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, norms, trained


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
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
