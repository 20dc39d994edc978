"""What this process knows of the cluster, fed by the watches, the re-list and its own writes; every replica keeps one.

Never goes backwards: an event older than what a write returned is dropped. Readers: observe (leader), the progress server and the
metrics collector (`jobs`, `job`, `children_of`, `pods_of`, `pod`).
"""

from collections.abc import Iterable
from dataclasses import replace

from .kube import FINETUNEJOBS, JOBS, PODS, Resource
from .views import FineTuneJobView, JobView, Json, PodView, finetunejob_view, job_view, pod_view

Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""


class Cache:
    """FineTuneJobs by key; Jobs and pods by the UID of the FineTuneJob that they belong to."""

    def __init__(self) -> None:
        self._jobs: dict[Key, FineTuneJobView] = {}
        self._children: dict[str, dict[str, JobView]] = {}
        self._pods: dict[str, dict[str, PodView]] = {}
        self._pods_by_uid: dict[str, PodView] = {}
        self._versions: dict[str, int] = {}

    # What is known

    def job(self, namespace: str, name: str) -> FineTuneJobView | None:
        """The FineTuneJob of that name."""
        return self._jobs.get((namespace, name))

    def jobs(self) -> Iterable[FineTuneJobView]:
        """Every FineTuneJob."""
        return self._jobs.values()

    def children_of(self, uid: str) -> dict[str, JobView]:
        """Jobs of a FineTuneJob by name."""
        return self._children.get(uid, {})

    def pods_of(self, uid: str) -> list[PodView]:
        """Pods of a FineTuneJob, those included that vanished while their Job remains."""
        return list(self._pods.get(uid, {}).values())

    def pod(self, uid: str) -> PodView | None:
        """The pod with that UID."""
        return self._pods_by_uid.get(uid)

    def uids(self, resource: Resource, namespace: str | None) -> set[str]:
        """UIDs of the objects of a kind that are thought to exist, in one namespace or all."""
        views: Iterable[FineTuneJobView | JobView | PodView]
        if resource == FINETUNEJOBS:
            views = self._jobs.values()
        elif resource == JOBS:
            views = (job for siblings in self._children.values() for job in siblings.values())
        else:
            views = (pod for pod in self._pods_by_uid.values() if not pod.gone)
        return {view.uid for view in views if namespace in (None, view.namespace)}

    # News

    def put(self, body: Json) -> Key | None:
        """Takes in a FineTuneJob; its key, or None when it is not newer than the one known."""
        key = body["metadata"]["namespace"], body["metadata"]["name"]
        known = self._jobs.get(key)
        if known and known.version >= int(body["metadata"]["resourceVersion"]):
            return None
        self._jobs[key] = finetunejob_view(body)
        return key

    def put_child(self, body: Json) -> Key | None:
        """Takes in a Job; the key of its FineTuneJob, or None when nothing of what matters has changed."""
        if not self._is_news(body):
            return None
        view = job_view(body)
        siblings = self._children.setdefault(view.owner, {})
        known = siblings.get(view.name)
        siblings[view.name] = view
        if known and not view.suspended and replace(known, active=view.active, started=view.started) == view:
            return None  # its pods tell more
        return view.namespace, view.owner_name

    def put_pod(self, body: Json) -> Key | None:
        """Takes in a pod; the key of its FineTuneJob, or None when nothing of what matters has changed."""
        if not self._is_news(body):
            return None
        view = pod_view(body)
        known = self._pods_by_uid.get(view.uid)
        self._keep(view)
        return None if view == known or view.is_quiet else (view.namespace, view.owner_name)

    def take(self, resource: Resource, body: Json) -> Key | None:
        """Takes in an object of one of the three kinds."""
        put = self.put if resource == FINETUNEJOBS else self.put_child if resource == JOBS else self.put_pod
        return put(body)

    def drop(self, resource: Resource, body: Json) -> Key | None:
        """Takes in a deletion with the object's last state, which may tell how a pod ended."""
        if resource != FINETUNEJOBS:
            self.take(resource, body)
        return self.forget(resource, body["metadata"]["uid"], body)

    def forget(self, resource: Resource, uid: str, body: Json | None = None) -> Key | None:
        """Takes in that an object is gone; the key of the FineTuneJob that this concerns.

        A vanished pod is kept, marked gone, as long as its Job remains: it may be the only witness of how a run ended.
        """
        self._versions.pop(uid, None)
        if resource == FINETUNEJOBS:
            return self._forget_job(uid, body)
        if resource == PODS:
            return self._forget_pod(uid)
        return self._forget_child(uid, body)

    def is_settled(self, key: Key) -> bool:
        """Whether nothing is to be done for a job whatever its children do."""
        known = self._jobs.get(key)
        return known is not None and known.finished and known.raw is None

    def settle(self, key: Key) -> None:
        """Lets go of the body of a finished job; whoever needs it again reads it live."""
        known = self._jobs.get(key)
        if known and known.finished:
            known.raw = None

    def _forget_job(self, uid: str, body: Json | None) -> Key | None:
        if body:
            candidates = [self._jobs.get((body["metadata"]["namespace"], body["metadata"]["name"]))]
        else:
            candidates = list(self._jobs.values())
        view = next((each for each in candidates if each and each.uid == uid), None)
        return self._jobs.pop(view.key).key if view else None

    def _forget_child(self, uid: str, body: Json | None) -> Key | None:
        owner = job_view(body).owner if body else None
        searched = [self._children.get(owner, {})] if owner else list(self._children.values())
        view = next((job for siblings in searched for job in siblings.values() if job.uid == uid), None)
        if view is None:
            return None
        siblings = self._children[view.owner]
        del siblings[view.name]
        if not siblings:
            del self._children[view.owner]
        for pod in self.pods_of(view.owner):
            if pod.job_name == view.name and pod.gone:
                self._let_go(pod)
        return view.namespace, view.owner_name

    def _forget_pod(self, uid: str) -> Key | None:
        view = self._pods_by_uid.get(uid)
        if view is None or view.gone:
            return None
        if view.job_name in self.children_of(view.owner):
            self._keep(replace(view, gone=True))
        else:
            self._let_go(view)
        return view.namespace, view.owner_name

    def _keep(self, pod: PodView) -> None:
        self._pods.setdefault(pod.owner, {})[pod.uid] = pod
        self._pods_by_uid[pod.uid] = pod

    def _let_go(self, pod: PodView) -> None:
        self._pods_by_uid.pop(pod.uid, None)
        pods = self._pods.get(pod.owner, {})
        pods.pop(pod.uid, None)
        if not pods:
            self._pods.pop(pod.owner, None)

    def _is_news(self, body: Json) -> bool:
        uid, version = body["metadata"]["uid"], int(body["metadata"]["resourceVersion"])
        if self._versions.get(uid, 0) >= version:
            return False
        self._versions[uid] = version
        return True
