"""The yardstick: fine-tuning as one would write it by hand with transformers and peft. It shares no code with the trainer but the order
of rows, which it is given. Padded batches, the model's own forward pass and attention, torch's own AdamW and clipping."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
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
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:  # fmt: skip
    """Losses and gradient norms of each step, and the trained weights.

    `steps` holds the indices of each step's rows; `adapt` puts a method on the model; `multiple` is a weight's learning rate by its name.
    """
    kind = kind or CHATS
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"quantization_config": quantization} if quantization else {}
    if device != "cpu":
        options["device_map"] = {"": device}
    model: Any = adapt(kind.model.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **options))
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
            loss = kind.loss(model, inputs.to(device), labels.to(device), mask.to(device))
            (loss / count).backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), clip)))
        losses.append(total / count)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, norms, trained


def train_encoder(
    folder: Path, task: str, rows: Any, steps: Sequence[Sequence[int]], *, problem: str, seed: int, rate: float, decay: float, clip: float
) -> list[float]:  # fmt: skip
    """Losses of each step of a whole encoder, by the library's own loss; it is given the prepared rows."""
    kinds = {"token-classification": "TokenClassification", "question-answering": "QuestionAnswering"}
    kind = getattr(transformers, f"AutoModelFor{kinds.get(task, 'SequenceClassification')}")
    names = {"multiLabel": "multi_label_classification", "regression": "regression"}
    options: dict[str, Any] = {} if task == "question-answering" else {"num_labels": len(rows.index.classes) or 1}
    torch.manual_seed(seed)
    model = kind.from_pretrained(
        folder, attn_implementation="eager", problem_type=names.get(problem), **options
    ).train()
    weights = list(model.parameters())
    groups = [{"params": [p], "weight_decay": decay if p.ndim >= 2 else 0.0} for p in weights]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: (s + 1) / 2 if s < 2 else 0.5 + 0.5 * math.cos(math.pi * (s - 2) / (len(steps) - 2))
    )
    losses = []
    for step in steps:
        # Of answers the library's loss looks for them in padding too: each row alone has none.
        parts = [[i] for i in step] if task == "question-answering" else [step]
        each = [model(**encoder_batch(rows, part, task, problem)).loss / len(parts) for part in parts]
        sum(each).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(weights, clip)
        losses.append(sum(loss.item() for loss in each))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


def encoder_batch(rows: Any, ids: Sequence[int], task: str, problem: str = "singleLabel") -> dict[str, Any]:
    """A padded batch as the library wants it."""
    tokens = [torch.from_numpy(rows.tokens[rows.offsets[i] : rows.offsets[i + 1]].astype("int64")) for i in ids]
    labels = [torch.tensor(rows.labels_of(i).tolist()) for i in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    batch: dict[str, Any] = {
        "input_ids": pad(tokens, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in tokens], batch_first=True),
    }
    if task == "token-classification":
        marked = [torch.where(row < 0, -100, row).long() for row in labels]
        return batch | {"labels": pad(marked, batch_first=True, padding_value=-100)}
    if task == "question-answering":
        kinds = [(torch.arange(len(row)) >= int(rows.splits[i])).long() for i, row in zip(ids, tokens, strict=True)]
        both = torch.stack(labels).long()
        return batch | {"token_type_ids": pad(kinds, batch_first=True), "start_positions": both[:, 0], "end_positions": both[:, 1]}  # fmt: skip
    if problem == "multiLabel":
        hot = torch.zeros(len(ids), len(rows.index.classes))
        for one, row in zip(hot, labels, strict=True):
            one[row.long()] = 1
        return batch | {"labels": hot}
    return batch | {
        "labels": torch.stack(labels)[:, 0].float() if problem == "regression" else torch.stack(labels)[:, 0].long()
    }


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
    logits = (
        model(input_ids=inputs, attention_mask=mask).logits[:, -inputs.shape[1] :].float()
    )  # virtual tokens come first
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def _targets(model: Any, inputs: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The library's own loss is the mean over the labels of a batch."""
    mean: torch.Tensor = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
    return mean * (labels >= 0).sum()


CHATS = Kind(
    AutoModelForCausalLM, encode, lambda labels: sum(label != -100 for label in labels[1:]), _next_tokens
)  # fmt: skip
TEXTS = Kind(
    AutoModelForCausalLM,
    lambda tokenizer, text: ([*tokenizer(text)["input_ids"], tokenizer.eos_token_id],) * 2,
    lambda labels: len(labels) - 1,
    _next_tokens,
)
PAIRS = Kind(
    AutoModelForSeq2SeqLM,
    lambda tokenizer, row: (tokenizer(row["source"])["input_ids"], tokenizer(text_target=row["target"])["input_ids"]),
    len,
    _targets,
)
