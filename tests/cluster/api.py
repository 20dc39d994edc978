"""The API server from this process. kubectl takes a tenth of a second of a core to start, and waiting starts it again and again.

    cluster.api.create("configmaps", body, "team")
    cluster.api.list("jobs,pods", "team", labels="finetune.dev/job=a")

What a user does with kubectl, tests do with kubectl.
"""

import http.client
import json
import ssl
import threading
import urllib.parse
from collections.abc import Mapping
from typing import Any

from .errors import Refused
from .pki import Authority
from .settings import Settings

Json = dict[str, Any]

_PLACES = {
    "api/v1": "configmaps events namespaces nodes persistentvolumeclaims pods resourcequotas secrets serviceaccounts services",
    "apis/apps/v1": "deployments",
    "apis/batch/v1": "jobs",
    "apis/discovery.k8s.io/v1": "endpointslices",
    "apis/events.k8s.io/v1": "events.events.k8s.io",
    "apis/finetune.dev/v1alpha1": "finetunejobs",
    "apis/rbac.authorization.k8s.io/v1": "clusterroles rolebindings roles",
}
_PLACE_OF = {kind: place for place, kinds in _PLACES.items() for kind in kinds.split()}
_MANAGER = "user"
_PATCHES = {"merge": "application/merge-patch+json", "apply": "application/apply-patch+yaml"}


class Api:
    """Requests as administrator, or as whom `impersonate` says. Each thread has a connection of its own."""

    def __init__(self, settings: Settings, authority: Authority) -> None:
        self._settings = settings
        self._authority = authority
        self._local = threading.local()

    def get(self, kind: str, name: str, namespace: str = "") -> Json:
        return self._request("GET", _path(kind, namespace, name))

    def list(self, kinds: str, namespace: str = "", labels: str = "", fields: str = "") -> list[Json]:
        """Objects of several kinds, separated by commas, in this order; each has its kind."""
        found = []
        query = {key: value for key, value in (("labelSelector", labels), ("fieldSelector", fields)) if value}
        for kind in kinds.split(","):
            answer = self._request("GET", _path(kind, namespace), query=query)
            common = {"apiVersion": answer["apiVersion"], "kind": answer["kind"].removesuffix("List")}
            found += [common | item for item in answer["items"]]
        return found

    def create(
        self, kind: str, body: Json, namespace: str = "", *, dry_run: bool = False, impersonate: str = ""
    ) -> Json:
        """As `kubectl create`: unknown fields are refused."""
        query = {"fieldValidation": "Strict", "fieldManager": _MANAGER} | ({"dryRun": "All"} if dry_run else {})
        who = {"Impersonate-User": impersonate, "Impersonate-Group": "system:authenticated"} if impersonate else {}
        return self._request("POST", _path(kind, namespace), body, query, who)

    def apply(self, kind: str, body: Json) -> Json:
        """As `kubectl apply --server-side --force-conflicts`: what the manifest no longer has is removed."""
        metadata = body["metadata"]
        return self._patch(
            _path(kind, metadata.get("namespace", ""), metadata["name"]),
            body,
            "apply",
            {"force": "true", "fieldValidation": "Strict"},
        )

    def patch(self, kind: str, name: str, body: Json, namespace: str = "") -> Json:
        """Merges into an object."""
        return self._patch(_path(kind, namespace, name), body, "merge", {})

    def delete(self, kind: str, name: str = "", namespace: str = "", propagation: str = "Background") -> None:
        """Deletes one object, or all of a kind in a namespace, and does not wait."""
        self._request("DELETE", _path(kind, namespace, name), {"propagationPolicy": propagation})

    def _patch(self, path: str, body: Json, how: str, query: dict[str, str]) -> Json:
        return self._request("PATCH", path, body, query | {"fieldManager": _MANAGER}, {"Content-Type": _PATCHES[how]})

    def _request(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Json:
        """One answer.

        Raises:
            Refused: what the server said.
            OSError: it does not answer.
        """
        target = f"{path}?{urllib.parse.urlencode(query)}" if query else path
        content = None if body is None else json.dumps(body)
        sent = {"Content-Type": "application/json", "Accept": "application/json", **(headers or {})}
        used = getattr(self._local, "connection", None)
        connection = used or self._connect()
        self._local.connection = None
        try:
            connection.request(method, target, content, sent)
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (http.client.HTTPException, OSError):
            connection.close()
            if used is None:
                raise
            return self._request(method, path, body, query, headers)  # the server has closed it meanwhile
        self._local.connection = connection
        if response.status >= 400:
            raise Refused(response.status, f"{method} {path}: {answer.get('message', '')}")
        return dict(answer)

    def _connect(self) -> http.client.HTTPSConnection:
        admin = self._authority.issue("admin", ["system:masters"])
        context = ssl.create_default_context(cafile=str(self._authority.files.certificate))
        context.load_cert_chain(admin.certificate, admin.key)
        address = urllib.parse.urlsplit(self._settings.server).netloc
        return http.client.HTTPSConnection(address, context=context, timeout=60)


def _path(kind: str, namespace: str, name: str = "") -> str:
    inside = f"namespaces/{namespace}/" if namespace else ""
    return f"/{_PLACE_OF[kind]}/{inside}{kind.partition('.')[0]}" + (f"/{name}" if name else "")
