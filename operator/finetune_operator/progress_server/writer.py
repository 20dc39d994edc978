"""Accepted reports -> status, at most one write a job in 30 seconds, and at once for what must not wait.

A status write costs the API server 5 to 7 ms, so ten thousand jobs that report every 5 s cannot be written as they come.
Each write carries the resourceVersion that it was computed from: whatever the leader or the other replica wrote in between
is read and taken into account before the next try, so status never goes backwards.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from finetune_crds.names import MANAGER_PROGRESS

from ..cache import Cache, Key
from ..kube import FINETUNEJOBS, ApiError, Conflict, Invalid, Json, Kube, NotFound, Unreachable
from ..views import finetunejob_view
from . import statuses
from .runs import has_ended
from .statuses import Reported

INTERVAL_SECONDS: Final = 30.0
RETRY_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 10.0
_CONFLICTS: Final = 5

logger = logging.getLogger(__name__)


@dataclass
class _Outbox:
    """What is to be written for one job."""

    pending: Reported | None = None
    writing: Reported | None = None
    due: float = 0.0
    written: float = float("-inf")
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class ProgressWriter:
    """Coalesces; `submit` returns at once. `await close()` writes what is pending."""

    def __init__(
        self,
        kube: Kube,
        cache: Cache,
        *,
        interval_seconds: float = INTERVAL_SECONDS,
        started: Callable[[float], None] = lambda seconds: None,
        changed: Callable[[Key], None] = lambda key: None,
    ) -> None:
        """
        Args:
            interval_seconds: least time between two writes for a job.
            started: called at a job's first report with the seconds since its container started.
            changed: called with a job that somebody else has changed meanwhile: the watch's own event of that is no news to the cache then.
        """
        self._started, self._changed = started, changed
        self._kube = kube
        self._cache = cache
        self._interval = interval_seconds
        self._outboxes: dict[Key, _Outbox] = {}
        self._closing = False

    def submit(self, reported: Reported) -> None:
        """Takes a report; it is written now or with those that follow it."""
        key = (reported.run.namespace, reported.run.name)
        outbox = self._outboxes.setdefault(key, _Outbox())
        outbox.pending = statuses.fold(outbox.pending, reported) if outbox.pending else reported
        outbox.due = time.monotonic() if self._is_urgent(outbox) else outbox.written + self._interval
        outbox.changed.set()
        if outbox.task is None:
            outbox.task = asyncio.create_task(self._run(key, outbox), name=f"progress of {key[0]}/{key[1]}")

    async def close(self) -> None:
        """Writes what is pending, for at most ten seconds."""
        self._closing = True
        tasks = []
        for outbox in self._outboxes.values():
            outbox.due = time.monotonic()
            outbox.changed.set()
            if outbox.task:
                tasks.append(outbox.task)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
            for task in late:
                task.cancel()

    def _is_urgent(self, outbox: _Outbox) -> bool:
        if outbox.pending is None:
            return False
        run = outbox.pending.run
        view = self._cache.job(run.namespace, run.name)
        document = view.document() if view else None
        status: Json = (document or {}).get("status") or {}
        if outbox.writing:  # what is on its way is as good as known
            status = status | (statuses.advance(status, outbox.writing) or {})
        after = statuses.advance(status, outbox.pending)
        return after is not None and statuses.is_urgent(status, after)

    async def _run(self, key: Key, outbox: _Outbox) -> None:
        try:
            while True:
                now = time.monotonic()
                if outbox.pending and now >= outbox.due:
                    await self._write(key, outbox)
                    continue
                # With nothing pending it stays for the rest of its interval, to remember when the last write was.
                until = outbox.due if outbox.pending else outbox.written + self._interval
                if not outbox.pending and (self._closing or now >= until):
                    return
                outbox.changed.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(outbox.changed.wait(), until - now)
        finally:
            del self._outboxes[key]

    async def _write(self, key: Key, outbox: _Outbox) -> None:
        reported, outbox.pending = outbox.pending, None
        if reported is None:
            return
        outbox.written = time.monotonic()
        outbox.writing = reported
        try:
            await self._apply(reported)
        except (NotFound, Invalid) as error:
            logger.warning("progress of %s/%s is dropped: %s", *key, error)
        except (ApiError, Unreachable) as error:
            logger.info("progress of %s/%s is tried again: %s", *key, error)
            outbox.pending = statuses.fold(reported, outbox.pending) if outbox.pending else reported
            outbox.due = time.monotonic() + RETRY_SECONDS
        finally:
            outbox.writing = None

    async def _apply(self, reported: Reported) -> None:
        run = reported.run
        ref = FINETUNEJOBS(run.namespace, run.name)
        for _ in range(_CONFLICTS):
            view = self._cache.job(run.namespace, run.name)
            if view is None or view.uid != run.uid or view.attempt < run.attempt:
                view = finetunejob_view(await self._kube.get(ref))
            document = view.document()
            if document is None or view.uid != run.uid or has_ended(view, run.attempt):
                return
            before = document.get("status") or {}
            after = statuses.advance(before, reported)
            if after is None:
                return
            try:
                written = await self._kube.apply_status(
                    ref, after, manager=MANAGER_PROGRESS, resource_version=str(view.version)
                )
            except Conflict:
                if key := self._cache.put(await self._kube.get(ref)):
                    self._changed(key)
                continue
            self._cache.put(written)
            if not before.get("progress"):
                self._started(max(0.0, (reported.at - run.pod_started).total_seconds()))
            return
        raise Unreachable(f"status of {run.namespace}/{run.name} changes faster than it can be written")
