"""Events of events.k8s.io/v1, by our own component. Each turn of a job's story has a name of its own, so it is told once.

A repeated pass, a restarted operator and a second leader all make the same name, and the API server accepts the first.
"""

import hashlib
import logging
from datetime import UTC, datetime

from finetune_crds.v1alpha1 import API_VERSION, KIND

from .decisions import Event
from .kube import EVENTS, AlreadyExists, ApiError, Kube, Unreachable
from .seen import Json, Seen

CONTROLLER = "finetune.dev/operator"
NOTE_MAX = 1024

logger = logging.getLogger(__name__)


class EventRecorder:
    """Writes events; a lost one is logged and costs nothing else."""

    def __init__(self, kube: Kube, identity: str) -> None:
        self._kube = kube
        self._identity = identity

    async def publish(self, seen: Seen, events: list[Event]) -> None:
        """Tells what happened to a job."""
        for event in events:
            await self._publish(seen, event)

    async def _publish(self, seen: Seen, event: Event) -> None:
        try:
            await self._kube.create(EVENTS(seen.namespace), self._body(seen, event), brief=True)
        except AlreadyExists:
            pass
        except (ApiError, Unreachable) as error:
            logger.warning(
                "%s/%s: event %s (%s) is lost: %s", seen.namespace, seen.name, event.reason, event.note, error
            )

    def _body(self, seen: Seen, event: Event) -> Json:
        key = f"{seen.uid}/{event.reason}/{event.turn}"
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "name": f"{seen.name}.{hashlib.sha256(key.encode()).hexdigest()[:16]}",
                "namespace": seen.namespace,
            },
            "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "type": "Warning" if event.warning else "Normal",
            "reason": event.reason,
            "action": event.reason,
            "note": event.note[:NOTE_MAX],
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": seen.namespace,
                "name": seen.name,
                "uid": seen.uid,
            },
            "reportingController": CONTROLLER,
            "reportingInstance": self._identity,
        }
