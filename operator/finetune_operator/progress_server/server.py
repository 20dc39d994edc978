"""HTTPS for the pods' reports: one path, POST only. Every replica serves it; who may report is decided in runs.py.

The order of the checks is that of their cost, and what is unauthenticated never gets to read a body or to ask the API server
without bound. Every answer is counted by its code.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

from finetune_crds.progress import BODY_MAX, PATH, ProgressReply

from ..kube import ApiError, Unreachable
from . import reports
from .certificates import Certificates
from .limits import RateLimit
from .refusals import RETRY_LATER, Refused
from .reviews import Bearer, Busy, Reviews
from .runs import Runs
from .statuses import Reported
from .writer import ProgressWriter

BODY_SECONDS: Final = 10.0
HANDSHAKE_SECONDS: Final = 10.0
CONNECTION_SECONDS: Final = 60.0
"""A connection lives so long, however little is sent on it: idle ones would add up, and trainers connect anew."""
CONNECTIONS_MAX: Final = 2048
_REFUSED_COSTS = (400, 401, 403, 413, 415)

logger = logging.getLogger(__name__)


class ProgressServer:
    """The listener. `await start()`, and at the end `await stop()`, which also writes what is pending."""

    def __init__(
        self,
        certificates: Certificates,
        reviews: Reviews,
        runs: Runs,
        writer: ProgressWriter,
        *,
        answered: Callable[[int], None] = lambda code: None,
        job_limit: RateLimit | None = None,
        refusal_limit: RateLimit | None = None,
        connection_seconds: float = CONNECTION_SECONDS,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        """
        Args:
            answered: called with the code of each answer.
            job_limit: of accepted reports, by job.
            refusal_limit: of refusals, by source address, and by pod once a token is known to be good.
        """
        self._certificates = certificates
        self._reviews = reviews
        self._runs = runs
        self._writer = writer
        self._answered = answered
        self._job_limit = job_limit or RateLimit(per_second=1.0, burst=20)
        self._refusal_limit = refusal_limit or RateLimit(per_second=1.0, burst=30)
        self._connection_seconds = connection_seconds
        self._connections_max = connections_max
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def is_serving(self) -> bool:
        """Whether it listens."""
        return self._server is not None and self._server.is_serving()

    async def start(self, host: str | None, port: int) -> int:
        """Listens; the port, chosen by the system when 0 is given. Certificates must be loaded."""
        application = web.Application(middlewares=[self._count], client_max_size=BODY_MAX)
        application.router.add_post(PATH, self._post)
        # Compressed bodies are refused unread: unpacked they could be of any size.
        self._runner = web.AppRunner(application, access_log=None, auto_decompress=False, keepalive_timeout=30.0)
        await self._runner.setup()
        accept = self._runner.server
        if accept is None:
            raise RuntimeError("aiohttp has set up no server")
        self._server = await asyncio.get_running_loop().create_server(
            lambda: self._connection(accept),
            host,
            port,
            ssl=self._certificates.context,
            ssl_handshake_timeout=HANDSHAKE_SECONDS,
            backlog=512,
        )
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Stops listening, then writes what was accepted."""
        if self._server:
            self._server.close()
        if self._runner:
            await self._runner.cleanup()
        await self._writer.close()

    def _connection(self, accept: web.Server) -> asyncio.BaseProtocol:
        if len(accept.connections) >= self._connections_max:
            return _Full()
        handler = accept()
        asyncio.get_running_loop().call_later(self._connection_seconds, self._end, handler)
        return handler

    def _end(self, handler: web.RequestHandler) -> None:
        if handler.transport is not None:
            handler.close()
            task = asyncio.create_task(handler.shutdown(BODY_SECONDS))  # a request on its way is answered
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except web.HTTPException as answer:
            response = _answer(answer.status, answer.reason)
            response.headers.update({k: v for k, v in answer.headers.items() if k == "Allow"})
        self._answered(response.status)
        return response

    async def _post(self, request: web.Request) -> web.StreamResponse:
        token = _token(request)
        bearer = self._reviews.cached(token) if token else None
        known = self._reviews.known(token) if token else None
        source = known.pod_uid if known else request.remote or ""
        try:
            wait = self._refusal_limit.wait_seconds(source)
            if wait:
                raise Refused(429, "too many refused requests from here", retry_after=wait)
            reply = await self._accept(request, token, bearer)
        except Refused as refused:
            if refused.code in _REFUSED_COSTS:
                self._refusal_limit.spend(source)
            return _answer(refused.code, refused.message, retry_after=refused.retry_after)
        except Busy:
            return _answer(429, "too many tokens wait for their review", retry_after=RETRY_LATER)
        except (ApiError, Unreachable) as error:
            logger.warning("a report could not be checked: %s", error)
            return _answer(503, "the API server cannot be asked now", retry_after=RETRY_LATER)
        return web.Response(text=reply.model_dump_json(exclude_none=True), content_type="application/json")

    async def _accept(self, request: web.Request, token: str | None, bearer: Bearer | None) -> ProgressReply:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        if not token:
            raise Refused(401, "send the pod's token: Authorization: Bearer <token>")
        bearer = bearer or await self._reviews.review(token)
        if bearer is None:
            raise Refused(
                401, "the token is not valid here: use the one mounted for progress, read anew as it is renewed"
            )
        run = await self._runs.admit(namespace, name, bearer)
        wait = self._job_limit.take(f"{namespace}/{name}")
        if wait:
            raise Refused(429, "this job reports too often", retry_after=wait)
        report = reports.parse(await _body(request))
        if report.finetune and report.finetune.attempt != run.attempt:
            raise Refused(400, f"finetune.attempt is not {run.attempt}, the attempt of this pod")
        self._writer.submit(Reported(run, report, datetime.now(UTC)))
        if run.stop:
            return ProgressReply(action="stop", reason=run.stop)
        return ProgressReply(action="continue")


class _Full(asyncio.Protocol):
    """Hangs up at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _token(request: web.Request) -> str | None:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


async def _body(request: web.Request) -> bytes:
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise Refused(415, "the body must not be compressed")
    if (request.content_length or 0) > BODY_MAX:
        raise Refused(413, f"the body may have at most {BODY_MAX} bytes")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise Refused(413, f"the body may have at most {BODY_MAX} bytes") from None
    except TimeoutError:
        raise Refused(400, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None


def _answer(code: int, message: str, *, retry_after: float | None = None) -> web.Response:
    headers = {"Retry-After": str(math.ceil(retry_after))} if retry_after else None
    return web.json_response({"error": message}, status=code, headers=headers)
