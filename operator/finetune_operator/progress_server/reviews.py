"""Bearer token -> the pod that it was issued to: one TokenReview a minute and token.

Before the API server is asked, the token's own claims are read unverified: one without our audience, expired, or without a
pod could not pass the review, so it is refused here for nothing. What remains is bounded: few reviews at once, and a queue
that is cut.
"""

import asyncio
import base64
import binascii
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from finetune_crds.names import AUDIENCE

from ..kube import TOKEN_REVIEWS, Kube

VALID_SECONDS: Final = 60.0
INVALID_SECONDS: Final = 10.0
CONCURRENT: Final = 8
WAITING: Final = 256
CACHED: Final = 20_000
TOKEN_MAX: Final = 8_192

_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"
_USER = "system:serviceaccount:"


class Bearer(NamedTuple):
    """The pod that a token is bound to."""

    namespace: str
    pod: str
    pod_uid: str


class Busy(Exception):
    """Too many tokens wait for their review."""


class Reviews:
    """TokenReviews with a cache, by the token's sha256; the token itself is kept nowhere."""

    def __init__(self, kube: Kube, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube = kube
        self._clock = clock
        self._cache: OrderedDict[bytes, tuple[float, Bearer | None]] = OrderedDict()
        self._running: dict[bytes, asyncio.Task[Bearer | None]] = {}
        self._slots = asyncio.Semaphore(CONCURRENT)

    def cached(self, token: str) -> Bearer | None:
        """The pod of a token that was reviewed within the last minute; None when it has to be asked for."""
        found = self._look_up(_digest(token))
        return found[1] if found else None

    def known(self, token: str) -> Bearer | None:
        """The pod that a token was of when it was last reviewed, however long ago: whose refusals are counted, not who gets in."""
        found = self._cache.get(_digest(token))
        return found[1] if found else None

    async def review(self, token: str) -> Bearer | None:
        """The pod of a token; None when it is not one of ours or no longer valid.

        Raises:
            Busy: try again later.
            ApiError, Unreachable: the review could not be made.
        """
        digest = _digest(token)
        found = self._look_up(digest)
        if found:
            return found[1]
        if not plausible(token, time.time()):
            return None
        task = self._running.get(digest)
        if task is None:
            if len(self._running) >= WAITING:
                raise Busy
            task = asyncio.create_task(self._ask(token, digest))
            self._running[digest] = task
            task.add_done_callback(lambda done: self._forget(digest, done))
        return await asyncio.shield(
            task
        )  # a client that hangs up must not fail the others that wait for the same token

    def _forget(self, digest: bytes, task: asyncio.Task[Bearer | None]) -> None:
        del self._running[digest]
        if not task.cancelled():
            task.exception()  # nobody may be left who waits for it

    def _look_up(self, digest: bytes) -> tuple[float, Bearer | None] | None:
        found = self._cache.get(digest)
        return found if found and found[0] > self._clock() else None

    async def _ask(self, token: str, digest: bytes) -> Bearer | None:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [AUDIENCE]},
        }
        async with self._slots:
            answer = await self._kube.create(TOKEN_REVIEWS(), body)
        bearer = _bearer(answer.get("status") or {})
        self._cache[digest] = (self._clock() + (VALID_SECONDS if bearer else INVALID_SECONDS), bearer)
        self._cache.move_to_end(digest)
        while len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return bearer


def plausible(token: str, now: float) -> bool:
    """Whether a review could succeed: a JWT with our audience and a pod, not expired. Proves nothing."""
    if len(token) > TOKEN_MAX:
        return False
    try:
        _, payload, _ = token.split(".")
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        audiences = claims["aud"] if isinstance(claims["aud"], list) else [claims["aud"]]
        return AUDIENCE in audiences and float(claims["exp"]) > now and bool(claims["kubernetes.io"]["pod"]["uid"])
    except (ValueError, KeyError, TypeError, binascii.Error, RecursionError):
        return False


def _bearer(status: dict[str, Any]) -> Bearer | None:
    user = status.get("user") or {}
    extra = user.get("extra") or {}
    username, names, uids = user.get("username", ""), extra.get(_POD_NAME), extra.get(_POD_UID)
    # An authenticator that does not know audiences answers without them: then the token was meant for the API server.
    if not status.get("authenticated") or AUDIENCE not in (status.get("audiences") or ()):
        return None
    if not username.startswith(_USER) or not names or not uids:
        return None
    return Bearer(username.removeprefix(_USER).partition(":")[0], names[0], uids[0])


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()
