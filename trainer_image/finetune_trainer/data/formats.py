"""What a row means: chat messages, an instruction and its answer, answers compared, plain text, a text and its class, words and their tags, a question, a text and what is made of it, an image.

Called by prepare with the rows of one file at a time; the format is the user's, or told from the columns of the file's first row.
"""

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from finetune_crds.support import OBJECTIVE_FORMATS, Format, Problem, Task, formats_of
from finetune_crds.v1alpha1.dataset import Columns

from ..errors import DataError
from .columns import COMPLETION, PROMPT, check_optional, found, told

_WORDS = ("tokens", "words")
_TAGS = ("tags", "ner_tags", "labels")
_SOURCE = ("source", "text", "article", "document", "dialogue")
_TARGET = ("target", "summary", "highlights", "translation")
_TRUTHS: Final = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Chat:
    """A conversation."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    given: int = 0
    """Messages before the first that is to be learned."""


@dataclass(frozen=True)
class Instruction:
    """A prompt and its answer."""

    prompt: str
    completion: str
    system: str | None = None

    @property
    def chat(self) -> Chat:
        """The same as a conversation, for models with a chat template."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion}]
        return Chat([*system, *turns], given=len(system) + 1)


@dataclass(frozen=True)
class Text:
    """Text to learn as it stands."""

    text: str


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, each with the prompt. Text: the prompt is what both begin with."""

    chosen: "Answer"
    rejected: "Answer"
    margin: float = 0.0


@dataclass(frozen=True)
class Feedback:
    """A prompt with an answer, and whether that is a good one."""

    answer: Chat | Instruction
    good: bool


@dataclass(frozen=True)
class Prompt:
    """What the model is to answer by itself, and the row that it stands in."""

    asked: Chat | Instruction
    """Of an instruction the completion is empty; a conversation ends with what is to be answered."""
    row: dict[str, Any]

    @property
    def plain(self) -> list[dict[str, Any]] | str:
        """Messages, or text: as the row has it."""
        return self.asked.messages if isinstance(self.asked, Chat) else self.asked.prompt


@dataclass(frozen=True)
class Labelled:
    """A text and its class, its classes, or its number."""

    text: str
    labels: list[str] | list[float]


@dataclass(frozen=True)
class Tagged:
    """Words, and a tag for each."""

    words: list[str]
    tags: list[str]


@dataclass(frozen=True)
class Question:
    """A question, a text, and the answers that it holds; none: the text does not say."""

    question: str
    context: str
    answers: list[str]
    start: int
    """Character of the text where the first answer begins."""


@dataclass(frozen=True)
class Pair:
    """A text, and what is to be made of it: its summary, its translation."""

    source: str
    target: str


@dataclass(frozen=True)
class Picture:
    """An image, in the format of its file, and its class."""

    image: bytes
    label: str


Answer = Chat | Instruction | Text
Example = Chat | Instruction | Text | Preference | Feedback | Prompt | Labelled | Tagged | Question | Pair | Picture


class RowFormat:
    """Turns the rows of one file into examples. Raises DataError that names row and column."""

    def __init__(
        self,
        first: dict[str, Any],
        task: Task,
        given: Format | None,
        columns: Columns | None,
        name: str,
        problem: Problem = "singleLabel",
        objective: str | None = None,
        folder: Path | None = None,
    ) -> None:
        """Args: first: the first row; task, given, columns, problem: the job's; name: what messages call the file; folder: where it lies."""
        self._name = name
        self._columns = columns or Columns()
        self._available = list(first)
        self._problem = problem
        self._asks = objective == "grpo"
        self._has_margins = objective == "reward"
        known = formats_of(task, objective)
        self.format = given or told(self._available, self._columns, known, name, asks=self._asks)
        if self.format not in known:
            whose = f"objective {objective}" if objective in OBJECTIVE_FORMATS else f"the task {task}"
            raise DataError(f"{name}: rows of format {self.format} do not fit {whose}; correct it, or dataset.format")
        check_optional(self._available, self._columns, self.format, name)
        self._folder = folder or Path()
        self._by_path = bool(picture_path(first, columns))

    def _found(self, given: str | None, usual: tuple[str, ...]) -> str | None:
        return found(self._available, given, usual)

    def example(self, number: int, row: dict[str, Any]) -> Example:
        """The example of one row."""
        columns = self._columns
        if self._asks:
            return self._prompt(number, row)
        match self.format:
            case "chat":
                return Chat(self._messages(number, row), self._tools(number, row))
            case "instruction":
                prompt = self._text(number, row, columns.prompt, *PROMPT)
                context = self._optional(number, row, columns.input or "input")
                return Instruction(
                    prompt=f"{prompt}\n\n{context}" if context else prompt,
                    completion=self._text(number, row, columns.completion, *COMPLETION),
                    system=self._optional(number, row, columns.system or "system"),
                )
            case "text":
                return Text(self._text(number, row, columns.text, "text"))
            case "preference":
                return self._preference(number, row)
            case "unpairedPreference":
                return self._feedback(number, row)
            case "classification":
                return Labelled(self._text(number, row, columns.text, "text"), self._labels(number, row))
            case "tags":
                return self._tagged(number, row)
            case "question":
                return self._question(number, row)
            case "pair":
                return self._pair(number, row)
            case "image":
                return self._picture(number, row)

    def _prompt(self, number: int, row: dict[str, Any]) -> Prompt:
        """A last turn of the assistant's is what the model is to say itself. As in TRL a prompt may be text or messages."""
        columns = self._columns
        column = self._found(columns.prompt, PROMPT) or columns.prompt or PROMPT[0]
        if self.format == "instruction" and isinstance(row.get(column), str):
            context = self._optional(number, row, columns.input or "input")
            text = self._text(number, row, column)
            system = self._optional(number, row, columns.system or "system")
            return Prompt(Instruction(f"{text}\n\n{context}" if context else text, "", system), row)
        if self.format == "chat":
            column = columns.messages or "messages"
        self._no_words_beside(number, row)
        messages = self._messages(number, row, column)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise self._wrong(number, column, "holds nothing to answer")
        return Prompt(Chat(messages, self._tools(number, row)), row)

    def _preference(self, number: int, row: dict[str, Any]) -> Preference:
        columns = self._columns
        margin = columns.margin or "margin"
        has_margin = self._has_margins and (columns.margin or row.get(margin) is not None)
        return Preference(
            *self._two_answers(number, row, (columns.chosen or "chosen", columns.rejected or "rejected")),
            self._number(number, row, margin) if has_margin else 0.0,
        )

    def _two_answers(self, number: int, row: dict[str, Any], names: tuple[str, str]) -> tuple[Answer, Answer]:
        """With their prompt, which has a column of its own, or is what both begin with."""
        chosen, rejected = names
        prompt = self._found(self._columns.prompt, PROMPT) or self._columns.prompt
        if isinstance(self._value(number, row, chosen), str):
            if prompt is None:
                self._no_words_beside(number, row, "answers that hold their prompt")
                return Text(self._text(number, row, chosen)), Text(self._text(number, row, rejected))
            return self._answered(number, row, prompt, chosen), self._answered(number, row, prompt, rejected)
        self._no_words_beside(number, row)
        whole = self._messages(number, row, chosen), self._messages(number, row, rejected)
        begins = (
            whole[0][0]["role"] == "assistant"
        )  # UltraFeedback has a prompt beside conversations that begin with it
        if prompt is not None and (begins or not isinstance(self._value(number, row, prompt), str)):
            return self._answered(number, row, prompt, chosen), self._answered(number, row, prompt, rejected)
        differs = (i for i, (one, other) in enumerate(zip(*whole, strict=False)) if one != other)
        given = next(differs, min(map(len, whole)) - 1)
        return self._chat(number, row, chosen, whole[0], given), self._chat(number, row, rejected, whole[1], given)

    def _feedback(self, number: int, row: dict[str, Any]) -> Feedback:
        columns = self._columns
        prompt = self._found(columns.prompt, PROMPT) or columns.prompt or PROMPT[0]
        completion = self._found(columns.completion, COMPLETION) or columns.completion or COMPLETION[0]
        column = columns.label or "label"
        good = _TRUTHS.get(str(self._value(number, row, column)).lower())
        if good is None:
            raise self._wrong(number, column, "must say whether the answer is a good one: true or false")
        return Feedback(self._answered(number, row, prompt, completion), good)

    def _answered(self, number: int, row: dict[str, Any], prompt: str, answer: str) -> Chat | Instruction:
        """A prompt with one of its answers, both text or both messages; a prompt of text may have an answer of messages."""
        asked, said = self._value(number, row, prompt), self._value(number, row, answer)
        if isinstance(said, str):
            system = self._optional(number, row, self._columns.system or "system")
            return Instruction(self._text(number, row, prompt), self._text(number, row, answer), system)
        self._no_words_beside(number, row)
        before = [{"role": "user", "content": asked}] if isinstance(asked, str) else self._messages(number, row, prompt)
        return self._chat(number, row, answer, [*before, *self._messages(number, row, answer)], len(before))

    def _no_words_beside(self, number: int, row: dict[str, Any], what: str = "messages") -> None:
        """They hold all that is said."""
        for name, column in (("system", self._columns.system), ("input", self._columns.input)):
            if column and row.get(column):
                raise self._wrong(
                    number,
                    column,
                    f"(dataset.columns.{name}) is for prompts that are text, and this row has {what}: write it into them",
                )

    def _chat(self, number: int, row: dict[str, Any], column: str, messages: list[dict[str, Any]], given: int) -> Chat:
        if not any(message["role"] == "assistant" for message in messages[given:]):
            raise self._wrong(number, column, "has no message of the assistant behind the prompt")
        return Chat(messages, self._tools(number, row), given)

    def _number(self, number: int, row: dict[str, Any], column: str) -> float:
        value = self._value(number, row, column)
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if isinstance(value, bool) or not math.isfinite(found):
            raise self._wrong(number, column, "must be a number")
        return found

    def _labels(self, number: int, row: dict[str, Any]) -> list[str] | list[float]:
        column = self._columns.label or "label"
        value = self._value(number, row, column)
        if self._problem == "regression":
            try:
                found = float(value)
            except (TypeError, ValueError):
                found = math.nan
            if isinstance(value, bool) or not math.isfinite(found):
                raise self._wrong(number, column, "must be a number (objective.classification.problem is regression)")
            return [found]
        if self._problem == "multiLabel":
            if not isinstance(value, list) or not all(_is_class(one) for one in value):
                raise self._wrong(
                    number,
                    column,
                    "must be a list of classes, strings or integers (objective.classification.problem is multiLabel)",
                )
            return sorted({str(one) for one in value})
        if not _is_class(value):
            raise self._wrong(number, column, "must be a class: a string or an integer")
        return [str(value)]

    def _tagged(self, number: int, row: dict[str, Any]) -> Tagged:
        columns = [
            self._found(self._columns.tokens, _WORDS) or self._columns.tokens or _WORDS[0],
            self._found(self._columns.tags, _TAGS) or self._columns.tags or _TAGS[0],
        ]
        words, tags = (self._value(number, row, column) for column in columns)
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
            raise self._wrong(number, columns[0], "must be a list of words")
        if not isinstance(tags, list) or not all(_is_class(tag) for tag in tags):
            raise self._wrong(number, columns[1], "must be a list of tags, strings or integers")
        if len(words) != len(tags):
            raise self._wrong(number, columns[1], f"has {len(tags)} tags for {len(words)} words")
        return Tagged(words, [str(tag) for tag in tags])

    def _question(self, number: int, row: dict[str, Any]) -> Question:
        columns = self._columns
        context = self._text(number, row, columns.context, "context")
        column = columns.answers or "answers"
        answers = self._value(number, row, column)
        texts = answers.get("text") if isinstance(answers, dict) else None
        starts = answers.get("answer_start") if isinstance(answers, dict) else None
        if not (
            isinstance(texts, list)
            and isinstance(starts, list)
            and len(texts) == len(starts)
            and all(isinstance(text, str) and text for text in texts)
            and all(isinstance(start, int) for start in starts)
        ):
            raise self._wrong(
                number,
                column,
                "must be {text: [...], answer_start: [...]} as in SQuAD, with empty lists where there is no answer",
            )
        for text, start in zip(texts, starts, strict=True):
            if context[start : start + len(text)] != text:
                raise self._wrong(number, column, "an answer does not stand in the context at its answer_start")
        return Question(
            self._text(number, row, columns.question, "question"), context, texts, starts[0] if starts else -1
        )

    def _pair(self, number: int, row: dict[str, Any]) -> Pair:
        columns, languages = self._columns, row.get("translation")
        if isinstance(languages, dict):
            if not (columns.source and columns.target):
                raise self._wrong(
                    number,
                    "translation",
                    f"holds {', '.join(languages)}: name two of them in dataset.columns, such as {{source: en, target: de}}",
                )
            row = languages
        return Pair(
            self._text(number, row, columns.source, *_SOURCE), self._text(number, row, columns.target, *_TARGET)
        )

    def _picture(self, number: int, row: dict[str, Any]) -> Picture:
        column = self._columns.image or "image"
        value = self._value(number, row, column)
        path = picture_path(row, self._columns)
        if bool(path) != self._by_path:
            raise self._wrong(number, column, "must be bytes in all rows of the file, or a path in all")
        if path:
            file = self._folder / path
            if not is_below(path) or not file.is_file():
                raise self._wrong(
                    number,
                    column,
                    "names no file in the table's folder or below it (of s3:// and hf:// name the folder, so that its images are fetched)",
                )
            content: Any = file.read_bytes()
        else:
            content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes) or not content:
            raise self._wrong(
                number, column, "must be an image: bytes, {bytes, path}, or a path from the table's folder"
            )
        (label,) = self._labels(number, row)
        return Picture(content, str(label))

    def _messages(self, number: int, row: dict[str, Any], given: str | None = None) -> list[dict[str, Any]]:
        column = given or self._columns.messages or "messages"
        messages = self._value(number, row, column)
        if not isinstance(messages, list) or not messages:
            raise self._wrong(number, column, "must be a list of {role, content}")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise self._wrong(number, column, "must be a list of {role, content}: a message has no role")
            if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
                raise self._wrong(number, column, "must be a list of {role, content}: a content is no text")
        # Parquet gives every message the union of all keys; templates take a key that is there for one that means something.
        kept = [
            {key: value for key, value in message.items() if value is not None and (value or key != "tool_calls")}
            for message in messages
        ]
        for message in kept:
            calls = message.get("tool_calls", [])
            if not _are_objects(calls) or not all(map(function_name, calls)):
                raise self._wrong(number, column, "must have tool_calls as a list of {function: {name, arguments}}")
            if calls:
                message["tool_calls"] = [_called(one) for one in calls]
        return kept

    def _tools(self, number: int, row: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Tools, which tables often hold as JSON."""
        tools = row.get("tools")
        if isinstance(tools, str):
            with suppress(ValueError):
                tools = json.loads(tools)
        if not tools:
            return None
        if not _are_objects(tools):
            raise self._wrong(number, "tools", "must be a list of {type, function}, or JSON of one")
        return list(tools)

    def _text(self, number: int, row: dict[str, Any], given: str | None, *usual: str) -> str:
        column = self._found(given, usual) or given or usual[0]
        value = self._value(number, row, column)
        if not isinstance(value, str) or not value:
            raise self._wrong(number, column, "must be text that is not empty")
        return value

    def _optional(self, number: int, row: dict[str, Any], column: str) -> str | None:
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise self._wrong(number, column, "must be text")
        return value or None

    def _value(self, number: int, row: dict[str, Any], column: str) -> Any:
        if column not in row:
            raise DataError(
                f"{self._name} row {number}: no column {column!r} (columns: {', '.join(row)}); correct the data or dataset.columns"
            )
        return row[column]

    def _wrong(self, number: int, column: str, what: str) -> DataError:
        return DataError(f"{self._name} row {number}: column {column!r} {what}")


def _called(call: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments as an object: templates write them as JSON, and of a text of JSON (as OpenAI has it) they make a quoted one."""
    function = call.get("function")
    if isinstance(function, dict) and isinstance(arguments := function.get("arguments"), str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            return {**call, "function": {**function, "arguments": parsed}}
    return call


def function_name(one: dict[str, Any]) -> str:
    """Name of the function of a tool, or of a call of one; empty where it has none."""
    function = one.get("function") or one
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def picture_path(row: dict[str, Any], columns: Columns | None) -> str | None:
    """The path of a row's image, where the row does not hold the image itself."""
    value = row.get((columns and columns.image) or "image")
    if isinstance(value, dict):
        value = None if value.get("bytes") else value.get("path")
    return value if isinstance(value, str) and value else None


def is_below(path: str) -> bool:
    """Whether a path leads downwards."""
    return not path.startswith("/") and ".." not in Path(path).parts


def _is_class(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""
