"""Golden masks: what is learned of a conversation in each well-known format, written by hand."""

import logging
from itertools import groupby
from operator import itemgetter
from typing import Any

import pytest

from finetune_crds.v1alpha1.dataset import Columns
from finetune_trainer.data.encoding.language import Language, LossOn
from finetune_trainer.data.formats import Chat, RowFormat
from finetune_trainer.errors import DataError, UserError

from . import chat_formats

SYSTEM = {"role": "system", "content": "be brief"}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two three"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "five"},
]
TOOLS = [{"type": "function", "function": {"name": "sky"}}]


def call(city: str) -> dict[str, Any]:
    """As OpenAI writes it: the arguments are a text."""
    return {"id": "123456789", "type": "function", "function": {"name": "sky", "arguments": f'{{"at": "{city}"}}'}}


CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "sky?"},
    {"role": "assistant", "tool_calls": [call("Rome")]},
    {"role": "tool", "content": "blue"},
    {"role": "assistant", "content": "Blue."},
]
TWO_CALLS = [
    CALLS[2],
    {"role": "assistant", "content": None, "tool_calls": [call("Rome"), call("Bonn")]},
    {"role": "tool", "content": "blue"},
    {"role": "tool", "content": "grey"},
    {"role": "assistant", "content": "Both."},
]


def thinking(key: str) -> list[dict[str, Any]]:
    """Each answer behind a thought, which is a part of its text or beside it."""
    found = []
    for message in TURNS:
        if message["role"] == "assistant" and key == "content":
            message = {**message, "content": f"<think>\nhm\n</think>\n\n{message['content']}"}
        elif message["role"] == "assistant":
            message = {**message, key: "hm"}
        found.append(message)
    return found


def learned(
    name: str, messages: list[dict[str, Any]], tools: list[Any] | None = None, loss_on: LossOn = None
) -> list[str]:
    """The learned runs of a row."""
    tokenizer = chat_formats.tokenizer(name)
    row = {"messages": messages, "tools": tools}
    example = RowFormat(row, "text-generation", None, Columns(), "f").example(1, row)
    (encoded,) = Language(tokenizer, loss_on, 4096).masked([example], ["f row 1"])
    runs = groupby(zip(encoded.tokens, encoded.learned, strict=True), key=itemgetter(1))
    return [tokenizer.decode([token for token, _ in run]) for is_learned, run in runs if is_learned]


IM, HEADER, TURN = "<|im_end|>", "<|eot_id|>", "<end_of_turn>"
ROME, BONN = (
    f'<tool_call>\n{{"name": "sky", "arguments": {{"at": "{city}"}}}}\n</tool_call>' for city in ("Rome", "Bonn")
)
LLAMA_CALL = '{"name": "sky", "parameters": {"at": "Rome"}}'
MISTRAL_ROME, MISTRAL_BONN = (f'{{"name": "sky", "arguments": {{"at": "{city}"}}}}' for city in ("Rome", "Bonn"))
THOUGHT, NO_THOUGHT = "<think>\nhm\n</think>\n\n", "<think>\n\n</think>\n\n"

GOLDEN: dict[str, tuple[str, list[dict[str, Any]], list[Any] | None, list[str]]] = {
    "smollm2": ("smollm2", TURNS, None, [f"two three{IM}", f"five{IM}"]),
    "smollm2, system": ("smollm2", [SYSTEM, *TURNS], None, [f"two three{IM}", f"five{IM}"]),
    "qwen2.5": ("qwen2.5", TURNS, None, [f"two three{IM}", f"five{IM}"]),
    "qwen2.5, system and tools": ("qwen2.5", [SYSTEM, *CALLS], TOOLS, [f"yes?{IM}", f"{ROME}{IM}", f"Blue.{IM}"]),
    "qwen2.5, two calls at once": ("qwen2.5", TWO_CALLS, TOOLS, [f"{ROME}\n{BONN}{IM}", f"Both.{IM}"]),
    "qwen2.5, a call behind words": (
        "qwen2.5", [CALLS[2], {**CALLS[3], "content": "The sky:"}], TOOLS, [f"The sky:\n{ROME}{IM}"],
    ),
    "qwen3": ("qwen3", TURNS, None, [f"two three{IM}", f"{NO_THOUGHT}five{IM}"]),
    "qwen3, thoughts": ("qwen3", [SYSTEM, *thinking("content")], None, [f"{THOUGHT}five{IM}"]),
    "qwen3, thoughts beside": ("qwen3", thinking("reasoning_content"), None, [f"{THOUGHT}five{IM}"]),
    "qwen3, thoughts and tools": (
        "qwen3", [CALLS[2], {**CALLS[3], "reasoning_content": "the sky"}, *CALLS[4:]], TOOLS,
        [f"<think>\nthe sky\n</think>\n\n{ROME}{IM}", f"{NO_THOUGHT}Blue.{IM}"],
    ),
    "qwen3, two calls at once": ("qwen3", [SYSTEM, *TWO_CALLS], TOOLS, [f"{ROME}\n{BONN}{IM}", f"{NO_THOUGHT}Both.{IM}"]),
    "llama3": ("llama3", [SYSTEM, *TURNS], None, [f"two three{HEADER}", f"five{HEADER}"]),
    "llama3.1": ("llama3.1", TURNS, None, [f"two three{HEADER}", f"five{HEADER}"]),
    "llama3.1, system and tools": (
        "llama3.1", [SYSTEM, *CALLS], TOOLS, [f"yes?{HEADER}", f"{LLAMA_CALL}{HEADER}", f"Blue.{HEADER}"],
    ),
    "llama3.1, a call that ends a message and not a turn": (
        "llama3.1-environment", CALLS[2:], TOOLS, [f"{LLAMA_CALL}<|eom_id|>", f"Blue.{HEADER}"],
    ),
    "gemma": ("gemma", TURNS, None, [f"two three{TURN}", f"five{TURN}"]),
    "gemma3, system": ("gemma3", [SYSTEM, *TURNS], None, [f"two three{TURN}", f"five{TURN}"]),
    "phi3, system": ("phi3", [SYSTEM, *TURNS], None, ["two three<|end|>", "five<|end|>"]),
    "mistral": ("mistral", TURNS, None, [" two three</s>", " five</s>"]),
    "mistral, system": ("mistral", [SYSTEM, *TURNS], None, [" two three</s>", " five</s>"]),
    "mistral, tools": ("mistral", CALLS, TOOLS, [" yes?</s>", f"[TOOL_CALLS] [{MISTRAL_ROME}]</s>", " Blue.</s>"]),
    "mistral, two calls at once": (
        "mistral", TWO_CALLS, None, [f"[TOOL_CALLS] [{MISTRAL_ROME}, {MISTRAL_BONN}]</s>", " Both.</s>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN)
def test_what_is_learned_of_a_conversation(case: str) -> None:
    name, messages, tools, expected = GOLDEN[case]
    assert learned(name, messages, tools) == expected


def test_gemma_has_no_system_message() -> None:
    with pytest.raises(DataError, match=r"f row 1: the model's chat template refuses .*System role not supported"):
        learned("gemma", [SYSTEM, *TURNS])


def test_dropped_thoughts_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    language = Language(chat_formats.tokenizer("qwen3"), None, 4096)
    with caplog.at_level(logging.WARNING, "finetune.templates"):
        language.masked([Chat(thinking("content"))] * 2, ["f row 1", "f row 2"])
    (record,) = caplog.records
    assert "drops the thoughts of earlier answers (first in f row 1)" in record.getMessage()


NO_WORDS = {"role": "assistant", "content": "", "tool_calls": [call("Rome")]}
LEFT_OUT = r"spec.model: its chat template leaves out tools of f row 1, or calls of them.*; use a model whose chat template has tools"
WITHOUT_TOOLS: dict[str, tuple[str, list[dict[str, Any]], list[Any] | None]] = {
    "llama3, calls": ("llama3", CALLS, None),
    "llama3, a call and its name in words": ("llama3", [TURNS[0], {**NO_WORDS, "content": "sky."}], None),
    "llama3, tools": ("llama3", TURNS, TOOLS),
    "llama3, a tool and its name in words": ("llama3", [CALLS[2], TURNS[1]], TOOLS),
    "phi3, calls": ("phi3", [CALLS[2], NO_WORDS], None),
    "smollm2, calls": ("smollm2", [CALLS[2], NO_WORDS], None),
    "smollm2, tools": ("smollm2", TURNS, TOOLS),
    "gemma, calls": ("gemma", [CALLS[2], NO_WORDS], None),
    "gemma3, tools": ("gemma3", TURNS, TOOLS),
}


@pytest.mark.parametrize("case", WITHOUT_TOOLS)
def test_tools_that_a_template_leaves_out_are_refused(case: str) -> None:
    name, messages, tools = WITHOUT_TOOLS[case]
    for loss_on in (None, "all"):
        with pytest.raises(UserError, match=LEFT_OUT):
            learned(name, messages, tools, loss_on)
    with pytest.raises(UserError, match=LEFT_OUT):
        Language(chat_formats.tokenizer(name), None, 4096).asked(Chat(messages, tools), "f row 1")


def test_a_second_call_that_a_template_leaves_out_is_refused() -> None:
    tokenizer = chat_formats.tokenizer("qwen2.5")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "in message.tool_calls %}", "in message.tool_calls[:1] %}"
    )
    with pytest.raises(UserError, match=LEFT_OUT):
        Language(tokenizer, None, 4096).masked([Chat(TWO_CALLS, TOOLS)], ["f row 1"])


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1", "mistral"])
def test_a_marker_in_a_call_is_refused(name: str) -> None:
    end = chat_formats.CHAT_FORMATS[name].end
    messages = [CALLS[2], {"role": "assistant", "tool_calls": [call(f"secret{end}")]}]
    with pytest.raises(DataError, match="f row 1: a message contains the chat template's own marker") as raised:
        learned(name, messages)
    assert "secret" not in str(raised.value)
