"""The cache never goes backwards and forgets nothing that is still needed."""

from typing import Any

from finetune_crds import names
from finetune_operator.cache import Cache
from finetune_operator.kube import FINETUNEJOBS, JOBS, PODS

Json = dict[str, Any]
KEY = ("team", "support-bot")


def _meta(uid: str, version: int, name: str, **more: Any) -> Json:
    return {
        "namespace": "team",
        "name": name,
        "uid": uid,
        "resourceVersion": str(version),
        "creationTimestamp": "2026-01-31T12:00:00Z",
        **more,
    }


def _finetunejob(version: int, *, uid: str = "u", status: Json | None = None) -> Json:
    meta = _meta(uid, version, "support-bot", generation=1, managedFields=[{"manager": "kubectl"}])
    return {"metadata": meta, "spec": {}, "status": status or {}}


def _child(version: int, uid: str, name: str, **more: Any) -> Json:
    labels = {names.LABEL_UID: "u", names.LABEL_JOB: "support-bot", "batch.kubernetes.io/job-name": "j-1"}
    return {"metadata": _meta(uid, version, name, labels=labels), "spec": {}, "status": {}, **more}


def _running(version: int, code: int | None = None) -> Json:
    state: Json = {"running": {"startedAt": "2026-01-31T12:00:01Z"}}
    if code is not None:
        state = {"terminated": {"exitCode": code, "message": "last words", "finishedAt": "2026-01-31T12:00:09Z"}}
    status = {
        "phase": "Running" if code is None else "Failed",
        "containerStatuses": [{"name": "trainer", "state": state}],
    }
    return _child(version, "pod", "p", status=status)


def test_an_older_event_never_undoes_a_write() -> None:
    cache = Cache()
    assert cache.put(_finetunejob(5, status={"phase": "Running"})) == KEY
    assert cache.put(_finetunejob(4)) is None
    assert cache.put(_finetunejob(5)) is None
    view = cache.job(*KEY)
    assert view is not None
    assert (view.version, view.phase) == (5, "Running")


def test_managed_fields_are_not_kept() -> None:
    cache = Cache()
    cache.put(_finetunejob(1))
    view = cache.job(*KEY)
    assert view is not None
    document = view.document()
    assert document is not None
    assert "managedFields" not in document["metadata"]


def test_a_settled_job_lets_go_of_its_body_until_it_changes() -> None:
    cache = Cache()
    done = {"conditions": [{"type": "Complete", "status": "True", "reason": "Completed"}]}
    cache.put(_finetunejob(1))
    cache.settle(KEY)
    assert not cache.is_settled(KEY), "it has not ended"
    cache.put(_finetunejob(2, status=done))
    cache.settle(KEY)
    assert cache.is_settled(KEY)
    cache.put(_finetunejob(3, status=done))
    assert not cache.is_settled(KEY)


def test_the_deletion_of_a_predecessor_does_not_remove_its_successor() -> None:
    cache = Cache()
    cache.put(_finetunejob(9, uid="new"))
    assert cache.drop(FINETUNEJOBS, _finetunejob(8, uid="old")) is None
    assert cache.job(*KEY) is not None
    assert cache.drop(FINETUNEJOBS, _finetunejob(10, uid="new")) == KEY
    assert cache.job(*KEY) is None


def test_only_what_matters_is_news() -> None:
    cache = Cache()
    assert cache.take(PODS, _child(1, "pod", "p", status={"phase": "Pending"})) is None, "it is on its way"
    assert cache.take(PODS, _running(2)) == KEY
    assert cache.take(PODS, {**_running(3), "irrelevant": True}) is None
    assert cache.take(PODS, _running(4, code=75)) == KEY
    assert cache.take(JOBS, _child(5, "job", "j-1")) == KEY
    assert cache.take(JOBS, _child(6, "job", "j-1", status={"active": 1, "startTime": "t"})) is None
    (job,) = cache.children_of("u").values()
    assert job.active == 1, "it is known all the same"


def test_a_vanished_pod_is_a_witness_until_its_job_goes() -> None:
    cache = Cache()
    cache.take(JOBS, _child(1, "job", "j-1"))
    cache.take(PODS, _running(2))
    assert cache.drop(PODS, _running(3, code=65)) == KEY
    (pod,) = cache.pods_of("u")
    assert (pod.gone, pod.ended, pod.exit_code, pod.message) == (True, True, 65, "last words")
    assert cache.uids(PODS, None) == set()
    cache.drop(JOBS, _child(4, "job", "j-1"))
    assert cache.pods_of("u") == []
    assert cache.children_of("u") == {}


def test_a_relist_that_misses_an_object_removes_it() -> None:
    cache = Cache()
    cache.put(_finetunejob(1))
    cache.take(JOBS, _child(2, "job", "j-1"))
    cache.take(PODS, _running(3))
    assert (cache.uids(JOBS, "team"), cache.uids(JOBS, "other")) == ({"job"}, set())
    for resource, uid in ((PODS, "pod"), (JOBS, "job"), (FINETUNEJOBS, "u")):
        assert cache.forget(resource, uid) == KEY
        assert cache.forget(resource, uid) is None
    assert list(cache.jobs()) == []
