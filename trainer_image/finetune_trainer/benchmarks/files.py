"""Files of a benchmark, read and judged before lm-evaluation-harness sees them: what would run code or ask the network is refused.

The harness imports what a file names while it parses it, wherever it stands. So without allowUserCode it gets what was read here. Parsed with a loader that makes nothing but plain values. Neither torch nor the harness is imported here. Called by setup.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from finetune_crds import locations
from finetune_crds.v1alpha1.evaluation import Benchmark

from ..errors import UserError

BUILDERS: Final = ("json", "csv", "parquet", "text")
"""What dataset_path may be: readers of the datasets library that take files."""
OPTIONS: Final = ("data_files", "field", "delimiter", "sep", "names", "encoding", "trust_remote_code")
"""Of dataset_kwargs."""
_SPLITS: Final = ("test_split", "validation_split", "training_split")
_LISTED: Final = 8


class _Code(str):
    """What `!function` names."""


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: _Code(node.value))


@dataclass(frozen=True)
class TaskFile:
    """A task that may be run."""

    benchmark: Benchmark
    name: str
    """What its file calls it."""
    path: Path
    config: dict[str, Any] | None
    """What the file and those that it includes say, in plain values; None where the harness may read them itself, which runs what they name."""
    data_files: dict[str, list[str]]
    """Files by split; empty where the user's own function makes the data."""
    files: tuple[Path, ...]
    """All files of the benchmark, whose content belongs to the identity of a run."""
    root: Path
    """Their folder."""


def find(benchmark: Benchmark, place: Path) -> TaskFile:
    """The task of a benchmark.

    Args:
        benchmark: of the job.
        place: its folder, or its only file.

    Raises:
        UserError: there is none or which one is open; or it would run code that nobody allowed, or ask the network.
    """
    reader = _Reader(benchmark, place)
    tasks = {str(config["task"]): (path, config) for path, config in reader.tasks()}
    if benchmark.task is not None and benchmark.task not in tasks:
        raise UserError(f"{reader.what}: no file defines task {benchmark.task!r}; there are {_few(sorted(tasks))}")
    if benchmark.task is None and len(tasks) != 1:
        raise UserError(
            f"{reader.what}: {locations.public(benchmark.uri)} holds {len(tasks)} tasks ({_few(sorted(tasks))}); say which with task, and list others as benchmarks of their own"
        )
    name = benchmark.task or next(iter(tasks))
    path, config = tasks[name]
    try:
        data_files = reader.judge(path, config)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{reader.what}: {name} has a field of another type than the harness reads; correct it"
        ) from error
    files = sorted({*reader.files(), *reader.named})
    own = None if benchmark.allow_user_code else config
    return TaskFile(benchmark, name, path, own, data_files, tuple(files), reader.root)


class _Reader:
    def __init__(self, benchmark: Benchmark, place: Path) -> None:
        self.what = f"evaluation.benchmarks {benchmark.name}"
        self.root = place if place.is_dir() else place.parent
        self._only = None if place.is_dir() else place
        self.named: set[Path] = set()
        """Files that others name."""
        self._allowed = bool(benchmark.allow_user_code)

    def files(self) -> Iterator[Path]:
        """All of them; hidden ones are what volumes keep for themselves."""
        if self._only:
            yield self._only
            return
        for path in sorted(self.root.rglob("*")):
            hidden = any(part.startswith((".", "__pycache__")) for part in path.relative_to(self.root).parts)
            if not hidden and path.is_file():
                yield path

    def tasks(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Files that define a task, with what they and those that they include say."""
        for path in self.files():
            if path.suffix not in (".yaml", ".yml"):
                continue
            config = self._read(path, ())
            if isinstance(config.get("task"), str) and "group" not in config:
                yield path, config

    def judge(self, path: Path, config: dict[str, Any]) -> dict[str, list[str]]:
        """Raises UserError for what must not be run; returns the files of each split, absolute."""
        where = self._where(path)
        if not self._allowed:
            code = next(_codes(config), None)
            if code is None and ("class" in config or config.get("unsafe_code")):
                code = "class" if "class" in config else "unsafe_code"
            if code is not None:
                raise UserError(
                    f"{where}: {code} runs code of the file's author, and allowUserCode is not set; set evaluation.benchmarks[].allowUserCode: true if you trust it, or remove it"
                )
        for field in ("use_prompt", "doc_to_image", "doc_to_audio"):
            if config.get(field) is not None:
                raise UserError(f"{where}: {field} is not supported; write the prompt as doc_to_text")
        for metric in config.get("metric_list") or ():
            if isinstance(metric, dict) and metric.get("hf_evaluate"):
                raise UserError(
                    f"{where}: hf_evaluate would download metric {metric.get('metric')}, and nothing is downloaded; use one of the harness's own"
                )
        given = config.get("generation_kwargs") or {}
        if given.get("do_sample") or float(given.get("temperature") or 0) > 0:
            raise UserError(
                f"{where}: generation_kwargs draws answers at random, so two runs would not agree; remove do_sample and temperature"
            )
        if not any(config.get(split) for split in _SPLITS[:2]):
            raise UserError(f"{where}: it names no split to be asked of; add test_split or validation_split")
        if self._allowed and isinstance(config.get("custom_dataset"), _Code):
            return {}
        return self._data(where, path.parent, config)

    def _data(self, where: str, folder: Path, config: dict[str, Any]) -> dict[str, list[str]]:
        builder, options = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
        if builder not in BUILDERS:
            raise UserError(
                f"{where}: dataset_path {builder!r} would be downloaded, and nothing is; put the data beside the task, and write dataset_path: json with dataset_kwargs: {{data_files: ...}} (or {', '.join(BUILDERS[1:])})"
            )
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise UserError(f"{where}: dataset_kwargs.{unknown[0]} is not supported; there are {', '.join(OPTIONS)}")
        listed = options.get("data_files")
        if not listed:
            raise UserError(f"{where}: dataset_kwargs needs data_files, the files of each split")
        by_split = listed if isinstance(listed, dict) else {"train": listed}
        return {
            str(split): [
                str(self._inside(where, folder, file)) for file in (files if isinstance(files, list) else [files])
            ]
            for split, files in by_split.items()
        }

    def _inside(self, where: str, folder: Path, name: Any) -> Path:
        """A file of the folder, by its name from the file that names it. Links count by where they lead."""
        path = Path(os.path.normpath(folder / str(name)))
        if "://" in str(name) or not path.resolve().is_relative_to(self.root.resolve()):
            raise UserError(f"{where}: {name} lies outside of the benchmark's folder; put it inside")
        if not path.is_file():
            raise UserError(f"{where}: {name} is not there; put it beside the task, or correct the name")
        self.named.add(path)
        return path

    def _read(self, path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
        """A file with what it includes, its own keys first, as the harness merges them."""
        where = self._where(path)
        if path in including:
            raise UserError(f"{where}: it includes itself; remove the include")
        try:
            config = yaml.load(path.read_bytes(), Loader=_Loader)  # makes plain values only
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f" line {mark.line + 1}" if mark else ""
            raise UserError(f"{where}{line}: it is no YAML of plain values and !function; correct it") from error
        if not isinstance(config, dict):
            raise UserError(f"{where}: it holds no mapping; a task is one")
        merged: dict[str, Any] = {}
        includes = config.pop("include", None) or []
        for name in includes if isinstance(includes, list) else [includes]:
            included = self._read(self._inside(where, path.parent, name), (*including, path))
            merged |= {key: value for key, value in included.items() if key != "task_list"}
        return merged | config

    def _where(self, path: Path) -> str:
        try:
            name = path.relative_to(self.root)
        except ValueError:
            name = Path(path.name)
        return f"{self.what}: {name}"


def _codes(value: Any) -> Iterator[str]:
    """Every !function below a value."""
    if isinstance(value, _Code):
        yield f"!function {value}"
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _codes(child)


def _few(names: list[str]) -> str:
    return (", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")) or "none"
