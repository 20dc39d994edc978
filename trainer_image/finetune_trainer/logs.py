"""Where the trainer's log goes, and what never gets there. Called by the processes that log."""

import logging
import sys


def begin(level: int, form: str) -> None:
    """To stderr. HTTP clients tell addresses, and a store's signature is part of them: they warn at most."""
    logging.basicConfig(level=level, format=form, stream=sys.stderr)
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
