"""The client against a real API server: every error by its type, pages, watches, preconditions, both kinds of credentials."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cluster import Cluster
from cluster.ports import free_ports
from finetune_operator import kube as module
from finetune_operator.credentials import Credentials
from finetune_operator.kube import (
    CONFIGMAPS,
    FINETUNEJOBS,
    SECRETS,
    AlreadyExists,
    ApiError,
    BadRequest,
    Conflict,
    Forbidden,
    Invalid,
    Kube,
    NotFound,
    Unauthorized,
    Unreachable,
)

from .operators import NAMESPACE

Json = dict[str, Any]


@pytest.fixture
async def kube(installed_cluster: Cluster) -> AsyncIterator[Kube]:
    client = Kube(Credentials(str(installed_cluster.kubeconfig)), identity="test")
    yield client
    await client.close()


def test_an_operator_that_cannot_ask_the_api_server_as_it_starts_exits_and_says_so(log_folder: Path) -> None:
    """Its pod is restarted then; one that stayed would hold its ports and never serve."""
    nowhere = {
        "clusters": [{"name": "it", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "it", "user": {"token": "none"}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "current-context": "it",
    }
    config = log_folder / "config"
    config.write_text(yaml.safe_dump(nowhere))
    ports = [
        f"--{name}-port={port}" for name, port in zip(("metrics", "progress", "liveness"), free_ports(3), strict=True)
    ]
    command = [sys.executable, "-m", "finetune_operator", "--trainer-image=unused", f"--kubeconfig={config}", *ports]
    ended = subprocess.run([*command, "--progress-host=127.0.0.1"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "exiting: cannot start: " in ended.stderr
    assert "Traceback" not in ended.stderr


def _config_map(name: str, **data: str) -> Json:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


async def _twice(kube: Kube, namespace: str) -> None:
    await kube.create(CONFIGMAPS(namespace), _config_map("same"))
    await kube.create(CONFIGMAPS(namespace), _config_map("same"))


async def _stale(kube: Kube, namespace: str) -> None:
    old = await kube.create(CONFIGMAPS(namespace), _config_map("old"))
    await kube.patch(CONFIGMAPS(namespace, "old"), {"data": {"a": "b"}})
    await kube.update(CONFIGMAPS(namespace, "old"), old)


async def _deleted_by_another_uid(kube: Kube, namespace: str) -> None:
    await kube.create(CONFIGMAPS(namespace), _config_map("kept"))
    await kube.delete(CONFIGMAPS(namespace, "kept"), uid="another")


@pytest.mark.parametrize(
    ("request_", "error", "said"),
    [
        pytest.param(lambda k, n: k.get(CONFIGMAPS(n, "none")), NotFound, '"none" not found', id="404"),
        pytest.param(_twice, AlreadyExists, '"same" already exists', id="409 exists"),
        pytest.param(_stale, Conflict, "has been modified", id="409 version"),
        pytest.param(_deleted_by_another_uid, Conflict, "UID in the precondition", id="409 uid"),
        pytest.param(lambda k, n: k.create(FINETUNEJOBS(n), {"metadata": {"name": "x"}}), BadRequest, "Kind", id="400"),
        pytest.param(lambda k, n: k.create(CONFIGMAPS(n), _config_map("Not A Name")), Invalid, "RFC 1123", id="422"),
    ],
)
async def test_errors_have_types_and_the_servers_words(
    kube: Kube,
    namespace: str,
    request_: Callable[[Kube, str], Coroutine[Any, Any, Any]],
    error: type[ApiError],
    said: str,
) -> None:
    with pytest.raises(error, match=said) as caught:
        await request_(kube, namespace)
    assert type(caught.value) is error


async def test_deleting_what_is_gone_is_fine(kube: Kube, namespace: str) -> None:
    await kube.delete(CONFIGMAPS(namespace, "none"))


async def test_rights_and_credentials(installed_cluster: Cluster, tmp_path: Path) -> None:
    """A service account's token from a kubeconfig: what it may not do is Forbidden, a wrong one is Unauthorized."""
    admin = yaml.safe_load(installed_cluster.kubeconfig.read_text())
    right = installed_cluster.kubectl("create", "token", "finetune-operator", "-n", NAMESPACE).strip()
    for token, error in ((right, Forbidden), ("wrong", Unauthorized)):
        file = tmp_path / f"{error.__name__}.yaml"
        file.write_text(yaml.safe_dump({**admin, "users": [{**admin["users"][0], "user": {"token": token}}]}))
        client = Kube(Credentials(str(file)))
        with pytest.raises(error):
            await client.get(SECRETS("kube-system", "any"))
        await client.close()


async def test_an_absent_server_is_unreachable(kube: Kube, installed_cluster: Cluster, tmp_path: Path) -> None:
    config = yaml.safe_load(installed_cluster.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    seen: list[tuple[str, str, int]] = []
    client = Kube(Credentials(str(tmp_path / "config")), observer=lambda v, r, c, s: seen.append((v, r, c)))
    with pytest.raises(Unreachable):
        await client.get(CONFIGMAPS("default", "x"))
    assert seen == [("get", "configmaps", 0)]
    await client.close()


async def test_lists_go_page_by_page(kube: Kube, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 2)
    for number in range(5):
        body = _config_map(f"listed-{number}")
        body["metadata"]["labels"] = {"listed": "yes"}
        await kube.create(CONFIGMAPS(namespace), body)
    pages = [page async for page in kube.pages(CONFIGMAPS(namespace), labels="listed")]
    assert [len(page["items"]) for page in pages] == [2, 2, 1]
    assert len({page["metadata"]["resourceVersion"] for page in pages}) == 1
    found = [each["metadata"]["name"] async for each in kube.list(CONFIGMAPS(namespace), labels="listed")]
    assert found == [f"listed-{number}" for number in range(5)]


async def test_a_watch_tells_what_comes_after_its_version(kube: Kube, namespace: str) -> None:
    (page,) = [page async for page in kube.pages(CONFIGMAPS(namespace), labels="watched")]
    events: list[tuple[str, str]] = []

    async def watch() -> None:
        version = page["metadata"]["resourceVersion"]
        async for event in kube.watch(CONFIGMAPS(namespace), version=version, labels="watched"):
            events.append((event["type"], event["object"]["metadata"]["name"]))

    task = asyncio.create_task(watch())
    big = _config_map("big", text="ö" * 200_000)  # arrives in many pieces
    for body in (big, _config_map("unlabelled")):
        if body is big:
            body["metadata"]["labels"] = {"watched": "yes"}
        await kube.create(CONFIGMAPS(namespace), body)
    await kube.patch(CONFIGMAPS(namespace, "big"), {"data": {"more": "x"}})
    await kube.delete(CONFIGMAPS(namespace, "big"))
    async with asyncio.timeout(10):
        while len(events) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert events == [("ADDED", "big"), ("MODIFIED", "big"), ("DELETED", "big")]
