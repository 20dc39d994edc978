"""Makes the volumes of the StorageClass `local`: a process beside the control plane, `python -m cluster.provisioner`.

As with most default classes of real clusters a volume is made where the first pod lands (WaitForFirstConsumer), and
belongs to that node. It is a local volume, not a hostPath: the kubelet then applies fsGroup, without which a pod of
the restricted profile could not write to it.
"""

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import Any

from kubernetes import client, config, watch
from urllib3.exceptions import HTTPError

STORAGE_CLASS = "local"
PROVISIONER = "finetune.dev/local"
_MADE_BY = "pv.kubernetes.io/provisioned-by"
_NODE = "volume.kubernetes.io/selected-node"


def serve(folder: Path, ready: Path) -> None:
    """Follows claims and volumes for ever; an API server that is away is asked again. `ready` then holds its pid."""
    core = client.CoreV1Api()
    ready.write_text(str(os.getpid()))
    while True:
        try:
            _follow(core, folder)
        except (client.ApiException, HTTPError, OSError) as error:
            print(f"watching again after: {error}", flush=True)
            time.sleep(0.5)


def _follow(core: Any, folder: Path) -> None:
    """Handles what is there, then every change of a claim; volumes are looked at with each, and each second."""
    version = None
    while True:
        if version is None:
            claims = core.list_persistent_volume_claim_for_all_namespaces()
            version = claims.metadata.resource_version
            for claim in claims.items:
                _provision(core, folder, claim)
        _reclaim(core, folder)
        stream = watch.Watch().stream(
            core.list_persistent_volume_claim_for_all_namespaces, resource_version=version, timeout_seconds=5
        )
        for event in stream:
            if event["type"] == "ERROR":  # the version is too old: list again
                version = None
                break
            claim = event["object"]
            version = claim.metadata.resource_version
            if event["type"] == "DELETED":
                _reclaim(core, folder)
            else:
                _provision(core, folder, claim)


def _provision(core: Any, folder: Path, claim: Any) -> None:
    node = (claim.metadata.annotations or {}).get(_NODE)
    if claim.spec.storage_class_name != STORAGE_CLASS or claim.spec.volume_name or node is None:
        return
    name = f"pvc-{claim.metadata.uid}"
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    volume = {
        "metadata": {"name": name, "annotations": {_MADE_BY: PROVISIONER}},
        "spec": {
            "storageClassName": STORAGE_CLASS,
            "capacity": {"storage": claim.spec.resources.requests["storage"]},
            "accessModes": claim.spec.access_modes,
            "persistentVolumeReclaimPolicy": "Delete",
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": claim.metadata.namespace,
                "name": claim.metadata.name,
                "uid": claim.metadata.uid,
            },
            "local": {"path": str(place)},
            "nodeAffinity": {
                "required": {
                    "nodeSelectorTerms": [
                        {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
                    ]
                }
            },
        },
    }
    try:
        core.create_persistent_volume(volume)
    except client.ApiException as error:
        if error.status != 409:  # made by an earlier look at the same claim
            raise


def _reclaim(core: Any, folder: Path) -> None:
    for volume in core.list_persistent_volume().items:
        made_here = (volume.metadata.annotations or {}).get(_MADE_BY) == PROVISIONER
        if made_here and volume.status.phase == "Released" and volume.metadata.deletion_timestamp is None:
            shutil.rmtree(folder / volume.metadata.name, ignore_errors=True)
            core.delete_persistent_volume(volume.metadata.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kubeconfig", required=True)
    parser.add_argument("--folder", required=True, type=Path, help="where the volumes lie")
    parser.add_argument("--ready", required=True, type=Path, help="file that gets the pid once it serves")
    options = parser.parse_args()
    config.load_kube_config(options.kubeconfig)
    serve(options.folder, options.ready)
