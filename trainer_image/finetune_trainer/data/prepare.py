"""Preparing a dataset: read, map columns, render, tokenise and mask each row once, into a folder that all ranks map.

Called by train on the first rank of each node; the result is a pure function of the files and the configuration, so nodes need not
exchange it. The dataset digest names both: a run never resumes on other data. Of remote sources one file is on this machine at a time, or none
where one is too large for it.
"""

import hashlib
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from finetune_crds.resolved import ResolvedFineTune
from finetune_crds.v1alpha1.dataset import HeldOut

from ..errors import DataError, UserError
from ..storage.remote_files import RemoteFile
from ..storage.sources import LocalFile, ReadFile, fetched, local_file
from ..storage.trees import SourceFile
from .encoding import EncodedRow, encoder
from .formats import Example, RowFormat, is_below, picture_path
from .near_duplicates import signature, words
from .prepared import INDEX, Index, RowSet, RowWriter, Tally, place
from .rows import Row, read_rows
from .wording import merged, read_synonyms

VERSION = 9
"""Counts changes that make other tokens or masks of the same rows: prepared sets of another version are not resumed on."""
IMAGES: Final = "images.json"
"""Size and time of each image that rows of tables name, by path."""
_VERSIONS: Final = ".versions"
"""End of the name of an empty file in a prepared set, by which it is found again: a hash of its files' versions."""
BATCH_ROWS = 256
IMAGE_ROWS = 32
NAMED_ROWS = 5
READ_FOR_BUDGET: Final = 4
"""Files are read till they have so many times dataset.tokenBudget, from which the rows are drawn."""


class Dataset(NamedTuple):
    """Files by source."""

    train: list[Sequence[SourceFile]]
    """Those of dataset.train[i]."""
    evaluation: list[Sequence[SourceFile]]
    """Those of dataset.evaluation.sources."""
    sets: list[list[Sequence[SourceFile]]]
    """Those of each further set."""
    synonyms: Sequence[LocalFile] = ()
    """Those of dataset.augmentation.synonyms."""
    benchmarks: Sequence[LocalFile] = ()
    """Those of evaluation.benchmarks: no rows, but a run that is resumed must be measured by the same."""

    @property
    def numbered(self) -> list[tuple[int, Sequence[SourceFile]]]:
        """Each source with the number that its rows bear."""
        sets = ((-2 - i, source) for i, sources in enumerate(self.sets) for source in sources)
        return [*enumerate(self.train), *((-1, source) for source in self.evaluation), *sets]

    @property
    def listed(self) -> list[SourceFile]:
        """Each file, by the number that its rows bear."""
        return [file for _, source in self.numbered for file in source]


class _Planned(NamedTuple):
    """A file to read."""

    source: int
    number: int
    file: SourceFile
    spare: bool = False
    """Whether a token budget may do without."""
    enough: float = math.inf
    """Tokens of it that are enough, where it is read as it arrives."""


@dataclass
class _Seen:
    """What was read."""

    files: dict[int, ReadFile] = field(default_factory=dict)
    """By number."""
    parts: dict[int, float] = field(default_factory=dict)
    """Of files of which only the beginning was read, by number: how much of their bytes."""
    tokens: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Of each file, by number, as far as they have been written."""
    images: dict[str, LocalFile] = field(default_factory=dict)
    """What rows of tables named, by URI."""
    columns: dict[str, None] = field(default_factory=dict)
    """Of the rows that may be held out, where there are slices of them."""


class _Read(NamedTuple):
    example: Example
    row: dict[str, Any]
    source: int
    file: int
    name: str
    number: int


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
        files: its sources.
        tokenizer: the model's; None for images.
        folder: where prepared sets are kept.
        classes: names of the classes that the model has a head for already; without, those of the data.
        check_stop: called between batches; raises to stop.

    Raises:
        DataError, UserError: with file and row number.
        StorageError: a file could not be fetched.
    """
    described = _described(spec, files, tokenizer, classes)
    versions = [[source, file.uri, file.size, file.version] for source, listed in files.numbered for file in listed]
    key = _sha256([described, versions])[:16] + _VERSIONS
    known = all(version for *_, version in versions)
    if known and (found := next(filter(_is_whole, (path.parent for path in folder.glob(f"*/{key}"))), None)):
        return RowSet.open(found)
    temporary = folder / "part"
    shutil.rmtree(temporary, ignore_errors=True)
    digest = _write(spec, files, tokenizer, temporary, described, classes, check_stop)
    if known:
        (temporary / key).touch()
    target = folder / digest.removeprefix("sha256:")[:16]
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return RowSet.open(target)


def _is_whole(folder: Path) -> bool:
    """Whether a set is prepared, of images that its tables still name as they were."""
    if not (folder / INDEX).exists():
        return False
    images: dict[str, list[int]] = json.loads((folder / IMAGES).read_text())
    return all(Path(path).is_file() and _version(Path(path)) == version for path, version in images.items())


def _version(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _described(spec: ResolvedFineTune, files: Dataset, tokenizer: Any, classes: Sequence[str] | None) -> dict[str, Any]:
    """What decides how rows are prepared, and the small files beside them."""
    held_out = spec.dataset.evaluation or HeldOut()
    described = {
        "version": VERSION,
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
    if spec.dataset.augmentation and spec.task == "text-classification":
        described["changed"] = [_contents(files.synonyms)]
    if files.benchmarks:
        described["benchmarks"] = [_contents(files.benchmarks)]
    arriving = [file.uri for source in files.train for file in source if file.arrive]
    if spec.dataset.token_budget and (arriving or any(len(source) > 1 for source in files.train)):
        described["budget"] = [spec.dataset.token_budget, spec.training.seed, *arriving]
    return described


def _digest(described: dict[str, Any], files: Dataset, seen: _Seen) -> str:
    """`sha256:<hex>` over sorted (uri, size, content hash) of the files and over what decides how they are prepared. Of files that a token budget did without, uri and size.

    The content hash is that of the bytes, whether a file was fetched or read as it arrived; of one that a token budget left in the middle it is over the rows that
    were read, each with its number."""
    numbers = iter(range(len(files.listed)))

    def listed(sources: Iterable[Sequence[SourceFile]]) -> list[list[list[Any]]]:
        return [_contents(seen.files.get(next(numbers), file) for file in source) for source in sources]

    whole = {
        **described,
        "train": listed(files.train),
        "evaluation": listed(files.evaluation),
        "sets": [listed(sources) for sources in files.sets],
    }
    if seen.images:
        whole["images"] = [_contents(seen.images.values())]
    return f"sha256:{_sha256(whole)}"


def _contents(files: Iterable[ReadFile | SourceFile]) -> list[list[Any]]:
    return sorted([file.uri, file.size, *([file.sha256] if isinstance(file, ReadFile) else [])] for file in files)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write(
    spec: ResolvedFineTune,
    files: Dataset,
    tokenizer: Any,
    folder: Path,
    described: dict[str, Any],
    classes: Sequence[str] | None,
    check_stop: Callable[[], None],
) -> str:
    """Returns the digest."""
    encode = encoder(spec, tokenizer).encode
    writer = RowWriter(folder)
    tallies: dict[int, Tally] = defaultdict(Tally)
    seen = _Seen()
    unlearnable = 0
    named: list[str] = []
    size = IMAGE_ROWS if spec.task == "image-classification" else BATCH_ROWS
    with closing(_read(spec, files, seen, lambda: writer.tokens, check_stop)) as rows:
        while batch := list(islice(rows, size)):
            check_stop()
            places = [place(read.name, read.number) for read in batch]
            for read, where, encoded in zip(
                batch, places, encode([read.example for read in batch], places), strict=True
            ):
                tally = tallies[read.source]
                tally.read += 1
                if spec.dataset.too_long == "drop" and any(row.truncated for row in encoded):
                    tally.too_long += 1
                    continue
                if spec.dataset.min_tokens and _length(spec, encoded) < spec.dataset.min_tokens:
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
                    seen.tokens[read.file] += len(row.tokens)
    if unlearnable:
        listed = ", ".join(named) + (", …" if unlearnable > NAMED_ROWS else "")
        raise DataError(
            f"{unlearnable} of {len(writer)} rows have no token to learn within training.sequenceLength {spec.training.sequence_length} ({listed}): "
            "the answer is empty or lies behind the cut; lengthen sequenceLength, leave out what is too long (dataset.tooLong: drop), or correct or remove these rows"
        )
    if not len(writer):
        raise DataError(_why_none(tallies.values()))
    for one in spec.evaluation.slices:
        if one.column not in seen.columns:
            raise UserError(
                f"evaluation.slices {one.name}: no row to evaluate on has a column {one.column!r} (columns: {', '.join(seen.columns)}); correct it"
            )
    images = {str(file.path): _version(file.path) for file in seen.images.values()}
    (folder / IMAGES).write_text(json.dumps(images))
    digest = _digest(described, files, seen)
    writer.finish(
        Index(
            digest=digest,
            files=[file.uri for file in files.listed],
            classes=_classes(writer.names, classes or ()),
            tallies=dict(tallies),
            shares=_shares(files, seen),
            digests=_source_digests(files, seen),
            synonyms=merged(_synonyms(file) for file in files.synonyms),
        )
    )
    return digest


def _length(spec: ResolvedFineTune, encoded: Sequence[EncodedRow]) -> int:
    """Tokens of the longest sequence of a row of the files; of answers that are compared each is one, with its prompt."""

    def longest(row: EncodedRow) -> int:
        if not spec.compares or row.split is None:
            return len(row.tokens)
        of_another_row = spec.objective is not None and spec.objective.kto is not None  # the second answer
        return row.split if of_another_row else max(row.split, len(row.tokens) - row.split)

    return max(map(longest, encoded))


def _shares(files: Dataset, seen: _Seen) -> dict[int, float]:
    """Part of each source's bytes that was read, where a token budget did without the rest."""
    numbers = iter(range(len(files.listed)))
    found = {}
    for source, listed in enumerate(files.train):
        sizes = [
            (file.size or 0, seen.parts.get(i, float(i in seen.files)))
            for file, i in zip(listed, numbers, strict=False)
        ]
        if whole := sum(size for size, _ in sizes):
            found[source] = sum(size * part for size, part in sizes) / whole
    return {source: share for source, share in found.items() if share < 1}


def _source_digests(files: Dataset, seen: _Seen) -> dict[int, str]:
    found: dict[int, list[str]] = defaultdict(list)
    numbers = iter(range(len(files.listed)))
    for source, listed in files.numbered:
        found[source] += [
            seen.files[number].sha256 for _, number in zip(listed, numbers, strict=False) if number in seen.files
        ]
    return {source: f"sha256:{read[0] if len(read) == 1 else _sha256(sorted(read))}" for source, read in found.items()}


def _synonyms(file: LocalFile) -> dict[str, list[str]]:
    try:
        return read_synonyms(file.path.read_text(encoding="utf-8-sig").splitlines(), file.uri)
    except UnicodeDecodeError as error:
        raise DataError(f"{file.uri}: it is no text in UTF-8; save it as such") from error


def _why_none(tallies: Collection[Tally]) -> str:
    if not sum(tally.read for tally in tallies):
        return "dataset.train: the files hold no rows"
    long, short = (sum(getattr(tally, name) for tally in tallies) for name in ("too_long", "too_short"))
    return f"dataset: every row is left out, {long} as too long (dataset.tooLong: drop) and {short} as too short (dataset.minTokens); lengthen training.sequenceLength or lower minTokens"


def _read(
    spec: ResolvedFineTune, files: Dataset, seen: _Seen, tokens: Callable[[], int], check_stop: Callable[[], None]
) -> Generator[_Read]:
    """The rows of all files, or of as many as a token budget asks for. `tokens` tells how many have been written."""
    enough = _enough(spec)
    of_its_own = bool(spec.dataset.evaluation and spec.dataset.evaluation.sources)
    for planned in _plan(spec, files):
        with closing(fetched((one.file for one in planned), check_stop)) as there:
            for one in planned:
                if one.spare and tokens() >= enough:
                    break
                file, content = next(there)
                rows, shape = read_rows(content, file.uri), None
                if isinstance(content, Path):
                    seen.files[one.number] = local_file(file.uri, content)
                else:
                    rows = _arriving(rows, one, content, seen)
                for number, row in rows:
                    shape = shape or row_format(spec, row, file.uri, content)
                    if spec.task == "image-classification" and isinstance(content, Path):
                        _note_image(spec, row, file.uri, content, seen)
                    if spec.evaluation.slices and (one.source == -1 if of_its_own else one.source >= 0):
                        seen.columns.update(dict.fromkeys(row))
                    yield _Read(shape.example(number, row), row, one.source, one.number, file.uri, number)


def _enough(spec: ResolvedFineTune) -> float:
    """Tokens that are enough to draw the budget from."""
    return READ_FOR_BUDGET * spec.dataset.token_budget if spec.dataset.token_budget else math.inf


def _arriving(rows: Iterator[Row], one: _Planned, content: RemoteFile, seen: _Seen) -> Iterator[Row]:
    """The rows of a file that is read as it arrives; notes what was read.

    When there are enough tokens of it the file is left where further bytes would have to come: behind a row group of Parquet, at the end of
    what is read whole.
    """
    digest, enough = hashlib.sha256(), math.inf
    for number, row in rows:
        if content.arrived > enough:
            seen.files[one.number] = ReadFile(one.file.uri, content.size, digest.hexdigest())
            seen.parts[one.number] = min(1.0, enough / content.size)
            return
        if one.enough < math.inf:
            digest.update(b"%d %d\n" % (number, _hash(row)))
            if enough == math.inf and seen.tokens[one.number] >= one.enough:
                enough = content.arrived
        yield number, row
    seen.files[one.number] = ReadFile(one.file.uri, content.size, content.sha256())


def _plan(spec: ResolvedFineTune, files: Dataset) -> list[list[_Planned]]:
    """The files to train on and those to evaluate on, in the order in which they are read.

    With a token budget the files of each source are shuffled, and the sources advance together. Of what is enough, a file that is read as it arrives
    gives as large a part as it is of all bytes; such files come first, and no other makes up for them.
    """
    numbers = iter(range(len(files.listed)))
    planned = [[_Planned(source, next(numbers), file) for file in listed] for source, listed in files.numbered]
    train, other = planned[: len(files.train)], planned[len(files.train) :]
    if not spec.dataset.token_budget:
        return [list(chain(*train)), list(chain(*other))]
    whole = sum(one.file.size or 0 for one in chain(*train))
    train = [
        [
            one._replace(enough=_enough(spec) * (one.file.size or 0) / whole) if one.file.arrive else one
            for one in source
        ]
        for source in train
    ]
    draw = np.random.default_rng([spec.training.seed, 9])
    places: list[tuple[float, _Planned]] = []
    for source in train:
        order = draw.permutation(len(source)) if len(source) > 1 else range(len(source))
        spare = [i > 0 and not source[j].file.arrive for i, j in enumerate(order)]
        places += [(spare[i] * i / len(source), source[j]._replace(spare=spare[i])) for i, j in enumerate(order)]
    return [[one for _, one in sorted(places, key=lambda place: place[0])], list(chain(*other))]


def row_format(spec: ResolvedFineTune, first: dict[str, Any], uri: str, content: Path | RemoteFile) -> RowFormat:
    """What the rows of a file mean, of which this is the first. Images beside it are named by rows of files on this machine only."""
    objective = spec.objective.name if spec.objective else None
    columns = spec.dataset.columns
    folder = content.parent if isinstance(content, Path) else None
    return RowFormat(first, spec.task, spec.dataset.format, columns, uri, spec.problem, objective, folder)


def _note_image(spec: ResolvedFineTune, row: dict[str, Any], uri: str, path: Path, seen: _Seen) -> None:
    """Notes the file that a row names. What is none, its format tells."""
    name = picture_path(row, spec.dataset.columns)
    if name is None or not is_below(name):
        return
    named = f"{uri.rpartition('/')[0]}/{name}"
    if named not in seen.images and (found := path.parent / name).is_file():
        seen.images[named] = local_file(named, found)


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
