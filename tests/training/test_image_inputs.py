"""Models that take images as something else than one grid of pixels of one size, and Perceiver, whose head is no part that can be added."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import ImageOps
from safetensors.torch import load_file
from torch.testing import assert_close

from finetune_crds.verdict import ExitCode
from finetune_trainer.data import augment
from finetune_trainer.modelling import anatomy

from . import pictures
from .runs import assert_same_logits, loaded, opened_as_its_card_says, run, trained
from .test_images import make

NO_PIXELS = ("siglip2", "imagegpt")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write_folder(tmp_path_factory.mktemp("images") / "train")


@pytest.mark.parametrize(
    ("family", "more"), [("siglip2", {}), ("imagegpt", {}), ("imagegpt", {"size": {"height": 4, "width": 16}})]
)
def test_the_model_is_given_what_the_library_makes_of_an_image_after_it_was_changed(
    tmp_path: Path, data: Path, family: str, more: dict[str, Any]
) -> None:
    model = pictures.make_model(tmp_path / "model", family)
    file = model / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    processor = transformers.AutoImageProcessor.from_pretrained(model)

    def of(changes: dict[str, Any]) -> Any:
        job = make(tmp_path, model, data, {"lora": {}}, dataset={"augmentation": changes})
        return loaded(job, tmp_path).objective.pixels  # type: ignore[attr-defined]

    mirrored, cut = of({"horizontalFlip": "1"}), of({"randomResizedCrop": {"minScale": "0.2"}})
    shapes = set()
    for number in range(6):
        image = pictures.picture("red", number)
        content = pictures.encoded(image)
        theirs = dict(processor(image, return_tensors="pt"))
        assert_close(mirrored.plain([content]), theirs, rtol=0, atol=0)
        shapes.add(tuple(theirs.get("spatial_shapes", torch.zeros(1, 2))[0].tolist()))
        theirs = dict(processor(ImageOps.mirror(image), return_tensors="pt"))
        assert_close(mirrored.augmented([content], 0, [(number,)]), theirs, rtol=0, atol=0)
        top, left, height, width = augment._part(image.height, image.width, 0.2, cut.draw(0, number))
        part = image.crop((left, top, left + width, top + height))
        theirs = dict(processor(part, return_tensors="pt"))
        assert_close(cut.augmented([content], 0, [(number,)]), theirs, rtol=0, atol=0)
    assert family != "siglip2" or len(shapes) > 1, "wide and tall ones, and padding"


def test_numbers_that_the_model_asks_for_stay_on_the_host(tmp_path: Path, data: Path) -> None:
    made = loaded(make(tmp_path, pictures.make_model(tmp_path / "model", "siglip2"), data, {"lora": {}}), tmp_path)
    batch = made.objective.batch(made.rows, [np.arange(2)], torch.device("meta"))
    assert {name: one.device.type for name, one in batch.inputs.items()} == {  # type: ignore[union-attr]
        "pixel_values": "meta", "pixel_attention_mask": "meta", "spatial_shapes": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
@pytest.mark.parametrize("family", NO_PIXELS)
def test_mixing_is_refused_before_any_image_is_read(tmp_path: Path, data: Path, family: str, mixing: str) -> None:
    model = pictures.make_model(tmp_path / "model", family)
    verdict = run(make(tmp_path, model, data, {"lora": {}}, dataset={"augmentation": {mixing: "1"}}), tmp_path)
    assert verdict.code == ExitCode.USER_ERROR
    assert f"two images cannot be mixed into one for models of type {family}" in verdict.message
    assert not (tmp_path / "scratch/prepared").exists()


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "patches": ("siglip2", {"patch_size": 16}, "takes patches of 8 x 8 and its preprocessor_config.json makes them 16 x 16"),
    "colours": ("imagegpt", {"clusters": None}, "has no colours"),
    "positions": ("imagegpt", {"size": {"height": 16, "width": 16}}, "takes images of 8 x 8 and its preprocessor_config.json makes them 16 x 16"),
    "learned positions": ("perceiver", {"size": {"height": 16, "width": 16}}, "takes images of 32 x 32 and its preprocessor_config.json makes them 16 x 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_image_processor_of_another_model_is_refused(tmp_path: Path, data: Path, case: str) -> None:
    family, wrong, sentence = WRONG[case]
    model = pictures.make_model(tmp_path / "model", family)
    file = model / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    verdict = run(make(tmp_path, model, data, {"lora": {}}), tmp_path)
    assert (verdict.code, sentence in verdict.message) == (ExitCode.USER_ERROR, True), verdict.message


@pytest.mark.parametrize("kind", ["PerceiverModel", "PerceiverForMaskedLM"])
def test_a_perceiver_that_tells_no_classes_of_images_is_refused(tmp_path: Path, data: Path, kind: str) -> None:
    model = pictures.make_model(tmp_path / "model", "perceiver")
    config = transformers.AutoConfig.from_pretrained(model)
    getattr(transformers, kind)(config).save_pretrained(model)
    verdict = run(make(tmp_path, model, data, {"full": {}}), tmp_path)
    assert verdict.code == ExitCode.USER_ERROR
    assert "is a Perceiver that tells no classes of images" in verdict.message


@pytest.mark.parametrize("family", ["perceiver", *pictures.PERCEIVERS])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_of_a_perceiver_for_other_classes_only_the_last_layer_is_replaced(
    tmp_path: Path, data: Path, family: str, method: str
) -> None:
    """Also where it has as many outputs; and one for these classes goes on with it."""
    last = "perceiver.decoder.decoder.final_layer.weight"
    for classes in (["cat", "dog", "owl"], [*pictures.COLOURS]):
        model = pictures.make_model(tmp_path / classes[0], family, classes=classes)
        stored = load_file(model / "model.safetensors")
        made = loaded(make(tmp_path, model, data, {method: {}}), tmp_path / f"{classes[0]}-look")
        weights = {
            name.replace(".modules_to_save.default", "").replace(".base_layer", ""): weight
            for name, weight in made.model.inner.named_parameters()
        }
        same = {name for name, weight in stored.items() if name in weights and torch.equal(weights[name].cpu(), weight)}
        changed = {name for name in stored if name in weights} - same
        assert weights[last].shape == (3, 32)
        assert (last in changed) == (classes[0] == "cat"), changed
        assert changed <= {last, last.replace("weight", "bias")}
    job = make(tmp_path, tmp_path / "cat", data, {method: {}}, training={"maxSteps": 3})
    assert_same_logits(trained(job, tmp_path), opened_as_its_card_says(tmp_path / "output"), tmp_path)


@pytest.mark.parametrize("family", ["clip", "timm_wrapper"])
def test_no_kernel_is_fetched_from_a_repository_that_config_json_names(tmp_path: Path, data: Path, family: str) -> None:
    """transformers would, where the library for it is there."""
    model = pictures.make_model(tmp_path / "model", family)
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_implementation": "org/kernel"}))
    inner = loaded(make(tmp_path, model, data, {"full": {}}), tmp_path).model.inner
    assert anatomy.of_images(inner.config)._attn_implementation == "sdpa"


def test_a_model_of_other_channels_than_its_images_is_refused(tmp_path: Path, data: Path) -> None:
    model = pictures.make_model(tmp_path / "model", "vit", num_channels=4)
    verdict = run(make(tmp_path, model, data, {"full": {}}), tmp_path)
    assert verdict.code == ExitCode.USER_ERROR and verdict.step == 0
    assert "takes images of 4 channels and its image processor makes them of 3" in verdict.message
