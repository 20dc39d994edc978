"""What an operator process is told: arguments, each also an environment variable FINETUNE_<NAME>. The chart sets the variables."""

import argparse
import os
import socket
from dataclasses import dataclass, field, fields
from typing import Any


def _option(default: Any, doc: str, **more: Any) -> Any:
    return field(default=default, metadata={"doc": doc, **more})


@dataclass(frozen=True)
class Settings:
    """One field is one option: progress_port is --progress-port and FINETUNE_PROGRESS_PORT."""

    trainer_image: str = _option("", "image of the trainer, with its digest; needed")
    namespace: str = _option("finetune-system", "namespace of the operator itself: Lease and progress certificate")
    identity: str = _option("", "name of this replica; its host name when empty")
    watch_namespaces: str = _option("", "namespaces whose FineTuneJobs are run, separated by commas; all when empty")
    gpu_resource_name: str = _option("nvidia.com/gpu", "extended resource that stands for a GPU unless a job says so")
    progress_host: str = _option(
        "", "DNS name or address at which pods reach the progress server; no progress if empty"
    )
    progress_port: int = _option(8443, "port of the progress server")
    progress_secret: str = _option(
        "finetune-operator-progress", "Secret that holds CA and certificate of the progress server"
    )
    metrics_port: int = _option(8080, "port of /metrics")
    liveness_port: int = _option(8081, "port of /healthz")
    lease_name: str = _option("finetune-operator", "name of the leader's Lease")
    lease_seconds: float = _option(7.0, "a leader that has not renewed for so long may be replaced")
    renew_deadline: float = _option(5.5, "a leader that could not renew for so long exits; less than lease_seconds")
    retry_period: float = _option(1.5, "time between two renewals, and longest time that one may take")
    relist_seconds: float = _option(300.0, "time between two lists that heal what a watch has missed")
    workers: int = _option(16, "jobs that are reconciled at the same time")
    kubeconfig: str = _option("", "kubeconfig; else $KUBECONFIG, the pod's service account, ~/.kube/config")
    log_level: str = _option("INFO", "DEBUG, INFO, WARNING or ERROR")

    @property
    def namespaces(self) -> list[str]:
        """Namespaces to watch; empty for all."""
        return [name.strip() for name in self.watch_namespaces.split(",") if name.strip()]

    @classmethod
    def parse(cls, arguments: list[str] | None = None) -> "Settings":
        """From the command line over the environment over the defaults; exits with a sentence when something is wrong."""
        parser = argparse.ArgumentParser("finetune-operator", description="Runs FineTuneJobs.")
        for option in fields(cls):
            variable = f"FINETUNE_{option.name.upper()}"
            parser.add_argument(
                "--" + option.name.replace("_", "-"),
                type=type(option.default),
                default=os.environ.get(variable, option.default),
                help=f"{option.metadata['doc']} (${variable}; default: {option.default!r})",
            )
        given = vars(parser.parse_args(arguments))
        given["identity"] = given["identity"] or socket.gethostname()
        settings = cls(**given)
        if not settings.trainer_image:
            parser.error("--trainer-image (or $FINETUNE_TRAINER_IMAGE) is needed: the image whose trainer the jobs run")
        if not settings.retry_period < settings.renew_deadline < settings.lease_seconds:
            parser.error("--retry-period must be less than --renew-deadline, and that less than --lease-seconds")
        return settings
