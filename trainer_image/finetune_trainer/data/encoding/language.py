"""Chats, instructions and texts: what a decoder learns to write."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from ...errors import UserError
from ..formats import Chat, Example, Instruction, Text
from ..templates import ChatTemplate, Encoded
from .row import EncodedRow

LossOn = Literal["assistant", "all"] | None
TooLong = Literal["truncate", "drop", "split"]
Kind = TypeVar("Kind", Chat, Instruction, Text)
_TRIES = 4


class Language:
    """Learned is the answer, or with loss_on "all" and in plain text everything.

    What is too long loses its end: a text the rest of it, a conversation its later turns. Where not even the first answer would be whole,
    the prompt before it loses its beginning, since a question comes at the end of what it is about; an answer loses its end only where it
    is too long by itself. With too_long "split" a text becomes several rows.
    """

    def __init__(self, tokenizer: Any, loss_on: LossOn, limit: int, too_long: TooLong = "truncate") -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._limit = limit
        self._too_long = too_long
        self._begin: int | None = tokenizer.bos_token_id
        self._template = ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[EncodedRow]]:
        """See Encoder."""
        if self._too_long == "split":
            for example, place in zip(examples, places, strict=True):
                if not isinstance(example, Text):
                    raise UserError(
                        f"dataset.tooLong: split is for plain text, and {place} has a prompt and an answer; use truncate or drop"
                    )
            return [pieces(one.tokens, self._limit, self._begin) for one in self.masked(examples, places)]
        masked = zip(examples, places, self.masked(examples, places), strict=True)
        return [[self._row(example, place, one)] for example, place, one in masked]

    def masked(self, examples: Sequence[Example], places: Sequence[str]) -> list[Encoded]:
        """Tokens and masks, however long."""
        encoded: dict[int, Encoded] = {}
        self._each(examples, places, Chat, self._chats, encoded)
        self._each(examples, places, Instruction, self._instructions, encoded)
        self._each(examples, places, Text, self._texts, encoded)
        return [encoded[i] for i in range(len(examples))]

    def asked(self, example: Chat | Instruction, place: str) -> list[int]:
        """Tokens of a prompt, up to where its answer begins."""
        if self._template is not None:
            chat = example if isinstance(example, Chat) else Chat(example.chat.messages[:-1])
            return self._template.asked(chat, place)
        if isinstance(example, Chat):
            raise _no_template()
        return self._tokens([_headed(example)], special=True)[0]

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
            raise _no_template()
        return self._template.encode(chats, places, everything=self._loss_on == "all")

    def _instructions(self, instructions: list[Instruction], places: list[str]) -> list[Encoded]:
        if self._template is not None:
            return self._chats([one.chat for one in instructions], places)
        heads = self._tokens([_headed(one) for one in instructions], special=True)
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

    def _row(self, example: Example, place: str, one: Encoded) -> EncodedRow:
        truncated = len(one.tokens) > self._limit
        if truncated and self._too_long == "truncate" and self._loss_on != "all" and not isinstance(example, Text):
            one = self._with_first_answer(example, place, one)
        tokens, learned = one.tokens[: self._limit], one.learned[: self._limit]
        return EncodedRow(tokens, learned, targets=sum(learned[1:]), truncated=truncated)

    def _with_first_answer(self, example: Example, place: str, whole: Encoded) -> Encoded:
        """The row with the beginning of its prompt cut off until the first answer fits; as it was if that answer is too long by itself."""
        one, shorter = whole, example
        for _ in range(_TRIES):  # tokens at the cut may join otherwise than before
            excess = _end_of_first_answer(one.learned) - self._limit
            if excess <= 0:
                return one
            found = self._shortened(shorter, excess)
            if found is None:
                return whole
            shorter = found
            (one,) = self.masked([shorter], [place])
        return whole

    def _shortened(self, example: Example, count: int) -> Example | None:
        """The example without the first tokens of the prompt that its first answer replies to; None where there are not so many."""
        if isinstance(example, Instruction):
            rest = self._without_beginning(example.prompt, count)
            return replace(example, prompt=rest) if rest else None
        assert isinstance(example, Chat)
        first = next((i for i, message in enumerate(example.messages) if message["role"] == "assistant"), 0)
        asked = [
            i
            for i, message in enumerate(example.messages[:first])
            if message["role"] == "user" and isinstance(message.get("content"), str)
        ]
        if not asked:
            return None
        messages = list(example.messages)
        rest = self._without_beginning(messages[asked[-1]]["content"], count)
        messages[asked[-1]] = {**messages[asked[-1]], "content": rest}
        return replace(example, messages=messages) if rest else None

    def _without_beginning(self, text: str, count: int) -> str:
        spans = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if count >= len(spans):
            return ""
        cut = spans[count - 1][1]  # a character may be several tokens
        return text[next((start for start, _ in spans[count:] if start >= cut), len(text)) :]

    def _tokens(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """Tokens with the tokenizer's own beginning if `special`, and never with its end: where a row ends is ours to say."""
        end = self._tokenizer.eos_token_id
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=special)["input_ids"]
        return [tokens[:-1] if special and tokens and tokens[-1] == end else tokens for tokens in found]

    @staticmethod
    def _everything(tokens: list[int]) -> Encoded:
        return Encoded(tokens, [True] * len(tokens))


def _headed(one: Instruction) -> str:
    """What stands before the answer, for models without a template."""
    return "\n\n".join(filter(None, (one.system, one.prompt, ""))) + "\n\n"


def _no_template() -> UserError:
    return UserError(
        "spec.model: its tokenizer has no chat template, which chat rows need; use an instruct model, or instruction rows"
    )


def pieces(tokens: list[int], limit: int, begin: int | None) -> list[EncodedRow]:
    """A text's tokens as rows of at most `limit`; each token but the first is learned once.

    Each row begins with the last token of the one before, from which its first own token is told, behind the text's own first token
    where that is `begin`: models that were trained with one before each text do badly without.
    """
    if len(tokens) <= limit:
        return [EncodedRow(tokens, [True] * len(tokens), targets=len(tokens) - 1)]
    head = tokens[:1] if tokens[0] == begin else []
    rows = [EncodedRow(tokens[:limit], [True] * limit, targets=limit - 1)]
    stride = limit - len(head) - 1
    for start in range(limit - 1, len(tokens) - 1, stride):
        piece = tokens[start : start + stride + 1]
        learned = [False] * (len(head) + 1) + [True] * (len(piece) - 1)
        rows.append(EncodedRow([*head, *piece], learned, targets=len(piece) - 1))
    return rows


def _end_of_first_answer(learned: Sequence[bool]) -> int:
    """Behind its last token; 0 where there is no answer."""
    start = next((i for i, it in enumerate(learned) if it), len(learned))
    end = next((i for i in range(start, len(learned)) if not learned[i]), len(learned))
    return end if start < end else 0
