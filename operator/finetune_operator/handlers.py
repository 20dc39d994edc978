"""Kopf's decorators, and nothing else: what the shell calls is one line each. process.py is what they delegate to."""

from typing import Any

import kopf

from finetune_crds.v1alpha1 import GROUP, PLURAL, VERSION

from .process import Process


class _Stateless(kopf.DiffBaseStorage):
    """Kopf compares nothing and stores nothing on objects: the reconcile is level-triggered, and status is its only memory."""

    def fetch(self, *, body: kopf.Body) -> None:
        return None

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def store(self, **_: Any) -> None:
        return None


def register(process: Process) -> kopf.OperatorRegistry:
    """A registry with the handlers of one process."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return process.credentials.for_kopf()

    @kopf.on.startup(registry=registry, errors=kopf.ErrorsMode.PERMANENT)
    async def startup(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.posting.enabled = False
        settings.scanning.disabled = True
        settings.persistence.diffbase_storage = _Stateless()
        settings.watching.chunk_size = 500
        await process.start()

    @kopf.on.cleanup(registry=registry)
    async def cleanup(**_: Any) -> None:
        await process.stop()

    @kopf.on.probe(registry=registry, id="leading")
    async def leading(**_: Any) -> bool:
        return process.state.leading

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def finetunejob(event: kopf.RawEvent, **_: Any) -> None:
        process.on_event(event["type"], dict(event["object"]))

    return registry
