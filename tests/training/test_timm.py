"""Models of timm: folders as timm and as transformers write them, timm's images, and what is told of architectures that cannot be trained so."""

import inspect
import json
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import ImageOps
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.v2 import functional

from finetune_crds.verdict import ExitCode
from finetune_trainer.data import augment
from finetune_trainer.errors import UserError
from finetune_trainer.modelling import anatomy, timm_models
from finetune_trainer.modelling.models import load_config

from . import pictures
from .runs import assert_same_logits, loaded, opened_as_its_card_says, run, trained
from .test_images import AUGMENTED, make

CPU = torch.device("cpu")
VIT: dict[str, Any] = pictures.SHAPES["timm_wrapper"]
EVA = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
DISTILLED = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
LEVIT = {"embed_dim": [16, 16, 16], "num_heads": [1, 1, 1], "depth": [1, 1, 1], "key_dim": 8, "mlp_ratio": 1}
BIT = {"layers": [1, 1], "channels": [16, 32], "stem_chs": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write_folder(tmp_path_factory.mktemp("images") / "train")


def as_timm(folder: Path, architecture: str, classes: list[str], shape: dict[str, Any], **seen: Any) -> Path:
    """A folder as the hub has those of timm: no model_type, its own names of weights, and what it knows of the classes."""
    torch.manual_seed(20)
    model = timm.create_model(architecture, num_classes=len(classes), **shape)
    told = {"label_names": classes, "label_descriptions": dict.fromkeys(classes, "an animal")} if classes else {}
    data = {"input_size": (3, 32, 32)} | seen
    timm.models.save_for_hf(model, str(folder), told, model_args=shape, safe_serialization=True, data_config=data)
    return rewritten(folder, lambda config: config["model_args"].pop("num_classes"))


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Its config.json is changed."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("classes", [[], ["cat", "dog", "owl"], [str(i) for i in range(7)]], ids=len)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_folder_of_timm_is_trained_and_opened(tmp_path: Path, folder: Path, method: str, classes: list[str]) -> None:
    """Whatever its head; by timm too, where the model is published whole."""
    model = as_timm(tmp_path / "model", VIT["architecture"], classes, VIT["model_args"])
    job = make(tmp_path, model, folder, {method: {}}, training={"maxSteps": 2})
    stored = load_file(model / "model.safetensors")
    begins = loaded(job, tmp_path / "look").model.inner.timm_model
    head = begins.head.modules_to_save["default"] if method == "lora" else begins.head
    assert head.weight.shape == (3, 32) and float(head.weight.detach().std()) > 0
    assert len(classes) != 3 or not torch.equal(head.weight, stored["head.weight"])
    assert torch.equal(begins.norm.weight, stored["norm.weight"])

    made = trained(job, tmp_path)
    opened = opened_as_its_card_says(tmp_path / "output")
    assert_same_logits(made, opened, tmp_path)
    assert list(opened.config.id2label.values()) == ["blue", "green", "red"]
    if method == "full":
        assert "animal" not in (tmp_path / "output/config.json").read_text()
        theirs = timm.create_model(f"local-dir:{tmp_path / 'output'}", pretrained=True).eval()
        pixels = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(theirs(pixels), opened(pixel_values=pixels).logits)


def test_a_folder_that_says_twice_how_many_classes_it_has_is_trained_whole(tmp_path: Path, folder: Path) -> None:
    """As timm writes them now: transformers cannot open them."""
    model = as_timm(tmp_path / "model", VIT["architecture"], ["cat", "dog"], VIT["model_args"])
    rewritten(model, lambda config: config["model_args"].update(num_classes=2))
    with pytest.raises(TypeError, match="multiple values for keyword argument 'num_classes'"):
        transformers.AutoModelForImageClassification.from_pretrained(model)
    made = trained(make(tmp_path, model, folder, {"full": {}}, training={"maxSteps": 1}), tmp_path)
    assert_same_logits(made, opened_as_its_card_says(tmp_path / "output"), tmp_path)
    verdict = run(make(tmp_path / "adapter", model, folder, {"lora": {}}), tmp_path / "adapter")
    assert verdict.code == ExitCode.USER_ERROR
    assert "has num_classes, with which transformers cannot open the model" in verdict.message


def test_a_folder_of_transformers_goes_on_with_its_head(tmp_path: Path, folder: Path) -> None:
    """What one job has published is another's model; so is a folder of timm's own whose classes are those of the rows."""
    classes = ["blue", "green", "red"]
    for whose in ("timm", "transformers"):
        model = as_timm(tmp_path / whose, VIT["architecture"], classes, VIT["model_args"])
        if whose == "transformers":
            transformers.AutoModelForImageClassification.from_pretrained(model).save_pretrained(model)
            assert json.loads((model / "config.json").read_text())["model_type"] == "timm_wrapper"
        made = loaded(make(tmp_path, model, folder, {"full": {}}), tmp_path / f"of {whose}")
        assert made.rows.index.classes == classes
        stored = load_file(model / "model.safetensors")
        assert torch.equal(made.model.inner.timm_model.head.weight, stored["head.weight"])


def test_a_head_that_is_a_convolution_is_replaced_too(tmp_path: Path, folder: Path) -> None:
    model = as_timm(tmp_path / "model", "resnetv2_18", ["cat", "dog", "owl"], BIT)
    head = loaded(make(tmp_path, model, folder, {"full": {}}), tmp_path).model.inner.timm_model.head.fc
    assert isinstance(head, nn.Conv2d) and head.out_channels == 3
    assert not torch.equal(head.weight, load_file(model / "model.safetensors")["head.fc.weight"])


SEEN: dict[str, dict[str, Any]] = {
    "center": {"crop_pct": 0.875, "interpolation": "bilinear"},
    "squash": {"crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bicubic"},
    "border": {"crop_pct": 0.9, "crop_mode": "border", "interpolation": "bicubic"},
    "oblong": {"input_size": (3, 24, 40), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 0.5)},
}


@pytest.mark.parametrize("case", SEEN)
def test_images_are_those_of_timm(tmp_path: Path, folder: Path, case: str) -> None:
    """To the last bit: as they are, mirrored, and cut already."""
    model = as_timm(
        tmp_path / "model", "resnet18", [], pictures.TIMM["timm_wrapper resnet18"]["model_args"], **SEEN[case]
    )
    processor: Any = transformers.AutoImageProcessor.from_pretrained(model)
    size = tuple(SEEN[case].get("input_size", (3, 32, 32))[1:])

    def of(changes: dict[str, Any]) -> Any:
        return loaded(
            make(tmp_path, model, folder, {"full": {}}, dataset={"augmentation": changes}), tmp_path
        ).objective

    mirrored, cut = of({"horizontalFlip": "1"}), of({"randomResizedCrop": {"minScale": "0.5"}})
    for number in range(3):
        image = pictures.picture("red", number)
        content = pictures.encoded(image)
        theirs = processor(image)["pixel_values"]
        assert theirs.shape == (1, 3, *size)
        assert torch.equal(mirrored.pixels.plain([content])["pixel_values"], theirs)
        theirs = processor(ImageOps.mirror(image))["pixel_values"]
        assert torch.equal(mirrored.pixels.augmented([content], 0, [(number,)])["pixel_values"], theirs)

        bicubic = processor.data_config["interpolation"] == "bicubic"
        kind = functional.InterpolationMode.BICUBIC if bicubic else functional.InterpolationMode.BILINEAR
        part = augment.random_resized_crop(
            functional.pil_to_tensor(image), size, 0.5, kind, cut.pixels.draw(0, number)
        )  # fmt: skip
        mean, std = (torch.tensor(processor.data_config[name])[:, None, None] for name in ("mean", "std"))
        torch.testing.assert_close(
            cut.pixels.augmented([content], 0, [(number,)])["pixel_values"][0],
            (part / 255 - mean) / std,
            rtol=0,
            atol=1e-5,
        )


def test_augmented_grey_images_are_learned(tmp_path: Path, folder: Path) -> None:
    """By a model of one channel."""
    shape = VIT["model_args"] | {"in_chans": 1}
    model = as_timm(tmp_path / "model", VIT["architecture"], [], shape, input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    job = make(tmp_path, model, folder, {"full": {}}, training={"maxSteps": 1}, dataset={"augmentation": AUGMENTED})
    made = trained(job, tmp_path)
    batch = made.objective.train_batch(made.rows, [np.array([0])], CPU, 5)
    assert batch.inputs["pixel_values"].shape == (1, 1, 32, 32)


@pytest.mark.parametrize("method", [{"lora": {}}, {"freeze": {"trainLastBlocks": 1}}], ids=["lora", "freeze"])
@pytest.mark.parametrize("architecture", ["deit_tiny_distilled_patch16_224", "levit_384_s8"])
def test_both_heads_are_replaced_and_trained(
    tmp_path: Path, folder: Path, architecture: str, method: dict[str, Any]
) -> None:
    """Of levit_384_s8 timm names one only."""
    shape = LEVIT if "levit" in architecture else DISTILLED
    side = 224 if shape is LEVIT else 32
    model = as_timm(tmp_path / "model", architecture, ["cat", "dog"], shape, input_size=(3, side, side))
    begins: dict[str, torch.Tensor] = {}

    def heads(made: Any) -> dict[str, torch.Tensor]:
        inner = made.model.inner
        found = {name: inner.get_submodule(name) for name in anatomy.head(inner.config, "image-classification")}
        return {
            name: getattr(one, "modules_to_save", {"default": one})["default"].weight.detach().clone()
            for name, one in found.items()
        }

    job = make(tmp_path, model, folder, method, training={"maxSteps": 1, "learningRate": "1e-2"})
    made = trained(job, tmp_path, lambda made: begins.update(heads(made)))
    ends = heads(made)
    assert len(begins) == 2 and all(weight.shape[0] == 3 for weight in begins.values())
    assert not any(torch.equal(weight, ends[name]) for name, weight in begins.items())
    assert_same_logits(made, opened_as_its_card_says(tmp_path / "output"), tmp_path)


DIVIDED = {
    "resnet50": 4,
    "regnety_002": 4,
    "convnext_tiny": 4,
    "swin_tiny_patch4_window7_224": 4,
    "vit_base_patch16_224": 12,
    "eva02_tiny_patch14_224": 12,
    "vit_base_patch16_siglip_224": 12,
    "deit_tiny_distilled_patch16_224": 12,
    "efficientnet_b0": 7,
    "mobilenetv3_small_100": 6,
    "inception_v3": 12,
}


@pytest.mark.parametrize("architecture", DIVIDED)
def test_blocks_are_those_of_timm_and_neither_head_nor_stem_is_one(architecture: str) -> None:
    config = transformers.AutoConfig.for_model("timm_wrapper", architecture=architecture, num_labels=3)
    with torch.device("meta"):
        inner: Any = transformers.AutoModelForImageClassification.from_config(config)
    found = anatomy.blocks(inner)
    assert len(found) == DIVIDED[architecture]
    names = {id(parameter): name for name, parameter in inner.named_parameters()}
    inside = [names[id(parameter)] for block in found for parameter in block.parameters()]
    assert len(set(inside)) == len(inside)
    heads = tuple(f"{name}." for name in anatomy.head(config, "image-classification"))
    outside = set(names.values()) - set(inside)
    assert sum(name.startswith(heads) for name in outside) == 2 * len(heads)
    assert any(part in name for part in ("conv1", "stem", "patch_embed", "Conv2d_1a") for name in outside)
    assert not any(name.startswith("timm_model.norm.") for name in inside)


def test_only_stages_that_are_trained_move_their_running_statistics(tmp_path: Path, folder: Path) -> None:
    model = pictures.make_model(tmp_path / "model", "timm_wrapper resnet18")
    job = make(tmp_path, model, folder, {"freeze": {"trainLastBlocks": 1}}, training={"gradientCheckpointing": False})
    trained(job, tmp_path)
    before, after = (load_file(at / "model.safetensors") for at in (model, tmp_path / "output"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in moved} == {"layer4"}
    assert {name.rpartition(".")[2] for name in moved} == {
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip


def test_gradient_checkpointing_computes_blocks_once_more(tmp_path: Path, folder: Path) -> None:
    model = pictures.make_model(tmp_path / "model", "timm_wrapper")
    for saving, times in ((False, 1), (True, 2)):
        made = loaded(make(tmp_path, model, folder, {"full": {}}, training={"gradientCheckpointing": saving}), tmp_path)
        ran: list[nn.Module] = []
        made.model.inner.timm_model.blocks[0].register_forward_pre_hook(lambda module, _, ran=ran: ran.append(module))
        made.model.outer.train()
        batch = made.objective.batch(made.rows, [np.array([0])], CPU)
        made.objective.loss(made.model, batch).backward()
        assert len(ran) == times


def test_no_adapter_stands_beside_a_layer_that_is_not_called(tmp_path: Path, folder: Path) -> None:
    """EVA-02 multiplies by the weight of qkv itself: an adapter there would be saved as it began."""
    model = as_timm(tmp_path / "model", "eva02_tiny_patch14_224", [], EVA)
    trained(make(tmp_path, model, folder, {"lora": {}}, training={"maxSteps": 1}), tmp_path)
    saved = load_file(tmp_path / "output/adapter_model.safetensors")
    beside = {name.split(".")[-3] for name in saved if name.endswith("lora_B.weight")}
    assert beside >= {"proj"} and "qkv" not in beside
    assert all(bool(tensor.any()) for name, tensor in saved.items() if name.endswith("lora_B.weight"))
    verdict = run(make(tmp_path, model, folder, {"lora": {"targets": ["qkv"]}}), tmp_path / "named")
    assert verdict.code == ExitCode.USER_ERROR
    assert "method.lora.targets: qkv is no linear layer of this model that can have an adapter" in verdict.message


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "no linear layer": ("resnet18", pictures.TIMM["timm_wrapper resnet18"]["model_args"], {"lora": {}}, "has no linear layer but its head"),
    "not divided": ("pit_ti_224", {}, {"freeze": {"trainLastBlocks": 1}}, "timm does not say what the blocks of 'pit_ti_224' are; use method full"),
    "other size": (VIT["architecture"], VIT["model_args"], {"full": {}}, "takes images of 32 x 32 and its config.json (pretrained_cfg.input_size) makes them 16 x 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_architecture_cannot_do_is_said(tmp_path: Path, folder: Path, case: str) -> None:
    architecture, shape, method, said = REFUSED[case]
    size = 224 if case == "not divided" else 32
    model = as_timm(tmp_path / "model", architecture, [], shape, input_size=(3, size, size))
    if case == "other size":
        rewritten(model, lambda config: config["pretrained_cfg"].update(input_size=[3, 16, 16]))
    verdict = run(make(tmp_path, model, folder, method), tmp_path)
    assert verdict.code == ExitCode.USER_ERROR and verdict.step == 0
    assert said in verdict.message


UNREADABLE = "holds no config.json that transformers can read"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"architecture": "resnet1"}, "knows no architecture 'resnet1'"),
        ({"architecture": "hf-hub:org/model"}, "knows no architecture 'hf-hub:org/model'"),
        ({"architecture": "mobilenetv5_300m_enc", "model_args": {}}, "is an encoder that no head can be put on"),
        ({"architecture": "qwen3_vit_88m_enc", "model_args": {}}, "is an encoder that no head can be put on"),
        ({"architecture": 5}, UNREADABLE),
        ({"architecture": None}, UNREADABLE),
        ({"model_args": []}, UNREADABLE),
        ({"num_classes": None}, UNREADABLE),
        ({"model_args": {"deep": 3}}, "with the model_args of its config.json (TypeError); correct them"),
        ({"model_args": {"act_layer": "nope"}}, "with the model_args of its config.json (KeyError)"),
        ({"model_args": {"num_heads": 0}}, "with the model_args of its config.json"),
        ({"model_args": {"patch_size": 0}}, "with the model_args of its config.json (ZeroDivisionError)"),
        ({"model_args": {"img_size": [32]}}, "with the model_args of its config.json"),
        ({"model_args": {"drop_rate": 2.0}}, "with the model_args of its config.json (ValueError)"),
        ({"model_args": {"in_chans": "three"}}, "with the model_args of its config.json (ValueError)"),
        ({"model_args": {"global_pool": ""}}, "does not give one number for each class"),
        ({"model_args": {"in_chans": 4}}, "takes images of 4 channels, and there are only those of 3"),
        ({"model_args": VIT["model_args"] | {"in_chans": 1}}, "cannot make an image of 1 channels (RuntimeError)"),
        ({"pretrained_cfg": {}}, "holds no image processor that can be read"),
        ({"pretrained_cfg": "tag"}, "holds no image processor that can be read"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "std": [0, 0, 0]}}, "cannot make an image of 3 channels (ValueError)"),
    ],
)  # fmt: skip
def test_what_config_json_lacks_is_said(tmp_path: Path, folder: Path, fields: dict[str, Any], said: str) -> None:
    model = pictures.make_model(tmp_path / "model", "timm_wrapper")
    rewritten(model, lambda config: config.update(fields))
    verdict = run(make(tmp_path, model, folder, {"full": {}}), tmp_path)
    assert verdict.code == ExitCode.USER_ERROR and verdict.step == 0
    assert said in verdict.message


ELSEWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "hub": ({"pretrained": True}, "pretrained"),
    "address": ({"pretrained": True, "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/w.pth"}}, "pretrained, pretrained_cfg_overlay, url"),
    "file": ({"pretrained": True, "pretrained_cfg_overlay": {"file": "FILE"}}, "file, pretrained, pretrained_cfg_overlay"),
    "checkpoint": ({"checkpoint_path": "FILE"}, "checkpoint_path"),
    "not loaded": ({"pretrained": False}, "pretrained"),
    "cache": ({"cache_dir": "/"}, "cache_dir"),
    "place": ({"device": "cpu", "dtype": "float16"}, "device, dtype"),
    "other model": ({"features_only": True, "pruned": True}, "features_only, pruned"),
    "within": ({"depth": [{"hf_hub_id": "org/model"}]}, "hf_hub_id"),
}  # fmt: skip


@pytest.mark.parametrize("case", ELSEWHERE)
def test_nothing_is_read_from_elsewhere(tmp_path: Path, folder: Path, case: str) -> None:
    """Nothing is built, so nothing is asked or opened."""
    given, named = ELSEWHERE[case]
    file = tmp_path / "any.pth"
    torch.save({}, file)
    model = pictures.make_model(tmp_path / "model", "timm_wrapper")
    rewritten(model, lambda config: config.update(model_args=json.loads(json.dumps(given).replace("FILE", str(file)))))
    spec = make(tmp_path, model, folder, {"full": {}}).spec
    with (
        mock.patch.object(socket, "getaddrinfo") as asked,
        mock.patch.object(socket.socket, "connect") as connected,
        mock.patch.object(torch, "load") as read,
        mock.patch.object(timm, "create_model") as built,
        pytest.raises(UserError, match=f"model_args in its config.json has {named}, which .* remove it there"),
    ):
        load_config(spec, model)
    assert not any(one.called for one in (asked, connected, read, built))


def test_what_timm_calls_its_arguments_is_known() -> None:
    """None that a later version adds is let through unseen."""
    for function in (timm.create_model, timm.models.build_model_with_cfg):
        assert timm_models._NO_SHAPE.issuperset(inspect.signature(function).parameters.keys() - {"kwargs"})


def test_timm_is_told_to_read_no_weights(tmp_path: Path) -> None:
    """Whatever model_args has."""
    config = transformers.AutoConfig.for_model("timm_wrapper", **VIT)
    with mock.patch.object(timm, "create_model", wraps=timm.create_model) as built:
        assert timm_models.refusal(config) is None
    assert built.called and all(call.kwargs["pretrained"] is False for call in built.call_args_list)


@pytest.mark.parametrize(
    ("architecture", "heads"),
    [
        ("levit_384_s8", ("head.linear", "head_dist.linear")),
        ("levit_conv_384_s8", ("head.linear", "head_dist.linear")),
        ("levit_128s", ("head.linear", "head_dist.linear")),
        ("resnetv2_50", ("head.fc",)),
        ("xception", ("fc",)),
        ("jx_nest_tiny", ("head",)),
    ],
)
def test_heads_are_what_follows_the_number_of_classes(architecture: str, heads: tuple[str, ...]) -> None:
    """Also where timm names one of two, or the name is an old one."""
    config = transformers.AutoConfig.for_model("timm_wrapper", architecture=architecture, num_labels=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mapping deprecated")
        assert timm_models.refusal(config) is None
        assert timm_models.head(config) == tuple(f"timm_model.{name}" for name in heads)


@pytest.mark.parametrize(
    ("architecture", "takes"), [("xcit_nano_12_p16_224", True), ("twins_svt_small", True), ("vit_tiny_patch16_224", False)]
)  # fmt: skip
def test_a_size_that_the_model_takes_is_not_refused(architecture: str, takes: bool) -> None:
    """Though timm says of each that it takes one."""
    config = transformers.AutoConfig.for_model("timm_wrapper", architecture=architecture)
    assert anatomy.fixed_size(config) == (224, 224) and anatomy.takes_size(config, (224, 224))
    assert anatomy.takes_size(config, (256, 256)) == takes
