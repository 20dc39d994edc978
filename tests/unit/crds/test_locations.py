"""URIs taken apart."""

import pytest

from finetune_crds.locations import Place, checkpoint_storage, inputs, outputs, parse
from finetune_crds.v1alpha1 import FineTuneJob, Location
from manifests import manifest


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("pvc://models/a/b", Place("pvc", "models", "a/b")),
        ("pvc://models", Place("pvc", "models", "")),
        ("s3://bucket/prefix/", Place("s3", "bucket", "prefix")),
        ("https://host/a.jsonl", Place("https", "host", "a.jsonl")),
        ("https://host/a.jsonl?signature=a/*", Place("https", "host", "a.jsonl")),
        ("hf://org/name@abc123", Place("hf", "org/name", "", "abc123")),
        ("hf://org/name", Place("hf", "org/name", "")),
        ("hf://org/data/train.jsonl@main", Place("hf", "org/data", "train.jsonl", "main")),
        ("configmap://name/key.jsonl", Place("configmap", "name", "key.jsonl")),
        ("oci://registry:5000/team/bot:v1", Place("oci", "registry:5000", "team/bot", "v1")),
        ("oci://registry/bot@sha256:0f", Place("oci", "registry", "bot", "sha256:0f")),
        ("oci://registry/bot:v1@sha256:0f", Place("oci", "registry", "bot", "sha256:0f")),
        ("file:///data/x", Place("file", "", "/data/x")),
    ],
)
def test_parse(uri: str, place: Place) -> None:
    assert parse(uri) == place


@pytest.mark.parametrize("uri", ["models/a", "gs://bucket/x", "hf://name", "pvc://"])
def test_what_is_no_location_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"location|organisation"):
        parse(uri)


def test_every_location_of_a_spec_is_found() -> None:
    spec = FineTuneJob.model_validate(
        manifest(
            model={"uri": "pvc://m/base", "adapter": {"uri": "pvc://m/adapter"}},
            dataset={
                "train": [{"uri": "s3://b/1"}, {"uri": "s3://b/2"}],
                "evaluation": {"sources": [{"uri": "s3://b/e"}]},
            },
            checkpoints={"storage": {"uri": "pvc://c/x"}},
        )
    ).spec
    assert [path for path, _ in inputs(spec)] == [
        "model",
        "model.adapter",
        "dataset.train[0]",
        "dataset.train[1]",
        "dataset.evaluation.sources[0]",
    ]
    assert [path for path, _ in outputs(spec)] == ["output", "checkpoints.storage"]


def test_checkpoints_lie_beside_the_output_with_its_credentials() -> None:
    output = Location(uri="s3://b/out/", endpoint="http://minio:9000")
    storage = checkpoint_storage(output)
    assert storage is not None
    assert storage.uri == "s3://b/out.checkpoints"
    assert storage.endpoint == "http://minio:9000"
    assert checkpoint_storage(Location(uri="oci://registry/bot:v1")) is None
