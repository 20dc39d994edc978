"""Fixtures of the e2e tier: a node that runs containers, and the project's images on it (see tests/cluster).

The images' layers, the registry and the node's store are kept between runs; the cluster too with FINETUNE_KEEP_CLUSTER=1.
"""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.charts import Helm
from api.operators import CHART
from cluster import images
from cluster.cluster import Cluster
from cluster.commands import run
from cluster.fixtures import namespace as new_namespace
from cluster.fixtures import session_cluster
from cluster.model import TINY_LLAMA, model_path
from cluster.registry import PushedImage, publish
from shell import registries

from . import rows
from .traces import traces
from .workbench import Workbench

SYSTEM = "finetune-system"
RELEASE = "finetune-operator"
BUCKET = "e2e"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One cluster for each worker: node `node-0` with eight GPUs that are only counted. It leaves nothing."""
    with session_cluster("e2e-tests", "full") as found:
        yield found
    settings = found.settings
    if Cluster.attach(settings.name) is None:
        assert traces(settings.name) == []
        routes = run("ip", "-4", "route")
        gone = settings.host_address, settings.pod_network, settings.service_network
        assert not [each for each in gone if each in routes]


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of this test alone, under the restricted pod security profile."""
    with new_namespace(cluster, f"test-{secrets.token_hex(4)}") as name:
        yield name


def _published(cluster: Cluster, image: images.Image) -> PushedImage:
    pushed = publish(image)
    cluster.pull(pushed)
    return pushed


@pytest.fixture(scope="session")
def operator_image(cluster: Cluster) -> PushedImage:
    """The operator's image, built from the working tree and pulled."""
    return _published(cluster, images.OPERATOR)


@pytest.fixture(scope="session")
def trainer_image(cluster: Cluster) -> PushedImage:
    """The trainer's image, built from the working tree and pulled: minutes the first time, seconds after."""
    return _published(cluster, images.TRAINER)


@pytest.fixture(scope="session")
def operator(
    cluster: Cluster, operator_image: PushedImage, trainer_image: PushedImage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The operator, installed by the chart as the README says."""
    helm = Helm(tmp_path_factory.mktemp("helm"), cluster)
    images_given = f"image.reference={operator_image.reference},trainer.image={trainer_image.reference}"
    helm(
        *("upgrade", "--install", RELEASE, CHART, "-n", SYSTEM, "--create-namespace", "--set", images_given),
        *("--take-ownership", "--force-conflicts", "--wait", "--timeout=3m"),
    )
    yield
    helm("uninstall", RELEASE, "-n", SYSTEM, "--ignore-not-found", "--wait")


@pytest.fixture(scope="session")
def workbench(cluster: Cluster, operator: None, trainer_image: PushedImage) -> Iterator[Workbench]:
    """One namespace with a claim, the tiny model and data, for all tests of a session; each names its jobs."""
    with new_namespace(cluster, f"work-{secrets.token_hex(3)}") as name:
        bench = Workbench(cluster, name, trainer_image.reference)
        data = {
            "train.jsonl": rows.chat(),
            "preferences.jsonl": rows.preferences(),
            "questions.jsonl": rows.questions(),
        }
        bench.prepare(model_path(TINY_LLAMA), data)
        yield bench


@pytest.fixture(scope="session")
def s3(workbench: Workbench, cluster: Cluster) -> dict[str, str]:
    """A bucket with rows in it, and the Secret `s3` that opens it."""
    store = cluster.s3
    store.start()
    data: Path = store.create_bucket(BUCKET) / "data"
    data.mkdir(exist_ok=True)
    (data / "train-1.jsonl").write_text(rows.labelled())
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s3"},
        "stringData": {"AWS_ACCESS_KEY_ID": store.access_key, "AWS_SECRET_ACCESS_KEY": store.secret_key},
    }
    workbench.kubectl("apply", "-f", "-", stdin=json.dumps(secret))
    return {"endpoint": store.endpoint, "bucket": BUCKET, "secret": store.secret_key}


@pytest.fixture(scope="session")
def models(
    workbench: Workbench, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[registries.RealRegistry]:
    """A registry behind a password, for what is published, and the Secret `models` that opens it."""
    registry = registries.with_password(tmp_path_factory.mktemp("models") / "registry", cluster.settings.host_address)
    try:
        account = f"--docker-username={registries.USER}", f"--docker-password={registries.PASSWORD}"
        workbench.kubectl("create", "secret", "docker-registry", "models", f"--docker-server={registry.host}", *account)
        yield registry
    finally:
        registry.process.stop()
