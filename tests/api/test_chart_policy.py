"""The chart's ValidatingAdmissionPolicy: a FineTuneJob is no way around RBAC to Secrets and service accounts."""

import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cluster.cluster import Cluster, KubectlError, Refused
from cluster.fixtures import namespace as new_namespace
from finetune_crds.schema import openapi

from .charts import IMAGES, Helm
from .jobs import FineTuneJob, Json, eventually

_USER = "ada"


@pytest.fixture(scope="module")
def guarded_cluster(installed_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The policy of the chart, in force."""
    documents = Helm(tmp_path_factory.mktemp("helm")).template(*IMAGES)
    policy = yaml.safe_dump_all([d for d in documents if d["kind"].startswith("ValidatingAdmissionPolicy")])
    installed_cluster.kubectl("apply", "--server-side", "-f", "-", stdin=policy)
    body = _with({"runtime": {"serviceAccountName": "nobody-may"}}, "default")

    def refused() -> bool:
        try:
            _create(installed_cluster, "nobody", body)
        except Refused as error:
            return "you may not act as service account" in str(error)
        return False

    installed_cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(_rights("default", "nobody", [])))
    eventually(refused, "the policy is in force")
    yield installed_cluster
    installed_cluster.kubectl("delete", "--wait=true", "-f", "-", stdin=policy)


@pytest.fixture(scope="module")
def namespace(guarded_cluster: Cluster) -> Iterator[str]:
    """One for all tests of this module."""
    with new_namespace(guarded_cluster, f"test-{secrets.token_hex(4)}") as name:
        yield name


@pytest.fixture(scope="module")
def user(guarded_cluster: Cluster, namespace: str) -> str:
    """Somebody who may write FineTuneJobs, read one Secret and use one service account."""
    may = [
        {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["mine"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["serviceaccounts/token"], "resourceNames": ["robot"], "verbs": ["create"]},
    ]
    guarded_cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(_rights(namespace, _USER, may)))

    def allowed() -> bool:
        try:
            _create(guarded_cluster, _USER, _with({"runtime": {"serviceAccountName": "robot"}}, namespace))
        except Refused:
            return False
        return True

    eventually(allowed, "the rights are in force")
    return _USER


def _in_env(name: str) -> Json:
    return {"runtime": {"env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": name, "key": "k"}}}]}}


def _judged(model: Json) -> Json:
    return {
        "objective": {
            "grpo": {"rewards": [{"name": "one", "regex": {"pattern": "x"}}, {"name": "two", "model": model}]}
        }
    }


PLACES: dict[str, Any] = {
    "model": lambda name: {"model": {"uri": "hf://o/n", "secretRef": {"name": name}}},
    "model.adapter": lambda name: {
        "model": {"uri": "hf://o/n", "adapter": {"uri": "s3://b/a", "secretRef": {"name": name}}}
    },
    "model.addTokens.file": lambda name: {
        "model": {"uri": "hf://o/n", "addTokens": {"file": {"uri": "s3://b/t", "secretRef": {"name": name}}}}
    },
    "dataset.augmentation.synonyms": lambda name: {
        "task": "text-classification",
        "dataset": {
            "train": [{"uri": "pvc://d/a"}],
            "augmentation": {"synonyms": {"uri": "s3://b/s", "secretRef": {"name": name}}},
        },
    },
    "objective.grpo.rewards.model": lambda name: _judged({"uri": "s3://b/m", "secretRef": {"name": name}}),
    "objective.grpo.rewards.model.adapter": lambda name: _judged(
        {"uri": "pvc://d/m", "adapter": {"uri": "s3://b/a", "secretRef": {"name": name}}}
    ),
    "evaluation.benchmarks": lambda name: {
        "evaluation": {"benchmarks": [{"name": "one", "uri": "s3://b/k", "secretRef": {"name": name}}]}
    },
    "dataset.train": lambda name: {
        "dataset": {"train": [{"uri": "pvc://d/a"}, {"uri": "s3://b/r", "secretRef": {"name": name}}]}
    },
    "dataset.evaluation": lambda name: {
        "dataset": {
            "train": [{"uri": "pvc://d/a"}],
            "evaluation": {"sources": [{"uri": "s3://b/r", "secretRef": {"name": name}}]},
        }
    },
    "dataset.evaluation.sets": lambda name: {
        "dataset": {
            "train": [{"uri": "pvc://d/a"}],
            "evaluation": {
                "sets": [
                    {"name": "one", "sources": [{"uri": "pvc://d/b"}]},
                    {
                        "name": "two",
                        "sources": [{"uri": "pvc://d/c"}, {"uri": "s3://b/r", "secretRef": {"name": name}}],
                    },
                ]
            },
        }
    },
    "dataset.evaluation.general": lambda name: {
        "dataset": {
            "train": [{"uri": "pvc://d/a"}],
            "evaluation": {"general": [{"uri": "s3://b/r", "secretRef": {"name": name}}]},
        }
    },
    "output": lambda name: {"output": {"uri": "s3://b/out", "secretRef": {"name": name}}},
    "checkpoints.storage": lambda name: {"checkpoints": {"storage": {"uri": "s3://b/c", "secretRef": {"name": name}}}},
    "runtime.env": _in_env,
    "runtime.imagePullSecrets": lambda name: {"runtime": {"imagePullSecrets": [{"name": name}]}},
    "runtime.volumes": lambda name: {"runtime": {"volumes": [{"name": "v", "secret": {"name": name}}]}},
}
"""Every place of a spec that names a Secret."""


def test_no_place_for_a_secret_is_forgotten() -> None:
    found: set[str] = set()

    def visit(node: Json, path: str) -> None:
        for name, child in node.get("properties", {}).items():
            where = f"{path}.{name}".lstrip(".")
            if name in ("secretRef", "secretKeyRef", "secret", "imagePullSecrets"):
                found.add(where.removeprefix("spec."))
            else:
                visit(child, where)
        if "items" in node:
            visit(node["items"], path)

    visit(openapi(), "")
    endings = (".valueFrom.secretKeyRef", ".secretRef", ".secret", ".sources.secretRef")
    places = set()
    for where in found:
        for ending in sorted(endings, key=len, reverse=True):
            where = where.removesuffix(ending)
        places.add(where)
    assert places == set(PLACES)


@pytest.mark.parametrize("place", PLACES)
def test_secret_that_the_user_may_not_read_is_refused_and_one_that_he_may_is_taken(
    guarded_cluster: Cluster, namespace: str, user: str, place: str
) -> None:
    with pytest.raises(Refused) as refused:
        _create(guarded_cluster, user, _with(PLACES[place]("theirs"), namespace))
    assert "you may not read each of theirs: ask for get on them in this namespace" in str(refused.value)
    _create(guarded_cluster, user, _with(PLACES[place]("mine"), namespace))


def test_service_account_needs_the_right_to_its_tokens(guarded_cluster: Cluster, namespace: str, user: str) -> None:
    with pytest.raises(Refused, match="you may not act as service account admin-robot"):
        _create(guarded_cluster, user, _with({"runtime": {"serviceAccountName": "admin-robot"}}, namespace))
    _create(guarded_cluster, user, _with({"runtime": {"serviceAccountName": "robot"}}, namespace))


def test_editing_is_checked_and_what_leaves_spec_alone_is_not(
    guarded_cluster: Cluster, namespace: str, user: str
) -> None:
    """Else he could point another's program, which holds another's Secret, at himself; and else nothing could be deleted
    in the foreground, as the garbage collector, which updates finalizers, reads no Secrets."""
    cluster = guarded_cluster
    cluster.api.create("finetunejobs", _with(_in_env("theirs"), namespace), namespace)
    edit = ("patch", "ftj", "guarded", "-n", namespace, "--type=merge")
    with pytest.raises(KubectlError, match="you may not read each of theirs"):
        _kubectl(cluster, *edit, '-p={"spec": {"retries": 1}}', user=user)
    _kubectl(cluster, *edit, '-p={"metadata": {"labels": {"a": "b"}}}', user=user)
    cluster.kubectl("delete", "ftj", "guarded", "-n", namespace, "--cascade=foreground", "--timeout=30s")


def test_smallest_manifest_asks_for_nothing(guarded_cluster: Cluster, namespace: str, user: str) -> None:
    _create(guarded_cluster, user, _with({}, namespace))


def _with(spec: Json, namespace: str) -> Json:
    body = FineTuneJob("guarded", namespace).body
    body["spec"] = {**body["spec"], "runtime": {}, **spec}
    return body


def _create(cluster: Cluster, user: str, body: Json) -> None:
    cluster.api.create("finetunejobs", body, body["metadata"]["namespace"], dry_run=True, impersonate=user)


def _kubectl(cluster: Cluster, *arguments: str, user: str, stdin: str | None = None) -> str:
    return cluster.kubectl(*arguments, f"--as={user}", "--as-group=system:authenticated", stdin=stdin)


def _rights(namespace: str, user: str, more: list[Json]) -> list[Json]:
    name = f"writes-finetunejobs-{user}"
    jobs = {"apiGroups": ["finetune.dev"], "resources": ["finetunejobs"], "verbs": ["*"]}
    group = "rbac.authorization.k8s.io"
    return [
        {
            "apiVersion": f"{group}/v1",
            "kind": "Role",
            "metadata": {"name": name, "namespace": namespace},
            "rules": [jobs, *more],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": name, "namespace": namespace},
            "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
            "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
        },
    ]
