"""The writer beside somebody who changes the job at the same moment. What it writes when, at a real API server: tests/api."""

import copy
from typing import Any

from finetune_operator.cache import Cache
from finetune_operator.kube import Conflict
from finetune_operator.progress_server.writer import ProgressWriter

from .builders import ours, reported

BODY: dict[str, Any] = {
    "metadata": {
        "namespace": "team",
        "name": "support-bot",
        "uid": "uid-1",
        "resourceVersion": "10",
        "generation": 1,
        "creationTimestamp": "2026-01-31T12:00:00Z",
    },
    "spec": {},
    "status": {"phase": "Running", "attempts": [{"number": 1}]},
}
SUSPENDED: dict[str, Any] = {
    **BODY,
    "metadata": {**BODY["metadata"], "resourceVersion": "11", "generation": 2},
    "spec": {"suspend": True},
}


class _Server:
    """Has taken an edit that no watch has told of yet."""

    def __init__(self) -> None:
        self.live = copy.deepcopy(SUSPENDED)

    async def get(self, ref: object) -> dict[str, Any]:
        return copy.deepcopy(self.live)

    async def apply_status(self, ref: object, status: Any, *, manager: str, resource_version: str) -> dict[str, Any]:
        if resource_version != self.live["metadata"]["resourceVersion"]:
            raise Conflict(409, {}, None, "PATCH")
        self.live = {
            **self.live,
            "metadata": {**self.live["metadata"], "resourceVersion": str(int(resource_version) + 1)},
            "status": {**self.live["status"], **status},
        }
        return copy.deepcopy(self.live)


async def test_an_edit_that_a_write_ran_into_is_looked_at() -> None:
    """Its own event comes too late: the cache knows of it by then, and nobody would ever suspend the job."""
    server, cache, changed = _Server(), Cache(), []
    cache.put(copy.deepcopy(BODY))
    writer = ProgressWriter(server, cache, changed=changed.append)  # type: ignore[arg-type]
    writer.submit(reported(ours(1)))
    await writer.close()
    assert server.live["status"]["progress"]["step"] == 1
    assert cache.put(copy.deepcopy(SUSPENDED)) is None, "the event"
    assert changed == [("team", "support-bot")]
