"""The API server's audit log as parsed events: who did what to which object, and how the server answered.

Tests prove with it what no object's state can show: that something was created exactly once, that a stale writer was
refused, which verbs an operator really uses and how many calls one job costs.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class AuditEvent:
    """One answered request."""

    verb: str
    """create, update, patch, delete, get, list, watch, ..."""
    user: str
    user_agent: str
    group: str
    resource: str
    subresource: str
    namespace: str
    name: str
    code: int
    """HTTP status of the answer."""
    request: Any
    """The body sent, for resources of finetune.dev; None for others."""
    raw: dict[str, Any] = field(repr=False)

    @property
    def is_write(self) -> bool:
        return self.verb in {"create", "update", "patch", "delete", "deletecollection"}


class AuditLog:
    """The log of one cluster. `mark = log.mark()` ... `log.since(mark)` gives the events in between."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mark(self) -> int:
        """The present end of the log: the server writes an event before it answers the request."""
        return self.path.stat().st_size

    def since(self, mark: int = 0, **wanted: str | int) -> list[AuditEvent]:
        """The events after `mark` whose attributes equal those wanted: `log.since(mark, verb="create", resource="jobs")`."""
        with self.path.open("rb") as file:
            file.seek(mark)
            lines = file.read().split(b"\n")[:-1]  # what follows the last newline is still being written
        events = (_event(json.loads(line)) for line in lines)
        return [e for e in events if all(getattr(e, key) == value for key, value in wanted.items())]


def _event(raw: dict[str, Any]) -> AuditEvent:
    target = raw.get("objectRef", {})
    # A created object's name is in the answer only, when the request left it to the server.
    return AuditEvent(
        verb=raw["verb"],
        user=raw["user"].get("username", ""),
        user_agent=raw.get("userAgent", ""),
        group=target.get("apiGroup", ""),
        resource=target.get("resource", ""),
        subresource=target.get("subresource", ""),
        namespace=target.get("namespace", ""),
        name=target.get("name", ""),
        code=raw.get("responseStatus", {}).get("code", 0),
        request=raw.get("requestObject"),
        raw=raw,
    )
