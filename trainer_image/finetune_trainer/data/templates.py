"""Conversations to tokens, with a mask of what is learned: the assistant's words and the end of each of its turns.

Called by prepare. Which characters are the assistant's is found in one of three ways, the first that the template allows:
tags ({% generation %}), the markers of a format that we know (FORMATS), or rendering the conversation turn by turn, where each
beginning must be a prefix of the whole in characters and in tokens. If none holds, the template is refused by name: a mask that is
off by a token trains the model to speak for the user. So is one that leaves out tools or their calls: an empty answer would be learned.
"""

import json
import logging
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from ..errors import DataError, UserError
from .formats import Chat, function_name

log = logging.getLogger("finetune.templates")

DAY: Final = datetime(2024, 7, 26)
"""What the templates of Llama 3 take for today where no clock is at hand."""
_DIRECTIVES = [f"%{dash}{letter}" for dash in ("-", "") for letter in string.ascii_letters if letter != "s"]
_CALENDAR = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{each}', '{DAY.strftime(each)}')" for each in _DIRECTIVES if DAY.strftime(each) != each)
    + " | replace('%%', '%') }}{%- endmacro %}\n"
)
"""Takes the place of the function that templates have from transformers; its line leaves nothing in what is rendered."""
_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """Tokens of one row and, for each, whether it is learned."""

    tokens: list[int]
    learned: list[bool]


def rendered(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    ask: bool = False,
    goes_on: bool = False,
) -> str:
    """A conversation in the model's chat template, the same on any day: a template that writes today's date gets DAY.

    Args:
        ask: whether the assistant's next turn begins at the end.
        goes_on: whether the last turn is left open.
    """
    template = dated(tokenizer.get_chat_template(None, tools))
    text = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=ask,
        continue_final_message=goes_on,
    )
    return str(text)


def dated(template: str) -> str:
    """The template with DAY for today."""
    return _CALENDAR + template if "strftime_now" in template else template


class Format:
    """How a family of templates marks the assistant's turns."""

    def __init__(self, *starts: str, ends: Sequence[str], unless: str | None = None) -> None:
        """Args: starts, ends: what stands before an answer and what ends one; unless: what, behind a start, says that there is no answer yet."""
        guard = rf"(?!\s*{re.escape(unless)})" if unless else ""
        self.start = re.compile(f"(?:{'|'.join(map(re.escape, starts))}){guard}")
        self.end = re.compile("|".join(map(re.escape, ends)))
        self.ends = tuple(ends)
        self.markers = (*starts, *ends)


FORMATS: tuple[Format, ...] = (
    Format("<|im_start|>assistant\n", ends=["<|im_end|>"]),  # ChatML: Qwen, SmolLM2, Hermes
    # Llama 3; <|eom_id|> ends a message that the environment goes on from
    Format("<|start_header_id|>assistant<|end_header_id|>\n\n", ends=["<|eot_id|>", "<|eom_id|>"]),
    Format("<start_of_turn>model\n", ends=["<end_of_turn>"]),  # Gemma
    Format("[/INST]", "[/TOOL_RESULTS]", ends=["</s>"], unless="[TOOL_RESULTS]"),  # Mistral, Llama 2
    Format("<|assistant|>\n", ends=["</s>"]),  # Zephyr, TinyLlama
    Format("<|assistant|>\n", ends=["<|end|>"]),  # Phi 3
)

Span = tuple[int, int]


class ChatTemplate:
    """Renders, tokenises and masks conversations with a tokenizer's own template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template = str(tokenizer.chat_template)
        self._tagged = bool(_TAG.search(self._template))
        self._format = None if self._tagged else self._known_format()
        self._ends = {tokenizer.eos_token_id}
        self._said_what_is_dropped = False
        for end in (end for known in FORMATS for end in known.ends):
            token = tokenizer.convert_tokens_to_ids(end)
            if isinstance(token, int) and token != tokenizer.unk_token_id:
                self._ends.add(token)

    def encode(self, chats: Sequence[Chat], places: Sequence[str], *, everything: bool = False) -> list[Encoded]:
        """Tokens and masks of conversations; `places` name them in messages, `everything` learns the prompts, too."""
        texts = [self._render(chat, place) for chat, place in zip(chats, places, strict=True)]
        found = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        encoded = []
        for chat, place, text, tokens, offsets in zip(
            chats, places, texts, found["input_ids"], found["offset_mapping"], strict=True
        ):
            self._refuse_markers(chat, place)
            if everything:
                _refuse_without_tools(chat, place, text)
                encoded.append(Encoded(tokens, [True] * len(tokens)))
                continue
            given, answers = (len(_answers(messages)) for messages in (chat.messages[: chat.given], chat.messages))
            spans = self._spans(chat, place, text, tokens)
            _refuse_without_tools(chat, place, text, spans)
            if given and len(spans) != answers:
                raise UserError(
                    f"spec.model: its chat template marks {len(spans)} answers where {place} has {answers}, so those of the prompt cannot be told from the last; mend the template"
                )
            if len(spans) == answers:
                spans = self._with_their_thoughts(chat, place, text, spans)
            spans = spans[given:]
            learned = _covered(offsets, spans)
            self._learn_ends_of_turn(tokens, learned)
            encoded.append(Encoded(tokens, learned))
        return encoded

    def asked(self, chat: Chat, place: str) -> list[int]:
        """Tokens of a conversation up to where the assistant's next turn begins."""
        text = self._render(chat, place, ask=True)
        _refuse_without_tools(chat, place, text)
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def _render(self, chat: Chat, place: str, *, ask: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return rendered(self._tokenizer, chat.messages, tools=chat.tools, ask=ask)
        except (TemplateError, TypeError) as error:
            raise DataError(f"{place}: the model's chat template refuses the conversation: {error}") from error

    def _spans(self, chat: Chat, place: str, text: str, tokens: list[int]) -> list[Span]:
        if self._tagged:
            return self._tagged_spans(chat, text)
        if self._format:
            return self._marked_spans(self._format, chat, place, text)
        return self._grown_spans(chat, place, text, tokens)

    def _tagged_spans(self, chat: Chat, text: str) -> list[Span]:
        from transformers.utils.chat_template_utils import render_jinja_template

        (same,), spans = render_jinja_template(
            conversations=[chat.messages],
            tools=chat.tools,
            chat_template=dated(self._template),
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        if same != text:
            raise UserError(
                "spec.model: its chat template renders differently with and without generation tags; mend the template"
            )
        return [(start, end) for start, end in spans[0]]

    def _known_format(self) -> Format | None:
        """The format whose markers this template writes; told from a rendering, since templates build markers from pieces."""
        probe = [{"role": "user", "content": "q7"}, {"role": "assistant", "content": "a7"}]
        try:
            text = rendered(self._tokenizer, probe)
        except Exception:  # a template that needs more than a question and an answer is left to the third way
            return None
        for known in FORMATS:
            starts = [match.end() for match in known.start.finditer(text)]
            if len(starts) == 1 and known.end.search(text, max(starts[0], text.find("a7"))):
                return known
        return None

    def _refuse_markers(self, chat: Chat, place: str) -> None:
        """A message's own marker would end its turn."""
        if self._format is None:
            return
        markers = self._format.markers
        for written in _strings([chat.messages, chat.tools]):
            if any(marker in written for marker in markers):
                raise DataError(
                    f"{place}: a message contains the chat template's own marker {' or '.join(map(repr, markers))}"
                )

    def _marked_spans(self, known: Format, chat: Chat, place: str, text: str) -> list[Span]:
        spans = []
        begun = known.start.search(text)
        while begun:
            ended = known.end.search(text, begun.end())
            end = ended.end() if ended else len(text)
            spans.append((begun.end(), end))
            begun = known.start.search(text, end)
        answers = len(_answers(chat.messages))
        if len(spans) != answers:
            raise UserError(
                f"spec.model: its chat template writes {len(spans)} answers for the {answers} of {place}, so they cannot be told "
                "from prompts; set objective.sft.lossOn: all, or use a template with {% generation %} tags"
            )
        return spans

    def _with_their_thoughts(self, chat: Chat, place: str, text: str, spans: list[Span]) -> list[Span]:
        """The answers as empty spans that the template writes without the thought that led to them: templates such as Qwen3's drop those of earlier
        turns, and what is left is not what the model is asked to write there."""
        kept = list(spans)
        answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        for number, i in enumerate(answers[:-1]):
            if not _has_thought(chat.messages[i]):
                continue
            alone = Chat(chat.messages[: i + 1], chat.tools)
            last = self._render(alone, place)
            found = self._spans(alone, place, last, self._tokenizer(last, add_special_tokens=False)["input_ids"])
            start, end = spans[number]
            if not found or last[slice(*found[-1])] != text[start:end]:
                kept[number] = (start, start)
        if kept != spans and not self._said_what_is_dropped:
            self._said_what_is_dropped = True
            log.warning(
                "the chat template drops the thoughts of earlier answers (first in %s), so of such conversations only answers that keep theirs are learned; "
                "give each answer a row of its own, with the conversation so far, to learn all",
                place,
            )
        return kept

    def _grown_spans(self, chat: Chat, place: str, text: str, tokens: list[int]) -> list[Span]:
        spans = []
        for i, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            before = self._render(Chat(chat.messages[:i], chat.tools), place, ask=True)
            after = self._render(Chat(chat.messages[: i + 1], chat.tools), place)
            head = self._tokenizer(before, add_special_tokens=False)["input_ids"]
            if not text.startswith(after) or not after.startswith(before) or tokens[: len(head)] != head:
                raise UserError(
                    f"spec.model: its chat template renders a conversation differently as it grows (seen at {place}), so answers cannot "
                    "be told from prompts; set objective.sft.lossOn: all, or use a template with {% generation %} tags"
                )
            spans.append((len(before), len(after)))
        return spans

    def _learn_ends_of_turn(self, tokens: list[int], learned: list[bool]) -> None:
        """Extends each learned run by the end-of-turn token after it, and cuts what the template puts behind one."""
        ended = False
        for i, token in enumerate(tokens):
            is_end = token in self._ends
            if is_end and not learned[i] and i and learned[i - 1] and not ended:
                learned[i] = True
            if not learned[i]:
                ended = False
            elif ended:
                learned[i] = False
            elif is_end:
                ended = True


def _strings(value: Any) -> Iterator[str]:
    """Every text in a value of lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def _has_thought(message: dict[str, Any]) -> bool:
    return "</think>" in str(message.get("content") or "") or bool(
        message.get("reasoning_content") or message.get("thinking")
    )


def _answers(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in messages if message["role"] == "assistant"]


def _refuse_without_tools(chat: Chat, place: str, text: str, spans: Sequence[Span] = ()) -> None:
    """However a template writes tools and their calls, it writes the names of the functions, and those of an answer's calls in its span."""
    if not chat.tools and not any(message.get("tool_calls") for message in chat.messages):
        return
    answers = _answers(chat.messages)
    parts: list[tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]], str]] = [
        (chat.messages, chat.tools or (), text)
    ]
    if len(spans) == len(answers):
        parts += [([answer], (), text[start:end]) for answer, (start, end) in zip(answers, spans, strict=True)]
    for messages, tools, written in parts:
        calls = [call for message in messages for call in message.get("tool_calls", ())]
        names = Counter(filter(None, map(function_name, [*tools, *calls])))
        said = [_said(message) for message in messages] if names else []
        for name, times in names.items():
            if written.count(name) < times + sum(content.count(name) for content in said if content in written):
                raise UserError(
                    f"spec.model: its chat template leaves out tools of {place}, or calls of them, which then could not be learned; "
                    "use a model whose chat template has tools, or leave tools and tool_calls out of the rows"
                )


def _said(message: dict[str, Any]) -> str:
    """An answer's words beside its calls; none if they stand in the calls, where nobody could tell them apart."""
    words = str(message.get("content") or "").strip()
    return "" if words in json.dumps(message.get("tool_calls", ""), ensure_ascii=False) else words


def _covered(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Tokens that lie wholly inside a span. Both are in order."""
    learned = [False] * len(offsets)
    remaining = iter(spans)
    span = next(remaining, None)
    for i, (start, end) in enumerate(offsets):
        while span and start >= span[1]:
            span = next(remaining, None)
        if span is None:
            break
        learned[i] = span[0] <= start and end <= span[1] and end > start
    return learned
