"""What judges answers: regular expressions, JSON schemas, right answers in the data, reward models, functions of the user's. Called by grpo.

Each judge gives a number for each answer. What a judge cannot do is told with its name, and never with what it was judging.
"""

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_crds.resolved import ResolvedRewardSource
from finetune_crds.v1alpha1.objective import ReferenceReward, RegexReward

from ..errors import UserError
from .patterns import Pattern
from .schemas import holds_for


@dataclass(frozen=True)
class Answer:
    """An answer to be judged."""

    asked: list[dict[str, Any]] | str
    """Messages, or text."""
    text: str
    tokens: list[int]
    columns: dict[str, Any]
    """Of the row."""


Judge = Callable[[Sequence[Answer]], Sequence[float | None]]
"""None is no judgement."""


class Panel(NamedTuple):
    """All rewards of a job."""

    names: tuple[str, ...]
    weights: NDArray[np.float64]
    judges: tuple[Judge, ...]

    def scores(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        """(answers, rewards), without weights; NaN where an answer is not judged.

        Raises:
            UserError: a judge failed, or gave something else than a finite number or None for each answer.
        """
        found = np.zeros((len(answers), len(self.names)))
        for i, (name, judge) in enumerate(zip(self.names, self.judges, strict=True)):
            if answers:
                found[:, i] = _numbers(name, judge, answers)
        return found

    def totals(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """(answers): sums with weights of what was judged; NaN where nothing was."""
        totals: NDArray[np.float64] = np.nansum(scores * self.weights, axis=1)
        totals[np.isnan(scores).all(axis=1)] = np.nan
        return totals


def panel(sources: Sequence[ResolvedRewardSource], models: Mapping[str, Judge]) -> Panel:
    """The rewards of a job.

    Args:
        sources: objective.grpo.rewards.
        models: judges that are models, by the name of the reward.

    Raises:
        UserError: one cannot be made.
    """
    return Panel(
        tuple(source.name for source in sources),
        np.array([float(source.weight) for source in sources]),
        tuple(_judge(source, models) for source in sources),
    )


def _judge(source: ResolvedRewardSource, models: Mapping[str, Judge]) -> Judge:
    where = _where(source.name)
    if source.regex:
        return _by_regex(source.regex, where)
    if source.json_schema:
        holds = holds_for(source.json_schema.json_schema, where)
        return lambda answers: [float(holds(answer.text)) for answer in answers]
    if source.reference:
        return _by_reference(source.reference, where)
    if source.model:
        return models[source.name]
    assert source.entry_point and source.allow_user_code
    return _by_function(source.entry_point, where)


def _where(name: str) -> str:
    return f"objective.grpo.rewards: {name}"


def _numbers(name: str, judge: Judge, answers: Sequence[Answer]) -> NDArray[np.float64]:
    try:
        given = list(judge(answers))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_where(name)} failed with {type(error).__name__}") from error
    if len(given) != len(answers):
        raise UserError(
            f"{_where(name)} gave {len(given)} numbers for {len(answers)} completions; it must give one for each"
        )
    try:
        judged = np.array([float(one) for one in given if one is not None])
    except (TypeError, ValueError):
        judged = np.array([math.nan])
    if not np.isfinite(judged).all():
        raise UserError(f"{_where(name)} gave something else than a finite number or None; correct it")
    found = np.full(len(given), math.nan)
    found[[one is not None for one in given]] = judged
    return found


def _by_regex(settings: RegexReward, where: str) -> Judge:
    pattern = Pattern(settings.pattern, where)
    matches = pattern.is_all if settings.match == "full" else pattern.search
    return lambda answers: [float(matches(answer.text)) for answer in answers]


def _by_reference(settings: ReferenceReward, where: str) -> Judge:
    pattern = Pattern(settings.pattern, where) if settings.pattern else None

    def judge(answers: Sequence[Answer]) -> list[float]:
        found = []
        for answer in answers:
            right = str(answer.columns[settings.column])
            said = pattern.last(answer.text) if pattern else answer.text
            wanted = pattern.last(right) if pattern else right
            found.append(float(said is not None and _plain(said) == _plain(right if wanted is None else wanted)))
        return found

    return judge


_NUMBER: Final = re.compile(r"[-+]?\$?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?")


def _plain(text: str | None) -> float | str:
    """A number by its value, whatever its thousands are marked by; other text without blanks around it."""
    stripped = (text or "").strip()
    number = stripped.rstrip(".").replace("$", "")
    if _NUMBER.fullmatch(number) and any(letter.isdigit() for letter in number):
        return float(number.replace(",", ""))
    return stripped


def _by_function(entry_point: str, where: str) -> Judge:
    """As TRL calls its reward functions."""
    module, _, name = entry_point.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise UserError(
            f"{where}: entryPoint {entry_point} cannot be imported ({type(error).__name__}); it must be a function in runtime.image, on its PYTHONPATH"
        ) from error
    if not callable(function):
        raise UserError(f"{where}: entryPoint {entry_point} is no function")

    def judge(answers: Sequence[Answer]) -> Sequence[float | None]:
        names = {name for answer in answers for name in answer.columns} - {"prompts", "completions", "completion_ids"}
        chats = [not isinstance(answer.asked, str) for answer in answers]
        said = [
            [{"role": "assistant", "content": answer.text}] if chat else answer.text
            for answer, chat in zip(answers, chats, strict=True)
        ]
        given: Sequence[float | None] = function(
            prompts=[answer.asked for answer in answers],
            completions=said,
            completion_ids=[answer.tokens for answer in answers],
            **{name: [answer.columns.get(name) for answer in answers] for name in sorted(names)},
        )
        return given

    return judge
