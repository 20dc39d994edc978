"""The data report: which rows came in, which were left out and why, and how some of them look to the model. Called by train and cli.

data-report.json holds numbers and places; text of rows, and images, are in data-report.html only. Both are a pure function of the rows and the job, so
that a resumed run writes the same bytes. Files go by their names: where they lie is the manifest's to say.
"""

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_crds import locations
from finetune_crds.resolved import ResolvedFineTune
from finetune_crds.v1alpha1 import ApiModel

from ..data.holdout import Division, empty_slices, set_names, slice_rows
from ..data.pictures import opened
from ..data.prepared import NOTHING, RowSet
from ..results.outputs import DATA_NUMBERS, DATA_REPORT

JSON: Final = DATA_NUMBERS
HTML: Final = DATA_REPORT
BARS: Final = 40
"""Of the histogram, at most."""
EXAMPLES: Final = 10
LISTED: Final = 20
SHOWN_TOKENS: Final = 800
"""Of an example; of a longer one its two ends."""
THUMBNAIL: Final = 128
"""Pixels, at most, of the longer side of an example that is an image."""


_AT_ONCE = 65_536


class SourceCounts(ApiModel):
    """What became of the rows of one source; rows of its files, but for sequences and tokens."""

    name: str
    evaluation: bool
    """Whether its rows are evaluated on only."""
    read: int = 0
    too_long: int = 0
    """Left out by tooLong: drop."""
    too_short: int = 0
    """Left out by minTokens."""
    duplicates: int = 0
    """Equal to an earlier row; left out with deduplicate only."""
    leaked: int = 0
    """Equal to a row of evaluation; left out with deduplicate only."""
    over_budget: int = 0
    """Left out by tokenBudget."""
    held_out: int = 0
    """Evaluated on."""
    trained: int = 0
    """Trained on."""
    truncated: int = 0
    """Of those trained or evaluated on: cut at sequenceLength."""
    in_pieces: int = 0
    """Of those: made into several sequences."""
    sequences: int = 0
    """Sequences to train on."""
    tokens: int = 0
    """Theirs."""
    targets: int = 0
    """Of these, to be learned."""


class Lengths(ApiModel):
    """A histogram of sequences by their tokens: bar i counts those from i x width + 1 to (i + 1) x width."""

    width: int
    training: list[int]
    evaluation: list[int]
    median: int
    longest: int


class LabelCount(ApiModel):
    """How often a class or tag occurs."""

    training: int
    evaluation: int


class ShownImage(ApiModel):
    """An image of training that is on the page."""

    place: str
    label: str


class DataReport(ApiModel):
    """data-report.json."""

    version: int = 1
    task: str
    sequence_length: int | None = None
    deduplicated: bool
    sources: list[SourceCounts]
    lengths: Lengths
    labels: dict[str, LabelCount]
    """Empty where there are none."""
    duplicates: list[str]
    """Places of the first of them."""
    leaked: list[str]
    findings: list[str]
    """What somebody who knows the trade would look at."""
    images: list[ShownImage]
    """Empty where rows have text, of which examples are on the page only."""

    @property
    def total(self) -> SourceCounts:
        """Of all sources."""
        sums: Counter[str] = Counter()
        for source in self.sources:
            sums.update(source.model_dump(exclude={"name", "evaluation"}))
        return SourceCounts(name="all", evaluation=False, **sums)


class Segment(NamedTuple):
    """A stretch of an example."""

    text: str
    learned: bool
    label: str = ""
    """The tag that is learned here."""


class Shown(NamedTuple):
    """An example as the model sees it."""

    place: str
    tokens: int
    targets: int
    truncated: bool
    labels: list[str]
    """Of the row as a whole."""
    segments: list[Segment]
    image: str = ""
    """An image, small, as a URI that holds it."""


def files(spec: ResolvedFineTune, rows: RowSet, division: Division, tokenizer: Any) -> dict[str, bytes]:
    """Contents of both files by name.

    Args:
        spec: the resolved job.
        rows: the prepared set.
        division: what of it is trained and evaluated on.
        tokenizer: None for images.
    """
    from . import data_page

    found = report(spec, rows, division)
    shown = examples(spec, rows, division, tokenizer)
    text = json.dumps(found.to_wire(), indent=1, ensure_ascii=False) + "\n"
    return {JSON: text.encode(), HTML: data_page.render(spec, found, shown).encode()}


def report(spec: ResolvedFineTune, rows: RowSet, division: Division) -> DataReport:
    """The numbers."""
    selection = division.selection
    evaluated = np.concatenate([division.held_out, *division.sets.values()])
    found = DataReport(
        task=spec.task,
        sequence_length=spec.training.sequence_length,
        deduplicated=selection.deduplicated,
        sources=_sources(spec, rows, division, evaluated),
        lengths=_lengths(rows, division.train, evaluated),
        labels=_labels(rows, division.train, evaluated),
        duplicates=[_place(rows, int(row)) for row in selection.duplicates[:LISTED]],
        leaked=[_place(rows, int(row)) for row in selection.leaked[:LISTED]],
        findings=[],
        images=[
            ShownImage(place=_place(rows, row), label=_row_labels(rows, row)[0])
            for row in (_drawn(spec, rows, division) if spec.task == "image-classification" else ())
        ],
    )
    findings = [*_findings(spec, found), *empty_slices(slice_rows(spec, rows, division.held_out))]
    return found.model_copy(update={"findings": findings})


def _sources(
    spec: ResolvedFineTune, rows: RowSet, division: Division, evaluated: NDArray[np.int64]
) -> list[SourceCounts]:
    selection, examples = division.selection, rows.examples
    first = np.flatnonzero(np.diff(examples, prepend=-1))
    pieces = np.diff(first, append=len(examples))
    used = np.concatenate([division.train, evaluated])

    def counted(ids: NDArray[np.int64], *, whole: bool = True, weights: Any = None) -> Callable[[int], int]:
        """By source: rows of the files (each by the first of its prepared rows) that these prepared rows come from, or sums over them all."""
        if whole:
            ids = first[np.unique(examples[ids])]
        sources = rows.sources[ids]
        return lambda source: int(
            (sources == source).sum() if weights is None else weights[ids][sources == source].sum()
        )

    columns = {
        "duplicates": counted(selection.duplicates),
        "leaked": counted(selection.leaked),
        "over_budget": counted(selection.over_budget),
        "held_out": counted(evaluated),
        "trained": counted(division.train),
        "truncated": counted(used[rows.truncated[used]]),
        "in_pieces": counted(used[np.isin(examples[used], np.flatnonzero(pieces > 1))]),
        "sequences": counted(division.train, whole=False),
        "tokens": counted(division.train, whole=False, weights=rows.lengths),
        "targets": counted(division.train, whole=False, weights=_learned(spec, rows)),
    }
    return [
        SourceCounts(
            name=name,
            evaluation=number < 0,
            **rows.index.tallies[number].model_dump() if number in rows.index.tallies else {},
            **{column: of(number) for column, of in columns.items()},
        )
        for number, name in _named_sources(spec)
    ]


def _learned(spec: ResolvedFineTune, rows: RowSet) -> NDArray[Any]:
    """Targets of each row; where answers are compared the loss counts rows, and what is learned are the tokens of both answers."""
    if spec.compares:
        return np.add.reduceat(rows.learned, rows.offsets[:-1], dtype=np.int32)
    return rows.targets


def _named_sources(spec: ResolvedFineTune) -> list[tuple[int, str]]:
    """Numbers as the rows bear them, and names."""
    held_out = spec.dataset.evaluation
    return [
        *((i, f"train[{i}]: {_name(locations.public(source.uri))}") for i, source in enumerate(spec.dataset.train)),
        *([(-1, "evaluation.sources")] if held_out and held_out.sources else []),
        *((-2 - i, f"evaluation: {name}") for i, name in enumerate(set_names(spec))),
    ]


def _name(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


def _place(rows: RowSet, row: int) -> str:
    """What a reader needs to find it."""
    return _name(rows.place(row))


def _lengths(rows: RowSet, train: NDArray[np.int64], evaluated: NDArray[np.int64]) -> Lengths:
    both = rows.lengths[np.concatenate([train, evaluated])]
    longest = int(both.max(initial=0))
    width = max(1, -(-longest // BARS))
    bars = max(1, -(-longest // width))

    def histogram(ids: NDArray[np.int64]) -> list[int]:
        counts = np.bincount((np.maximum(rows.lengths[ids], 1) - 1) // width, minlength=bars)
        return [int(count) for count in counts]

    median = int(np.median(rows.lengths[train])) if len(train) else 0
    return Lengths(
        width=width, training=histogram(train), evaluation=histogram(evaluated), median=median, longest=longest
    )


def _labels(rows: RowSet, train: NDArray[np.int64], evaluated: NDArray[np.int64]) -> dict[str, LabelCount]:
    """By class, frequent ones first."""
    if not rows.index.classes:
        return {}
    side = np.zeros(len(rows.targets), np.int8)
    side[train], side[evaluated] = 1, 2
    counts = np.zeros((2, len(rows.index.classes)), np.int64)
    for start in range(0, len(side), _AT_ONCE):
        offsets = rows.label_offsets[start : start + _AT_ONCE + 1]
        labels = rows.labels[offsets[0] : offsets[-1]].astype(np.int64)
        sides = np.repeat(side[start : start + _AT_ONCE], np.diff(offsets))
        for i in (1, 2):
            counts[i - 1] += np.bincount(labels[(sides == i) & (labels != NOTHING)], minlength=len(rows.index.classes))
    order = np.argsort(-counts[0], kind="stable")
    return {rows.index.classes[i]: LabelCount(training=int(counts[0][i]), evaluation=int(counts[1][i])) for i in order}


def _findings(spec: ResolvedFineTune, found: DataReport) -> Iterable[str]:
    total = found.total
    if total.leaked:
        rows = "row of training equals a row" if total.leaked == 1 else "rows of training equal rows"
        yield f"{total.leaked:,} {rows} of evaluation" + (
            " and were left out."
            if found.deduplicated
            else ": the evaluation looks better than the model is. dataset.deduplicate leaves them out."
        )
    if total.duplicates:
        rows = (
            "row of training equals an earlier one" if total.duplicates == 1 else "rows of training equal earlier ones"
        )
        yield f"{total.duplicates:,} {rows}" + (
            " and were left out."
            if found.deduplicated
            else " and weigh as much again. dataset.deduplicate leaves them out."
        )
    if total.truncated:
        share = total.truncated / max(1, total.trained + total.held_out)
        yield f"{total.truncated:,} rows ({share:.1%}) are cut at {found.sequence_length} tokens. training.sequenceLength and dataset.tooLong decide that."
    if (
        total.tokens
        and total.targets < total.tokens / 20
        and spec.task == "text-generation"
        and not (spec.objective and spec.objective.grpo)
    ):
        yield f"Only {total.targets / total.tokens:.1%} of the tokens are learned: most of each row is prompt."
    if not total.held_out:
        yield "Nothing is held out: nobody will know whether the model got better."
    counts = {name: label.training for name, label in found.labels.items()}
    if counts and spec.task != "token-classification":
        rare = [name for name, count in counts.items() if count < 10]
        if rare:
            yield f"Classes with fewer than 10 rows to learn from: {len(rare)} of {len(counts)}."
        if min(counts.values()) * 10 < max(counts.values()):
            yield "The most frequent class has more than ten times the rows of the rarest. objective.classification.balanceClasses weighs them."


def examples(spec: ResolvedFineTune, rows: RowSet, division: Division, tokenizer: Any) -> list[Shown]:
    """Some rows of training as the model sees them; images small. Args: tokenizer: None for images."""
    return [_shown(spec, rows, row, tokenizer) for row in _drawn(spec, rows, division)]


def _drawn(spec: ResolvedFineTune, rows: RowSet, division: Division) -> list[int]:
    """Some rows of training, of each source in turn, drawn by the seed."""
    drawn = np.random.default_rng([spec.training.seed, 7]).permutation(division.train)
    turn = np.zeros(len(drawn), np.int64)
    for source in np.unique(rows.sources[drawn]):
        here = rows.sources[drawn] == source
        turn[here] = np.arange(here.sum())
    return [int(row) for row in drawn[np.argsort(turn, kind="stable")][:EXAMPLES]]


def _row_labels(rows: RowSet, row: int) -> list[str]:
    classes = rows.index.classes
    return [classes[int(value)] if classes else f"{value:g}" for value in rows.labels_of(row)]


def _thumbnail(content: bytes) -> str:
    image, small = opened(content, "RGB"), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(small, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}"


def _shown(spec: ResolvedFineTune, rows: RowSet, row: int, tokenizer: Any) -> Shown:
    if spec.task == "image-classification":
        return Shown(_place(rows, row), 0, 0, False, _row_labels(rows, row), [], _thumbnail(rows.note(row)))
    start, end = int(rows.offsets[row]), int(rows.offsets[row + 1])
    tokens, learned = rows.tokens[start:end].tolist(), rows.learned[start:end].tolist()
    values = rows.labels_of(row)
    names = [""] * len(tokens)
    labels: list[str] = []
    if spec.task == "token-classification":
        names = ["" if value == NOTHING else rows.index.classes[int(value)] for value in values]
        learned = [bool(name) for name in names]
    elif spec.task == "question-answering":
        first, last = (int(value) for value in values)
        learned = [first <= i <= last and last > 0 for i in range(len(tokens))]
        labels = [] if last > 0 else ["no answer here"]
    else:
        labels = _row_labels(rows, row)
    return Shown(
        _place(rows, row), len(tokens), sum(learned) if spec.compares else int(rows.targets[row]), bool(rows.truncated[row]), labels,
        _segments(tokens, learned, names, tokenizer),
    )  # fmt: skip


def _segments(tokens: list[int], learned: list[bool], names: list[str], tokenizer: Any) -> list[Segment]:
    """Runs of tokens of one kind, as text."""
    half = SHOWN_TOKENS // 2
    if len(tokens) > SHOWN_TOKENS:
        left_out = Segment(f" … {len(tokens) - 2 * half:,} tokens … ", learned=False)
        ends = (_segments(part[0], part[1], part[2], tokenizer) for part in (
            (tokens[:half], learned[:half], names[:half]), (tokens[-half:], learned[-half:], names[-half:])
        ))  # fmt: skip
        return [*next(ends), left_out, *next(ends)]
    found: list[Segment] = []
    start, before = 0, ""
    for i in range(1, len(tokens) + 1):
        if i < len(tokens) and learned[i] == learned[start] and not names[i] and not names[start]:
            continue
        whole = str(tokenizer.decode(tokens[:i], clean_up_tokenization_spaces=False))
        text = whole.removeprefix(before) if whole.startswith(before) else str(tokenizer.decode(tokens[start:i]))
        found.append(Segment(text, learned[start], names[start]))
        start, before = i, whole
    return found
