"""Volumes and mounts of a training pod, from the places that its job reads and writes. children.py calls it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from finetune_crds import locations, names
from finetune_crds.resolved import ResolvedJob
from finetune_crds.v1alpha1 import FineTuneJobSpec
from finetune_crds.v1alpha1.pods import Volume

Json = dict[str, Any]

TOKEN_SECONDS = 3600
"""Life of the progress token; the kubelet renews it when 80 % are over."""


class Mounted(NamedTuple):
    """A volume and where it appears in the training container."""

    volume: Json
    mounts: list[Json]


def claims(spec: FineTuneJobSpec) -> dict[str, bool]:
    """Claims that the locations of a spec name, and whether anything is written there."""
    found: dict[str, bool] = {}
    for _, place in locations.inputs(spec):
        if (parsed := locations.parse(place.uri)).scheme == "pvc":
            found.setdefault(parsed.root, False)
    for _, place in locations.outputs(spec):
        if (parsed := locations.parse(place.uri)).scheme == "pvc":
            found[parsed.root] = True
    return found


def mounted_claims(spec: FineTuneJobSpec) -> dict[str, bool]:
    """All claims of a pod, those of locations and those that the user mounts besides, and whether anything may be written there."""
    found = claims(spec)
    for volume in (spec.runtime and spec.runtime.volumes) or ():
        if claim := volume.persistent_volume_claim:
            found[claim.claim_name] = found.get(claim.claim_name, False) or not claim.read_only
    return dict(sorted(found.items()))


def mounted(job: ResolvedJob, config_map: str, *, progress: bool) -> Iterator[Mounted]:
    """Everything that the training container sees."""
    resources = job.spec.resources
    scratch = {"name": "scratch", "emptyDir": {"sizeLimit": resources.scratch}}
    yield Mounted(
        scratch,
        [_mount("scratch", names.SCRATCH_DIR), {**_mount("scratch", "/tmp"), "subPath": "tmp"}],
    )
    shared_memory = {"medium": "Memory", "sizeLimit": resources.shared_memory}
    yield Mounted({"name": "shared-memory", "emptyDir": shared_memory}, [_mount("shared-memory", "/dev/shm")])
    job_folder = names.JOB_FILE.rsplit("/", 1)[0]
    yield Mounted({"name": "job", "configMap": {"name": config_map}}, [_mount("job", job_folder, read_only=True)])
    if progress:
        source = {"audience": names.AUDIENCE, "expirationSeconds": TOKEN_SECONDS, "path": "token"}
        yield Mounted(
            {"name": "token", "projected": {"defaultMode": 0o440, "sources": [{"serviceAccountToken": source}]}},
            [_mount("token", names.TOKEN_FILE.rsplit("/", 1)[0], read_only=True)],
        )
    yield from _of_locations(job)
    for each in job.spec.runtime.volumes or ():
        yield Mounted({"name": f"user-{each.name}", **_source(each)}, _users_mounts(job, each.name))


def _of_locations(job: ResolvedJob) -> Iterator[Mounted]:
    for i, (claim, written) in enumerate(claims(job.spec).items()):
        name, path = f"claim-{i}", f"{names.VOLUMES_DIR}/{claim}"
        source: Json = {"claimName": claim} if written else {"claimName": claim, "readOnly": True}
        yield Mounted({"name": name, "persistentVolumeClaim": source}, [_mount(name, path, read_only=not written)])
    places = [place for _, place in (*locations.inputs(job.spec), *locations.outputs(job.spec))]
    parsed = [locations.parse(place.uri) for place in places]
    for i, config_map in enumerate(dict.fromkeys(p.root for p in parsed if p.scheme == "configmap")):
        name, path = f"configmap-{i}", f"{names.CONFIGMAPS_DIR}/{config_map}"
        yield Mounted({"name": name, "configMap": {"name": config_map}}, [_mount(name, path, read_only=True)])
    for i, secret in enumerate(dict.fromkeys(place.secret_ref.name for place in places if place.secret_ref)):
        name, path = f"secret-{i}", f"{names.SECRETS_DIR}/{secret}"
        source = {"secretName": secret, "defaultMode": 0o440}
        yield Mounted({"name": name, "secret": source}, [_mount(name, path, read_only=True)])


def _source(volume: Volume) -> Json:
    if volume.persistent_volume_claim:
        return {"persistentVolumeClaim": volume.persistent_volume_claim.to_wire()}
    if volume.secret:
        return {"secret": {"secretName": volume.secret.name, "defaultMode": 0o440}}
    if volume.config_map:
        return {"configMap": volume.config_map.to_wire()}
    return {"emptyDir": volume.empty_dir.to_wire() if volume.empty_dir else {}}


def _users_mounts(job: ResolvedJob, volume: str) -> list[Json]:
    mounts = [m for m in job.spec.runtime.volume_mounts or () if m.name == volume]
    return [{**mount.to_wire(), "name": f"user-{volume}"} for mount in mounts]


def _mount(name: str, path: str, *, read_only: bool = False) -> Json:
    return {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}
