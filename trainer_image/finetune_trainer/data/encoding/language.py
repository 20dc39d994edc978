"""Chats, instructions and texts: what a decoder learns to write."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from ...errors import UserError
from ..formats import Chat, Example, Instruction, Text
from ..templates import ChatTemplate, Encoded
from .row import EncodedRow

LossOn = Literal["assistant", "all"] | None
Kind = TypeVar("Kind", Chat, Instruction, Text)


class Language:
    """Learned is the answer, or with loss_on "all" and in plain text everything. What is too long loses its end."""

    def __init__(self, tokenizer: Any, loss_on: LossOn, limit: int) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._limit = limit
        self._template = ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[EncodedRow]]:
        """See Encoder."""
        return [[self._row(one)] for one in self.masked(examples, places)]

    def masked(self, examples: Sequence[Example], places: Sequence[str]) -> list[Encoded]:
        """Tokens and masks, however long."""
        encoded: dict[int, Encoded] = {}
        self._each(examples, places, Chat, self._chats, encoded)
        self._each(examples, places, Instruction, self._instructions, encoded)
        self._each(examples, places, Text, self._texts, encoded)
        return [encoded[i] for i in range(len(examples))]

    def _each(
        self,
        examples: Sequence[Example],
        places: Sequence[str],
        kind: type[Kind],
        encode: Callable[[list[Kind], list[str]], list[Encoded]],
        into: dict[int, Encoded],
    ) -> None:
        chosen = [(i, example) for i, example in enumerate(examples) if isinstance(example, kind)]
        if chosen:
            found = encode([example for _, example in chosen], [places[i] for i, _ in chosen])
            into.update(zip((i for i, _ in chosen), found, strict=True))

    def _chats(self, chats: list[Chat], places: list[str]) -> list[Encoded]:
        if self._template is None:
            raise UserError(
                "spec.model: its tokenizer has no chat template, which chat rows need; use an instruct model, or instruction rows"
            )
        found = self._template.encode(chats, places)
        return [self._everything(one.tokens) for one in found] if self._loss_on == "all" else found

    def _instructions(self, instructions: list[Instruction], places: list[str]) -> list[Encoded]:
        if self._template is not None:
            return self._chats([one.chat for one in instructions], places)
        prompts = ["\n\n".join(filter(None, (one.system, one.prompt, ""))) + "\n\n" for one in instructions]
        heads = self._tokens(prompts, special=True)
        tails = self._tokens([one.completion for one in instructions], special=False)
        found = []
        for head, tail in zip(heads, tails, strict=True):
            tokens = [*head, *tail, self._tokenizer.eos_token_id]
            learned = [self._loss_on == "all"] * len(head) + [True] * (len(tail) + 1)
            found.append(Encoded(tokens, learned))
        return found

    def _texts(self, texts: list[Text], places: list[str]) -> list[Encoded]:
        if self._loss_on == "assistant":
            raise UserError(
                f"objective.sft.lossOn: assistant needs chat or instruction rows, and {places[0]} is plain text; remove lossOn"
            )
        end = self._tokenizer.eos_token_id
        return [self._everything([*tokens, end]) for tokens in self._tokens([one.text for one in texts], special=True)]

    def _row(self, one: Encoded) -> EncodedRow:
        tokens, learned = one.tokens[: self._limit], one.learned[: self._limit]
        return EncodedRow(tokens, learned, targets=sum(learned[1:]), truncated=len(one.tokens) > self._limit)

    def _tokens(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """Tokens with the tokenizer's own beginning if `special`, and never with its end: where a row ends is ours to say."""
        end = self._tokenizer.eos_token_id
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=special)["input_ids"]
        return [tokens[:-1] if special and tokens and tokens[-1] == end else tokens for tokens in found]

    @staticmethod
    def _everything(tokens: list[int]) -> Encoded:
        return Encoded(tokens, [True] * len(tokens))
