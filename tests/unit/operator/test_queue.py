"""The queue's promises: each key once, never twice at the same time, tried again later and later."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import uvloop

from finetune_operator.queue import Queue

Key = tuple[str, str]
A, B = ("team", "a"), ("team", "b")


@asynccontextmanager
async def _running(work: Callable[[Key], Awaitable[float | None]], workers: int = 4) -> AsyncIterator[Queue]:
    queue = Queue(work)
    task = asyncio.create_task(queue.run(workers))
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_wait_of_almost_nothing_can_be_shortened_on_the_loop_of_the_operator() -> None:
    passes: list[Key] = []

    async def work(key: Key) -> None:
        passes.append(key)

    async def add_twice() -> None:
        async with _running(work) as queue:
            queue.add(A, after=0.0001)  # uvloop makes no timer of it
            queue.add(A, after=0)
            await asyncio.sleep(0.2)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(add_twice())
    assert passes == [A]


async def test_many_changes_of_one_key_are_one_pass() -> None:
    passes: Counter[Key] = Counter()

    async def work(key: Key) -> None:
        passes[key] += 1

    async with _running(work) as queue:
        for _ in range(50):
            queue.add(A)
            queue.add(B)
        await asyncio.sleep(0.3)
    assert passes == {A: 1, B: 1}


async def test_a_change_during_a_pass_is_another_pass_and_never_a_second_worker() -> None:
    at_once, most, passes = 0, 0, 0

    async def work(key: Key) -> None:
        nonlocal at_once, most, passes
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.2)
        at_once -= 1
        passes += 1

    async with _running(work) as queue:
        queue.add(A, after=0)
        await asyncio.sleep(0.1)
        for _ in range(5):
            queue.add(A)
        await asyncio.sleep(0.8)
    assert (passes, most) == (2, 1)


async def test_keys_are_worked_on_at_the_same_time() -> None:
    both, met = asyncio.Barrier(2), asyncio.Event()

    async def work(key: Key) -> None:
        await both.wait()
        met.set()

    async with _running(work) as queue:
        queue.add(A, after=0)
        queue.add(B, after=0)
        async with asyncio.timeout(5):
            await met.wait()


async def test_a_pass_says_when_to_look_again_and_a_change_comes_sooner() -> None:
    passes: asyncio.Queue[Key] = asyncio.Queue()
    looks = iter([3600.0, 0.5, None])

    async def work(key: Key) -> float | None:
        passes.put_nowait(key)
        return next(looks)

    async with _running(work) as queue, asyncio.timeout(30):
        queue.add(A, after=0)
        await passes.get()
        queue.add(A)
        await passes.get()  # the change took the place of the look in an hour
        await passes.get()  # nothing but the second look
    assert passes.empty()


async def test_a_key_that_fails_is_tried_later_and_later_while_others_go_on() -> None:
    times: list[float] = []
    others: asyncio.Queue[Key] = asyncio.Queue()

    async def work(key: Key) -> None:
        if key == B:
            others.put_nowait(key)
            return
        times.append(asyncio.get_running_loop().time())
        if len(times) < 4:
            raise RuntimeError("not yet")

    async with _running(work, workers=1) as queue, asyncio.timeout(30):
        queue.add(A, after=0)
        while len(times) < 4:
            queue.add(B, after=0)
            await others.get()
            await asyncio.sleep(0.01)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[0] < pauses[2], "0.2 s and 0.8 s, give or take a fifth"
