"""Regular expressions of users, which may take exponential time on an answer: each gets a limit. Called by rewards and schemas.

They are of Python's syntax and are matched by `regex`, whose matching can be stopped. What would mean something else to it is refused.
"""

import re
import warnings
from typing import Final

import regex

from ..errors import UserError

SECONDS: Final = 10.0
"""The most that an expression may take on one text."""
_FUZZY: Final = re.compile(r"(?<!\\)(\\\\)*\{[0-9<=,+\s]*[eids]\b[^}]*\}")
"""Braces that count letters to re and errors to regex."""


class Pattern:
    """A regular expression in which a dot matches line breaks too."""

    def __init__(self, pattern: str, where: str) -> None:
        """Args: pattern: in Python's syntax; where: named in errors.

        Raises:
            UserError: it is none.
        """
        self._where = where
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "error", FutureWarning
                )  # sets in sets: of letters to re, classes and operations to regex
                re.compile(pattern, re.DOTALL)
            if _FUZZY.search(pattern):
                raise re.error(r"braces around e, i, d or s; write \{ for a brace")
            self._compiled: regex.Pattern[str] = regex.compile(pattern, regex.DOTALL)
        except FutureWarning as error:
            raise UserError(
                f"{where}: pattern is no regular expression: {error}; escape it with a backslash"
            ) from error
        except (re.error, regex.error) as error:
            raise UserError(f"{where}: pattern is no regular expression: {error}") from error

    def search(self, text: str) -> bool:
        """Whether it is found somewhere.

        Raises:
            UserError: it takes too long.
        """
        try:
            return self._compiled.search(text, timeout=SECONDS) is not None
        except TimeoutError:
            raise self._slow() from None

    def is_all(self, text: str) -> bool:
        """Whether it is the whole text.

        Raises:
            UserError: it takes too long.
        """
        try:
            return self._compiled.fullmatch(text, timeout=SECONDS) is not None
        except TimeoutError:
            raise self._slow() from None

    def last(self, text: str) -> str | None:
        """What is found last: the first group, if there are groups.

        Raises:
            UserError: it takes too long.
        """
        match = None
        try:
            for match in self._compiled.finditer(text, timeout=SECONDS):  # noqa: B007
                pass
        except TimeoutError:
            raise self._slow() from None
        return None if match is None else match[1] if self._compiled.groups else match[0]

    def _slow(self) -> UserError:
        return UserError(
            f"{self._where}: a pattern took more than {SECONDS:g} s on one text; write it without repetitions within repetitions, such as (a+)+"
        )
