"""Why a POST is not accepted: an HTTP code, and a sentence for the log of the program that sent it."""

from typing import Final


class Refused(Exception):
    """The request is answered with `code`; clients should wait `retry_after` seconds when it is given.

    400  the body breaks the contract          401  no valid token of ours
    403  another job's pod                     409  an earlier run: stop at once and commit nothing
    413  the body is too long                  429  too many
    503  the API server cannot be asked now
    """

    def __init__(self, code: int, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after


RETRY_LATER: Final = 5.0
"""Seconds; what a stock callback waits between two reports."""
