"""Digests of what a job reads. Called by train."""

import hashlib
import json
from pathlib import Path

WHOLE_BYTES = 16 * 1024 * 1024
EDGE_BYTES = 1024 * 1024


def folder_digest(folder: Path) -> str:
    """`sha256:<hex>` over names, sizes and contents of a model's files.

    Of files above WHOLE_BYTES the first and last EDGE_BYTES are read, which hold a safetensors file's index: a model of 140 GB is told
    from another in a second.
    """
    described = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        with path.open("rb") as file:
            content = hashlib.sha256(file.read(EDGE_BYTES if size > WHOLE_BYTES else -1))
            if size > WHOLE_BYTES:
                file.seek(-EDGE_BYTES, 2)
                content.update(file.read())
        described.append([path.relative_to(folder).as_posix(), size, content.hexdigest()])
    return "sha256:" + hashlib.sha256(json.dumps(described, separators=(",", ":")).encode()).hexdigest()


def joined(*digests: str) -> str:
    """One digest of several; of one, itself."""
    if len(digests) == 1:
        return digests[0]
    return "sha256:" + hashlib.sha256("\n".join(digests).encode()).hexdigest()
