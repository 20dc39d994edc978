"""Every label, annotation, path, variable, condition and reason that crosses a boundary, each with who reads it."""

from enum import StrEnum
from typing import Final

DOMAIN: Final = "finetune.dev"

# Labels on every child. The operator's watches select on LABEL_JOB; kubectl users too.
LABEL_JOB: Final = f"{DOMAIN}/job"
"""metadata.name of the FineTuneJob."""
LABEL_UID: Final = f"{DOMAIN}/uid"
"""metadata.uid of the FineTuneJob: the keyed queue maps a child back to its parent with it."""
LABEL_ATTEMPT: Final = f"{DOMAIN}/attempt"
"""Attempt number: on Job and Pod, read by the progress server to refuse an earlier attempt's pod."""
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGED_BY: Final = "finetune-operator"

# Annotations.
ANNOTATION_RETRY: Final = f"{DOMAIN}/retry"
"""On a FineTuneJob, by a user: any new value tries a failed job again. Read by the operator."""
ANNOTATION_DIGEST: Final = f"{DOMAIN}/digest"
"""On the Job, for people and other programs: outcome digest that it trains. The operator goes by status alone."""

# Field managers of status. See v1alpha1/status.py for who owns what.
MANAGER_OPERATOR: Final = "finetune-operator"
MANAGER_PROGRESS: Final = "finetune-progress"

# Paths in the training pod. Written by the operator's pod builder, read by the trainer and by users' programs.
ROOT: Final = "/finetune"
JOB_FILE: Final = f"{ROOT}/job/job.json"
"""The ResolvedJob."""
CA_FILE: Final = f"{ROOT}/job/ca.crt"
"""CA of the progress server."""
TOKEN_FILE: Final = f"{ROOT}/token/token"
"""Projected service-account token with AUDIENCE, the only credential of a pod."""
VOLUMES_DIR: Final = f"{ROOT}/volumes"
"""VOLUMES_DIR/<claim> is the claim's root: pvc://claim/path is VOLUMES_DIR/claim/path."""
CONFIGMAPS_DIR: Final = f"{ROOT}/configmaps"
"""CONFIGMAPS_DIR/<name>/<key>."""
SECRETS_DIR: Final = f"{ROOT}/secrets"
"""SECRETS_DIR/<secret>/<key>."""
SCRATCH_DIR: Final = f"{ROOT}/scratch"
"""Writable: HOME, TMPDIR, caches, prepared data. The only writable place besides claims and /dev/shm."""
INIT_DIR: Final = f"{ROOT}/init"
"""INIT_DIR/finetune-init is PID 1 of a user's own program, copied there by an init container from the trainer image."""
TERMINATION_FILE: Final = "/dev/termination-log"

# Environment of the training container. Written by the pod builder.
ENV_JOB_FILE: Final = "FINETUNE_JOB_FILE"
ENV_ATTEMPT: Final = "FINETUNE_ATTEMPT"
ENV_RUN_ID: Final = "FINETUNE_RUN_ID"
"""UID of the pod (downward API): the fencing token of a run."""
ENV_POD_NAME: Final = "FINETUNE_POD_NAME"
ENV_NODES: Final = "FINETUNE_NODES"
ENV_NODE_RANK: Final = "FINETUNE_NODE_RANK"
"""Completion index of the pod."""
ENV_PROCESSES_PER_NODE: Final = "FINETUNE_PROCESSES_PER_NODE"
ENV_MASTER_ADDR: Final = "FINETUNE_MASTER_ADDR"
"""Host name of the pod with index 0 in the headless Service; localhost for a single pod, which has none."""
ENV_MASTER_PORT: Final = "FINETUNE_MASTER_PORT"
ENV_GRACE_SECONDS: Final = "FINETUNE_GRACE_SECONDS"
ENV_PROGRESS_URL: Final = "KUBEFLOW_TRAINER_SERVER_URL"
"""With the next two: what transformers' KubeflowCallback registers itself on. Our trainer reads the same three."""
ENV_PROGRESS_CA: Final = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
ENV_PROGRESS_TOKEN: Final = "KUBEFLOW_TRAINER_SERVER_TOKEN"

MASTER_PORT: Final = 29400
AUDIENCE: Final = f"progress.{DOMAIN}"
"""Audience of the pod's token; the progress server sends it to TokenReview."""
CONTAINER: Final = "trainer"
"""Name of the training container; the operator reads its termination message."""


class ConditionType(StrEnum):
    """Types in status.conditions. `kubectl wait --for=condition=...` and kstatus read them."""

    COMPLETE = "Complete"
    """The output is there."""
    FAILED = "Failed"
    """It ended without an output; status.failure says why."""
    SUSPENDED = "Suspended"
    """spec.suspend is true and no pod holds a GPU any more."""
    RUNNING = "Running"
    """Pods of the current attempt run."""
    SPEC_FROZEN = "SpecFrozen"
    """The API server's CEL rule refuses edits of what decides the outcome."""
    RECONCILING = "Reconciling"
    """kstatus: True only until the children exist."""
    STALLED = "Stalled"
    """kstatus: True when it failed."""
    WAITING = "Waiting"
    """True while something outside the job is missing: GPUs, quota, a claim, a Secret, an image. Reason and message name it."""


class Reason(StrEnum):
    """Reasons in conditions and Events."""

    CREATED = "Created"
    WAITING_FOR_NODES = "WaitingForNodes"
    """No node fits now; message in the scheduler's words."""
    WAITING_FOR_OBJECT = "WaitingForObject"
    """A claim, Secret, ConfigMap or service account is not there yet."""
    WAITING_FOR_IMAGE = "WaitingForImage"
    """The image cannot be pulled (yet)."""
    WAITING_FOR_QUOTA = "WaitingForQuota"
    """The API server refuses the pods: quota, pod security or admission."""
    PODS_RUNNING = "PodsRunning"
    RESUMED = "Resumed"
    SUSPENDED = "Suspended"
    SUSPENDING = "Suspending"
    DISRUPTED = "Disrupted"
    RETRYING = "Retrying"
    EDITED = "Edited"
    COMPLETED = "Completed"
    OUTPUT_REUSED = "OutputReused"
    FAILED = "Failed"
    VOLUME_NOT_SHARED = "VolumeNotShared"
    CLEANED_UP = "CleanedUp"
    TRAINING = "Training"
    NOT_STARTED = "NotStarted"
