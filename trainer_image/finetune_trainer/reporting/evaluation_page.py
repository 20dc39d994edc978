"""evaluation.html: one page without anything from elsewhere, light or dark as its reader likes. Called by evaluation_report."""

from collections.abc import Sequence
from typing import Any, Final

from finetune_crds.resolved import ResolvedFineTune

from . import pages
from .evaluation_report import Answers, Curve, EvaluationReport

WIDTH: Final = 640
HEIGHT: Final = 240
LEFT: Final = 52
BOTTOM: Final = 24
_LINES: Final = 4
_TILES: Final = 3
_OUTLIERS: Final = 0.02
"""Part of the values that the axis may leave out at the top: a first loss can be ten times all others."""


def render(spec: ResolvedFineTune, report: EvaluationReport, answers: Sequence[Answers]) -> str:
    """The page. Prompts, answers and names are escaped by the template engine."""
    return pages.template("evaluation.html.j2").render(
        report=report,
        spec=spec,
        model=spec.model.uri.rstrip("/").rpartition("/")[2],
        chart=_chart(report.curves, report.published_step),
        tiles=[row for one in report.sets if one.kind == "heldOut" for row in one.metrics][:_TILES],
        answers=answers,
        prompted=any(one.prompted is not None for one in answers),
        shown=spec.evaluation.few_shot.examples if spec.evaluation.few_shot else 0,
        kinds={"heldOut": "Held-out rows", "set": "Set", "slice": "Slice"},
        baselines={"model": "before", "majority": "same answer always"},
        on_the_way=any(row.best is not None for one in report.sets for row in one.metrics),
    )


def _chart(curves: Sequence[Curve], published: int) -> dict[str, Any] | None:
    """Lines in the units of an SVG of WIDTH x HEIGHT."""
    finite = [value for curve in curves for value in curve.values if abs(value) < float("inf")]
    if not finite:
        return None
    values = sorted(finite)
    top = values[min(len(values) - 1, int(len(values) * (1 - _OUTLIERS)))]
    top, low = max(top, *(curve.values[-1] for curve in curves if curve.values[-1] in finite)), min(values)
    low, top = (low - 0.5, top + 0.5) if top <= low else (low, top)
    last = max(step for curve in curves for step in curve.steps) or 1

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - 8) * step / last, 2)

    def y(value: float) -> float:
        return round(8 + (HEIGHT - BOTTOM - 16) * (top - min(value, top)) / (top - low), 2)

    return {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "bottom": HEIGHT - BOTTOM,
        "lines": [
            {"name": curve.name, "kind": i % 7, "points": [
                (x(step), y(value)) for step, value in zip(curve.steps, curve.values, strict=True) if value in finite
            ]}
            for i, curve in enumerate(curves)
        ],
        "ticks": [{"y": y(value), "text": f"{value:.3g}"} for value in (low + (top - low) * i / _LINES for i in range(_LINES + 1))],
        "steps": [{"x": x(step), "text": f"{step:,}"} for step in sorted({0, round(last / 2), round(last)})],
        "published": x(published),
    }  # fmt: skip
