"""data-report.html: one page without anything from elsewhere, light or dark as its reader likes. Called by data_report."""

from collections.abc import Sequence
from typing import Any, Final

from finetune_crds.resolved import ResolvedFineTune

from . import pages
from .data_report import DataReport, Shown, SourceCounts

FATES: Final = (
    ("trained", "trained on"),
    ("held_out", "held out"),
    ("duplicates", "duplicates, left out"),
    ("leaked", "in the evaluation too, left out"),
    ("too_long", "too long, left out"),
    ("too_short", "too short, left out"),
    ("over_budget", "beyond the token budget"),
)
"""What becomes of a row, in the order of the bars; each row has one."""
_COLUMNS: Final = (
    ("read", "read"),
    ("trained", "trained on"),
    ("held_out", "held out"),
    ("duplicates", "duplicates"),
    ("leaked", "in evaluation too"),
    ("too_long", "too long"),
    ("too_short", "too short"),
    ("over_budget", "over budget"),
    ("truncated", "cut"),
    ("in_pieces", "in pieces"),
    ("tokens", "tokens to train on"),
)
_ALWAYS: Final = ("read", "trained", "held_out")
_LABELS_SHOWN: Final = 40


def render(spec: ResolvedFineTune, report: DataReport, examples: Sequence[Shown]) -> str:
    """The page. Text of rows is escaped by the template engine."""
    labels = list(report.labels.items())
    return pages.template("data_report.html.j2").render(
        report=report,
        spec=spec,
        model=spec.model.uri.rstrip("/").rpartition("/")[2],
        total=report.total,
        flows=[_flow(source, report.deduplicated) for source in report.sources],
        fates=[(i, name) for i, (key, name) in enumerate(FATES) if _fate(report.total, key, report.deduplicated)],
        columns=[(key, name) for key, name in _COLUMNS if key in _ALWAYS or getattr(report.total, key)],
        bars=_bars(report),
        median=round(100 * report.lengths.median / (report.lengths.width * len(report.lengths.training)), 3),
        labels=labels[:_LABELS_SHOWN],
        more_labels=len(labels) - _LABELS_SHOWN,
        most=max((label.training for _, label in labels), default=0) or 1,
        examples=examples,
    )


def _fate(source: SourceCounts, key: str, deduplicated: bool) -> int:
    if key in ("duplicates", "leaked") and not deduplicated:
        return 0
    return int(getattr(source, key))


def _flow(source: SourceCounts, deduplicated: bool) -> dict[str, Any]:
    """A bar of what became of a source's rows, in percent."""
    parts, at = [], 0.0
    for i, (key, name) in enumerate(FATES):
        count = _fate(source, key, deduplicated)
        width = 100 * count / max(1, source.read)
        if count:
            parts.append({"kind": i, "at": round(at, 2), "width": round(width, 2), "name": name, "count": count})
        at += width
    return {"source": source, "parts": parts}


def _bars(report: DataReport) -> list[dict[str, Any]]:
    """The histogram of lengths, in hundredths of its width and height."""
    lengths = report.lengths
    both = list(zip(lengths.training, lengths.evaluation, strict=True))
    highest = max((a + b for a, b in both), default=0) or 1
    width = 100 / len(both)
    return [
        {
            "at": round(i * width, 3),
            "width": round(width * 0.86, 3),
            "training": round(100 * training / highest, 2),
            "evaluation": round(100 * evaluation / highest, 2),
            "title": f"{i * lengths.width + 1:,} to {(i + 1) * lengths.width:,} tokens: {training:,} of training, {evaluation:,} of evaluation",
        }
        for i, (training, evaluation) in enumerate(both)
    ]
