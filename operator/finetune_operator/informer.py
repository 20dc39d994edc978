"""Lists and watches into the cache. Two users: the children's own watch here, and `relist`, which heals what any watch has missed.

FineTuneJobs are watched by Kopf (handlers.py). Jobs and pods, two thirds of all events, are watched here: Kopf prepares each
event for handlers that we do not have, which costs more CPU than all the rest that the operator does for a job.
"""

import asyncio
import logging
from collections.abc import Callable

from finetune_crds.names import LABEL_JOB

from .kube import FINETUNEJOBS, JOBS, PODS, ApiError, Gone, Resource, Unreachable
from .state import Key, State

PAUSE = 1.0
"""Seconds after a watch that ended in an error."""

logger = logging.getLogger(__name__)

Changed = Callable[[Key], None]


async def relist(state: State) -> set[Key]:
    """Brings the cache up to date; returns the jobs of which something had been missed.

    Raises:
        ApiError, Unreachable: the cache is as good as before; call again.
    """
    missed: set[Key] = set()
    for namespace in namespaces(state):
        for resource in (PODS, JOBS, FINETUNEJOBS):
            _, keys = await _list(state, resource, namespace)
            missed |= keys
    return missed


async def watch(state: State, resource: Resource, namespace: str | None, changed: Changed) -> None:
    """Keeps the cache up to date with the children of one kind, for ever."""
    version = ""
    while True:
        try:
            if not version:
                version, keys = await _list(state, resource, namespace)
                for key in keys:
                    changed(key)
            async for event in state.kube.watch(resource(namespace), version=version, labels=LABEL_JOB):
                body = event["object"]
                version = body["metadata"]["resourceVersion"]
                if event["type"] == "BOOKMARK":
                    continue
                change = state.cache.drop if event["type"] == "DELETED" else state.cache.take
                if concerned := change(resource, body):
                    changed(concerned)
        except Gone:
            version = ""
        except (ApiError, Unreachable) as error:
            logger.info("the watch of %s starts again: %s", resource.plural, error)
            await asyncio.sleep(PAUSE)


def namespaces(state: State) -> list[str | None]:
    """Those to watch, or all as None."""
    return [*state.settings.namespaces] or [None]


async def _list(state: State, resource: Resource, namespace: str | None) -> tuple[str, set[Key]]:
    known = state.cache.uids(resource, namespace)
    found: set[str] = set()
    missed: list[Key | None] = []
    version = ""
    async for page in state.kube.pages(resource(namespace), labels="" if resource == FINETUNEJOBS else LABEL_JOB):
        version = page["metadata"]["resourceVersion"]
        for body in page.get("items", ()):
            found.add(body["metadata"]["uid"])
            missed.append(state.cache.take(resource, body))
    # What was known before the list began and is not in it was deleted.
    missed += [state.cache.forget(resource, uid) for uid in known - found]
    return version, {key for key in missed if key}
