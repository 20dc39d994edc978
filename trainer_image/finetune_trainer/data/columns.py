"""The columns of a file: which shape its rows have by them, and whether those are there that the user names. Called by formats.

A named column decides: rows of another shape, that the file may have as well, are not what the user means.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from finetune_crds.support import COLUMNS, Format
from finetune_crds.v1alpha1.dataset import Columns

from ..errors import DataError

PROMPT: Final = ("prompt", "instruction")
COMPLETION: Final = ("completion", "output", "response")
_OPTIONAL: Final = ("input", "system")
"""Of dataset.columns those in which a row may have nothing."""


def found(there: Sequence[str], given: str | None, usual: tuple[str, ...]) -> str | None:
    """The column of that name, or without one of a usual name; None where it is not there."""
    return next((name for name in ([given] if given else usual) if name in there), None)


def told(there: Sequence[str], columns: Columns, known: tuple[Format, ...], file: str, *, asks: bool) -> Format:
    """The shape of a file's rows.

    Args:
        there: its columns.
        columns: dataset.columns.
        known: shapes that the job takes.
        file: what messages call it.
        asks: whether a prompt needs no answer.

    Raises:
        DataError: none or several by what the user names, or none by what is there.
    """
    if len(known) > 1 and (named := _named(columns, COLUMNS)):
        known = _fitting(there, named, known, file)
    if len(known) == 1:
        return known[0]
    if "preference" in known:
        return "preference" if (columns.chosen or "chosen") in there else "unpairedPreference"
    if "messages" in there:
        return "chat"
    if found(there, None, PROMPT) and (asks or found(there, None, COMPLETION)):
        return "instruction"
    if "text" in there:
        return "text"
    raise DataError(
        f"{file}: columns {', '.join(there)} are neither chat (messages), nor instruction (prompt, completion), "
        "nor text (text); name them in dataset.columns"
    )


def check_optional(there: Sequence[str], columns: Columns, format: Format, file: str) -> None:
    """Refuses a named column that is not there, where no row would tell.

    Raises:
        DataError: with the columns that are there.
    """
    read = _named(columns, (name for name in _OPTIONAL if format in COLUMNS[name]))
    if absent := {name: column for name, column in read.items() if column not in there}:
        raise _absent(there, absent, file)


def _fitting(there: Sequence[str], named: dict[str, str], known: tuple[Format, ...], file: str) -> tuple[Format, ...]:
    """Those that have every named column which is there."""
    read = {name: column for name, column in named.items() if column in there}
    if not read:
        raise _absent(there, named, file)
    fitting = tuple(one for one in known if all(one in COLUMNS[name] for name in read))
    if not fitting:
        raise DataError(
            f"{file}: dataset.columns names {_listed(read)}, of rows of different formats, and all are there; name those of one format only, or set dataset.format"
        )
    return fitting


def _named(columns: Columns, among: Iterable[str]) -> dict[str, str]:
    """What dataset.columns says, by its fields."""
    return {name: column for name in among if (column := getattr(columns, name))}


def _absent(there: Sequence[str], named: dict[str, str], file: str) -> DataError:
    return DataError(
        f"{file}: its first row has no column {_listed(named)}, which dataset.columns names (columns: {', '.join(there)}); correct the data, or name what is there"
    )


def _listed(named: dict[str, str]) -> str:
    return ", ".join(f"{column!r} ({name})" for name, column in named.items())
