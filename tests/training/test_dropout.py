"""training.dropout: the model's own, in training only, and as reproducible as everything else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from finetune_crds import support
from finetune_crds.verdict import ExitCode
from finetune_trainer.modelling.models import dropouts
from finetune_trainer.objectives.reference import BOTH, Reference, answers_batch, log_probabilities
from finetune_trainer.setup import Setup

from . import pictures, tiny
from .runs import loaded, run, same_bytes_when_stopped

FAMILIES: dict[str, tuple[str, Any]] = {
    "llama": ("text-generation", tiny.chat_rows(8)),
    "gpt2": ("text-generation", tiny.chat_rows(8)),
    "bert": ("token-classification", tiny.tagged_rows(8)),
    "t5": ("summarization", tiny.pair_rows(8)),
}
"""One for each way in which configurations name their rates."""


def job(folder: Path, family: str, rate: str, **training: Any) -> Any:
    model = tiny.make_model(folder.parent / "model", family)
    task, rows = FAMILIES[family]
    data = tiny.write_rows(folder / "train.jsonl", rows)
    given = {"batchSize": 8, "sequenceLength": 256, "dropout": rate, **training}
    held_out = {"evaluation": {"sources": [{"uri": f"file://{data}"}]}}
    return tiny.job(folder, model, data, task=task, method={"full": {}}, dataset=held_out, training=given)


def loss(setup: Setup, seed: int) -> float:
    """Of the first step."""
    torch.manual_seed(seed)
    _, step = next(setup.order.walk(0))
    batch = setup.objective.train_batch(setup.rows, step, torch.device("cpu"), 0)
    return float(setup.objective.loss(setup.model, batch).detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_of_training_only(tmp_path: Path, family: str) -> None:
    plain, dropped = (loaded(job(tmp_path / rate, family, rate), tmp_path / rate) for rate in ("0", "0.5"))
    assert loss(plain, 1) == loss(plain, 2)
    assert loss(dropped, 1) == loss(dropped, 1) != loss(dropped, 2)
    measured = [each.evaluate(each.model, lambda: False, on_the_way=True) for each in (plain, dropped)]
    assert measured[0] == measured[1] is not None


def test_a_stopped_run_ends_with_the_same_bytes_and_the_models_own_configuration(tmp_path: Path) -> None:
    whole = same_bytes_when_stopped(lambda folder: job(folder, "llama", "0.2", maxSteps=4), tmp_path, 2)
    without = tmp_path / "without"
    assert run(job(without, "llama", "0", maxSteps=4), without).code == 0
    assert tiny.losses(whole / "output") != tiny.losses(without / "output")
    own, published = (
        json.loads((place / "config.json").read_text()) for place in (tmp_path / "model", whole / "output")
    )
    assert published["attention_dropout"] == own["attention_dropout"] == 0.0


def test_every_family_has_rates_or_is_refused(tmp_path: Path) -> None:
    without = {family for family in support.FAMILIES if not dropouts(AutoConfig.for_model(family))}
    assert without == {
        "bit", "convnext", "convnextv2", "cvt", "hgnet_v2", "hiera", "levit", "poolformer", "regnet", "resnet", "swiftformer", "textnet", "timm_wrapper",
    }  # fmt: skip
    images = pictures.make_model(tmp_path / "model", "resnet")
    refused = tiny.job(
        tmp_path, images, [{"uri": f"file://{tmp_path}"}], task="image-classification", method={"full": {}}, training={"dropout": "0.1"}
    )  # fmt: skip
    verdict = run(refused, tmp_path)
    assert verdict.code == ExitCode.USER_ERROR
    assert verdict.message == "training.dropout: models of type resnet have no dropout of their own; remove it"


def test_a_model_of_images_and_texts_has_the_rates_of_its_part_for_images(tmp_path: Path) -> None:
    images = [{"uri": f"file://{pictures.write_folder(tmp_path / 'images', 1)}"}]
    given = tiny.job(
        tmp_path, pictures.make_model(tmp_path / "model", "clip"), images, task="image-classification", method={"full": {}}, training={"dropout": "0.5"}
    )  # fmt: skip
    inner = loaded(given, tmp_path).model.inner
    assert inner.vision_model.encoder.layers[0].self_attn.dropout == 0.5
    assert inner.config.vision_config.attention_dropout == 0.0, "what is published has its own"


def test_what_a_model_is_compared_with_drops_nothing(tmp_path: Path, llama: Path) -> None:
    pairs = [{"prompt": "who?", "chosen": "Ann", "rejected": "Bob"}] * 4
    given = tiny.job(
        tmp_path, llama, tiny.write_rows(tmp_path / "train.jsonl", pairs), objective={"dpo": {}}, training={"dropout": "0.5"}
    )  # fmt: skip
    setup = loaded(given, tmp_path)
    _, step = next(setup.order.walk(0))
    batch = answers_batch(setup.rows, step, BOTH, torch.device("cpu"))
    said = [Reference(setup.method).log_probabilities(setup.model, batch, BOTH) for _ in range(2)]
    assert torch.equal(*said)
    assert not torch.equal(*(log_probabilities(setup.model, batch) for _ in range(2))), "it is trained with it"
