"""How to reach the API server and as whom, found by the official client's loaders. kube.py and Kopf's login both use it.

Order: the kubeconfig that was named (argument or $KUBECONFIG), the pod's service account, ~/.kube/config.
"""

import os
import ssl
import time
from pathlib import Path
from typing import Final

import kopf
from kubernetes import config
from kubernetes.client.configuration import Configuration

TOKEN_SECONDS: Final = 10.0
"""Seconds after which the official client is asked again for the token, which it reads anew when that is due."""


class Credentials:
    """Server, certificates and token."""

    def __init__(self, kubeconfig: str | None = None) -> None:
        loaded = Configuration()
        named = kubeconfig or os.environ.get("KUBECONFIG")
        if named or "KUBERNETES_SERVICE_HOST" not in os.environ:
            config.load_kube_config(named, client_configuration=loaded)
        else:
            config.load_incluster_config(client_configuration=loaded)
        self._loaded = loaded
        self.server: str = loaded.host.rstrip("/")
        self.proxy: str | None = loaded.proxy
        self._authorization: str | None = None
        self._asked = -TOKEN_SECONDS

    def authorization(self) -> str | None:
        """Value of the Authorization header now; None with a client certificate."""
        now = time.monotonic()
        if now - self._asked >= TOKEN_SECONDS:
            self._authorization = self._loaded.get_api_key_with_prefix("BearerToken", alias="authorization")
            self._asked = now
        return self._authorization

    def ssl_context(self) -> ssl.SSLContext:
        """Trusts the cluster's CA and presents the client certificate, if there is one."""
        context = ssl.create_default_context(cafile=self._loaded.ssl_ca_cert)
        if not self._loaded.verify_ssl:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self._loaded.cert_file:
            context.load_cert_chain(self._loaded.cert_file, self._loaded.key_file)
        return context

    def for_kopf(self) -> kopf.ConnectionInfo:
        """The same for Kopf's own watches."""
        scheme, _, token = (self.authorization() or "").partition(" ")
        return kopf.ConnectionInfo(
            server=self.server,
            ca_path=_path(self._loaded.ssl_ca_cert),
            insecure=not self._loaded.verify_ssl,
            certificate_path=_path(self._loaded.cert_file),
            private_key_path=_path(self._loaded.key_file),
            scheme=scheme or None,
            token=token or None,
            proxy_url=self.proxy,
        )


def _path(name: str | None) -> Path | None:
    return Path(name) if name else None
