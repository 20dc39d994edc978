"""The one client of the API server: plain dictionaries in and out, typed errors, a timeout on every request. No retries: the queue retries.

    kube = Kube(Credentials())
    job = await kube.get(JOBS("team", "support-bot-1a2b3c4d-a1"))
    await kube.create(JOBS("team"), body)

Errors:
    ApiError            any answer that is not 2xx
      BadRequest        400
      Unauthorized      401
      Forbidden         403: RBAC, quota or admission; the message tells which
      NotFound          404
      AlreadyExists     409 on create
      Conflict          409: the object is no longer what the precondition says
      Gone              410: a list's continue token or watch version is too old
      Invalid           422: schema, CEL or policy
      TooManyRequests   429, with retry_after
      ServerError       5xx, ServerTimeout among them
    Unreachable         no answer: refused, reset, or not in time. A write may have happened.

Rights that the operator uses (the chart's role is this table and no more):
    finetune.dev        finetunejobs             get list watch
    finetune.dev        finetunejobs/status      patch
    finetune.dev        finetunejobs/finalizers  update (to set blockOwnerDeletion; never called)
    batch               jobs                     get list watch create patch delete (patch: spec.suspend)
    core                pods                     get list watch
    core                services, configmaps     get create delete
    core                events                   list (why a pod waits)
    core                persistentvolumeclaims   get
    core                nodes                    get (is a pod's node lost)
    events.k8s.io       events                   create
    authentication      tokenreviews             create
    coordination        leases                   get create update (own namespace)
    core                secrets                  get create update (own namespace: the progress certificate)
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final, NamedTuple

import aiohttp
import orjson

from . import __version__
from .credentials import Credentials

Json = dict[str, Any]
Observer = Callable[[str, str, int, float], None]
"""Called after each request with (verb, resource, HTTP status or 0 for none, seconds)."""

TIMEOUT: Final = 15.0
"""Seconds for a request."""
PAGE: Final = 500
"""Objects in one page of a list."""
WATCH: Final = 300
"""Seconds that a watch lasts at least."""
SILENCE: Final = 90.0
"""Seconds without any event after which a watch is dead: the server sends a bookmark each minute."""

COLLECT: Final = 0.05
"""Seconds for which a watch's events are collected: a few at once cost less CPU than one by one."""


_METADATA: Final = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"


class Ref(NamedTuple):
    """A collection, or one object of it."""

    resource: "Resource"
    namespace: str | None = None
    name: str | None = None

    def path(self, subresource: str | None = None) -> str:
        """Path of the URL."""
        resource = self.resource
        root = f"/apis/{resource.api_version}" if "/" in resource.api_version else f"/api/{resource.api_version}"
        namespace = f"/namespaces/{self.namespace}" if self.namespace else ""
        return root + namespace + "/".join(("", resource.plural, *filter(None, (self.name, subresource))))


class Resource(NamedTuple):
    """A kind of objects; called with namespace and name it gives a Ref."""

    api_version: str
    plural: str

    def __call__(self, namespace: str | None = None, name: str | None = None) -> Ref:
        return Ref(self, namespace, name)


FINETUNEJOBS: Final = Resource("finetune.dev/v1alpha1", "finetunejobs")
JOBS: Final = Resource("batch/v1", "jobs")
PODS: Final = Resource("v1", "pods")
NODES: Final = Resource("v1", "nodes")
SERVICES: Final = Resource("v1", "services")
CONFIGMAPS: Final = Resource("v1", "configmaps")
SECRETS: Final = Resource("v1", "secrets")
CLAIMS: Final = Resource("v1", "persistentvolumeclaims")
CORE_EVENTS: Final = Resource("v1", "events")
EVENTS: Final = Resource("events.k8s.io/v1", "events")
LEASES: Final = Resource("coordination.k8s.io/v1", "leases")
TOKEN_REVIEWS: Final = Resource("authentication.k8s.io/v1", "tokenreviews")


class Unreachable(Exception):
    """The API server did not answer. Whether a write happened is not known."""


class ApiError(Exception):
    """The API server answered with an error; the text is its own."""

    def __init__(self, code: int, status: Json, retry_after: float | None, request: str) -> None:
        self.code = code
        self.reason: str = status.get("reason", "")
        self.message: str = status.get("message", "")
        self.details: Json = status.get("details") or {}
        self.retry_after = retry_after
        super().__init__(f"{request}: {code} {self.reason}: {self.message}")


class BadRequest(ApiError): ...


class Unauthorized(ApiError): ...


class Forbidden(ApiError): ...


class NotFound(ApiError): ...


class AlreadyExists(ApiError): ...


class Conflict(ApiError): ...


class Gone(ApiError): ...


class Invalid(ApiError): ...


class TooManyRequests(ApiError): ...


class ServerError(ApiError): ...


class ServerTimeout(ServerError): ...


_ERRORS: dict[int, type[ApiError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
    429: TooManyRequests,
    504: ServerTimeout,
}


def _error(code: int, body: bytes, headers: Mapping[str, str], request: str) -> ApiError:
    try:
        status = orjson.loads(body)
    except orjson.JSONDecodeError:  # a proxy on the way, or the server before it is up
        status = {}
    if not isinstance(status, dict):
        status = {}
    status.setdefault("message", body[:200].decode(errors="replace"))
    kind = _ERRORS.get(code, ServerError if code >= 500 else ApiError)
    if status.get("reason") == "AlreadyExists":
        kind = AlreadyExists
    after = headers.get("Retry-After", "")
    return kind(code, status, float(after) if after.isdigit() else None, request)


class Kube:
    """A connection pool to the API server. Made inside a running event loop; `await close()` at the end."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        identity: str = "",
        timeout: float = TIMEOUT,
        observer: Observer | None = None,
    ) -> None:
        """
        Args:
            identity: of this replica; the API server's audit log tells by it who wrote.
            timeout: seconds for a request.
            observer: told of each.
        """
        self._credentials = credentials
        self._observer = observer
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=credentials.ssl_context(), limit=64, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=timeout),
            cookie_jar=aiohttp.DummyCookieJar(),  # the API server sets none, and looking for some costs time
            headers={"User-Agent": f"finetune-operator/{__version__} ({identity})", "Accept": "application/json"},
        )

    async def close(self) -> None:
        """Closes every connection."""
        await self._session.close()

    async def get(self, ref: Ref) -> Json:
        """One object.

        Raises:
            NotFound: it does not exist.
        """
        return await self._request("GET", "get", ref)

    async def list(self, ref: Ref, *, labels: str = "", fields: str = "") -> AsyncIterator[Json]:
        """Every object of a collection, page by page."""
        async for page in self.pages(ref, labels=labels, fields=fields):
            for item in page.get("items", ()):
                yield item

    async def pages(self, ref: Ref, *, labels: str = "", fields: str = "") -> AsyncIterator[Json]:
        """A collection in pages; all have the same metadata.resourceVersion, from which a watch may go on.

        Raises:
            Gone: it took longer than the server keeps a page's token.
        """
        query = {"limit": str(PAGE)}
        if labels:
            query["labelSelector"] = labels
        if fields:
            query["fieldSelector"] = fields
        while True:
            page = await self._request("GET", "list", ref, query=query)
            yield page
            token = page["metadata"].get("continue")
            if not token:
                return
            query["continue"] = token

    async def watch(self, ref: Ref, *, version: str, labels: str = "") -> AsyncIterator[Json]:
        """Events {type, object} after a version, bookmarks among them, until the server ends the watch in good order.

        Raises:
            Gone: the version is too old; list again.
            Unreachable: nothing came for longer than between two bookmarks.
        """
        query = {"watch": "true", "allowWatchBookmarks": "true", "resourceVersion": version, "labelSelector": labels}
        query["timeoutSeconds"] = str(random.randint(WATCH, 2 * WATCH))
        url, headers = self._credentials.server + ref.path(), self._headers()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=SILENCE)
        try:
            async with self._session.get(
                url, params=query, headers=headers, proxy=self._credentials.proxy, timeout=timeout
            ) as response:
                if response.status != 200:
                    raise _error(response.status, await response.read(), response.headers, f"WATCH {ref.path()}")
                rest = b""
                async for chunk in response.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        event = orjson.loads(line)
                        if event["type"] == "ERROR":
                            status = event["object"]
                            raise _error(status.get("code", 500), orjson.dumps(status), {}, f"WATCH {ref.path()}")
                        yield event
                    await asyncio.sleep(COLLECT)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(f"WATCH {ref.path()}: {type(error).__name__}: {error}") from error

    async def create(self, ref: Ref, body: Json, *, brief: bool = False) -> Json:
        """POSTs an object into a collection; the answer is the object, or its metadata only.

        Raises:
            AlreadyExists: one of that name exists; whose it is must be looked at.
        """
        collection = Ref(ref.resource, ref.namespace)
        return await self._request("POST", "create", collection, body=body, accept=_METADATA if brief else None)

    async def update(self, ref: Ref, body: Json) -> Json:
        """Replaces an object; with metadata.resourceVersion in the body only that version of it (Conflict)."""
        return await self._request("PUT", "update", ref, body=body)

    async def patch(self, ref: Ref, body: Json, *, subresource: str | None = None) -> Json:
        """A merge patch; metadata.resourceVersion and metadata.uid in the body are preconditions (Conflict)."""
        return await self._request(
            "PATCH", "patch", ref, body=body, subresource=subresource, content="application/merge-patch+json"
        )

    async def apply_status(self, ref: Ref, status: Json, *, manager: str, resource_version: str) -> Json:
        """Server-side apply of the status fields that `manager` owns; those that it owned and omits are removed.

        Apply is an upsert by name, and a UID in it is ignored: only the version of what was observed keeps it from another
        object that has the name now.

        Raises:
            Conflict: the object has changed, or another one has its name.
            NotFound: it is gone.
        """
        body = {
            "apiVersion": ref.resource.api_version,
            "kind": "FineTuneJob",
            "metadata": {"name": ref.name, "namespace": ref.namespace, "resourceVersion": resource_version},
            "status": status,
        }
        return await self._request(
            "PATCH",
            "patch",
            ref,
            body=body,
            subresource="status",
            content="application/apply-patch+yaml",
            query={"fieldManager": manager, "force": "true"},
        )

    async def delete(
        self,
        ref: Ref,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
        grace_seconds: int | None = None,
        propagation: str = "Background",
    ) -> None:
        """Deletes one object, if it is still the one meant. Gone already is fine.

        Raises:
            Conflict: another object has the name now, or it has changed.
        """
        preconditions = {k: v for k, v in (("uid", uid), ("resourceVersion", resource_version)) if v}
        body: Json = {"propagationPolicy": propagation, "preconditions": preconditions}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        try:
            await self._request("DELETE", "delete", ref, body=body)
        except NotFound:
            return

    def _headers(self) -> dict[str, str]:
        authorization = self._credentials.authorization()
        return {"Authorization": authorization} if authorization else {}

    async def _request(
        self,
        method: str,
        verb: str,
        ref: Ref,
        *,
        body: Json | None = None,
        subresource: str | None = None,
        query: dict[str, str] | None = None,
        content: str = "application/json",
        accept: str | None = None,
    ) -> Json:
        path = ref.path(subresource)
        headers = self._headers()
        if body is not None:
            headers["Content-Type"] = content
        if accept:
            headers["Accept"] = accept
        began, code = time.monotonic(), 0
        try:
            async with self._session.request(
                method,
                self._credentials.server + path,
                data=orjson.dumps(body) if body is not None else None,
                params=query,
                headers=headers,
                proxy=self._credentials.proxy,
            ) as response:
                code = response.status
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            code = 0
            raise Unreachable(f"{method} {path}: {type(error).__name__}: {error}") from error
        finally:
            if self._observer:
                self._observer(verb, ref.resource.plural, code, time.monotonic() - began)
        if not 200 <= code < 300:
            raise _error(code, answer, response.headers, f"{method} {path}")
        result: Json = orjson.loads(answer)
        return result
