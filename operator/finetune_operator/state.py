"""The parts of one running process, made at start-up by handlers.py and handed to whoever needs them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from finetune_crds.progress import PATH
from finetune_crds.resolution import Defaults
from finetune_crds.v1alpha1 import FineTuneJobStatus

from .cache import Cache, Key
from .children import Surroundings
from .events import EventRecorder
from .kube import Kube
from .seen import Refusal
from .settings import Settings

__all__ = ["Key", "State"]


@dataclass
class State:
    """One process."""

    settings: Settings
    kube: Kube
    events: EventRecorder
    progress_ca: Callable[[], str]
    """CA of the progress server, PEM."""
    ended: Callable[[FineTuneJobStatus, FineTuneJobStatus], None]
    """Told of each status written, before and after: counts what came to its end."""
    cache: Cache = field(default_factory=Cache)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    """By UID of the FineTuneJob, while its children cannot be created."""
    readers: dict[Key, set[Key]] = field(default_factory=dict)
    """By job those that may wait for what it publishes."""
    wake: Callable[[Key], None] = lambda key: None
    """Has a job looked at soon."""
    leading: bool = False
    """Whether this replica reconciles and exports per-job metrics."""

    @cached_property
    def defaults(self) -> Defaults:
        """Defaults of this installation."""
        return Defaults(trainer_image=self.settings.trainer_image, gpu_resource_name=self.settings.gpu_resource_name)

    def surroundings(self, namespace: str, name: str) -> Surroundings:
        """What the pods of a job need to know of this installation."""
        host = self.settings.progress_host
        path = PATH.format(namespace=namespace, name=name)
        return Surroundings(
            trainer_image=self.settings.trainer_image,
            progress_url=f"https://{host}:{self.settings.progress_port}{path}" if host else "",
            progress_host=host,
            progress_ca=self.progress_ca() if host else "",
        )
