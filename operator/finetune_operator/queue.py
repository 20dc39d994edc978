"""A queue of keys: each at most once, never in two workers, tried again with a back-off of its own. handlers.py runs it on the leader."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from .act import NameTaken, Stale
from .kube import ApiError, Conflict, Unreachable
from .state import Key

COALESCE = 0.1
"""Seconds that a change waits for others of the same job: Job and pod tell of one turn in several events."""
RETRY, RETRY_MAX = 0.2, 60.0

logger = logging.getLogger(__name__)

Work = Callable[[Key], Awaitable[float | None]]
Passed = Callable[[float, str], None]
"""Told of each pass: seconds, and the name of the error or nothing."""


class _Waiting(NamedTuple):
    """A key that is to be worked on later."""

    due: float
    """Time of the loop. Kept here, because a timer that is due at once knows no time (uvloop)."""
    timer: asyncio.Handle


class Queue:
    """Work is what is done with a key; it returns seconds after which to do it again."""

    def __init__(self, work: Work, passed: Passed = lambda seconds, error: None) -> None:
        self._work = work
        self._passed = passed
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._waiting: dict[Key, _Waiting] = {}
        self._queued: set[Key] = set()
        self._working: set[Key] = set()
        self._again: set[Key] = set()
        self._failures: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._queued)

    def add(self, key: Key, after: float = COALESCE) -> None:
        """Has a key worked on in `after` seconds, or sooner if that was asked for before."""
        if key in self._queued:
            return
        if key in self._working and after <= COALESCE:
            self._again.add(key)
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + after
        if known := self._waiting.get(key):
            if known.due <= due:
                return
            known.timer.cancel()
        self._waiting[key] = _Waiting(due, loop.call_later(after, self._due, key))

    async def run(self, workers: int) -> None:
        """Works until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(workers):
                group.create_task(self._worker(), name=f"reconcile-{number}")

    def _due(self, key: Key) -> None:
        self._waiting.pop(key, None)
        if key in self._working:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.put_nowait(key)

    async def _worker(self) -> None:
        while True:
            key = await self._ready.get()
            self._queued.discard(key)
            self._working.add(key)
            if waiting := self._waiting.pop(key, None):
                waiting.timer.cancel()
            after = await self._pass(key)
            self._working.discard(key)
            if key in self._again:
                self._again.discard(key)
                after = COALESCE if after is None else min(after, COALESCE)
            if after is not None:
                self.add(key, after)

    async def _pass(self, key: Key) -> float | None:
        began, error = time.monotonic(), ""
        try:
            after = await self._work(key)
            self._failures.pop(key, None)
            return after
        except Exception as caught:
            error = type(caught).__name__
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            after = random.uniform(0.8, 1.2) * min(RETRY * 2.0 ** (failures - 1), RETRY_MAX)
            if isinstance(caught, ApiError) and caught.retry_after:
                after = max(after, caught.retry_after)
            if isinstance(caught, Conflict | Stale):
                logger.debug("%s/%s: %s", *key, caught)
            elif isinstance(caught, ApiError | Unreachable | NameTaken):
                logger.warning("%s/%s is tried again in %.1f s: %s", *key, after, caught)
            else:
                logger.exception("%s/%s is tried again in %.1f s", *key, after)
            return after
        finally:
            self._passed(time.monotonic() - began, error)
