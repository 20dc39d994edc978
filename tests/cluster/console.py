"""Progress lines of everything in this package: on stderr, so that stdout stays for results."""

import sys


def say(message: str) -> None:
    print(f"[cluster] {message}", file=sys.stderr, flush=True)
