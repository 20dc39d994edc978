"""Which replica reconciles: a Lease, renewed in a thread and on a connection of its own, so that no amount of work delays it.

Time is this process's monotonic clock: how long another's Lease has not changed is measured here, never read from it. Every write
carries the version that was read. A leader that could not renew in time ends its process at once: whatever it was about to write
is stopped with it, and what it had already sent is refused by the versions that its successor has moved on.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from .credentials import Credentials
from .kube import LEASES, AlreadyExists, ApiError, Conflict, Kube, NotFound, Observer, Unreachable
from .seen import Json
from .settings import Settings

logger = logging.getLogger(__name__)


class LeaderThread:
    """Runs the election beside the process's event loop.

    Args:
        elected: called in the thread, once.
        lost: called in the thread when leadership is gone; must end the process.
    """

    def __init__(
        self,
        credentials: Credentials,
        settings: Settings,
        *,
        elected: Callable[[], None],
        lost: Callable[[str], None],
        observer: Observer,
    ) -> None:
        self._credentials, self._settings = credentials, settings
        self._elected, self._lost, self._observer = elected, lost, observer
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="leader", daemon=True)

    def start(self) -> None:
        """Stands for election."""
        self._thread.start()

    def stop(self) -> None:
        """Releases the Lease, if it is held. Blocks for a request or two."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())
            self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except Exception as error:
            logger.exception("the election has failed")
            self._lost(str(error))
        finally:
            self._loop.close()

    async def _main(self) -> None:
        self._task = asyncio.current_task()
        kube = Kube(
            self._credentials,
            identity=self._settings.identity,
            timeout=self._settings.retry_period,
            observer=self._observer,
        )
        leader = Leader(kube, self._settings, elected=self._elected, lost=self._lost)
        try:
            await leader.run()
        except asyncio.CancelledError:
            await leader.release()
        finally:
            await kube.close()


class Leader:
    """One replica's part in the election.

    Args:
        kube: with a request timeout of `settings.retry_period`, used by nothing else.
    """

    def __init__(
        self, kube: Kube, settings: Settings, *, elected: Callable[[], None], lost: Callable[[str], None]
    ) -> None:
        self._kube, self._settings = kube, settings
        self._elected, self._lost = elected, lost
        self._ref = LEASES(settings.namespace, settings.lease_name)
        self._lease: Json | None = None
        self._seen_version = ""
        self._seen_at = 0.0
        self._leading = False

    async def run(self) -> None:
        """Tries to become leader, then stays it. Until cancelled, or lost."""
        while True:
            if await self._try_to_lead():
                break
            await asyncio.sleep(self._settings.retry_period)
        self._leading = True
        logger.info("%s leads", self._settings.identity)
        self._elected()
        await self._stay()

    async def release(self) -> None:
        """Lets another replica lead without waiting for the Lease to run out."""
        if not self._leading or self._lease is None:
            return
        self._leading = False
        try:
            await self._kube.update(self._ref, self._body(self._lease, holder=""))
            logger.info("%s no longer leads", self._settings.identity)
        except (ApiError, Unreachable) as error:
            logger.warning("the Lease could not be released and runs out by itself: %s", error)

    async def _stay(self) -> None:
        renewed = time.monotonic()
        while True:
            left = renewed + self._settings.renew_deadline - time.monotonic()
            if left <= 0:
                self._leading = False
                self._lost(f"the Lease could not be renewed for {self._settings.renew_deadline} s")
                return
            await asyncio.sleep(min(self._settings.retry_period, left))
            began = time.monotonic()
            try:
                async with asyncio.timeout(renewed + self._settings.renew_deadline - began):
                    await self._renew()
                renewed = began
            except Conflict:
                self._leading = False
                self._lost("another replica has taken the Lease")
                return
            except TimeoutError:
                logger.warning("the Lease could not be renewed in time")
            except (ApiError, Unreachable) as error:
                logger.warning("the Lease could not be renewed yet: %s", error)

    async def _renew(self) -> None:
        """Conflict when it is no longer ours."""
        assert self._lease is not None
        try:
            self._lease = await self._kube.update(self._ref, self._body(self._lease, holder=self._settings.identity))
        except Conflict:  # perhaps our own last renewal, whose answer was lost
            self._lease = await self._kube.get(self._ref)
            if self._lease["spec"].get("holderIdentity") != self._settings.identity:
                raise
            self._lease = await self._kube.update(self._ref, self._body(self._lease, holder=self._settings.identity))

    async def _try_to_lead(self) -> bool:
        try:
            lease = await self._kube.get(self._ref)
        except NotFound:
            lease = None
        except (ApiError, Unreachable) as error:
            logger.warning("the Lease cannot be read: %s", error)
            return False
        if lease is not None and not self._is_free(lease):
            return False
        try:
            body = self._body(lease, holder=self._settings.identity)
            self._lease = await (self._kube.update(self._ref, body) if lease else self._kube.create(self._ref, body))
        except (Conflict, AlreadyExists):
            return False  # another replica was faster
        except (ApiError, Unreachable) as error:
            logger.warning("the Lease cannot be taken: %s", error)
            return False
        return True

    def _is_free(self, lease: Json) -> bool:
        holder = lease["spec"].get("holderIdentity")
        if not holder or holder == self._settings.identity:  # ours: this process was restarted under its name
            return True
        version = lease["metadata"]["resourceVersion"]
        if version != self._seen_version:
            self._seen_version, self._seen_at = version, time.monotonic()
        duration: int = lease["spec"].get("leaseDurationSeconds", 0)
        return time.monotonic() - self._seen_at > duration

    def _body(self, lease: Json | None, *, holder: str) -> Json:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        before = lease["spec"] if lease else {}
        changes = bool(holder) and before.get("holderIdentity") != holder
        metadata: Json = {"name": self._settings.lease_name, "namespace": self._settings.namespace}
        if lease:
            metadata["resourceVersion"] = lease["metadata"]["resourceVersion"]
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": round(self._settings.lease_seconds) if holder else 1,
                "acquireTime": now if changes else before.get("acquireTime", now),
                "renewTime": now,
                "leaseTransitions": before.get("leaseTransitions", 0) + changes,
            },
        }
