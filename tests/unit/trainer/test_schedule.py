"""Learning rate by step."""

import pytest

from finetune_trainer.modelling.schedule import learning_rate, warmup_steps


@pytest.mark.parametrize(
    ("steps", "ratio", "expected"), [(5, None, 5), (0, None, 0), (None, "0.03", 3), (None, "0", 0), (None, None, 0)]
)
def test_warmup(steps: int | None, ratio: str | None, expected: int) -> None:
    assert warmup_steps(100, steps=steps, ratio=ratio) == expected


def test_it_rises_to_the_peak_and_no_step_is_wasted() -> None:
    assert [learning_rate(step, 10, 1.0, 4, "cosine") for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("shape", "middle", "last"), [("cosine", 0.5, 0.0245), ("linear", 0.5, 0.1), ("constant", 1.0, 1.0)]
)
def test_it_falls_towards_zero(shape: str, middle: float, last: float) -> None:
    assert learning_rate(0, 10, 1.0, 0, shape) == 1.0  # type: ignore[arg-type]
    assert learning_rate(5, 10, 1.0, 0, shape) == pytest.approx(middle)  # type: ignore[arg-type]
    assert learning_rate(9, 10, 1.0, 0, shape) == pytest.approx(last, abs=1e-4)  # type: ignore[arg-type]


def test_warmup_as_long_as_training() -> None:
    assert learning_rate(2, 3, 1.0, 3, "cosine") == 1.0
