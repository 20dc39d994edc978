"""The life of an operator process: what is started, fed and stopped. handlers.py calls it from Kopf's shell."""

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any

from . import tallies
from .credentials import Credentials
from .events import EventRecorder
from .informer import namespaces, relist, watch
from .kube import FINETUNEJOBS, JOBS, PODS, ApiError, Kube, Unreachable
from .leader import LeaderThread
from .metrics import Metrics, MetricsServer
from .progress_server import Certificates, ProgressServer
from .progress_server.reviews import Reviews
from .progress_server.runs import Runs
from .progress_server.writer import ProgressWriter
from .queue import Queue
from .reconcile import reconcile
from .seen import Json
from .settings import Settings
from .state import Key, State

logger = logging.getLogger(__name__)


class Process:
    """One replica. Made inside the running event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.credentials = Credentials(settings.kubeconfig or None)
        self._metrics = Metrics(
            lambda: self.state.cache.jobs(),
            is_leader=lambda: self.state.leading,
            queue_depth=lambda: len(self._queue),
        )
        observer = self._metrics.count_api_request
        kube = Kube(self.credentials, identity=settings.identity, observer=observer)
        names = [settings.progress_host or "localhost"]
        self._certificates = Certificates(kube, settings.namespace, settings.progress_secret, names)
        self.state = State(
            settings=settings,
            kube=kube,
            events=EventRecorder(kube, settings.identity),
            progress_ca=self._certificates.ca_pem,
            ended=lambda before, after: tallies.tally(self._metrics, before, after),
            wake=lambda key: self._queue.add(key),
        )
        self._progress = ProgressServer(
            self._certificates,
            Reviews(kube),
            Runs(kube, self.state.cache),
            ProgressWriter(
                kube, self.state.cache, started=self._metrics.start_seconds.observe, changed=self._on_change
            ),
            answered=self._metrics.count_progress_post,
        )
        self._scraped = MetricsServer(
            self._metrics, is_healthy=lambda: self._progress.is_serving or not settings.progress_host
        )
        self._queue = Queue(self._reconcile, self._passed)
        loop = asyncio.get_running_loop()
        self._leader = LeaderThread(
            self.credentials,
            settings,
            elected=lambda: _in(loop, lambda: self._spawn(self._lead())),
            lost=_die,
            observer=observer,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Serves progress and metrics on every replica, and stands for election. Exits when it cannot: a fresh process tries anew."""
        try:
            await self._start()
        except (ApiError, Unreachable, OSError) as error:
            _die(f"cannot start: {error}")

    async def _start(self) -> None:
        await self._scraped.start(None, self.settings.metrics_port)
        if self.settings.progress_host:
            await self._certificates.load()
            await self._progress.start(None, self.settings.progress_port)
            self._spawn(self._certificates.keep_fresh())
        for namespace in namespaces(self.state):
            for resource in (JOBS, PODS):
                self._spawn(watch(self.state, resource, namespace, self._on_child))
        self._leader.start()
        gc.collect()
        gc.freeze()  # what was imported stays: it need not be walked again in each collection
        gc.set_threshold(20_000, 20, 50)

    async def stop(self) -> None:
        """Lets another replica lead, then writes what is pending."""
        self.state.leading = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._leader.stop)
        if self.settings.progress_host:
            await self._progress.stop()
        await self._scraped.stop()
        await self.state.kube.close()

    def on_event(self, kind: str | None, body: Json) -> None:
        """A watch event of a FineTuneJob."""
        change = self.state.cache.drop if kind == "DELETED" else self.state.cache.take
        if key := change(FINETUNEJOBS, body):
            self._on_change(key)

    def _on_change(self, key: Key) -> None:
        if self.state.leading:
            self._queue.add(key)

    def _on_child(self, key: Key) -> None:
        if self.state.leading and not self.state.cache.is_settled(key):
            self._queue.add(key)

    async def _lead(self) -> None:
        """A new leader looks at everything first: its watches may lag behind what its predecessor did."""
        while True:
            try:
                await relist(self.state)
                break
            except (ApiError, Unreachable) as error:
                logger.warning("cannot list what there is, trying again: %s", error)
                await asyncio.sleep(1.0)
        self.state.leading = True
        for view in list(self.state.cache.jobs()):
            self._queue.add(view.key, after=0.0)
        self._spawn(self._keep_listing())
        await self._queue.run(self.settings.workers)

    async def _keep_listing(self) -> None:
        while True:
            await asyncio.sleep(self.settings.relist_seconds)
            try:
                missed = await relist(self.state)
            except (ApiError, Unreachable) as error:
                logger.warning("cannot list what there is, trying again later: %s", error)
                continue
            for key in missed:
                self._queue.add(key)

    async def _reconcile(self, key: Key) -> float | None:
        return await reconcile(self.state, key)

    def _passed(self, seconds: float, error: str) -> None:
        self._metrics.reconcile_seconds.observe(seconds)
        if error:
            self._metrics.reconcile_errors.labels(error=error).inc()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("a part of the operator has failed", exc_info=error)
            _die(f"{task.get_coro()} has failed")


def _in(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
        loop.call_soon_threadsafe(call)


def _die(why: str) -> None:
    """At once and without clean-up: a process that may no longer lead must not write another byte."""
    logger.critical("exiting: %s", why)
    logging.shutdown()
    os._exit(1)
