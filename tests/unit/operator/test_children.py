"""What the builders make of a resolved job. That the API server takes it is seen in tests/api."""

import json
from typing import Any

import pytest

from finetune_crds import names
from finetune_crds.resolution import Defaults, resolve
from finetune_crds.v1alpha1 import FineTuneJob, FineTuneJobSpec
from finetune_operator import volumes
from finetune_operator.children import Children, Surroundings, build
from finetune_operator.identities import child_name, template_digest
from manifests import manifest

AROUND = Surroundings("trainer:1", "https://progress.sys.svc:8443/x", "progress.sys.svc", "PEM")
OWN = {"image": "own:1", "command": ["train", "--fast"], "args": ["--now"]}


def _children(*, around: Surroundings = AROUND, grace: int = 600, **spec: Any) -> Children:
    body = manifest(**spec)
    body["metadata"] |= {"namespace": "team", "uid": "uid-1"}
    job = resolve(FineTuneJob.model_validate(body), Defaults(trainer_image="trainer:1"))
    return build(job, attempt=2, grace_seconds=grace, around=around)


def _pod(**spec: Any) -> dict[str, Any]:
    pod: dict[str, Any] = _children(**spec).job["spec"]["template"]["spec"]
    return pod


def _environment(pod: dict[str, Any]) -> dict[str, str]:
    entries = pod["containers"][0]["env"]
    named = [entry["name"] for entry in entries]
    assert len(set(named)) == len(named), "a name twice would leave it to the kubelet which one counts"
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}


def _mounts(pod: dict[str, Any]) -> dict[str, bool]:
    return {mount["mountPath"]: mount.get("readOnly", False) for mount in pod["containers"][0]["volumeMounts"]}


def test_names_fit_into_host_names_and_tell_objects_of_one_name_apart() -> None:
    longest = child_name("a" * 40, "uid", 9999)
    assert len(f"{longest}-1023") <= 63
    assert child_name("job", "uid-1", 1) != child_name("job", "uid-2", 1)


def test_every_child_has_the_same_name_labels_and_owner() -> None:
    made = _children(resources={"nodes": 2, "gpusPerNode": 4})
    for child in made:
        assert child is not None
        assert child["metadata"]["name"] == made.job["metadata"]["name"]
        assert child["metadata"]["labels"][names.LABEL_UID] == "uid-1"
        assert child["metadata"]["labels"][names.LABEL_ATTEMPT] == "2"
        (owner,) = child["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == ("uid-1", True, True)
    template = made.job["spec"]["template"]["metadata"]["labels"]
    assert made.service is not None
    assert made.service["spec"]["selector"].items() <= template.items()


def test_a_single_pod_has_nobody_to_meet() -> None:
    made = _children(resources={"nodes": 1, "gpusPerNode": 8})
    assert made.service is None
    assert _environment(made.job["spec"]["template"]["spec"])[names.ENV_MASTER_ADDR] == "localhost"


def test_the_job_file_is_the_resolved_job_and_the_ca_lies_beside_it() -> None:
    made = _children()
    job = json.loads(made.config_map["data"]["job.json"])
    assert (job["uid"], job["namespace"], job["spec"]["resources"]["gpusPerNode"]) == ("uid-1", "team", 1)
    assert made.config_map["data"]["ca.crt"] == "PEM"
    assert made.config_map["immutable"] is True


def test_the_failure_policy_is_the_table_of_exit_codes() -> None:
    rules = _children().job["spec"]["podFailurePolicy"]["rules"]
    assert [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in rules] == [
        ("FailJob", [64, 65, 66, 67, 69, 77]),
        ("Ignore", [75, 76]),
        ("Ignore", None),
    ]
    assert rules[2]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_pods_are_confined() -> None:
    for pod in (_pod(), _pod(runtime=OWN, model=None, dataset=None)):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_only_the_progress_token_is_mounted() -> None:
    (token,) = [volume for volume in _pod()["volumes"] if "projected" in volume]
    (source,) = token["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == names.AUDIENCE
    quiet = Surroundings("trainer:1", "", "", "")
    pod = _pod(around=quiet)
    assert not [volume for volume in pod["volumes"] if "projected" in volume]
    assert names.ENV_PROGRESS_URL not in _environment(pod)


def test_the_trainer_gets_its_contract() -> None:
    pod = _pod(resources={"nodes": 2, "gpusPerNode": 4})
    environment = _environment(pod)
    name = child_name("support-bot", "uid-1", 2)
    assert pod["containers"][0]["command"] == ["python", "-m", "finetune_trainer.supervisor"]
    assert environment[names.ENV_MASTER_ADDR] == f"{name}-0.{pod['subdomain']}"
    assert (environment[names.ENV_NODES], environment[names.ENV_PROCESSES_PER_NODE]) == ("2", "4")
    assert environment[names.ENV_ATTEMPT] == "2"
    assert environment[names.ENV_PROGRESS_URL] == AROUND.progress_url
    assert environment["NO_PROXY"] == AROUND.progress_host
    assert environment["HOME"].startswith(names.SCRATCH_DIR)
    assert pod["containers"][0]["resources"] == {
        "requests": {"cpu": 16, "memory": "128Gi", "nvidia.com/gpu": 4},
        "limits": {"memory": "128Gi", "nvidia.com/gpu": 4},
    }


def test_a_job_without_gpus_asks_for_none() -> None:
    pod = _pod(resources={"gpusPerNode": 0})
    assert "nvidia.com/gpu" not in pod["containers"][0]["resources"]["limits"]
    assert _environment(pod)[names.ENV_PROCESSES_PER_NODE] == "1"


def test_variables_of_the_user_win_and_keep_the_progress_server_reachable() -> None:
    env = [
        {"name": "HOME", "value": "/elsewhere"},
        {"name": "NO_PROXY", "value": "corp"},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
    ]
    environment = _environment(_pod(runtime={"env": env}))
    assert environment["HOME"] == "/elsewhere"
    assert environment["NO_PROXY"] == f"corp,{AROUND.progress_host}"
    assert environment["KEY"] == {"secretKeyRef": {"name": "s", "key": "k"}}


def test_what_is_only_read_is_mounted_read_only() -> None:
    mounts = _mounts(_pod())
    assert mounts[f"{names.VOLUMES_DIR}/datasets"] is True
    assert mounts[f"{names.VOLUMES_DIR}/models"] is False
    assert mounts[names.SCRATCH_DIR] is False
    both = _mounts(_pod(dataset={"train": [{"uri": "pvc://models/data.jsonl"}]}))
    assert both[f"{names.VOLUMES_DIR}/models"] is False


def test_places_bring_their_objects() -> None:
    secret = {"secretRef": {"name": "reader"}}
    pod = _pod(
        model={"uri": "hf://a/b", **secret},
        dataset={"train": [{"uri": "configmap://rows.v1/train.jsonl"}, {"uri": "s3://b/x", **secret}]},
    )
    mounts = _mounts(pod)
    assert mounts[f"{names.CONFIGMAPS_DIR}/rows.v1"] is True
    assert mounts[f"{names.SECRETS_DIR}/reader"] is True
    (mounted,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert mounted == {"secretName": "reader", "defaultMode": 0o440}
    for volume in pod["volumes"]:
        assert "." not in volume["name"], "names of volumes are DNS labels"


def test_a_users_program_runs_under_our_init() -> None:
    pod = _pod(runtime=OWN, model=None, dataset=None)
    (container,), (init,) = pod["containers"], pod["initContainers"]
    assert container["image"] == "own:1"
    assert container["command"] == ["/finetune/init/finetune-init", "--", "train", "--fast"]
    assert container["args"] == ["--now"]
    assert (init["image"], init["command"]) == ("trainer:1", ["finetune-init", "--copy-to", "/finetune/init"])


def test_volumes_of_the_user_never_collide_with_ours() -> None:
    runtime = {
        "volumes": [{"name": "scratch", "emptyDir": {}}, {"name": "keys", "secret": {"name": "k"}}],
        "volumeMounts": [{"name": "scratch", "mountPath": "/mine"}, {"name": "keys", "mountPath": "/keys"}],
    }
    pod = _pod(runtime=runtime)
    volume_names = [volume["name"] for volume in pod["volumes"]]
    assert len(set(volume_names)) == len(volume_names)
    assert {"/mine", "/keys"} <= _mounts(pod).keys()


@pytest.mark.parametrize("field", ["runtimeClassName", "nodeSelector", "affinity"])
def test_where_pods_may_run_is_passed_on(field: str) -> None:
    value: Any = {"runtimeClassName": "nvidia", "nodeSelector": {"a": "b"}, "affinity": {"podAffinity": {}}}[field]
    assert _pod(resources={field: value})[field] == value
    assert field not in _pod()


def test_pods_leave_a_lost_node_after_30_seconds_and_get_their_time_to_save() -> None:
    pod = _pod(grace=900, resources={"tolerations": [{"key": "gpu", "operator": "Exists"}]})
    assert pod["terminationGracePeriodSeconds"] == 900
    assert pod["tolerations"][0] == {"key": "gpu", "operator": "Exists"}
    assert {each.get("tolerationSeconds") for each in pod["tolerations"][1:]} == {30}


def test_the_template_digest_changes_with_what_pods_see_and_with_nothing_else() -> None:
    spec = manifest()["spec"]
    assert template_digest(spec) == template_digest(
        {**spec, "suspend": True, "retries": 1, "cleanup": {"afterSeconds": 1}}
    )
    assert template_digest(spec) != template_digest({**spec, "resources": {"gpusPerNode": 2}})
    assert template_digest(spec) != template_digest({**spec, "training": {"seed": 1}})


def test_a_claim_that_a_user_mounts_is_looked_at_like_those_of_locations() -> None:
    own = [
        {"name": "cache", "persistentVolumeClaim": {"claimName": "cache"}},
        {"name": "books", "persistentVolumeClaim": {"claimName": "books", "readOnly": True}},
        {"name": "again", "persistentVolumeClaim": {"claimName": "data", "readOnly": True}},
    ]
    spec = {**manifest()["spec"], "output": {"uri": "pvc://data/out"}, "runtime": {"volumes": own}}
    found = volumes.mounted_claims(FineTuneJobSpec.model_validate(spec))
    assert found == {"books": False, "cache": True, "data": True, "datasets": False}
