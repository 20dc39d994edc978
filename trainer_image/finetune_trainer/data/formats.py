"""What a row means: chat messages, an instruction and its answer, plain text, or a text and its class.

Called by prepare with the rows of one file at a time; the format is the user's, or told from the columns of the file's first row.
"""

from dataclasses import dataclass
from typing import Any, Literal

from finetune_crds.resolution import Task
from finetune_crds.v1alpha1.spec import Columns

from ..errors import DataError

Format = Literal["chat", "instruction", "text", "classification"]

_PROMPT = ("prompt", "instruction")
_COMPLETION = ("completion", "output", "response")


@dataclass(frozen=True)
class Chat:
    """A conversation."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


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
        return Chat([*system, *turns])


@dataclass(frozen=True)
class Text:
    """Text to learn as it stands."""

    text: str


@dataclass(frozen=True)
class Labelled:
    """A text and its class."""

    text: str
    label: str


Example = Chat | Instruction | Text | Labelled


class RowFormat:
    """Turns the rows of one file into examples. Raises DataError that names row and column."""

    def __init__(
        self, first: dict[str, Any], task: Task, given: Format | None, columns: Columns | None, name: str
    ) -> None:
        self._name = name
        self._columns = columns or Columns()
        self._available = list(first)
        self.format = given or self._told_from(task)
        if (self.format == "classification") != (task == "text-classification"):
            raise DataError(
                f"{name}: rows of format {self.format} do not fit the task {task}; correct task, or dataset.format"
            )

    def _told_from(self, task: Task) -> Format:
        columns, available = self._columns, self._available
        if task == "text-classification":
            return "classification"
        if (columns.messages or "messages") in available:
            return "chat"
        if self._found(columns.prompt, _PROMPT) and self._found(columns.completion, _COMPLETION):
            return "instruction"
        if (columns.text or "text") in available:
            return "text"
        raise DataError(
            f"{self._name}: columns {', '.join(self._available)} are neither chat (messages), nor instruction (prompt, completion), "
            "nor text (text); name them in dataset.columns"
        )

    def _found(self, given: str | None, usual: tuple[str, ...]) -> str | None:
        return next((name for name in ([given] if given else usual) if name in self._available), None)

    def example(self, number: int, row: dict[str, Any]) -> Example:
        """The example of one row."""
        columns = self._columns
        match self.format:
            case "chat":
                return Chat(self._messages(number, row), row.get("tools") or None)
            case "instruction":
                prompt = self._text(number, row, columns.prompt, *_PROMPT)
                context = self._optional(number, row, columns.input or "input")
                return Instruction(
                    prompt=f"{prompt}\n\n{context}" if context else prompt,
                    completion=self._text(number, row, columns.completion, *_COMPLETION),
                    system=self._optional(number, row, columns.system or "system"),
                )
            case "text":
                return Text(self._text(number, row, columns.text, "text"))
            case "classification":
                label = self._value(number, row, columns.label or "label")
                if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
                    raise self._wrong(number, columns.label or "label", "must be a class: a string or an integer")
                return Labelled(self._text(number, row, columns.text, "text"), str(label))

    def _messages(self, number: int, row: dict[str, Any]) -> list[dict[str, Any]]:
        column = self._columns.messages or "messages"
        messages = self._value(number, row, column)
        if not isinstance(messages, list) or not messages:
            raise self._wrong(number, column, "must be a list of {role, content}")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise self._wrong(number, column, "must be a list of {role, content}: a message has no role")
            if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
                raise self._wrong(number, column, "must be a list of {role, content}: a content is no text")
        # Parquet gives every message the union of all keys; templates take a key that is there for one that means something.
        return [{key: value for key, value in message.items() if value is not None} for message in messages]

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
