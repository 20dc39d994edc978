"""Folders as Hugging Face datasets and its hub lay them out: which of the files below one are those of a split. Called by sources.

Told by, in this order: what `save_to_disk` wrote (dataset_dict.json, state.json), the configs that README.md declares, the hub's conversion
to Parquet (CONFIG/SPLIT/0000.parquet), and the names of files and folders as `load_dataset` reads them.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import yaml

from ..errors import UserError
from .kinds import SAVED, SAVED_SPLITS, holding_rows

CARD: Final = "README.md"
SPLITS: Final = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What names of files and folders call the usual splits."""
_LISTED: Final = 8
_SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]+")
_CONVERTED = re.compile(r"([^/]+)/(?:partial-)?([^/]+)/\d{4}\.parquet")
_PARTS = re.compile(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])")

Splits = dict[str, list[str]]


class Asked(NamedTuple):
    """What a source says of the folder."""

    split: str | None = None
    config: str | None = None
    evaluation: bool = False
    """Whether its rows are evaluated on: the default is validation, else test, in place of train."""
    images: bool = False
    """Whether its rows may be images."""


class Tree(Protocol):
    """A folder, here or elsewhere. Names are paths below it."""

    uri: str

    def has(self, name: str) -> bool: ...
    def names(self) -> Sequence[str]: ...
    def read(self, name: str) -> bytes: ...


def declared(tree: Tree, asked: Asked) -> list[str] | None:
    """Names of the split's files where a file in the folder says which they are; None where none does.

    Raises:
        UserError: no such split or config, or several and none is asked for.
    """
    splits = _saved(tree)
    if splits is not None:
        if asked.config:
            raise UserError(f"{tree.uri}: a folder of save_to_disk has no configs; remove config {asked.config}")
        return _chosen(tree, splits, asked)
    configs = _configs(tree)
    if not configs:
        return None
    name = _config(tree, configs, asked, next((name for name, one in configs.items() if one.get("default")), "default"))
    return _chosen(tree, _files(tree, configs[name], asked), asked)


def by_name(tree: Tree, names: Sequence[str], asked: Asked) -> list[str]:
    """Those of `names` that are the split's, as they themselves tell; without a word of a split all are train.

    Raises:
        UserError: as `declared`.
    """
    converted = [match for match in map(_CONVERTED.fullmatch, names) if match]
    if converted and len(converted) == len(names):
        configs: dict[str, Splits] = defaultdict(lambda: defaultdict(list))
        for match in converted:
            configs[match[1]][match[2]].append(match[0])
        return _chosen(tree, configs[_config(tree, configs, asked, "default")], asked)
    if asked.config:
        raise UserError(f"{tree.uri}: {CARD} there declares no configs; remove config {asked.config}, or name a folder")
    return _chosen(tree, _told(tree, names, asked), asked)


def told(names: Iterable[str]) -> Splits:
    """Files by the split that they name: as a shard in data/, else by a folder, else by the file. Others are left out."""
    names = list(names)
    for tell in (_of_shard, _of_folder, _of_file):
        found: Splits = defaultdict(list)
        for name in names:
            if split := tell(name):
                found[split].append(name)
        if found:
            return dict(found)
    return {}


def _told(tree: Tree, names: Sequence[str], asked: Asked) -> Splits:
    """As `told`, without a word of a split all as train.

    Raises:
        UserError: some would be left out, and no split is asked for.
    """
    splits = told(names)
    left = set(names).difference(*splits.values())
    if splits and left and not asked.split:
        raise UserError(
            f"{tree.uri}: {shown(left)} would be left out, beside files that are named by a split; "
            f"name one in split ({shown(splits)}), or the files by *"
        )
    return splits or {"train": list(names)}


def shown(names: Iterable[str]) -> str:
    """A list for messages."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return (", ".join(ordered[:_LISTED]) + more) or "nothing"


def _saved(tree: Tree) -> Splits | None:
    try:
        if tree.has(SAVED_SPLITS):
            return {split: _shards(tree, f"{split}/")[1] for split in json.loads(tree.read(SAVED_SPLITS))["splits"]}
        if tree.has(SAVED) and "_data_files" in json.loads(tree.read(SAVED)):
            split, files = _shards(tree, "")
            return {split: files}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{tree.uri}: {SAVED_SPLITS} or {SAVED} is not what save_to_disk writes; save it again"
        ) from error
    return None


def _shards(tree: Tree, folder: str) -> tuple[str, list[str]]:
    """Split and files of one that was saved."""
    name = f"{folder}{SAVED}"
    state = json.loads(tree.read(name)) if tree.has(name) else {"_data_files": [{"filename": SAVED}]}
    if state.get("_indices_data_files"):
        raise UserError(f"{tree.uri}: {name} has a list of rows beside the rows; save it again, by datasets 2 or later")
    files = [folder + file["filename"] for file in state["_data_files"]]
    if outside := [file for file in files if file.startswith("/") or ".." in file.split("/")]:
        raise UserError(f"{tree.uri}: {name} names {shown(outside)}, which is not in the folder; save it again")
    if missing := [file for file in files if not tree.has(file)]:
        raise UserError(f"{tree.uri}: {shown(missing)} is not there; copy what save_to_disk wrote as a whole")
    return str(state.get("_split") or "train"), files


def _configs(tree: Tree) -> dict[str, dict[str, Any]]:
    """What the head of README.md declares, by name."""
    if not tree.has(CARD):
        return {}
    text = tree.read(CARD).decode("utf-8-sig", errors="replace")
    head = re.match(r"---\s*\n(.*?\n)---\s*(\n|$)", text, re.DOTALL)
    try:
        card = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        raise UserError(f"{tree.uri}: the head of {CARD} is not YAML; correct it, or name the files by *") from error
    listed = card.get("configs") if isinstance(card, dict) else None
    return {
        str(one.get("config_name", "default")): one
        for one in (listed if isinstance(listed, list) else [])
        if isinstance(one, dict)
    }


def _files(tree: Tree, config: dict[str, Any], asked: Asked) -> Splits:
    start = str(config.get("data_dir") or "").strip("./")
    start += "/" * bool(start)
    names = [name for name in tree.names() if name.startswith(start)]
    given = config.get("data_files")
    if given is None:
        return _told(tree, holding_rows(names, images=asked.images), asked)
    if isinstance(given, dict):
        patterns = dict(given)
    elif isinstance(given, list) and any(isinstance(one, dict) for one in given):
        patterns = {
            one["split"]: one["path"] for one in given if isinstance(one, dict) and {"split", "path"} <= one.keys()
        }
    else:
        patterns = {"train": given}
    found = {}
    for split, listed in patterns.items():
        each = [str(one) for one in (listed if isinstance(listed, list) else [listed])]
        if elsewhere := [one for one in each if "://" in one]:
            raise UserError(f"{tree.uri}: {CARD} names {elsewhere[0]}; make that a source of its own")
        fits = [re.compile(_expression(start + one.removeprefix("./"))) for one in each]
        found[str(split)] = [name for name in names if any(one.fullmatch(name) for one in fits)]
    return found


def _expression(pattern: str) -> str:
    """A pattern of the hub as a regular expression: * stays within a folder, ** does not."""
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        wild.get(part) or (part.replace("[!", "[^") if part.startswith("[") and part.endswith("]") else re.escape(part))
        for part in _PARTS.split(pattern)
        if part
    )


def _config(tree: Tree, configs: Iterable[str], asked: Asked, default: str) -> str:
    names = list(configs)
    if asked.config and asked.config not in names:
        raise UserError(f"{tree.uri}: there is no config {asked.config}; there is {shown(names)}")
    if asked.config or default in names or len(names) == 1:
        return asked.config or (default if default in names else names[0])
    raise UserError(f"{tree.uri}: name one of its configs in config: {shown(names)}")


def _chosen(tree: Tree, splits: Splits, asked: Asked) -> list[str]:
    if asked.split:
        wanted = [asked.split, *(word for words in SPLITS.values() if asked.split in words for word in words)]
    else:
        wanted = [*SPLITS["validation"], *SPLITS["test"]] if asked.evaluation else list(SPLITS["train"])
    found = next((one for one in wanted if one in splits), None)
    if found is None and not asked.split and len(splits) == 1:
        only = next(iter(splits))
        found = only if asked.evaluation or _word(only) not in ("validation", "test") else None
    if found is None:
        raise UserError(
            f"{tree.uri}: there is no split {wanted[0]}; "
            + (f"there is {shown(splits)}" if asked.split else f"name one in split: {shown(splits)}")
        )
    if not splits[found]:
        raise UserError(f"{tree.uri}: split {found} has no files; there is {shown(tree.names())}")
    return splits[found]


def _of_shard(name: str) -> str | None:
    match = _SHARD.fullmatch(name)
    return match[1] if match else None


def _of_folder(name: str) -> str | None:
    return next((split for part in name.split("/")[:-1] if (split := _word(part))), None)


def _of_file(name: str) -> str | None:
    return _word(name.rsplit("/", 1)[-1])


def _word(part: str) -> str | None:
    """The split that a name has a word for, between signs and digits."""
    for split, words in SPLITS.items():
        if any(re.search(rf"(?:^|[-._ 0-9]){word}(?:$|[-._ 0-9])", part) for word in words):
            return split
    return None
