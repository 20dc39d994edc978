"""What a row means, told from its columns or from the user's word; what is missing is named by row and column."""

from typing import Any

import pytest

from finetune_crds.support import COLUMNS, Format, Task
from finetune_crds.v1alpha1.dataset import Columns
from finetune_trainer.data.formats import Chat, Instruction, Labelled, Pair, Prompt, RowFormat, Text
from finetune_trainer.errors import DataError

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

ROWS: dict[str, tuple[dict[str, Any], Columns | None, Any]] = {
    "chat": ({"messages": MESSAGES}, None, Chat(MESSAGES)),
    "chat wins over text": ({"messages": MESSAGES, "text": "t"}, None, Chat(MESSAGES)),
    "chat by name": ({"conversation": MESSAGES}, Columns(messages="conversation"), Chat(MESSAGES)),
    "keys that parquet adds": ({"messages": [{**m, "tool_calls": None} for m in MESSAGES]}, None, Chat(MESSAGES)),
    "no calls": ({"messages": [{**m, "tool_calls": []} for m in MESSAGES]}, None, Chat(MESSAGES)),
    "tools": ({"messages": MESSAGES, "tools": [{"name": "f"}]}, None, Chat(MESSAGES, [{"name": "f"}])),
    "tools as JSON": ({"messages": MESSAGES, "tools": '[{"name": "f"}]'}, None, Chat(MESSAGES, [{"name": "f"}])),
    "no tools as JSON": ({"messages": MESSAGES, "tools": "[]"}, None, Chat(MESSAGES)),
    "instruction": ({"prompt": "p", "completion": "c"}, None, Instruction("p", "c")),
    "alpaca": ({"instruction": "p", "input": "i", "output": "c"}, None, Instruction("p\n\ni", "c")),
    "alpaca without input": ({"instruction": "p", "input": "", "output": "c"}, None, Instruction("p", "c")),
    "system": ({"prompt": "p", "response": "c", "system": "s"}, None, Instruction("p", "c", "s")),
    "named": ({"ask": "p", "say": "c"}, Columns(prompt="ask", completion="say"), Instruction("p", "c")),
    "text": ({"text": "t", "id": 4}, None, Text("t")),
    "text by name beside chat": ({"messages": MESSAGES, "rendered": "t"}, Columns(text="rendered"), Text("t")),
    "text by name beside an instruction": ({"prompt": "p", "completion": "c", "text": "t"}, Columns(text="text"), Text("t")),
    "one name of several": ({"ask": "p", "output": "c", "text": "t"}, Columns(prompt="ask", text="body"), Instruction("p", "c")),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_generation_rows(case: str) -> None:
    row, columns, expected = ROWS[case]
    assert RowFormat(row, "text-generation", None, columns, "f").example(1, row) == expected


@pytest.mark.parametrize(("label", "expected"), [("spam", "spam"), (3, "3"), (0, "0")])
def test_classification_rows(label: Any, expected: str) -> None:
    row = {"text": "t", "label": label}
    assert RowFormat(row, "text-classification", None, None, "f").example(1, row) == Labelled("t", [expected])


PAIRS: dict[str, tuple[dict[str, Any], Columns | None]] = {
    "source and target": ({"source": "s", "target": "t"}, None),
    "article and summary": ({"article": "s", "summary": "t", "id": 1}, None),
    "text and translation": ({"text": "s", "translation": "t"}, None),
    "named": ({"post": "s", "tldr": "t", "text": "x"}, Columns(source="post", target="tldr")),
    "languages": ({"translation": {"en": "s", "de": "t", "fr": "x"}}, Columns(source="en", target="de")),
    "the other way": ({"translation": {"en": "t", "de": "s"}}, Columns(source="de", target="en")),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case: str) -> None:
    row, columns = PAIRS[case]
    assert RowFormat(row, "translation", None, columns, "f").example(1, row) == Pair("s", "t")


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no format": ({"a": "secret", "b": 1}, {}, "f: columns a, b are neither chat"),
    "task": ({"messages": MESSAGES}, {"task": "text-classification", "given": "chat"}, "do not fit the task"),
    "no list": ({"messages": "secret"}, {}, "f row 7: column 'messages' must be a list"),
    "empty list": ({"messages": []}, {}, "f row 7: column 'messages' must be a list"),
    "no role": ({"messages": [{"content": "secret"}]}, {}, "has no role"),
    "no content": ({"messages": [{"role": "user", "content": 5}]}, {}, "a content is no text"),
    "no tools": ({"messages": MESSAGES, "tools": "secret"}, {}, "f row 7: column 'tools' must be a list of {type, function}"),
    "no calls": ({"messages": [{"role": "assistant", "tool_calls": "secret"}]}, {}, "f row 7: column 'messages' must have tool_calls as a list"),
    "nameless call": ({"messages": [{"role": "assistant", "tool_calls": [{"function": "secret"}]}]}, {}, "must have tool_calls as a list"),
    "empty answer": ({"prompt": "secret", "completion": ""}, {}, "f row 7: column 'completion' must be text that is not empty"),
    "system": ({"prompt": "secret", "completion": "c", "system": 5}, {}, "f row 7: column 'system' must be text"),
    "float label": ({"text": "secret", "label": 0.5}, {"task": "text-classification"}, "column 'label' must be a class"),
    "bool label": ({"text": "secret", "label": True}, {"task": "text-classification"}, "column 'label' must be a class"),
    "no label": ({"text": "secret"}, {"task": "text-classification"}, "f row 7: no column 'label' (columns: text)"),
    "no target": ({"source": "secret"}, {"task": "summarization"}, "f row 7: no column 'target' (columns: source)"),
    "empty target": ({"source": "secret", "target": ""}, {"task": "summarization"}, "column 'target' must be text that is not empty"),
    "no languages": ({"translation": {"en": "secret", "de": "secret"}}, {"task": "translation"}, "holds en, de: name two of them in dataset.columns"),
    "no language": ({"translation": {"en": "secret"}}, {"task": "translation", "columns": Columns(source="en", target="de")}, "no column 'de' (columns: en)"),
    "neither by name": ({"messages": MESSAGES, "rendered": "secret"}, {"columns": Columns(text="rendred")}, "f: its first row has no column 'rendred' (text), which dataset.columns names (columns: messages, rendered)"),
    "both by name": ({"messages": MESSAGES, "body": "secret"}, {"columns": Columns(text="body", messages="messages")}, "f: dataset.columns names 'messages' (messages), 'body' (text), of rows of different formats"),
    "optional by name": ({"prompt": "secret", "completion": "c", "system": "s", "input": "i"}, {"columns": Columns(system="sytem", input="contxt")}, "f: its first row has no column 'contxt' (input), 'sytem' (system), which dataset.columns names (columns: prompt, completion, system, input)"),
    "prompt by name": ({"chosen": MESSAGES, "rejected": MESSAGES, "prompt": "secret"}, {"columns": Columns(prompt="promt"), "objective": "dpo"}, "f row 7: no column 'promt' (columns: chosen, rejected, prompt)"),
    "named but absent": ({"text": "secret"}, {"given": "text", "columns": Columns(text="body")}, "no column 'body'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_and_not_quoted(case: str) -> None:
    row, options, sentence = WRONG[case]
    with pytest.raises(DataError) as raised:
        RowFormat(
            row, options.get("task", "text-generation"), options.get("given"), options.get("columns"), "f",
            objective=options.get("objective"),
        ).example(7, row)  # fmt: skip
    assert sentence in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_named_prompt_is_asked_for_beside_messages() -> None:
    row = {"messages": MESSAGES, "question": "q"}
    asked = RowFormat(row, "text-generation", None, Columns(prompt="question"), "f", objective="grpo").example(1, row)
    assert isinstance(asked, Prompt) and asked.plain == "q"


def test_a_later_row_without_the_prompt_of_the_first_is_named() -> None:
    row = {"chosen": MESSAGES, "rejected": MESSAGES}
    shape = RowFormat(row | {"prompt": "q"}, "text-generation", None, None, "f", objective="dpo")
    with pytest.raises(DataError, match="f row 2: no column 'prompt'"):
        shape.example(2, row)


def test_a_named_column_may_be_empty() -> None:
    row = {"prompt": "p", "completion": "c", "rules": None}
    assert RowFormat(row, "text-generation", None, Columns(system="rules"), "f").example(1, row) == Instruction("p", "c")  # fmt: skip


PREFERRED = {"system": "s", "prompt": "p", "chosen": "good", "rejected": "bad", "margin": 2.0}
WHOLE: dict[Format, tuple[Task, dict[str, Any]]] = {
    "chat": ("text-generation", {"messages": MESSAGES}),
    "instruction": ("text-generation", {"system": "s", "prompt": "p", "input": "i", "completion": "c"}),
    "text": ("text-generation", {"text": "t"}),
    "preference": ("text-generation", PREFERRED),
    "unpairedPreference": ("text-generation", {"system": "s", "prompt": "p", "completion": "c", "label": True}),
    "classification": ("text-classification", {"text": "t", "label": "l"}),
    "tags": ("token-classification", {"tokens": ["t"], "tags": ["O"]}),
    "question": ("question-answering", {"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}}),
    "pair": ("summarization", {"source": "s", "target": "t"}),
    "image": ("image-classification", {"image": b"i", "label": "l"}),
}
"""A row of each format, with all columns that it may have."""
ONLY = {"preference": "reward", "unpairedPreference": "kto"}
"""Objectives of formats that others of their task do not take."""


@pytest.mark.parametrize("format", WHOLE)
def test_columns_that_can_be_named_are_those_that_are_read(format: Format) -> None:
    """The table is that of the rules that refuse the others."""
    assert set(COLUMNS) == set(Columns.model_fields)
    task, row = WHOLE[format]
    assert set(row) == {name for name, formats in COLUMNS.items() if format in formats}

    def read(row: dict[str, Any], **named: str) -> Any:
        return RowFormat(row, task, format, Columns(**named), "f", objective=ONLY.get(format)).example(1, row)

    for name in COLUMNS:
        renamed = {"mine" if column == name else column: value for column, value in row.items()}
        assert read(renamed, **{name: "mine"}) == read(row), name
