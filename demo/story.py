"""The story that the demo tells, step by step; each step looks first whether it is done."""

import io
import json
import tarfile
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from cluster.model import SMOLLM2, model_path
from finetune_crds.v1alpha1 import GROUP, PLURAL

from .follow import follow
from .target import Target, TargetError

PROJECT = Path(__file__).resolve().parents[1]
MANIFEST = PROJECT / "examples/quickstart.yaml"
SYSTEM_NAMESPACE = "finetune-system"
NAMESPACE = "finetune-demo"
RELEASE = "finetune-operator"
CLAIM = "models"
HELPER = "models-shell"
CRD = f"{PLURAL}.{GROUP}"
LABEL = "finetune-demo"
"""Of the Helm release that the demo makes: no other is replaced or removed."""


def up(console: Console, target: Target) -> None:
    """Everything from images to answers."""
    console.print(
        "[bold]2/6[/] images: operator and trainer from the project's Dockerfiles (first time: 6 minutes, 12 GB; then seconds)"
    )
    operator_image, trainer_image = target.images()
    console.print("[bold]3/6[/] operator: helm upgrade --install (half a minute)")
    _install(target, operator_image, trainer_image)
    console.print("[bold]4/6[/] model: SmolLM2-135M-Instruct onto the claim 'models' (first time: a minute)")
    _namespace_and_claim(target, trainer_image)
    _load_model(console, target)
    job = _job_name()
    console.print(
        f"[bold]5/6[/] kubectl apply -f {MANIFEST.relative_to(PROJECT)} (a few minutes of training on 2 cores)"
    )
    target.kubectl("apply", "-n", NAMESPACE, "-f", str(MANIFEST))
    follow(console, target, NAMESPACE, job)
    console.print("[bold]6/6[/] what it learned")
    _answers(console, target)
    console.print(target.kubectl("get", "finetunejob", job, "-n", NAMESPACE, "-o", "wide"))
    _metrics(console, target)
    _look_around(console, target, job)


def down(console: Console, target: Target) -> None:
    """Leaves nothing behind."""
    if target.is_own:
        target.remove()
    else:
        target.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=false")
        if _is_installed(target, ours=True):
            _uninstall(console, target)
        else:
            console.print(
                f"an operator that the demo has not installed stays, and its namespace {SYSTEM_NAMESPACE} with it"
            )
    console.print("removed; what was built and downloaded stays in the cache for next time")


def _uninstall(console: Console, target: Target) -> None:
    """The release, and the CRD unless somebody else has FineTuneJobs: they, and what runs of them, would go with it."""
    target.helm("uninstall", RELEASE, "--namespace", SYSTEM_NAMESPACE, "--ignore-not-found", "--wait")
    target.kubectl("delete", "namespace", SYSTEM_NAMESPACE, "--ignore-not-found", "--wait=false")
    crds = target.kubectl("get", "crd", CRD, "--ignore-not-found", "-o", "name").split()
    everywhere = target.get(PLURAL, "--all-namespaces").get("items", []) if crds else []
    if others := [job for job in everywhere if job["metadata"]["namespace"] != NAMESPACE]:
        console.print(f"{CRD} stays: there are {len(others)} FineTuneJobs in other namespaces")
    else:
        target.kubectl("delete", "crd", CRD, "--ignore-not-found")


def _is_installed(target: Target, *, ours: bool) -> bool:
    """Whether a release of the name is there, in whatever state, that the demo made, or another."""
    # Helm 3 lists the first two by default, Helm 4 all.
    states = "--deployed", "--failed", "--pending", "--uninstalling"
    named = "--filter", f"^{RELEASE}$", "--selector", f"{LABEL}{'=' if ours else '!='}true"
    found = target.helm("list", *states, "-n", SYSTEM_NAMESPACE, "-q", *named)
    return RELEASE in found.split()


def _job_name() -> str:
    for document in yaml.safe_load_all(MANIFEST.read_text()):
        if document and document["kind"] == "FineTuneJob":
            return str(document["metadata"]["name"])
    raise TargetError(f"{MANIFEST} holds no FineTuneJob")


def _install(target: Target, operator_image: str, trainer_image: str) -> None:
    if _is_installed(target, ours=False):
        raise TargetError(
            f"this cluster has a release {RELEASE} in {SYSTEM_NAMESPACE} that is not the demo's, and the demo would replace it: "
            "use a cluster without, or apply examples/quickstart.yaml to this one"
        )
    target.helm(
        "upgrade", "--install", RELEASE, str(PROJECT / "charts/finetune-operator"),
        "--namespace", SYSTEM_NAMESPACE, "--create-namespace", "--wait", "--timeout", "5m", "--labels", f"{LABEL}=true",
        "--set", f"image.reference={operator_image}", "--set", f"trainer.image={trainer_image}",
    )  # fmt: skip


def _namespace_and_claim(target: Target, image: str) -> None:
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": HELPER, "namespace": NAMESPACE},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "fsGroup": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "shell",
                    "image": image,
                    "command": ["sleep", "infinity"],
                    "securityContext": security,
                    "volumeMounts": [{"name": "models", "mountPath": "/models"}],
                }
            ],
            "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": CLAIM}}],
        },
    }
    documents = [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": CLAIM, "namespace": NAMESPACE},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "10Gi"}}},
        },
        pod,
    ]
    target.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(documents))
    target.kubectl("wait", "-n", NAMESPACE, f"pod/{HELPER}", "--for=condition=Ready", "--timeout=10m")


def _load_model(console: Console, target: Target) -> None:
    folder = model_path(SMOLLM2)
    there = _shell(target, f"test -f /models/{folder.name}/.complete && echo yes || true").strip()
    if there:
        return
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, arcname=f"{folder.name}/{file.name}")
    console.print(f"      copying {archive.tell() / 1e6:.0f} MB")
    target.kubectl(
        "exec", "-n", NAMESPACE, "-i", HELPER, "--", "tar", "-x", "-C", "/models", "-f", "-", stdin=archive.getvalue()
    )
    _shell(target, f"touch /models/{folder.name}/.complete")


def _shell(target: Target, command: str) -> str:
    return target.kubectl("exec", "-n", NAMESPACE, HELPER, "--", "sh", "-c", command)


def _answers(console: Console, target: Target) -> None:
    spec = target.get("finetunejob", _job_name(), "-n", NAMESPACE)["spec"]
    path = spec["output"]["uri"].removeprefix(f"pvc://{CLAIM}/")
    rows = [json.loads(line) for line in _shell(target, f"cat /models/{path}/samples.jsonl").splitlines() if line]
    answers = {(row["prompt"], row["when"]): row["answer"].strip() for row in rows}
    table = Table("question", "before", "after", show_lines=True)
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        table.add_row(prompt, answers[prompt, "before"], answers[prompt, "after"])
    console.print(table)


def _metrics(console: Console, target: Target) -> None:
    lease = target.get("lease", "-n", SYSTEM_NAMESPACE, RELEASE)
    leader = lease.get("spec", {}).get("holderIdentity", "").split("_")[0]
    text = target.kubectl("get", "--raw", f"/api/v1/namespaces/{SYSTEM_NAMESPACE}/pods/{leader}:8080/proxy/metrics")
    wanted = (
        "finetune_jobs{",
        "finetune_gpu_seconds_total",
        "finetune_job_train_seconds_sum",
        "finetune_reconcile_seconds_count",
        "finetune_leader",
    )
    console.print("a few metrics:")
    for line in text.splitlines():
        if line.startswith(wanted):
            console.print(f"  {line}", markup=False)


def _look_around(console: Console, target: Target, job: str) -> None:
    export = f"  export KUBECONFIG={target.kubeconfig}\n" if target.kubeconfig else ""
    console.print(
        "\nlook around:\n"
        f"{export}"
        f"  {target.kubectl_path} get finetunejobs -A\n"
        f"  {target.kubectl_path} describe finetunejob {job} -n {NAMESPACE}\n"
        f"  {target.kubectl_path} explain finetunejob.spec.method.lora\n"
        f"  {target.kubectl_path} exec -n {NAMESPACE} {HELPER} -- ls -R /models\n"
        "take it down:\n"
        "  make demo-down",
        markup=False,
    )
