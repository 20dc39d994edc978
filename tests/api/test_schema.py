"""What the API server itself refuses, in a sentence that names the field and the fix; and what may be edited when."""

import json
from typing import Any

import pytest

from cluster.cluster import Cluster, Refused
from finetune_crds.v1alpha1 import OUTCOME_FIELDS
from finetune_crds.v1alpha1.methods import METHODS
from finetune_crds.validation import InvalidJob, check

from .jobs import FineTuneJob, Json
from .operators import Operator

SECRET = {"secretRef": {"name": "hub"}}
CLASSIFY: Json = {"task": "text-classification"}
BOTH = True
"""The same sentence comes from `finetune local`."""
SERVER = False
"""`finetune local` refuses it too, in the words of its own schema library."""

MALFORMED: dict[str, tuple[Json, str, bool]] = {
    "nothing to train": (
        {"model": None, "dataset": None, "output": None},
        "spec needs model, dataset and output (only a program of your own, runtime.command, may do without)",
        BOTH,
    ),
    "unknown scheme": (
        {"model": {"uri": "ftp://host/model"}},
        "uri must be pvc://claim/path, s3://bucket/prefix, https://host/path, hf://org/name@revision, oci://registry/repository:tag, configmap://name/key or, with 'finetune local', file:///path",
        BOTH,
    ),
    "climbing path": ({"model": {"uri": "pvc://models/../secrets"}}, "uri must not climb with '..'", BOTH),
    "password in a uri": (
        {"dataset": {"train": [{"uri": "https://me:word@host/rows.jsonl"}]}},
        "credentials do not belong in a uri: use secretRef",
        BOTH,
    ),
    "local path": (
        {"model": {"uri": "file:///data/model"}},
        "file:// works with 'finetune local' only: put the files on a claim and use pvc://claim/path",
        BOTH,
    ),
    "secret for a claim": (
        {"output": {"uri": "pvc://models/out", **SECRET}},
        "secretRef is for s3://, https://, hf:// and oci:// locations: a claim or ConfigMap needs no credentials",
        BOTH,
    ),
    "region of a hub": (
        {"model": {"uri": "hf://org/name", "region": "eu-west-1"}},
        "endpoint is for s3://, hf:// and oci:// locations and region for s3:// only: remove them from this uri",
        BOTH,
    ),
    "model in a ConfigMap": (
        {"model": {"uri": "configmap://model/weights"}},
        "a model does not fit into a ConfigMap: use pvc://, s3://, hf:// or oci://",
        BOTH,
    ),
    "output at the root of a claim": (
        {"output": {"uri": "pvc://models"}},
        "output.uri must be pvc://claim/path or s3://bucket/prefix, with a path of its own, oci://registry/repository:tag or hf://org/name@branch",
        BOTH,
    ),
    "image without a tag": (
        {"output": {"uri": "oci://registry/bot"}, "checkpoints": {"storage": {"uri": "pvc://work/bot"}}},
        "output.uri must be pvc://claim/path or s3://bucket/prefix, with a path of its own, oci://registry/repository:tag or hf://org/name@branch",
        BOTH,
    ),
    "image without a place for checkpoints": (
        {"output": {"uri": "oci://registry:5000/team/bot:v1"}},
        "checkpoints.storage is required with an oci:// or hf:// output, beside which no checkpoint can lie: pvc://claim/path or s3://bucket/prefix",
        BOTH,
    ),
    "rows in an image": (
        {"dataset": {"train": [{"uri": "oci://registry/rows:v1"}]}},
        "an image holds no training rows: use pvc://, s3://, hf://, https:// or configmap://",
        BOTH,
    ),
    "a split beside a pattern": (
        {"dataset": {"train": [{"uri": "hf://org/rows/*.csv", "split": "dev"}]}},
        "split and config choose among the files of a folder: remove them beside a * and for https://",
        BOTH,
    ),
    "checkpoints on the hub": (
        {"checkpoints": {"storage": {"uri": "hf://org/name"}}},
        "checkpoints.storage must be pvc://claim/path or s3://bucket/prefix",
        BOTH,
    ),
    "two methods": ({"method": {"full": {}, "lora": {}}}, f"method needs exactly one of: {', '.join(METHODS)}", BOTH),
    "no method": ({"method": {}}, f"method needs exactly one of: {', '.join(METHODS)}", BOTH),
    "nothing that is not frozen": (
        {"method": {"freeze": {}}},
        "method.freeze needs what is trained: trainLastBlocks, trainModules, trainHead or trainBiases",
        BOTH,
    ),
    "layers that never move": (
        {"method": {"full": {"layerDecay": "0"}}},
        "method.full.layerDecay must be above 0, or the blocks below the last would never move",
        BOTH,
    ),
    "two clocks of unfreezing": (
        {"method": {"gradualUnfreezing": {"everySteps": 5, "everyEpochs": "1"}}},
        "method.gradualUnfreezing needs exactly one of everySteps and everyEpochs: when the next blocks join",
        BOTH,
    ),
    "paged without a GPU": (
        {"training": {"optimizer": {"adamw": {"paged": True}}}, "resources": {"gpusPerNode": 0}},
        "training.optimizer.adamw.paged is for GPUs, and resources.gpusPerNode is 0: remove one of the two",
        BOTH,
    ),
    "three bits": ({"method": {"qlora": {"bits": 3}}}, "spec.method.qlora.bits", SERVER),
    "a prefix made in two ways": (
        {"method": {"prefix": {"projection": True, "initialText": "Answer briefly."}}},
        "method.prefix.initialText sets keys and values, which a projection makes itself: remove one of the two",
        BOTH,
    ),
    "epochs and steps": (
        {"training": {"epochs": "1", "maxSteps": 10}},
        "training takes epochs or maxSteps, not both",
        BOTH,
    ),
    "two batch sizes": (
        {"training": {"batchSize": 8, "tokensPerStep": 4096}},
        "training takes batchSize (sequences) or tokensPerStep, not both",
        BOTH,
    ),
    "a word for a number": ({"training": {"learningRate": "fast"}}, "spec.training.learningRate", SERVER),
    "a number for a decimal": ({"training": {"learningRate": 0.001}}, "spec.training.learningRate", SERVER),
    "misspelt field": ({"training": {"lerningRate": "1e-4"}}, 'unknown field "spec.training.lerningRate"', SERVER),
    "misspelt task": (
        {"task": "text-generatoin"},
        'spec.task: Unsupported value: "text-generatoin": supported values: "text-generation", "text-classification"',
        SERVER,
    ),
    "sequence of nothing": (
        {"training": {"sequenceLength": 0}},
        "spec.training.sequenceLength: Invalid value: 0: spec.training.sequenceLength in body should be greater than or equal to 8",
        SERVER,
    ),
    "no source": ({"dataset": {"train": []}}, "spec.dataset.train in body should have at least 1 items", SERVER),
    "half of the weights": (
        {"dataset": {"train": [{"uri": "pvc://d/a", "weight": "1"}, {"uri": "pvc://d/b"}]}},
        "either every source in dataset.train has a weight or none has",
        BOTH,
    ),
    "held out twice": (
        {
            "dataset": {
                "train": [{"uri": "pvc://d/a"}],
                "evaluation": {"fraction": "0.1", "sources": [{"uri": "pvc://d/b"}]},
            }
        },
        "dataset.evaluation takes fraction or sources, not both",
        BOTH,
    ),
    "evaluating on nothing": (
        {
            "evaluation": {"everySteps": 10},
            "dataset": {"train": [{"uri": "pvc://d/a"}], "evaluation": {"fraction": "0.0"}},
        },
        "evaluation.everySteps, gates and slices need held-out rows, and dataset.evaluation.fraction is 0: raise it",
        BOTH,
    ),
    "accuracy of text": (
        {"evaluation": {"metric": "eval_accuracy"}},
        "evaluation.metric eval_accuracy is for text-classification, token-classification",
        BOTH,
    ),
    "objective of a classifier": (
        {**CLASSIFY, "objective": {"sft": {}}},
        "objective.sft is for text-generation: remove it, or correct task",
        BOTH,
    ),
    "packing of a classifier": (
        {**CLASSIFY, "training": {"packing": True}},
        "training.packing is for text-generation: remove it",
        BOTH,
    ),
    "adapter under full fine-tuning": (
        {"model": {"uri": "hf://o/n", "adapter": {"uri": "pvc://a/b"}}, "method": {"full": {}}},
        "model.adapter continues a LoRA adapter: use method.lora or method.qlora",
        BOTH,
    ),
    "program without an image": (
        {"runtime": {"command": ["python"]}},
        "runtime.command needs runtime.image: the image that holds your program",
        BOTH,
    ),
    "preflight of a program": (
        {"runtime": {"image": "x", "command": ["python"]}, "preflight": "Required"},
        "preflight: Required checks what our trainer would do and knows nothing of a program of your own: remove it, or remove runtime.command",
        BOTH,
    ),
    "hyperparameters of a program": (
        {"runtime": {"image": "x", "command": ["python"]}, "training": {"seed": 1}},
        "task, objective, method, training and evaluation are read by our trainer only: remove them, or remove runtime.command",
        BOTH,
    ),
    "a variable of ours": (
        {"runtime": {"env": [{"name": "KUBEFLOW_TRAINER_SERVER_URL", "value": "https://elsewhere"}]}},
        "variables that start with FINETUNE_ or KUBEFLOW_TRAINER_SERVER_ are set by the operator",
        BOTH,
    ),
    "mount of no volume": (
        {"runtime": {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}},
        "each of runtime.volumeMounts must name a volume of runtime.volumes",
        BOTH,
    ),
    "root": (
        {"runtime": {"runAsUser": 0}},
        "spec.runtime.runAsUser in body should be greater than or equal to 1",
        SERVER,
    ),
}
NAME_SENTENCE = (
    "metadata.name must start with a letter, hold only lower-case letters, digits and -, and have at most 40 characters"
)
FROZEN_SENTENCE = "training has begun, and what decides its outcome"


def manifest(**spec: Any) -> Json:
    """The smallest job, with fields replaced or, by None, removed."""
    body = FineTuneJob("malformed", "default").body
    body["spec"].pop("runtime")
    fields = {**body["spec"], **spec}
    body["spec"] = {key: value for key, value in fields.items() if value is not None}
    return body


def refusal(cluster: Cluster, body: Json) -> str:
    """What the API server says to a manifest that must not pass."""
    with pytest.raises(Refused) as refused:
        cluster.api.create("finetunejobs", body, body["metadata"]["namespace"], dry_run=True)
    return str(refused.value)


@pytest.mark.parametrize(("spec", "sentence", "same_words"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_manifest_is_refused(installed_cluster: Cluster, spec: Json, sentence: str, same_words: bool) -> None:
    body = manifest(**spec)
    assert sentence in refusal(installed_cluster, body)
    with pytest.raises(InvalidJob) as refused:
        check(body, cluster=True)
    assert (sentence in str(refused.value)) or not same_words


@pytest.mark.parametrize("name", ["x" * 41, "1st", "a.b"], ids=["41 characters", "digit first", "dotted"])
def test_name_that_breaks_host_names_is_refused(installed_cluster: Cluster, name: str) -> None:
    body = manifest()
    body["metadata"]["name"] = name
    assert NAME_SENTENCE in refusal(installed_cluster, body)


def test_smallest_manifest_is_taken_client_side_and_server_side_and_is_stored_as_written(
    installed_cluster: Cluster, namespace: str
) -> None:
    cluster, body = installed_cluster, manifest()
    body["metadata"]["namespace"] = namespace
    text = json.dumps(body)
    assert "created" in cluster.kubectl("apply", "-f", "-", stdin=text)
    assert "unchanged" in cluster.kubectl("apply", "-f", "-", stdin=text)
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=text)
    stored = cluster.api.get("finetunejobs", "malformed", namespace)
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
    assert "malformed" in installed_cluster.kubectl("get", "all", "-n", namespace)


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
