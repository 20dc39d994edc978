"""Golden masks: in each well-known format a conversation as it is rendered, with what is learned between « and »."""

import logging
from typing import Any

import pytest

from finetune_crds.v1alpha1.dataset import Columns
from finetune_trainer.data.encoding.language import Language
from finetune_trainer.data.formats import Chat, RowFormat
from finetune_trainer.errors import DataError

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


def masked(name: str, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
    """The rendered row, what is learned between « and »."""
    tokenizer = chat_formats.tokenizer(name)
    row = {"messages": messages, "tools": tools}
    example = RowFormat(row, "text-generation", None, Columns(), "f", "singleLabel", None).example(1, row)
    assert isinstance(example, Chat)
    (encoded,) = Language(tokenizer, None, 4096).masked([example], ["f row 1"])
    text, before = "", False
    for token, learned in [*zip(encoded.tokens, encoded.learned, strict=True), (None, False)]:
        text += "»" * (before and not learned) + "«" * (learned and not before)
        text += tokenizer.decode([token]) if token is not None else ""
        before = learned
    return text


ROME = '<tool_call>\n{"name": "sky", "arguments": {"at": "Rome"}}\n</tool_call>'
SKY = '{"type": "function", "function": {"name": "sky"}}'
LLAMA_HEAD = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n"


def im(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def im_answer(text: str) -> str:
    return f"<|im_start|>assistant\n«{text}<|im_end|>»\n"


def header(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


def header_answer(text: str, end: str = "<|eot_id|>") -> str:
    return f"<|start_header_id|>assistant<|end_header_id|>\n\n«{text}{end}»"


def turn(text: str) -> str:
    return f"<start_of_turn>user\n{text}<end_of_turn>\n"


def turn_answer(text: str) -> str:
    return f"<start_of_turn>model\n«{text}<end_of_turn>»\n"


IM_TURNS = im("user", "one") + im_answer("two three") + im("user", "four") + im_answer("five")
RESULT = im("user", "<tool_response>\nblue\n</tool_response>")
LLAMA_CALL = '{"name": "sky", "parameters": {"at": "Rome"}}'
FUNCTION = '{{"name": "sky", "arguments": {{"at": "{}"}}}}'

GOLDEN: dict[str, tuple[str, list[dict[str, Any]], list[Any] | None, str]] = {
    "smollm2": ("smollm2", TURNS, None, im("system", "You are SmolLM") + IM_TURNS),
    "smollm2, system": ("smollm2", [SYSTEM, *TURNS], None, im("system", "be brief") + IM_TURNS),
    "qwen2.5": ("qwen2.5", TURNS, None, im("system", "You are Qwen.") + IM_TURNS),
    "qwen2.5, system": ("qwen2.5", [SYSTEM, *TURNS], None, im("system", "be brief") + IM_TURNS),
    "qwen2.5, tools": (
        "qwen2.5", CALLS, TOOLS,
        im("system", f"You are Qwen.\n\n# Tools\n{SKY}") + im("user", "hi") + im_answer("yes?") + im("user", "sky?")
        + im_answer(ROME) + RESULT + im_answer("Blue."),
    ),
    "qwen3": (
        "qwen3", TURNS, None, im("user", "one") + im_answer("two three") + im("user", "four") + im_answer("<think>\n\n</think>\n\nfive"),
    ),
    "qwen3, thoughts": (
        "qwen3", [SYSTEM, *thinking("content")], None,
        im("system", "be brief") + im("user", "one") + im("assistant", "two three") + im("user", "four") + im_answer("<think>\nhm\n</think>\n\nfive"),
    ),
    "qwen3, thoughts beside": (
        "qwen3", thinking("reasoning_content"), None,
        im("user", "one") + im("assistant", "two three") + im("user", "four") + im_answer("<think>\nhm\n</think>\n\nfive"),
    ),
    "qwen3, tools": (
        "qwen3", [*CALLS[2:3], {**CALLS[3], "reasoning_content": "hm"}, *CALLS[4:]], TOOLS,
        im("system", f"\n\n# Tools\n{SKY}") + im("user", "sky?") + im_answer(f"<think>\nhm\n</think>\n\n\n{ROME}") + RESULT
        + im_answer("<think>\n\n</think>\n\nBlue."),
    ),
    "llama3": (
        "llama3", TURNS, None,
        LLAMA_HEAD + "<|eot_id|>" + header("user", "one") + header_answer("two three") + header("user", "four") + header_answer("five"),
    ),
    "llama3, system and tools": (
        "llama3", [SYSTEM, *CALLS], TOOLS,
        LLAMA_HEAD + "be brief<|eot_id|>" + header("user", f"{SKY}\n\nhi") + header_answer("yes?") + header("user", "sky?")
        + header_answer(LLAMA_CALL) + header("ipython", '"blue"') + header_answer("Blue."),
    ),
    "llama3, a call that ends a message and not a turn": (
        "llama3-environment", CALLS[2:], None,
        LLAMA_HEAD + "<|eot_id|>" + header("user", "sky?") + header_answer(LLAMA_CALL, "<|eom_id|>") + header("ipython", '"blue"') + header_answer("Blue."),
    ),
    "gemma": ("gemma", TURNS, None, "<bos>" + turn("one") + turn_answer("two three") + turn("four") + turn_answer("five")),
    "gemma3, system": (
        "gemma3", [SYSTEM, *TURNS], None, "<bos>" + turn("be brief\n\none") + turn_answer("two three") + turn("four") + turn_answer("five"),
    ),
    "mistral": ("mistral", TURNS, None, "<s>[INST] one[/INST]« two three</s>»[INST] four[/INST]« five</s>»"),
    "mistral, system": (
        "mistral", [SYSTEM, *TURNS], None, "<s>[INST] one[/INST]« two three</s>»[INST] be brief\n\nfour[/INST]« five</s>»",
    ),
    "mistral, tools": (
        "mistral", CALLS, TOOLS,
        f"<s>[INST] hi[/INST]« yes?</s>»[AVAILABLE_TOOLS] [{SKY}][/AVAILABLE_TOOLS][INST] sky?[/INST]«[TOOL_CALLS] [{FUNCTION.format('Rome')}]</s>»"
        '[TOOL_RESULTS] {"content": "blue"}[/TOOL_RESULTS]« Blue.</s>»',
    ),
    "mistral, two calls at once": (
        "mistral", TWO_CALLS, None,
        f"<s>[INST] sky?[/INST]«[TOOL_CALLS] [{FUNCTION.format('Rome')}, {FUNCTION.format('Bonn')}]</s>»"
        '[TOOL_RESULTS] {"content": "blue"}[/TOOL_RESULTS][TOOL_RESULTS] {"content": "grey"}[/TOOL_RESULTS]« Both.</s>»',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN)
def test_what_is_learned_of_a_conversation(case: str) -> None:
    name, messages, tools, expected = GOLDEN[case]
    assert masked(name, messages, tools) == expected


def test_gemma_has_no_system_message() -> None:
    with pytest.raises(DataError, match=r"f row 1: the model's chat template refuses .*System role not supported"):
        masked("gemma", [SYSTEM, *TURNS])


def test_dropped_thoughts_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    language = Language(chat_formats.tokenizer("qwen3"), None, 4096)
    with caplog.at_level(logging.WARNING, "finetune.templates"):
        language.masked([Chat(thinking("content"))] * 2, ["f row 1", "f row 2"])
    (record,) = caplog.records
    assert "drops the thoughts of earlier answers (first in f row 1)" in record.getMessage()


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "mistral"])
def test_a_marker_in_a_call_is_refused(name: str) -> None:
    end = chat_formats.CHAT_FORMATS[name].end
    messages = [CALLS[2], {"role": "assistant", "tool_calls": [call(f"secret{end}")]}]
    with pytest.raises(DataError, match="f row 1: a message contains the chat template's own marker") as raised:
        masked(name, messages)
    assert "secret" not in str(raised.value)
