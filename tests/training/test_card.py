"""The card of an output, as the hub reads it and as somebody would who wants the same model again."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from finetune_crds.resolution import learning_rate
from finetune_crds.resolved import ResolvedFineTune
from finetune_trainer import methods
from finetune_trainer.local.manifests import load
from finetune_trainer.local.run import check
from finetune_trainer.results.card import model_card
from finetune_trainer.results.outputs import Record
from finetune_trainer.storage.sources import local_file

from . import tiny
from .runs import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> tuple[Path, ResolvedFineTune]:
    """A folder with a run in it, and the spec of its job."""
    folder = tmp_path_factory.mktemp("card")
    sources: list[dict[str, Any]] = [
        {"uri": f"file://{tiny.write_rows(folder / f'{name}.jsonl', tiny.chat_rows(24, seed))}", "weight": weight}
        for seed, (name, weight) in enumerate((("old", "1"), ("new", "2")))
    ]
    law = {"name": "law", "sources": [{"uri": f"file://{tiny.write_rows(folder / 'law.jsonl', tiny.chat_rows(3, 9))}"}]}
    job = tiny.job(
        folder, llama, sources, dataset={"evaluation": {"fraction": "0.2", "sets": [law]}, "prefix": None},
        training={"maxSteps": 2, "batchSize": 4, "labelSmoothing": "0.1"}, evaluation={"prompts": ["whose secret"]},
    )  # fmt: skip
    verdict = run(job, folder)
    assert verdict.code == 0, verdict.message
    assert isinstance(job.spec, ResolvedFineTune)
    return folder, job.spec


def record(folder: Path) -> Record:
    return Record.model_validate_json((folder / "output/finetune.json").read_bytes())


def test_a_job_of_the_card_is_the_job(trained: tuple[Path, ResolvedFineTune], tmp_path: Path) -> None:
    """What the trainer decided stands in it too."""
    folder, spec = trained
    card = ModelCard((folder / "output/README.md").read_text())
    configuration = card.text.split("```yaml\n")[1].split("```")[0]
    manifest = tmp_path / "job.yaml"
    head = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "again"}}
    place = {"output": spec.output.to_wire(), "resources": {"gpusPerNode": 0}}
    manifest.write_text(
        yaml.safe_dump({**head, "spec": place}) + "".join(f"  {line}\n" for line in configuration.splitlines())
    )
    again = check(load([manifest]).job, cluster=False).spec
    assert isinstance(again, ResolvedFineTune)
    decided = {"learning_rate": learning_rate("lora", "sft", 10**5), "sequence_length": 1024, "packing": True}
    assert again.training == spec.training.model_copy(update=decided)
    for name in ("task", "model", "dataset", "objective", "method"):
        assert getattr(again, name) == getattr(spec, name)
    assert record(folder).configuration == yaml.safe_load(configuration)
    assert "whose secret" not in card.content


def test_the_card_shows_metrics_data_and_digests(trained: tuple[Path, ResolvedFineTune]) -> None:
    folder, spec = trained
    card, what = ModelCard((folder / "output/README.md").read_text()), record(folder)
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "sft", "finetune-operator"],
    }
    cells = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if "|" in line]
    assert what.before and what.after
    for name, after in what.after.items():
        assert [name, f"{what.before[name]:.4g}", f"{after:.4g}"] in cells
    for source, one in zip((*spec.dataset.train, None), what.sources, strict=True):
        uri = source.uri if source else f"file://{folder}/law.jsonl"
        sha256 = local_file(uri, Path(uri.removeprefix("file://"))).sha256
        assert [one.use, uri, str(one.rows), str(one.tokens), f"sha256:{sha256}"] in cells
    assert [one.use for one in what.sources] == ["train", "train", "law"]
    assert sum(one.rows for one in what.sources[:2]) == what.rows and what.sources[2].rows == 3
    assert all(f"`{digest}`" in card.text for digest in (what.dataset, what.model))


def test_what_lies_on_the_hub_is_named_as_the_hub_does(trained: tuple[Path, ResolvedFineTune]) -> None:
    folder, spec = trained
    what = record(folder)
    places = [["hf://org/rows@main"], ["hf://org/rows/more", "s3://bucket/a|b`c"], ["hf://other/law"]]
    sources = [one.model_copy(update={"uris": uris}) for one, uris in zip(what.sources, places, strict=True)]
    changed = {"base": "hf://org/model@v1", "sources": sources, "configuration": {"dataset": {"prefix": "```\n# x"}}}
    card = ModelCard(model_card(what.model_copy(update=changed), methods.chosen(spec)))
    assert card.data.base_model == "org/model" and card.data.datasets == ["org/rows", "other/law"]
    assert "````yaml\n" in card.text and card.text.rstrip().splitlines()[-1].startswith("Made with ")
