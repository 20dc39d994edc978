"""Where the parts of the families of images are: their blocks, their heads, and whether images must be of one size."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from finetune_crds import support
from finetune_crds.verdict import ExitCode
from finetune_trainer.methods.weights import _from_the_head
from finetune_trainer.modelling import anatomy
from finetune_trainer.modelling.norms import batch_norms

from . import pictures, tiny
from .runs import assert_same_logits, loaded, opened_as_its_card_says, run, trained
from .test_images import make

FAMILIES = [name for name, family in support.FAMILIES.items() if "image-classification" in family.tasks]


def test_every_classifier_of_transformers_is_supported_or_left_out_for_a_reason() -> None:
    assert {*FAMILIES, *support.LEFT_OUT} == set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    assert not support.LEFT_OUT.keys() & support.FAMILIES
    said = support.refusal("dinat", "image-classification", "full")
    assert said == f"models of type 'dinat' are not supported: {support.LEFT_OUT['dinat']}"


@pytest.fixture(params=[*FAMILIES, *pictures.TIMM, *pictures.PERCEIVERS])
def inner(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A classifier with a new head on a model that has none, or one of two classes."""
    folder = pictures.make_model(tmp_path, request.param)
    found, report = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    found.missing = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    return found.eval()


def test_stages_are_unfrozen_against_the_order_of_the_forward_pass(inner: Any) -> None:
    """The head is what a model without one lacks; all of another size is refused before training, or works."""
    family = inner.config.model_type
    head = [f"{name}." for name in anatomy.head(inner.config, "image-classification")]
    assert inner.missing and all(name.startswith(tuple(head)) for name in inner.missing)
    for module in map(inner.get_submodule, anatomy.head(inner.config, "image-classification")):
        assert any(True for _ in module.parameters())

    ran: list[nn.Module] = []
    for module in inner.modules():
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
    side = pictures.side(family)
    with torch.no_grad():
        inner(**pictures.inputs(family, side))
        try:
            inner(**pictures.inputs(family, 2 * side))
            any_size = True
        except (ValueError, RuntimeError, AssertionError, IndexError):
            any_size = False
    assert (anatomy.fixed_size(inner.config) is None) == any_size

    names = [name for name, _ in inner.named_parameters()]
    above, *blocks, below = _from_the_head(inner, True, 1, names)
    assert sorted([*above, *below, *(name for block in blocks for name in block)]) == sorted(names)
    assert len(blocks) >= 2 and all(blocks)
    begins = [_calls(inner, ran, stage) for stage in (above, *blocks, below) if stage]
    for later, earlier in pairwise(begins):
        assert max(earlier) < min(later)


def _calls(inner: nn.Module, ran: list[nn.Module], names: tuple[str, ...]) -> list[int]:
    """When the modules with these weights were first called."""
    modules = {inner.get_submodule(name.rpartition(".")[0]) for name in names}
    return [ran.index(module) for module in modules if module in ran]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write_folder(tmp_path_factory.mktemp("images") / "train", 2)


def taught(folder: Path, family: str, kind: str) -> Path:
    """A model with a second head for distillation, as those of LeViT on the hub."""
    pictures.make_model(folder, family)
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=7)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


def test_a_head_that_learned_from_a_teacher_gives_way_to_a_plain_one(tmp_path: Path, data: Path) -> None:
    model = taught(tmp_path / "model", "levit", "LevitForImageClassificationWithTeacher")
    made = trained(make(tmp_path, model, data, {"full": {}}, training={"maxSteps": 1}), tmp_path)
    assert_same_logits(made, opened_as_its_card_says(tmp_path / "output"), tmp_path)
    architectures = json.loads((tmp_path / "output/config.json").read_text())["architectures"]
    assert architectures == ["LevitForImageClassification"]


def test_a_head_that_normalises_is_trained_with_an_adapter_in_bf16(tmp_path: Path, data: Path) -> None:
    model = pictures.make_model(tmp_path / "model", "levit")
    made = trained(make(tmp_path, model, data, {"lora": {}}, training={"maxSteps": 1, "precision": "bf16"}), tmp_path)
    assert made.model.inner.dtype == torch.bfloat16
    norms = batch_norms(made.model.inner)
    assert {tensor.dtype for norm in norms.values() for tensor in norm.state_dict().values()} == {
        torch.float32,
        torch.int64,
    }
    stored = load_file(model / "model.safetensors")
    frozen = {name: norm for name, norm in norms.items() if "classifier" not in name}
    assert len(frozen) > 10
    for name, norm in frozen.items():
        assert torch.equal(norm.running_var, stored[f"{name.removeprefix('levit.')}.running_var"])  # type: ignore[arg-type]


def test_no_adapter_is_made_for_a_head_that_is_not_there(tmp_path: Path, data: Path) -> None:
    model = taught(tmp_path / "model", "deit", "DeiTForImageClassificationWithTeacher")
    verdict = run(make(tmp_path, model, data, {"lora": {}}), tmp_path)
    assert verdict.code == ExitCode.USER_ERROR
    assert "or save it as DeiTForImageClassification first" in verdict.message


def test_a_new_head_keeps_what_normalises_its_input(tmp_path: Path, data: Path) -> None:
    model = pictures.make_model(tmp_path / "model", "poolformer", classes=["cat", "dog", "owl"])
    stored = load_file(model / "model.safetensors")
    stored["norm.weight"].fill_(0.5)
    transformers.AutoModelForImageClassification.from_pretrained(model).save_pretrained(model, state_dict=stored)
    inner = loaded(make(tmp_path, model, data, {"full": {}}), tmp_path).model.inner
    assert torch.equal(inner.norm.weight, stored["norm.weight"])
    assert not torch.equal(inner.classifier.weight, stored["classifier.weight"])


@pytest.mark.parametrize("family", [*pictures.NO_CHECKPOINTING, *pictures.COUNTING])
def test_gradient_checkpointing_is_refused_where_it_would_do_nothing_or_count_twice(
    tmp_path: Path, family: str
) -> None:
    model = pictures.make_model(tmp_path / "model", family)
    data = pictures.write_folder(tmp_path / "train", 2)
    job = tiny.job(
        tmp_path, model, data, task="image-classification", method={"full": {}},
        training={"gradientCheckpointing": True, "maxSteps": 1},
    )  # fmt: skip
    verdict = run(job, tmp_path)
    assert verdict.code == ExitCode.USER_ERROR and verdict.step == 0
    assert verdict.message.startswith("training.gradientCheckpointing: ") and family in verdict.message
