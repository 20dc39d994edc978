"""Token buckets on a clock that the test moves."""

from finetune_operator.progress_server.limits import RateLimit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_burst_then_one_a_period() -> None:
    clock = Clock()
    limit = RateLimit(per_second=0.5, burst=3, clock=clock)
    assert [limit.take("a") for _ in range(4)] == [0, 0, 0, 2.0]
    clock.now += 1.5
    assert limit.take("a") == 0.5
    clock.now += 0.5
    assert limit.take("a") == 0
    assert limit.take("b") == 0, "keys do not share"


def test_unused_bucket_fills_up_to_the_burst_and_no_further() -> None:
    clock = Clock()
    limit = RateLimit(per_second=1, burst=2, clock=clock)
    limit.take("a")
    clock.now += 1000
    assert [limit.take("a") for _ in range(3)] == [0, 0, 1.0]


def test_spending_more_than_there_is_makes_no_debt() -> None:
    clock = Clock()
    limit = RateLimit(per_second=1, burst=1, clock=clock)
    for _ in range(50):
        limit.spend("a")
    assert limit.wait_seconds("a") == 1.0


def test_memory_is_bounded_and_the_busiest_are_kept() -> None:
    clock = Clock()
    limit = RateLimit(per_second=1, burst=1, keys=10, clock=clock)
    for i in range(1000):
        limit.spend("busy")
        limit.spend(f"invented-{i}")
    assert len(limit._buckets) == 10
    assert limit.wait_seconds("busy") == 1.0
