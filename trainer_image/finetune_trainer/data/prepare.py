"""Preparing a dataset: read, map columns, render, tokenise and mask each row once, into a folder that all ranks map.

Called by train on the first rank of each node; the result is a pure function of the files and the configuration, so nodes need not
exchange it. The dataset digest names both: a run never resumes on other data.
"""

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from finetune_crds.resolved import ResolvedFineTune
from finetune_crds.v1alpha1.dataset import HeldOut

from ..errors import DataError
from .encoding import encoder
from .formats import Example, RowFormat, is_below, picture_path
from .near_duplicates import signature, words
from .prepared import INDEX, Index, RowSet, RowWriter, Tally, place
from .rows import read_rows
from .wording import merged, read_synonyms

VERSION = 6
"""Counts changes that make other tokens or masks of the same rows: prepared sets of another version are not resumed on."""
BATCH_ROWS = 256
IMAGE_ROWS = 32
NAMED_ROWS = 5


class SourceFile(Protocol):
    """A file of a source on this disk (see places.SourceFile)."""

    @property
    def uri(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def size(self) -> int: ...
    @property
    def sha256(self) -> str: ...


class Dataset(NamedTuple):
    """Files by source."""

    train: list[Sequence[SourceFile]]
    """Those of dataset.train[i]."""
    evaluation: list[Sequence[SourceFile]]
    """Those of dataset.evaluation.sources."""
    sets: list[list[Sequence[SourceFile]]]
    """Those of each further set."""
    images: Sequence[SourceFile] = ()
    """What rows of tables name."""
    synonyms: Sequence[SourceFile] = ()
    """Those of dataset.augmentation.synonyms."""
    benchmarks: Sequence[SourceFile] = ()
    """Those of evaluation.benchmarks: no rows, but a run that is resumed must be measured by the same."""

    @property
    def numbered(self) -> list[tuple[int, Sequence[SourceFile]]]:
        """Each source with the number that its rows bear."""
        sets = ((-2 - i, source) for i, sources in enumerate(self.sets) for source in sources)
        return [*enumerate(self.train), *((-1, source) for source in self.evaluation), *sets]


class _Read(NamedTuple):
    example: Example
    row: dict[str, Any]
    source: int
    file: int
    name: str
    number: int


def dataset_digest(spec: ResolvedFineTune, files: Dataset, tokenizer: Any, classes: Sequence[str] | None) -> str:
    """`sha256:<hex>` over sorted (uri, size, content hash) of the files and over what decides how they are prepared."""

    def listed(sources: list[Sequence[SourceFile]]) -> list[list[list[Any]]]:
        return [sorted([file.uri, file.size, file.sha256] for file in source) for source in sources]

    held_out = spec.dataset.evaluation or HeldOut()
    described = {
        "version": VERSION,
        "train": listed(files.train),
        "evaluation": listed(files.evaluation),
        "sets": [listed(sources) for sources in files.sets],
        "weights": [source.weight for source in spec.dataset.train],
        "fraction": held_out.fraction,
        "groupBy": held_out.group_by,
        "slices": [one.to_wire() for one in spec.evaluation.slices],
        "task": spec.task,
        "format": spec.dataset.format,
        "prefix": spec.dataset.prefix,
        "columns": spec.dataset.columns.to_wire() if spec.dataset.columns else None,
        "objective": spec.objective.to_wire() if spec.objective else None,
        "sequenceLength": spec.training.sequence_length,
        "tokenizer": tokenizer and hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer and tokenizer.chat_template,
        "tooLong": spec.dataset.too_long,
        "minTokens": spec.dataset.min_tokens,
        "signed": spec.dataset.deduplicate == "near",
        "classes": list(classes) if classes else None,
    }
    if files.images:
        described["images"] = listed([files.images])
    if spec.dataset.augmentation and spec.task == "text-classification":
        described["changed"] = listed([files.synonyms])
    if files.benchmarks:
        described["benchmarks"] = listed([files.benchmarks])
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def prepare(
    spec: ResolvedFineTune,
    files: Dataset,
    tokenizer: Any,
    folder: Path,
    *,
    classes: Sequence[str] | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> RowSet:
    """Prepares the set below `folder`, or opens it if this machine has it already.

    Args:
        spec: the resolved job.
        files: its sources on this disk.
        tokenizer: the model's; None for images.
        folder: where prepared sets are kept.
        classes: names of the classes that the model has a head for already; without, those of the data.
        check_stop: called between batches; raises to stop.

    Raises:
        DataError, UserError: with file and row number.
    """
    digest = dataset_digest(spec, files, tokenizer, classes)
    target = folder / digest.removeprefix("sha256:")[:16]
    if not (target / INDEX).exists():
        temporary = target.with_suffix(".part")
        shutil.rmtree(temporary, ignore_errors=True)
        _write(spec, files, tokenizer, temporary, digest, classes, check_stop)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    return RowSet.open(target)


def _write(
    spec: ResolvedFineTune,
    files: Dataset,
    tokenizer: Any,
    folder: Path,
    digest: str,
    classes: Sequence[str] | None,
    check_stop: Callable[[], None],
) -> None:
    encode = encoder(spec, tokenizer).encode
    writer = RowWriter(folder)
    tallies: dict[int, Tally] = defaultdict(Tally)
    unlearnable = 0
    named: list[str] = []
    rows = _read(spec, files)
    size = IMAGE_ROWS if spec.task == "image-classification" else BATCH_ROWS
    while batch := list(islice(rows, size)):
        check_stop()
        places = [place(read.name, read.number) for read in batch]
        for read, where, encoded in zip(batch, places, encode([read.example for read in batch], places), strict=True):
            tally = tallies[read.source]
            tally.read += 1
            if spec.dataset.too_long == "drop" and any(row.truncated for row in encoded):
                tally.too_long += 1
                continue
            if sum(len(row.tokens) for row in encoded) < (spec.dataset.min_tokens or 0):
                tally.too_short += 1
                continue
            if spec.dataset.deduplicate == "near":
                writer.sign(signature(words(read.example)))
            origin = _origin(spec, read, where)
            for row in encoded:
                if not row.targets:
                    unlearnable += 1
                    named += [where] * (len(named) < NAMED_ROWS)
                writer.add(row, **origin)
    if unlearnable:
        listed = ", ".join(named) + (", …" if unlearnable > NAMED_ROWS else "")
        raise DataError(
            f"{unlearnable} of {len(writer)} rows have no token to learn within training.sequenceLength {spec.training.sequence_length} ({listed}): "
            "the answer is empty or lies behind the cut; lengthen sequenceLength, leave out what is too long (dataset.tooLong: drop), or correct or remove these rows"
        )
    if not len(writer):
        raise DataError(_why_none(tallies.values()))
    names = [file.uri for _, source in files.numbered for file in source]
    writer.finish(
        Index(
            digest=digest,
            files=names,
            classes=_classes(writer.names, classes or ()),
            tallies=dict(tallies),
            synonyms=merged(_synonyms(file) for file in files.synonyms),
        )
    )


def _synonyms(file: SourceFile) -> dict[str, list[str]]:
    try:
        return read_synonyms(file.path.read_text(encoding="utf-8-sig").splitlines(), file.uri)
    except UnicodeDecodeError as error:
        raise DataError(f"{file.uri}: it is no text in UTF-8; save it as such") from error


def _why_none(tallies: Collection[Tally]) -> str:
    if not sum(tally.read for tally in tallies):
        return "dataset.train: the files hold no rows"
    long, short = (sum(getattr(tally, name) for tally in tallies) for name in ("too_long", "too_short"))
    return f"dataset: every row is left out, {long} as too long (dataset.tooLong: drop) and {short} as too short (dataset.minTokens); lengthen training.sequenceLength or lower minTokens"


def _read(spec: ResolvedFineTune, files: Dataset) -> Iterator[_Read]:
    number_of_file = 0
    for source, listed in files.numbered:
        for file in listed:
            shape: RowFormat | None = None
            for number, row in read_rows(file.path, file.uri):
                shape = shape or row_format(spec, row, file)
                yield _Read(shape.example(number, row), row, source, number_of_file, file.uri, number)
            number_of_file += 1


def row_format(spec: ResolvedFineTune, first: dict[str, Any], file: SourceFile) -> RowFormat:
    """What the rows of a file mean, of which this is the first."""
    objective = spec.objective.name if spec.objective else None
    columns = spec.dataset.columns
    return RowFormat(
        first, spec.task, spec.dataset.format, columns, file.uri, spec.problem, objective, file.path.parent
    )


def named_images(spec: ResolvedFineTune, sources: Iterable[Sequence[SourceFile]]) -> Iterator[tuple[str, Path]]:
    """URI and place of each image that the rows of tables name, once. What is no file is left for prepare to tell."""
    seen = set()
    for file in (file for source in sources for file in source):
        for _, row in read_rows(file.path, file.uri):
            path = picture_path(row, spec.dataset.columns)
            if path is None:
                break  # images in the first row are images in all
            uri = f"{file.uri.rpartition('/')[0]}/{path}"
            if uri not in seen and is_below(path) and (found := file.path.parent / path).is_file():
                seen.add(uri)
                yield uri, found


def _origin(spec: ResolvedFineTune, read: _Read, place: str) -> dict[str, int]:
    """Columns of the prepared set that say where a row comes from."""
    content = _hash(vars(read.example))
    group_by = spec.dataset.evaluation and spec.dataset.evaluation.group_by
    if group_by and read.source >= 0 and group_by not in read.row:
        raise DataError(f"{place}: no column {group_by!r}, which dataset.evaluation.groupBy names")
    slices = 0
    for i, one in enumerate(spec.evaluation.slices):
        value = read.row.get(one.column)
        slices |= ((value if isinstance(value, str) else json.dumps(value)) == one.value) << i
    return {
        "sources": read.source,
        "files": read.file,
        "numbers": read.number,
        "content": content,
        "groups": _hash(read.row[group_by]) if group_by and read.source >= 0 else content,
        "slices": slices,
    }


def _hash(value: Any) -> int:
    def plain(one: Any) -> str:
        return hashlib.sha256(one).hexdigest() if isinstance(one, bytes) else str(one)

    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=plain)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _classes(seen: Sequence[str], known: Sequence[str]) -> list[str]:
    """Those of the model where it knows all that were seen, else those seen."""
    if not seen or (known and set(seen) <= set(known)):
        return list(known) if seen else []
    if len(seen) < 2:
        raise DataError(f"dataset: {len(seen)} class in all rows; classification needs at least two")
    return _sorted_classes(seen)


def _sorted_classes(labels: Sequence[str]) -> list[str]:
    """Integers by value, other names by text: the same whatever the order of the rows."""
    distinct = set(labels)
    if all(label.lstrip("-").isdigit() for label in distinct):
        return sorted(distinct, key=int)
    return sorted(distinct)
