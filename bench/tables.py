"""Tables that a long measurement writes line by line: what was found until it ends is on the screen and in the file."""

from collections.abc import Iterable
from pathlib import Path


def tell(lines: Iterable[str], table: Path | None) -> None:
    """Prints each line as it comes, and keeps all of them in the file, if there is one."""
    text = []
    for line in lines:
        print(line, flush=True)
        text.append(line)
        if table:
            table.write_text("\n".join(text) + "\n")
