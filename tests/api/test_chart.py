"""What the chart renders, without a cluster."""

import json
import re

import pytest
import yaml

from finetune_crds import schema
from finetune_operator.kube import __doc__ as rights_table
from finetune_operator.metrics import Metrics
from finetune_operator.settings import Settings

from .charts import FULL_VALUES, IMAGES, Helm, HelmError, environment, one
from .jobs import Json
from .operators import CHART


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(tmp_path_factory.mktemp("helm"))


@pytest.mark.parametrize("values", [(), ("--values", FULL_VALUES)], ids=["defaults", "everything"])
def test_lint(helm: Helm, values: tuple[object, ...]) -> None:
    helm("lint", "--strict", CHART, *values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ((), "image.reference is needed: the operator's image"),
        (("--set", "image.reference=a"), "trainer.image is needed: the trainer's image"),
        ((*IMAGES, "--set", "replica=3"), "additional properties 'replica' not allowed"),
        ((*IMAGES, "--set", "logLevel=info"), "value must be one of 'DEBUG', 'INFO', 'WARNING', 'ERROR'"),
        ((*IMAGES, "--set", "progress.port=443"), "minimum: got 443, want 1,024"),
        ((*IMAGES, "--set", "watchNamespaces={Team A}"), "does not match pattern"),
    ],
    ids=["no image", "no trainer", "misspelt", "log level", "privileged port", "namespace"],
)
def test_wrong_values_are_refused(helm: Helm, values: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(HelmError) as refused:
        helm.template(*values)
    assert sentence in str(refused.value)


def test_every_value_is_in_the_schema_and_the_other_way_round() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    described = yaml.safe_load((CHART / "values.schema.json").read_text())["properties"]
    assert set(values) == set(described) - {"global"}
    for name, value in values.items():
        properties = described[name].get("properties")
        if properties:
            assert set(value) == set(properties), name


def test_crd_is_the_generated_one_and_stays_at_uninstall(helm: Helm) -> None:
    crd = one(helm.template(*IMAGES), "CustomResourceDefinition")
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert crd == schema.crd()
    without = helm.template(*IMAGES, "--set", "crds.install=false")
    assert not [each for each in without if each["kind"] == "CustomResourceDefinition"]


def test_variables_are_options_of_the_operator(helm: Helm) -> None:
    deployment = one(helm.template("--values", FULL_VALUES), "Deployment")
    options = {f"FINETUNE_{name.upper()}" for name in Settings.__dataclass_fields__}
    assert set(environment(deployment)) <= options
    given = {k: v for k, v in environment(deployment).items() if isinstance(v, str)}
    assert given["FINETUNE_WATCH_NAMESPACES"] == "team-a,team-b"
    assert given["FINETUNE_PROGRESS_HOST"] == "finetune-operator-progress.finetune-system.svc"


def test_pod_is_confined(helm: Helm) -> None:
    pod = one(helm.template(*IMAGES), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    assert ports["health"] == Settings.__dataclass_fields__["liveness_port"].default


def test_selectors_find_the_operators_pods(helm: Helm) -> None:
    documents = helm.template("--values", FULL_VALUES)
    labels = one(documents, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors: list[Json] = [each["spec"]["selector"] for each in documents if each["kind"] == "Service"]
    selectors += [
        one(documents, kind)["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")
    ]
    selectors.append(one(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"])
    for selector in selectors:
        assert selector.items() <= labels.items()
    monitored = one(documents, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    matching = [d for d in documents if d["kind"] == "Service" and monitored.items() <= d["metadata"]["labels"].items()]
    assert [service["metadata"]["name"] for service in matching] == ["finetune-operator-metrics"]


def rules(role: Json) -> set[tuple[str, str, str]]:
    """(group, resource, verb) of each rule."""
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_rights_in_watched_namespaces_are_those_of_the_whole_cluster(helm: Helm) -> None:
    whole, some = helm.template(*IMAGES), helm.template("--values", FULL_VALUES)
    name = "finetune-operator.finetune-system"
    everywhere = rules(one(whole, "ClusterRole", name))
    cluster_wide = rules(one(some, "ClusterRole", name))
    assert cluster_wide == {("authentication.k8s.io", "tokenreviews", "create"), ("", "nodes", "get")}
    namespaced = [d for d in some if d["kind"] == "Role" and d["metadata"]["name"] == name]
    assert [role["metadata"]["namespace"] for role in namespaced] == ["team-a", "team-b"]
    for role in namespaced:
        assert rules(role) | cluster_wide == everywhere


def test_no_right_reaches_secrets_logs_or_shells_of_users(helm: Helm) -> None:
    granted = rules(one(helm.template(*IMAGES), "ClusterRole", "finetune-operator.finetune-system"))
    assert not {resource for _, resource, _ in granted} & {"secrets", "pods/log", "pods/exec", "*"}
    assert "*" not in {verb for _, _, verb in granted}


def test_rights_are_those_that_the_client_says_it_uses(helm: Helm) -> None:
    """The table in kube.py's docstring is what reviewers read."""
    documents = helm.template(*IMAGES)
    granted = rules(one(documents, "ClusterRole", "finetune-operator.finetune-system"))
    granted |= rules(one(documents, "Role", "finetune-operator"))
    documented = set()
    for line in (rights_table or "").partition("Rights that the operator uses")[2].splitlines()[1:]:
        group, _, rest = line.strip().partition(" ")
        resources, _, verbs = rest.strip().partition("  ")
        for resource in resources.split(", "):
            words = verbs.partition("(")[0].split()
            documented |= {(_GROUPS.get(group, group), resource.strip(), verb) for verb in words}
    assert documented == granted


_GROUPS = {
    "core": "",
    "authentication": "authentication.k8s.io",
    "coordination": "coordination.k8s.io",
}


def test_alerts_and_dashboard_ask_for_metrics_that_exist(helm: Helm) -> None:
    documents = helm.template("--values", FULL_VALUES)
    groups = one(documents, "PrometheusRule")["spec"]["groups"]
    dashboard = json.loads(one(documents, "ConfigMap", "finetune-operator-dashboard")["data"]["finetune.json"])
    questions: list[str] = [rule["expr"] for group in groups for rule in group["rules"]]
    questions += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for question in questions for name in re.findall(r"finetune_\w+", question)}
    known: set[str] = set()
    for family in Metrics().registry.collect():
        suffixes: dict[str, tuple[str, ...]] = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        known |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    assert asked <= known
    assert len(asked) > 8


def test_names_of_two_releases_do_not_meet(helm: Helm) -> None:
    """The user-facing roles and the CRD are shared; `rbac.userRoles` and `crds.install` switch them off for the second."""
    off = (*IMAGES, "--set", "rbac.userRoles=false,crds.install=false")
    first, second = (
        {
            (d["kind"], d["metadata"]["name"])
            for d in helm.template(*off, namespace=n)
            if "namespace" not in d["metadata"]
        }
        for n in ("one", "two")
    )
    assert first
    assert not first & second


def test_notes_tell_what_was_installed(helm: Helm) -> None:
    notes = helm(
        "install", "x", CHART, "--dry-run=client", "-n", "team", *IMAGES, "--set", "policy.enabled=false,replicas=1"
    )
    assert "The policy is off" in notes
    assert "With fewer than two replicas" in notes
