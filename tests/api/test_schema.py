"""What the API server itself refuses, in a sentence that names the field and the fix; and what may be edited when."""

import json
from pathlib import Path

import pytest
import yaml

from cluster.cluster import Cluster, Refused
from finetune_crds.schema import reachable
from finetune_crds.v1alpha1 import OUTCOME_FIELDS
from finetune_crds.v1alpha1 import FineTuneJob as FineTuneJobModel
from finetune_crds.validation import InvalidJob, check
from manifests import MALFORMED, NAMES, Malformed, manifest

from .jobs import FineTuneJob, Json
from .operators import Operator

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
SENTENCES = {
    rule.message
    for model in reachable(FineTuneJobModel).values()
    for rule in (*model.rules, *getattr(model, "cluster_rules", ()))
}
"""Of all rules."""
NAME_SENTENCE = (
    "metadata.name must start with a letter, hold only lower-case letters, digits and -, and have at most 40 characters"
)
FROZEN_SENTENCE = "training has begun, and what decides its outcome"


def refusal(cluster: Cluster, body: Json) -> str:
    """What the API server says to a manifest that must not pass."""
    with pytest.raises(Refused) as refused:
        cluster.api.create("finetunejobs", body, "default", dry_run=True)
    return str(refused.value)


def rules_in(text: str) -> set[str]:
    """Sentences of rules that stand in a text."""
    return {sentence for sentence in SENTENCES if sentence in text}


@pytest.mark.parametrize("wrong", MALFORMED, ids=NAMES)
def test_malformed_manifest_is_refused(installed_cluster: Cluster, wrong: Malformed) -> None:
    """In the sentences of `finetune local`, all of them and no others."""
    body = manifest(**wrong.spec)
    said = refusal(installed_cluster, body)
    assert (wrong.server or wrong.sentence) in said
    with pytest.raises(InvalidJob) as refused:
        check(body, cluster=True)
    assert rules_in(said) == rules_in(str(refused.value))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_taken(installed_cluster: Cluster, file: Path) -> None:
    for body in yaml.safe_load_all(file.read_text()):
        installed_cluster.api.create(f"{body['kind'].lower()}s", body, "default", dry_run=True)


@pytest.mark.parametrize("name", ["x" * 41, "1st", "a.b"], ids=["41 characters", "digit first", "dotted"])
def test_name_that_breaks_host_names_is_refused(installed_cluster: Cluster, name: str) -> None:
    body = manifest()
    body["metadata"]["name"] = name
    assert NAME_SENTENCE in refusal(installed_cluster, body)


def test_smallest_manifest_is_taken_client_side_and_server_side_and_is_stored_as_written(
    installed_cluster: Cluster, namespace: str
) -> None:
    cluster, body = installed_cluster, manifest(preflight="Skip")
    body["metadata"]["namespace"] = namespace
    text = json.dumps(body)
    assert "created" in cluster.kubectl("apply", "-f", "-", stdin=text)
    assert "unchanged" in cluster.kubectl("apply", "-f", "-", stdin=text)
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=text)
    stored = cluster.api.get("finetunejobs", "support-bot", namespace)
    assert stored["spec"] == body["spec"], "no default in the schema: what is in git is what is in the cluster"
    assert stored["metadata"]["generation"] == 1


def test_kubectl_explains_each_field_and_prints_what_people_look_for(
    installed_cluster: Cluster, namespace: str
) -> None:
    explained = installed_cluster.kubectl("explain", "finetunejob.spec.method.lora")
    assert "Scale: the update is multiplied by alpha / rank. Default twice the rank." in " ".join(explained.split())
    installed_cluster.api.create("finetunejobs", _in(namespace, manifest()), namespace)
    header = installed_cluster.kubectl("get", "ftj", "-n", namespace).splitlines()[0].split()
    assert header == ["NAME", "PHASE", "PROGRESS", "LOSS", "GPUS", "AGE"]
    assert "support-bot" in installed_cluster.kubectl("get", "all", "-n", namespace)


OUTCOME_EDITS: dict[str, Json] = {
    "task": {"task": "text-generation"},
    "model": {"model": {"uri": "hf://example/other"}},
    "dataset": {"dataset": {"train": [{"uri": "s3://bucket/other.jsonl"}]}},
    "objective": {"objective": {"sft": {"lossOn": "all"}}},
    "method, another value": {"method": {"lora": {"rank": 32}}},
    "method, removed": {"method": None},
    "training, removed inside": {"training": {"seed": None}},
    "training, added inside": {"training": {"epochs": "1"}},
    "evaluation": {"evaluation": {"publish": "last"}},
    "output": {"output": {"uri": "s3://bucket/elsewhere"}},
    "runtime.image": {"runtime": {"image": "other"}},
}
OTHER_EDITS: dict[str, Json] = {
    "resources": {"resources": {"memory": "64Gi"}},
    "retries": {"retries": 1},
    "preflight": {"preflight": "Required"},
    "activeDeadlineSeconds": {"activeDeadlineSeconds": 100_000},
    "cleanup": {"cleanup": {"afterSeconds": 600}},
    "runtime.annotations": {"runtime": {"annotations": {"a": "b"}}},
}


def edit(cluster: Cluster, job: FineTuneJob, spec: Json) -> str:
    """Merges into a job's spec; the refusal, or nothing."""
    try:
        job.edit(cluster, **spec)
    except Refused as error:
        return str(error)
    return ""


@pytest.mark.usefixtures("operator")
class TestEditing:
    """Fields that decide the outcome: free until training first starts, frozen then, free again after Failed."""

    def test_before_training_anything_can_be_edited(self, installed_cluster: Cluster, namespace: str) -> None:
        selector = {"nodeSelector": {"gpu": "not-there"}}
        job = FineTuneJob("waiting", namespace).holds().having(resources=selector).apply(installed_cluster)
        job.wait(installed_cluster, "Waiting")
        for what, spec in {**OUTCOME_EDITS, **OTHER_EDITS}.items():
            assert edit(installed_cluster, job, spec) == "", what

    def test_while_training_only_what_does_not_decide_the_outcome(
        self, installed_cluster: Cluster, namespace: str
    ) -> None:
        job = FineTuneJob("frozen", namespace).holds()
        job.having(method={"lora": {"rank": 16}}, training={"seed": 1}).apply(installed_cluster)
        job.wait(installed_cluster, "SpecFrozen")
        for what, spec in OUTCOME_EDITS.items():
            assert FROZEN_SENTENCE in edit(installed_cluster, job, spec), what
        assert job.read(installed_cluster)["metadata"]["generation"] == 1
        assert edit(installed_cluster, job, {"cleanup": {"afterSeconds": 600}}) == ""
        assert edit(installed_cluster, job, {"suspend": True}) == ""
        job.wait(installed_cluster, "Suspended")
        for what, spec in OTHER_EDITS.items():
            assert edit(installed_cluster, job, spec) == "", f"suspended: {what}"
        assert FROZEN_SENTENCE in edit(installed_cluster, job, OUTCOME_EDITS["model"]), "a suspended job goes on later"

    def test_removing_and_adding_again_is_no_way_around(self, installed_cluster: Cluster, namespace: str) -> None:
        """A rule on the optional field itself would never see both values."""
        job = FineTuneJob("around", namespace).holds().having(training={"seed": 1}).apply(installed_cluster)
        job.wait(installed_cluster, "SpecFrozen")
        assert FROZEN_SENTENCE in edit(installed_cluster, job, {"training": None})
        assert FROZEN_SENTENCE in edit(installed_cluster, job, {"training": {"seed": 2}})
        assert job.read(installed_cluster)["spec"]["training"] == {"seed": 1}

    def test_after_failed_it_is_mended_and_runs(self, installed_cluster: Cluster, namespace: str) -> None:
        job = FineTuneJob("mended", namespace).exits(65).apply(installed_cluster)
        job.wait(installed_cluster, "Failed")
        job.finishes().having(dataset={"train": [{"uri": "s3://bucket/right.jsonl"}]}).apply(installed_cluster)
        status = job.wait(installed_cluster, "Complete")
        assert [attempt["outcome"] for attempt in status["attempts"]] == ["Failed", "Finished"]
        assert FROZEN_SENTENCE in edit(installed_cluster, job, OUTCOME_EDITS["model"]), (
            "what is complete stays as it is"
        )


def test_every_field_that_decides_the_outcome_is_in_the_table() -> None:
    covered = {name.partition(",")[0] for name in OUTCOME_EDITS} | {"runtime.command", "runtime.args"}
    assert covered == set(OUTCOME_FIELDS), "command and args take another manifest: see below"


@pytest.mark.parametrize("spec", [{"command": ["other"]}, {"args": ["--more"]}, {"args": None}], ids=str)
def test_program_is_frozen_too(installed_cluster: Cluster, namespace: str, operator: Operator, spec: Json) -> None:
    runtime = {"image": "own", "command": ["train"], "args": ["--fast"]}
    job = FineTuneJob("program", namespace).holds()
    job.body["spec"] = {"runtime": runtime | {"annotations": job.annotations}}
    job.apply(installed_cluster).wait(installed_cluster, "SpecFrozen")
    assert FROZEN_SENTENCE in edit(installed_cluster, job, {"runtime": spec})


def _in(namespace: str, body: Json) -> Json:
    return {**body, "metadata": {**body["metadata"], "namespace": namespace}}
