"""What the pods ask for, and what runs in them."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .common import (
    ApiModel,
    Name,
    Quantity,
    Raw,
    Rule,
    at_most_one,
    exactly_one,
    spelled,
)
from .model import SecretReference

Key = Annotated[str, spelled(r"^[-._a-zA-Z0-9]+$", "a key: letters, digits, -, _ and .", min_length=1, max_length=253)]


class Toleration(ApiModel):
    """A taint that the pods accept."""

    key: Annotated[str, Field(max_length=317)] | None = None
    """Taint key; empty matches all."""
    operator: Literal["Exists", "Equal"] | None = None
    """How value is compared."""
    value: Annotated[str, Field(max_length=63)] | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; empty matches all."""
    toleration_seconds: int | None = None
    """How long a NoExecute taint is accepted."""


class Resources(ApiModel):
    """What each training pod gets, and where it may run."""

    nodes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Pods that train together, one on each node. Default 1."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs of each pod. Default 1; 0 trains on the CPU."""
    gpu_resource_name: (
        Annotated[str, spelled(r"^[a-z0-9.-]+/[a-zA-Z0-9._-]+$", "domain/name, such as nvidia.com/gpu", max_length=253)]
        | None
    ) = None
    """Extended resource that stands for a GPU. Default: the chart's trainer.gpuResourceName, which is nvidia.com/gpu."""
    cpu: Quantity | None = None
    """CPU of each pod, request and no limit. Images are read by as many processes, 16 a GPU at most. Default 4 a GPU, 2 without."""
    memory: Quantity | None = None
    """Memory of each pod, request and limit. Default 32Gi a GPU, 8Gi without."""
    scratch: Quantity | None = None
    """Size limit of the scratch volume: HOME, caches, downloaded model and prepared data. Default 50Gi."""
    shared_memory: Quantity | None = None
    """Size limit of /dev/shm. Default 8Gi a GPU, 1Gi without."""
    node_selector: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=32)] | None = None
    """Labels that a node must have."""
    affinity: Raw | None = None
    """A core/v1 Affinity."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] | None = None
    """Taints to accept."""
    runtime_class_name: Name | None = None
    """RuntimeClass of the pods."""


class KeySelector(ApiModel):
    """One key of a Secret or ConfigMap."""

    name: Name
    """Name of the object."""
    key: Key
    """Its key."""


class EnvironmentSource(ApiModel):
    """Where a variable's value comes from."""

    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one(
            "secretKeyRef",
            "configMapKeyRef",
            sentence="valueFrom needs exactly one of secretKeyRef and configMapKeyRef",
        ),
    )

    secret_key_ref: KeySelector | None = None
    """A key of a Secret."""
    config_map_key_ref: KeySelector | None = None
    """A key of a ConfigMap."""


class EnvironmentVariable(ApiModel):
    """A variable for the training container."""

    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one("value", "valueFrom", sentence="an environment variable takes value or valueFrom, not both"),
        Rule(
            "!self.name.startsWith('FINETUNE_') && !self.name.startsWith('KUBEFLOW_TRAINER_SERVER_')",
            "variables that start with FINETUNE_ or KUBEFLOW_TRAINER_SERVER_ are set by the operator",
        ),
    )

    name: Annotated[
        str,
        spelled(
            r"^[-._a-zA-Z][-._a-zA-Z0-9]*$",
            "the name of a variable: letters, digits, -, _ and ., no digit first",
            min_length=1,
            max_length=256,
        ),
    ]
    """Name."""
    value: Annotated[str, Field(max_length=32_768)] | None = None
    """Value."""
    value_from: EnvironmentSource | None = None
    """A value from an object; use it for all that is secret."""


class VolumeMount(ApiModel):
    """Where a volume of runtime.volumes appears in the training container."""

    name: Annotated[str, Field(max_length=63)]
    """Name of the volume."""
    mount_path: Annotated[str, spelled(r"^/[^:]+$", "an absolute path without a colon", max_length=1024)]
    """Path in the container."""
    sub_path: Annotated[str, Field(max_length=1024)] | None = None
    """Path in the volume."""
    read_only: bool | None = None
    """Mount without write access."""


class ClaimVolume(ApiModel):
    """A PersistentVolumeClaim in the job's namespace."""

    claim_name: Name
    """Name of the claim."""
    read_only: bool | None = None
    """Mount without write access."""


class NamedVolume(ApiModel):
    """A Secret or ConfigMap in the job's namespace."""

    name: Name
    """Name of the object."""


class EmptyVolume(ApiModel):
    """An empty folder that lives as long as the pod."""

    size_limit: Quantity | None = None
    """Largest size."""


class Volume(ApiModel):
    """A volume for the training pod: exactly one source."""

    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one(
            "persistentVolumeClaim",
            "secret",
            "configMap",
            "emptyDir",
            sentence="a volume needs exactly one of persistentVolumeClaim, secret, configMap, emptyDir",
        ),
    )

    name: Annotated[
        str,
        spelled(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "lower-case letters, digits and -", min_length=1, max_length=40),
    ]
    """Name to mount it by."""
    persistent_volume_claim: ClaimVolume | None = None
    """A claim."""
    secret: NamedVolume | None = None
    """A Secret's keys as files."""
    config_map: NamedVolume | None = None
    """A ConfigMap's keys as files."""
    empty_dir: EmptyVolume | None = None
    """An empty folder."""


class Runtime(ApiModel):
    """The container that trains. Everything has a default; a command of your own takes the place of our trainer."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.command) || has(self.image)",
            "runtime.command needs runtime.image: the image that holds your program",
        ),
        Rule("!has(self.args) || has(self.command)", "runtime.args needs runtime.command"),
        Rule(
            "!has(self.volumeMounts) || (has(self.volumes) && self.volumeMounts.all(m, self.volumes.exists(v, v.name == m.name)))",
            "each of runtime.volumeMounts must name a volume of runtime.volumes",
        ),
    )

    image: (
        Annotated[str, spelled(r"^[^\s]+$", "the name of an image, without spaces", min_length=1, max_length=512)]
        | None
    ) = None
    """Image to run instead of the operator's trainer image."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When the image is pulled. Default as Kubernetes does: Always for the tag latest, else IfNotPresent."""
    command: Annotated[list[Annotated[str, Field(max_length=4096)]], Field(min_length=1, max_length=64)] | None = None
    """Your own program instead of our trainer. It gets the same mounts, environment, rendezvous and progress contract."""
    args: Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=256)] | None = None
    """Arguments of the command."""
    env: Annotated[list[EnvironmentVariable], Field(max_length=128)] | None = None
    """Variables for the training container."""
    service_account_name: Name | None = None
    """Service account of the pods, for cloud identity. Its own API token is never mounted. Default: the namespace's default."""
    annotations: Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=64)] | None = None
    """Annotations of the pods."""
    image_pull_secrets: Annotated[list[SecretReference], Field(max_length=8)] | None = None
    """Secrets to pull the image with."""
    volumes: Annotated[list[Volume], Field(max_length=32)] | None = None
    """More volumes."""
    volume_mounts: Annotated[list[VolumeMount], Field(max_length=64)] | None = None
    """Where they are mounted."""
    run_as_user: Annotated[int, Field(ge=1, le=2_147_483_647)] | None = None
    """User id of the container, never root. Default 10001."""


class Cleanup(ApiModel):
    """When the children of a finished job go. The FineTuneJob itself, its record, stays."""

    after_seconds: Annotated[int, Field(ge=0, le=315_360_000)]
    """Seconds after the end until Job, pods, Service and ConfigMap are deleted."""
