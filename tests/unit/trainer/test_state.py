"""What is best, and when patience ends; state reads back exactly."""

import pytest

from finetune_trainer.results.state import TrainingState


def walk(
    values: list[float], metric: str = "eval_loss", min_delta: float = 0.0, patience: int | None = 2
) -> TrainingState:
    state = TrainingState()
    for value in values:
        state.step += 10
        state.note({metric: value}, metric, min_delta, patience)
        if state.stopped_early:
            break
    return state


@pytest.mark.parametrize(
    ("values", "options", "best", "stop"),
    [
        pytest.param([3, 2, 1], {}, 30, None, id="always better"),
        pytest.param([3, 2, 2, 2, 1], {}, 20, 40, id="equal is not better"),
        pytest.param([3, 2, 2.5, 1, 1.5, 1.6], {}, 40, 60, id="patience starts anew"),
        pytest.param([0.5, 0.6, 0.4, 0.5], {"metric": "eval_f1"}, 20, 40, id="f1 rises"),
        pytest.param([3, 2.95, 2.91, 1], {"min_delta": 0.1}, 10, 30, id="too little to count"),
        pytest.param([3, 4, 5, 6], {"patience": None}, 10, None, id="no patience given"),
        pytest.param([float("nan"), 3, float("nan")], {}, 20, None, id="nan is never best"),
    ],
)
def test_best_and_patience(values: list[float], options: dict, best: int, stop: int | None) -> None:  # type: ignore[type-arg]
    state = walk(values, **options)
    assert state.best and state.best.step == best
    assert (state.step if state.stopped_early else None) == stop


def test_it_reads_back_exactly() -> None:
    state = walk([1 / 3, 0.1 + 0.2])
    assert TrainingState.model_validate_json(state.model_dump_json()) == state
