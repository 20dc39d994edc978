"""The e2e tier's cluster itself: containers, names, volumes, registry and object store under the restricted profile."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.cluster import Cluster, KubectlError
from cluster.registry import PushedImage


def pod(image: PushedImage, script: str, **spec: Any) -> str:
    """A restricted pod that runs a Python script with one GPU; `spec` adds to its spec, `mounts` to its container."""
    mounts = spec.pop("mounts", [])
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod"},
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 1,
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 10001,
                    "fsGroup": 10001,
                    "fsGroupChangePolicy": "OnRootMismatch",
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        "name": "main",
                        "image": image.reference,
                        "command": ["python", "-c", script],
                        "resources": {"limits": {"nvidia.com/gpu": 1}},
                        "volumeMounts": mounts,
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "readOnlyRootFilesystem": True,
                            "capabilities": {"drop": ["ALL"]},
                        },
                    }
                ],
            }
            | spec,
        }
    )


def run(cluster: Cluster, namespace: str, manifest: str) -> str:
    """Runs the pod to success; its log."""
    cluster.kubectl("-n", namespace, "apply", "-f", "-", stdin=manifest)
    done = "--for=jsonpath={.status.phase}=Succeeded"
    try:
        cluster.kubectl("-n", namespace, "wait", done, "--timeout=60s", "pod/pod")
    except KubectlError:
        described = cluster.kubectl("-n", namespace, "describe", "pod", "pod")
        pytest.fail(f"{described}\nLog:\n{cluster.kubectl('-n', namespace, 'logs', 'pod')}")
    return cluster.kubectl("-n", namespace, "logs", "pod")


def test_an_image_of_ours_runs_under_the_restricted_profile(
    cluster: Cluster, namespace: str, trainer_image: PushedImage
) -> None:
    script = "import os, finetune_trainer, tokenizers; print(os.getuid(), finetune_trainer.__name__)"
    assert run(cluster, namespace, pod(trainer_image, script)) == "10001 finetune_trainer\n"


def test_exit_code_and_termination_message_reach_the_status(
    cluster: Cluster, namespace: str, operator_image: PushedImage
) -> None:
    script = "open('/dev/termination-log', 'w').write('the last word'); exit(75)"
    cluster.kubectl("-n", namespace, "create", "-f", "-", stdin=pod(operator_image, script))
    cluster.kubectl("-n", namespace, "wait", "--for=jsonpath={.status.phase}=Failed", "--timeout=60s", "pod/pod")
    path = "jsonpath={.status.containerStatuses[0].state.terminated}"
    end = json.loads(cluster.kubectl("-n", namespace, "get", "pod", "pod", "-o", path))
    assert (end["exitCode"], end["message"]) == (75, "the last word")


def test_the_init_is_in_the_image_and_copies_itself_into_a_volume(
    cluster: Cluster, namespace: str, trainer_image: PushedImage
) -> None:
    script = (
        "import subprocess, sys\n"
        "subprocess.run(['finetune-init', '--copy-to', '/shared'], check=True)\n"
        "command = ['/shared/finetune-init', '--message-file', '/shared/message', '--', 'sh', '-c', 'exit 3']\n"
        "print(subprocess.run(command).returncode, open('/shared/message').read())"
    )
    volumes = [{"name": "shared", "emptyDir": {}}]
    mounts = [{"name": "shared", "mountPath": "/shared"}]
    log = run(cluster, namespace, pod(trainer_image, script, volumes=volumes, mounts=mounts))
    assert log == '3 {"code":68,"message":"The program ended with exit code 3."}\n'


def test_a_claim_of_the_default_class_is_provisioned_writable_and_removed(
    cluster: Cluster, namespace: str, operator_image: PushedImage
) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    cluster.kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(claim))
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
    mounts = [{"name": "data", "mountPath": "/data"}]
    script = "open('/data/file', 'w').write('kept'); print('written')"
    assert run(cluster, namespace, pod(operator_image, script, volumes=volumes, mounts=mounts)) == "written\n"
    folder = cluster.volumes.folder_of(namespace, "data")
    assert (folder / "file").read_text() == "kept"
    volume = cluster.kubectl("-n", namespace, "get", "pvc", "data", "-o", "jsonpath={.spec.volumeName}")
    cluster.kubectl("-n", namespace, "delete", "pod/pod", "pvc/data", "--timeout=60s")
    cluster.kubectl("wait", "--for=delete", "--timeout=30s", f"pv/{volume}")
    assert not folder.exists()


def test_a_folder_of_the_host_is_published_read_only(
    cluster: Cluster, namespace: str, operator_image: PushedImage, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PermissionError, match="mode 0700"):
        cluster.volumes.publish(namespace, "models", tmp_path)
    tmp_path.chmod(0o755)
    cluster.volumes.publish(namespace, "models", tmp_path)
    volumes = [{"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}}]
    mounts = [{"name": "models", "mountPath": "/models"}]
    script = "import os; print(os.listdir('/models'), os.access('/models', os.W_OK))"
    log = run(cluster, namespace, pod(operator_image, script, volumes=volumes, mounts=mounts))
    assert log == "['config.json'] False\n"


def test_names_and_services_resolve_and_answer(cluster: Cluster, namespace: str, operator_image: PushedImage) -> None:
    """The API server by its service, and the pod itself by a headless service while it is not Ready."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "peers"},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"job": "one"},
            "ports": [{"port": 29400}],
        },
    }
    cluster.kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(service))
    script = (
        "import socket, ssl, time, urllib.error, urllib.request\n"
        "try:\n"
        "    urllib.request.urlopen('https://kubernetes.default.svc/api', context=ssl._create_unverified_context())\n"
        "except urllib.error.HTTPError as error: print(error.code)\n"
        "deadline = time.monotonic() + 30\n"
        "while True:\n"
        "    try: found = socket.gethostbyname('rank-0.peers'); break\n"
        "    except socket.gaierror:\n"
        "        if time.monotonic() > deadline: raise\n"
        "        time.sleep(0.5)\n"
        "print(found == socket.gethostbyname(socket.gethostname()))"
    )
    manifest = json.loads(pod(operator_image, script, hostname="rank-0", subdomain="peers"))
    manifest["metadata"]["labels"] = {"job": "one"}
    assert run(cluster, namespace, json.dumps(manifest)) == "403\nTrue\n"


def test_the_object_store_answers_a_pod(cluster: Cluster, namespace: str, trainer_image: PushedImage) -> None:
    cluster.s3.start()
    (cluster.s3.create_bucket("data") / "row.txt").write_text("one")
    script = (
        "import obstore, obstore.store\n"
        f"store = obstore.store.S3Store('data', endpoint={cluster.s3.endpoint!r}, region={cluster.s3.region!r},\n"
        f"    access_key_id={cluster.s3.access_key!r}, secret_access_key={cluster.s3.secret_key!r},\n"
        "    virtual_hosted_style_request=False, client_options={'allow_http': True})\n"
        "obstore.put(store, 'two.txt', b'two')\n"
        "print(bytes(obstore.get(store, 'row.txt').bytes()))"
    )
    assert run(cluster, namespace, pod(trainer_image, script)) == "b'one'\n"
    assert (cluster.s3.folder / "data" / "two.txt").read_text() == "two"


def test_more_gpus_than_there_are_wait(cluster: Cluster, namespace: str, operator_image: PushedImage) -> None:
    manifest = json.loads(pod(operator_image, "pass"))
    manifest["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = 9
    cluster.kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(manifest))
    unscheduled = '--for=jsonpath={.status.conditions[?(@.type=="PodScheduled")].reason}=Unschedulable'
    cluster.kubectl("-n", namespace, "wait", unscheduled, "--timeout=30s", "pod/pod")


def test_nothing_outside_is_reachable(cluster: Cluster, namespace: str, operator_image: PushedImage) -> None:
    script = (
        "import socket\n"
        "try: socket.create_connection(('203.0.113.1', 80), 3); print('connected')\n"
        "except OSError: print('unreachable')"
    )
    assert run(cluster, namespace, pod(operator_image, script)) == "unreachable\n"


@pytest.mark.parametrize("part", ["kubelet", "containerd"])
def test_parts_of_the_node_can_be_restarted_under_a_running_pod(
    cluster: Cluster, namespace: str, operator_image: PushedImage, part: str
) -> None:
    script = "import time; time.sleep(8); print('undisturbed')"
    cluster.kubectl("-n", namespace, "create", "-f", "-", stdin=pod(operator_image, script))
    cluster.kubectl("-n", namespace, "wait", "--for=condition=Ready", "--timeout=60s", "pod/pod")
    next(process for process in cluster.processes if process.name == part).restart()
    done = "--for=jsonpath={.status.phase}=Succeeded"
    cluster.kubectl("-n", namespace, "wait", done, "--timeout=60s", "pod/pod")
    assert cluster.kubectl("-n", namespace, "logs", "pod") == "undisturbed\n"
