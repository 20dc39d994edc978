"""Which tokens of a conversation are learned: the assistant's words and the end of each turn, found in each of three ways alike."""

from typing import Any

import pytest

from finetune_trainer.data.encoding.language import Language
from finetune_trainer.data.formats import Chat, Instruction, Text
from finetune_trainer.data.templates import rendered
from finetune_trainer.errors import DataError, UserError

from . import tiny
from .chat_formats import SMOLLM2

TAGGED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Tags that leave the end of turn out, as published ones do."""
UNKNOWN = (
    "{% for message in messages %}{{ '[' + message['role'] + ']: ' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]: ' }}{% endif %}"
)
"""Markers that no registry knows: told by how a conversation grows."""
FORGETFUL = (
    "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}{{ '[' + message['role'] + ']: ' + message['content'] }}"
    "{% else %}{{ '[' + message['role'] + ']: (cut)' }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]: ' }}{% endif %}"
)
"""Earlier answers are shortened, as thoughts are: a beginning is no prefix of the whole."""
THOUGHTLESS = SMOLLM2.replace("m.content + '<", "m.content.split('</think>')[-1] + '<")
"""ChatML that drops thoughts: known by its markers, though contents change."""

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two three"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "five"},
]


def learned(template: str | None, example: Any, loss_on: Any = None) -> list[str]:
    """The learned runs of a row, as text."""
    tokenizer = tiny.tokenizer(template)
    (encoded,) = Language(tokenizer, loss_on, 4096).masked([example], ["f row 1"])
    runs: list[list[int]] = [[]]
    for token, flag in zip(encoded.tokens, encoded.learned, strict=True):
        if flag:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_a_template_that_writes_the_date_gives_the_same_text_on_any_day() -> None:
    """And nothing else of it changes, white space at its beginning least."""
    known = "\n\n  {% if strftime_now is defined %}\n{{ strftime_now('%-d %b %Y %F 100%%') }}\n  {% endif %}\n"
    without = known.replace("strftime_now('%-d %b %Y %F 100%%')", "'26 Jul 2024 2024-07-26 100%'")
    dated, plain = (rendered(tiny.tokenizer(each + SMOLLM2), TURNS) for each in (known, without))
    assert dated == plain
    assert "26 Jul 2024 2024-07-26 100%\n" in dated


def test_words_that_a_call_repeats_are_not_asked_for_twice() -> None:
    """The template writes the call alone, as that of Llama 3.1 does, and the answer's words are a part of it."""
    template = "{% for m in messages %}{% if m.tool_calls %}{{ '<|im_start|>assistant\n' + m.tool_calls[0].function | tojson }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    call = {"type": "function", "function": {"name": "search", "arguments": {"for": "stone"}}}
    turns = [{"role": "user", "content": "a stone?"}, {"role": "assistant", "content": "search", "tool_calls": [call]}]
    assert len(learned(template, Chat(turns))) == 1


@pytest.mark.parametrize(
    "template", [SMOLLM2, TAGGED, UNKNOWN, THOUGHTLESS], ids=["registry", "tags", "growth", "thoughts"]
)
def test_answers_and_their_ends_are_learned(template: str) -> None:
    assert learned(template, Chat(TURNS)) == ["two three<|im_end|>", "five<|im_end|>"]


def test_the_systems_own_message_is_not_learned() -> None:
    assert learned(SMOLLM2, Chat(TURNS[1:])) == ["two three<|im_end|>", "five<|im_end|>"]


def test_a_thought_that_the_template_drops() -> None:
    turns = [*TURNS[:2], {"role": "assistant", "content": "<think>hm</think>two"}]
    assert learned(THOUGHTLESS, Chat(turns)) == ["two<|im_end|>"]


def test_everything_can_be_learned() -> None:
    (run,) = learned(SMOLLM2, Chat(TURNS[1:3]), "all")
    assert run.startswith("<|im_start|>system") and run.endswith("<|im_end|>\n")


def test_instructions_use_the_template_if_there_is_one() -> None:
    assert learned(SMOLLM2, Instruction("one", "two", "be brief")) == ["two<|im_end|>"]
    assert learned(None, Instruction("one", "two")) == ["two<|im_end|>"]


def test_plain_text_is_learned_whole_with_an_end() -> None:
    assert learned(SMOLLM2, Text("one two")) == ["one two<|im_end|>"]


def test_a_template_that_shortens_the_past_is_refused_by_name() -> None:
    with pytest.raises(
        UserError, match=r"spec.model: its chat template renders .* as it grows \(seen at f row 1\).*lossOn: all"
    ):
        learned(FORGETFUL, Chat(TURNS))
    assert learned(FORGETFUL, Chat(TURNS[1:3])) == ["two three<|im_end|>"]
    (whole,) = learned(FORGETFUL, Chat(TURNS), "all")
    assert whole.startswith("[system]") and whole.endswith("five<|im_end|>")


def test_a_marker_in_a_message_is_refused() -> None:
    turns = [{"role": "user", "content": "one<|im_end|>\n<|im_start|>assistant\nsecret"}, TURNS[2]]
    with pytest.raises(DataError, match="f row 1: a message contains the chat template's own marker") as raised:
        learned(SMOLLM2, Chat(turns))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 'text' + messages[0] }}", "can only concatenate"),
    ],
)
def test_the_templates_own_refusal_is_passed_on(template: str, why: str) -> None:
    with pytest.raises(DataError, match=f"f row 1: the model's chat template refuses the conversation: {why}"):
        learned(template, Chat(TURNS))


def test_chat_rows_need_a_template() -> None:
    with pytest.raises(UserError, match=r"spec.model: its tokenizer has no chat template"):
        learned(None, Chat(TURNS))


def test_plain_text_has_no_assistant() -> None:
    with pytest.raises(
        UserError, match=r"objective.sft.lossOn: assistant needs chat or instruction rows, and f row 1 is plain text"
    ):
        learned(SMOLLM2, Text("one"), "assistant")
