"""Files of several documents, and sentences for those that are none."""

import copy
from pathlib import Path

import pytest

from finetune_trainer.errors import UserError
from finetune_trainer.local.manifests import load
from finetune_trainer.local.run import Options, adapt

EXAMPLES = Path(__file__).parents[3] / "examples"

JOB = "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: NAME}\nspec: {}\n"
DATA = "kind: ConfigMap\nmetadata: {name: rows}\ndata: {a.jsonl: '{}'}\nbinaryData: {b.zst: KLUv}\n"


def written(folder: Path, *documents: str) -> Path:
    file = folder / "job.yaml"
    file.write_text("---\n".join(documents))
    return file


def test_job_and_configmaps_are_found_among_other_objects(tmp_path: Path) -> None:
    file = written(tmp_path, JOB.replace("NAME", "one"), "", DATA, "kind: Namespace\nmetadata: {name: ml}\n")
    found = load([file])
    assert found.job["metadata"]["name"] == "one"
    assert found.configmaps == {"rows": {"a.jsonl": b"{}", "b.zst": b"(\xb5/"}}


def test_another_place_changes_nothing_else_of_model_and_output(tmp_path: Path) -> None:
    job = load([EXAMPLES / "added-tokens.yaml"]).job
    job["spec"]["model"] |= {"secretRef": {"name": "hub"}, "endpoint": "https://mirror.example"}
    job["spec"]["output"] |= {"uri": "s3://bucket/out", "region": "eu-1", "secretRef": {"name": "store"}}
    before = copy.deepcopy(job)
    adapted, _ = adapt(job, Options(model=tmp_path, output=tmp_path / "out"))
    assert adapted["spec"]["model"] == {"uri": f"file://{tmp_path}", "addTokens": job["spec"]["model"]["addTokens"]}
    assert adapted["spec"]["output"] == {"uri": f"file://{tmp_path}/out", "merged": True}
    adapted, _ = adapt(job | {"spec": job["spec"] | {"model": {"job": "first"}}}, Options(model=tmp_path))
    assert adapted["spec"]["model"] == {"uri": f"file://{tmp_path}"}
    assert job == before


def test_configmaps_may_lie_in_a_file_beside(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    files = [written(tmp_path, JOB), written(tmp_path / "data", DATA)]
    assert set(load(files).configmaps) == {"rows"}


def test_one_of_several_jobs_is_chosen_by_name(tmp_path: Path) -> None:
    file = written(tmp_path, JOB.replace("NAME", "one"), JOB.replace("NAME", "two"))
    assert load([file], "two").job["metadata"]["name"] == "two"
    with pytest.raises(UserError, match="holds 2 FineTuneJobs; choose one by --name: one, two"):
        load([file])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "there is no FineTuneJob in it"),
        ("a: [1\nb: 2", "line 2: is no YAML"),
        ("- a", "holds something that is no Kubernetes object"),
        (JOB.replace("v1alpha1", "v9"), "must be finetune.dev/v1alpha1"),
    ],
)
def test_a_wrong_file_is_told_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UserError, match=sentence) as caught:
        load([file])
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.yaml: cannot be read \(No such file"):
        load([tmp_path / "absent.yaml"])
