"""The control plane: etcd, API server, controller manager and scheduler as plain processes, ready in about 5 s.

The API server audits every request to a file (`audit` reads it) and enforces OwnerReferencesPermissionEnforcement, as
OpenShift does: an operator that may not update finalizers of an owner cannot set `blockOwnerDeletion` there.
"""

import ssl
from pathlib import Path
from typing import Any

import yaml

from .binaries import find
from .health import answers
from .pki import Authority
from .processes import Process, start_together
from .settings import Settings

_LOOPBACK = "127.0.0.1"


class ControlPlane:
    """The four processes and the files that they are configured by."""

    def __init__(self, settings: Settings, authority: Authority) -> None:
        self._settings = settings
        self._authority = authority
        folder = settings.folder
        ports = settings.ports
        self.audit_log = folder / "logs" / "audit.log"
        self.etcd = Process("etcd", folder, self._etcd, lambda: answers(f"http://{_LOOPBACK}:{ports['etcd']}/health"))
        # Asked to stop it waits a minute for open watches, of which there are always some.
        self.apiserver = Process("kube-apiserver", folder, self._apiserver, self._apiserver_ready, stop_seconds=2)
        self.controller_manager = Process(
            "kube-controller-manager",
            folder,
            self._controller_manager,
            lambda: answers(f"https://{_LOOPBACK}:{ports['controller_manager']}/healthz"),
        )
        self.scheduler = Process(
            "kube-scheduler",
            folder,
            self._scheduler,
            lambda: answers(f"https://{_LOOPBACK}:{ports['scheduler']}/readyz"),
        )
        self.processes = (self.etcd, self.apiserver, self.controller_manager, self.scheduler)

    def start(self) -> None:
        self._authority.create()
        self.apiserver.log.parent.mkdir(parents=True, exist_ok=True)
        self.etcd.start()
        self.apiserver.start()
        start_together(self.controller_manager, self.scheduler)

    def kubeconfig(self, user: str, groups: tuple[str, ...] = ()) -> Path:
        """A kubeconfig whose client certificate says that its holder is `user` in `groups`."""
        path = self._settings.folder / "kubeconfigs" / f"{user.replace(':', '-')}.yaml"
        files = self._authority.issue(user, groups)
        content = yaml.safe_dump(self._kubeconfig(str(files.certificate), str(files.key)))
        if not path.exists() or path.read_text() != content:
            path.parent.mkdir(exist_ok=True)
            path.touch(mode=0o600)
            path.write_text(content)
        return path

    def _kubeconfig(self, certificate: str, key: str) -> dict[str, Any]:
        cluster = {"server": self._settings.server, "certificate-authority": str(self._authority.files.certificate)}
        user = {"client-certificate": certificate, "client-key": key}
        name = f"finetune-{self._settings.name}"
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": name,
            "clusters": [{"name": name, "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        }

    def _etcd(self) -> list[str | Path]:
        client = f"http://{_LOOPBACK}:{self._settings.ports['etcd']}"
        peer = f"http://{_LOOPBACK}:{self._settings.ports['etcd_peer']}"
        return [
            find("etcd"),
            f"--data-dir={self._settings.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",  # a test cluster need not survive a power cut
            "--quota-backend-bytes=2147483648",
            "--log-level=warn",
        ]

    def _apiserver(self) -> list[str | Path]:
        settings = self._settings
        pki = self._authority
        serving = pki.issue(
            "kube-apiserver",
            names=[
                _LOOPBACK,
                settings.host_address,
                settings.kubernetes_service,
                "localhost",
                "kubernetes",
                "kubernetes.default",
                "kubernetes.default.svc",
                "kubernetes.default.svc.cluster.local",
            ],
        )
        kubelet_client = pki.issue("kube-apiserver-kubelet-client", ["system:masters"])
        command: list[str | Path] = [
            find("kube-apiserver"),
            f"--etcd-servers=http://{_LOOPBACK}:{settings.ports['etcd']}",
            f"--bind-address={settings.host_address}",
            f"--secure-port={settings.ports['apiserver']}",
            f"--service-cluster-ip-range={settings.service_network}",
            f"--client-ca-file={pki.files.certificate}",
            f"--tls-cert-file={serving.certificate}",
            f"--tls-private-key-file={serving.key}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={pki.service_account_key}",
            f"--service-account-signing-key-file={pki.service_account_key}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=OwnerReferencesPermissionEnforcement,NodeRestriction",
            f"--audit-policy-file={self._audit_policy()}",
            f"--audit-log-path={self.audit_log}",
            "--audit-log-maxsize=4096",  # MiB; a rotated file would be missed by its reader
            f"--kubelet-client-certificate={kubelet_client.certificate}",
            f"--kubelet-client-key={kubelet_client.key}",
            "--kubelet-preferred-address-types=InternalIP",
            "--profiling=false",
        ]
        if settings.profile == "api":
            # No pod will ever call it, and a loopback address may not be advertised.
            command += ["--advertise-address=198.18.0.1", "--endpoint-reconciler-type=none"]
        return command

    def _controller_manager(self) -> list[str | Path]:
        settings = self._settings
        pki = self._authority
        kubeconfig = self.kubeconfig("system:kube-controller-manager")
        return [
            find("kube-controller-manager"),
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            f"--bind-address={_LOOPBACK}",
            f"--secure-port={settings.ports['controller_manager']}",
            f"--root-ca-file={pki.files.certificate}",
            f"--service-account-private-key-file={pki.service_account_key}",
            f"--cluster-signing-cert-file={pki.files.certificate}",
            f"--cluster-signing-key-file={pki.files.key}",
            "--use-service-account-credentials",
            "--leader-elect=false",
            # Not to be the bottleneck of a load test: the default of 20 requests/s creates 10 pods/s.
            "--kube-api-qps=1000",
            "--kube-api-burst=2000",
            "--concurrent-job-syncs=20",
            "--concurrent-gc-syncs=20",
        ]

    def _scheduler(self) -> list[str | Path]:
        kubeconfig = self.kubeconfig("system:kube-scheduler")
        config = self._settings.folder / "scheduler.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "kubescheduler.config.k8s.io/v1",
                    "kind": "KubeSchedulerConfiguration",
                    "leaderElection": {"leaderElect": False},
                    "clientConnection": {"kubeconfig": str(kubeconfig), "qps": 1000, "burst": 2000},
                }
            )
        )
        return [
            find("kube-scheduler"),
            f"--config={config}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            f"--bind-address={_LOOPBACK}",
            f"--secure-port={self._settings.ports['scheduler']}",
        ]

    def _audit_policy(self) -> Path:
        path = self._settings.folder / "audit-policy.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "audit.k8s.io/v1",
                    "kind": "Policy",
                    "omitStages": ["RequestReceived"],
                    "omitManagedFields": True,
                    "rules": [
                        # What an operator wrote, word by word; of everything else who did what to which object.
                        {"level": "Request", "resources": [{"group": "finetune.dev"}]},
                        {"level": "Metadata"},
                    ],
                }
            )
        )
        return path

    def _apiserver_ready(self) -> bool:
        admin = self._authority.issue("admin", ["system:masters"])
        context = ssl.create_default_context(cafile=str(self._authority.files.certificate))
        context.load_cert_chain(admin.certificate, admin.key)
        return answers(f"{self._settings.server}/readyz", context)
