"""The e2e tier's cluster itself: volumes, names, object store and images in a restricted pod, and what survives restarts."""

import textwrap
from pathlib import Path
from typing import Any

import pytest

from api.jobs import Json, eventually
from cluster.cluster import Cluster, KubectlError
from cluster.registry import PushedImage

from .traces import traces

OUTSIDE = "203.0.113.1"
"""Set aside by RFC 5737 for documentation: nobody's."""


def pod(image: PushedImage, script: str, volumes: dict[str, Json] | None = None, **spec: Any) -> Json:
    """A restricted pod that runs a Python script with one GPU; volumes by the folder where they are mounted."""
    mounted = {
        folder: {"name": f"volume-{number}", **source}
        for number, (folder, source) in enumerate((volumes or {}).items())
    }
    container = {
        "name": "main",
        "image": image.reference,
        "command": ["python", "-c", textwrap.dedent(script)],
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "volumeMounts": [{"name": volume["name"], "mountPath": folder} for folder, volume in mounted.items()],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    return {
        "metadata": {"name": "pod", "labels": {"test": "pod"}},
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
            "containers": [container],
            "volumes": list(mounted.values()),
            **spec,
        },
    }


def test_a_pod_has_volumes_names_and_an_object_store_and_nothing_outside(
    cluster: Cluster, namespace: str, trainer_image: PushedImage, tmp_path: Path
) -> None:
    """The default class provisions, a folder of the host is read-only, the API server answers by its service, and the pod itself is
    found by a headless service while it is not Ready."""
    with pytest.raises(PermissionError, match="mode 0700"):
        cluster.volumes.publish(namespace, "models", tmp_path)
    tmp_path.chmod(0o755)
    (tmp_path / "config.json").write_text("{}")
    cluster.volumes.publish(namespace, "models", tmp_path)
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    cluster.api.create("persistentvolumeclaims", {"metadata": {"name": "data"}, "spec": claim}, namespace)
    cluster.s3.start()
    (cluster.s3.create_bucket("data") / "row.txt").write_text("one")
    service = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"test": "pod"},
        "ports": [{"port": 29400}],
    }
    cluster.api.create("services", {"metadata": {"name": "peers"}, "spec": service}, namespace)
    script = f"""
        import os, socket, ssl, subprocess, sys, time, urllib.error, urllib.request
        import obstore, obstore.store
        open("/data/file", "w").write("kept")
        print(os.listdir("/models"), os.access("/models", os.W_OK))
        try:
            urllib.request.urlopen("https://kubernetes.default.svc/api", context=ssl._create_unverified_context())
        except urllib.error.HTTPError as error:
            print(error.code)
        deadline = time.monotonic() + 30
        while True:
            try:
                found = socket.gethostbyname("rank-0.peers")
                break
            except socket.gaierror:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        print(found == socket.gethostbyname(socket.gethostname()))
        store = obstore.store.S3Store(
            "data", endpoint={cluster.s3.endpoint!r}, region={cluster.s3.region!r},
            access_key_id={cluster.s3.access_key!r}, secret_access_key={cluster.s3.secret_key!r},
            virtual_hosted_style_request=False, client_options={{"allow_http": True}})
        obstore.put(store, "two.txt", b"two")
        print(bytes(obstore.get(store, "row.txt").bytes()))
        imported = subprocess.run([sys.executable, "-v", "-c", "import finetune_trainer.supervisor"], capture_output=True, text=True)
        print([line for line in imported.stderr.splitlines() if "code object from" in line and line.endswith(".py'")])
        try:
            socket.create_connection(("{OUTSIDE}", 80), 3)
            print("connected")
        except OSError:
            print("unreachable")
        """
    volumes = {
        "/data": {"persistentVolumeClaim": {"claimName": "data"}},
        "/models": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
    }
    cluster.api.create("pods", pod(trainer_image, script, volumes, hostname="rank-0", subdomain="peers"), namespace)
    _ends(cluster, namespace)
    log = cluster.kubectl("-n", namespace, "logs", "pod").splitlines()
    assert log == ["['config.json'] False", "403", "True", "b'one'", "[]", "unreachable"], (
        "[]: nothing is compiled at a start"
    )
    assert (cluster.s3.folder / "data" / "two.txt").read_text() == "two"

    folder = cluster.volumes.folder_of(namespace, "data")
    assert (folder / "file").read_text() == "kept"
    volume = cluster.api.get("persistentvolumeclaims", "data", namespace)["spec"]["volumeName"]
    cluster.kubectl("-n", namespace, "delete", "pod/pod", "pvc/data", "--timeout=60s")
    cluster.kubectl("wait", "--for=delete", "--timeout=30s", f"pv/{volume}")
    assert not folder.exists()


def test_parts_of_the_node_can_be_restarted_under_a_running_pod_and_up_starts_nothing_again(
    cluster: Cluster, namespace: str, operator_image: PushedImage
) -> None:
    script = """
        import pathlib, time
        while not pathlib.Path("/dev/shm/end").exists():
            time.sleep(0.2)
        print("undisturbed")
        """
    cluster.api.create("pods", pod(operator_image, script), namespace)
    cluster.kubectl("-n", namespace, "wait", "--for=condition=Ready", "--timeout=60s", "pod/pod")
    for part in ("kubelet", "containerd"):
        next(process for process in cluster.processes if process.name == part).restart()
    started = {process.name: process.pid for process in cluster.processes}
    assert Cluster.up(cluster.settings.name, profile="full").kubectl("get", "nodes", "-o", "name") == "node/node-0\n"
    assert {process.name: process.pid for process in cluster.processes} == started
    assert traces(cluster.settings.name), "at the end of the session there is none"
    eventually(lambda: _touched(cluster, namespace, "/dev/shm/end"), "containerd takes commands again")
    _ends(cluster, namespace)
    assert cluster.kubectl("-n", namespace, "logs", "pod") == "undisturbed\n"
    assert cluster.api.get("pods", "pod", namespace)["status"]["containerStatuses"][0]["restartCount"] == 0


def _touched(cluster: Cluster, namespace: str, path: str) -> bool:
    try:
        cluster.kubectl("-n", namespace, "exec", "pod", "--", "touch", path)
    except KubectlError:
        return False
    return True


def _ends(cluster: Cluster, namespace: str) -> None:
    def phase() -> str:
        return str(cluster.api.get("pods", "pod", namespace)["status"]["phase"])

    eventually(lambda: phase() in ("Succeeded", "Failed"), "the pod ends")
    if phase() == "Failed":
        pytest.fail(cluster.kubectl("-n", namespace, "logs", "pod"))
