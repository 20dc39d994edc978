"""What the name of a file says of its content: rows, an image, or something about the rows beside it. Called by layouts, sources and rows."""

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Final

TABLE_SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
TEXT_SUFFIX: Final = ".txt"
DATA_SUFFIXES: Final = (*TABLE_SUFFIXES, TEXT_SUFFIX)
COMPRESSED: Final = (".gz", ".zst")
IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SAVED: Final = "state.json"
SAVED_SPLITS: Final = "dataset_dict.json"
OWN_FILES: Final = (SAVED, SAVED_SPLITS, "dataset_info.json", "dataset_infos.json", "config.json")
"""Files about the rows, without rows."""


def is_data(name: str) -> bool:
    """Whether a file's name says that it holds rows."""
    return _suffix(name) in DATA_SUFFIXES and not PurePosixPath(name).name.startswith((".", "_"))


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return PurePosixPath(name.lower()).suffix in IMAGE_SUFFIXES and not PurePosixPath(name).name.startswith(".")


def is_own(name: str) -> bool:
    """Whether a file is about the rows beside it, in whatever folder."""
    return PurePosixPath(name).name in OWN_FILES


def holding_rows(names: Iterable[str], *, images: bool = False) -> list[str]:
    """Those of a data set's files that hold its rows: tables; where there are none images, if rows may be images; else text."""
    usable = [name for name in names if not is_hidden(name) and not is_own(name)]
    data = [name for name in usable if is_data(name)]
    tables = [name for name in data if _suffix(name) != TEXT_SUFFIX]
    return tables or (images and [name for name in usable if is_image(name)]) or data


def is_hidden(name: str) -> bool:
    """Whether a path leads through what begins with a dot or two underscores."""
    return any(part.startswith((".", "__")) for part in name.split("/"))


def _suffix(name: str) -> str:
    """The end of the name, without that of a compression."""
    path = PurePosixPath(name.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix
