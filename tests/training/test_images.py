"""Classes of images: every family and method, parity with transformers, what is drawn at random, and what is refused."""

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers.image_utils import load_image

from finetune_crds.verdict import ExitCode
from finetune_trainer.data import augment
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.methods.layers import linear_below

from . import pictures, tiny
from .runs import assert_same_logits, loaded, opened_as_its_card_says, prepared, published, run, trained
from .spawn import run_ranks
from .test_parity import order_of

AUGMENTED = {"randomResizedCrop": {"minScale": "0.8"}, "randAugment": {"magnitude": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write_folder(tmp_path_factory.mktemp("images") / "train")


def make(tmp_path: Path, model: Path, data: Path, method: dict[str, Any], /, **spec: Any) -> Any:
    """A job that is evaluated on what it trains on."""
    training = {"maxSteps": 10, "batchSize": 8, "learningRate": "3e-3"} | spec.pop("training", {})
    dataset = {"evaluation": {"sources": [{"uri": f"file://{data}"}]}} | spec.pop("dataset", {})
    return tiny.job(
        tmp_path, model, data, task="image-classification", method=method, training=training, dataset=dataset, **spec
    )


def plain_loss(output: Path, folder: Path) -> float:
    """Mean over the files, each alone, by the code of the card."""
    model = opened_as_its_card_says(output)
    processor = transformers.AutoImageProcessor.from_pretrained(output)
    classes, losses = list(model.config.id2label.values()), []
    for file in sorted(folder.glob("*/*.png")):
        with torch.no_grad():
            logits = model(**processor(load_image(str(file)), return_tensors="pt")).logits
        losses.append(float(cross_entropy(logits, torch.tensor([classes.index(file.parent.name)]))))
    return float(np.mean(losses))


PARITY: dict[str, tuple[str, dict[str, Any]]] = {
    "vit, full": ("vit", {"full": {}}),
    "vit, lora": ("vit", {"lora": {"rank": 4, "alpha": 8}}),
    "resnet, full": ("resnet", {"full": {}}),
    "resnet, frozen": ("resnet", {"freeze": {"trainLastBlocks": 1}}),
}


@pytest.mark.parametrize("case", PARITY)
def test_losses_equal_those_of_transformers(tmp_path: Path, folder: Path, case: str) -> None:
    """Ten steps by hand: the library's processor, forward pass, AdamW and schedule. Running statistics move where a layer is trained."""
    family, method = PARITY[case]
    model = pictures.make_model(tmp_path / "model", family)
    training = {"maxSteps": 10, "batchSize": 8, "microBatchSize": 8, "learningRate": "2e-3", "warmupSteps": 2,
                "weightDecay": "0.1", "maxGradNorm": "0.5"}  # fmt: skip
    job = make(tmp_path, model, folder, method, training=training)
    verdict = run(job, tmp_path)
    assert verdict.code == 0, verdict.message
    rows = prepared(tmp_path)
    losses, reference = by_hand(model, rows, method)
    ours = [float.fromhex(loss) for loss in tiny.losses(tmp_path / "output")]
    assert losses[-1] < losses[0] - 0.02
    np.testing.assert_allclose(ours, losses, rtol=0, atol=1e-5)
    if family == "resnet":
        saved, state, base = (
            load_file(tmp_path / "output/model.safetensors"), reference.state_dict(), load_file(model / "model.safetensors")
        )  # fmt: skip
        means = [name for name in saved if "running" in name]
        for name in means:
            torch.testing.assert_close(saved[name], state[name], rtol=1e-4, atol=1e-4)
        still = {name for name in means if torch.equal(saved[name], base[name.removeprefix("resnet.")])}
        assert still == {name for name in means if "frozen" in case and "stages.1" not in name}


def by_hand(folder: Path, rows: RowSet, method: dict[str, Any]) -> tuple[list[float], Any]:
    torch.manual_seed(42)
    classes = rows.index.classes
    model: Any = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=len(classes), id2label=dict(enumerate(classes)), attn_implementation=None
    )
    if "lora" in method:
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=["classifier"],
            exclude_modules=linear_below(model, ["classifier"]),
        )  # fmt: skip
        model = peft.get_peft_model(model, config)
    model.train()
    if "freeze" in method:
        for name, module in model.named_modules():
            if "stages.1" not in name and "classifier" not in name:
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
                module.training = False
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in trained], lr=2e-3
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: (s + 1) / 2 if s < 2 else 0.5 + 0.5 * math.cos(math.pi * (s - 2) / 8)
    )
    order = order_of(rows, 8, seed=42)
    train_rows = np.flatnonzero(rows.sources >= 0)
    assert list(train_rows) == list(range(15))
    losses = []
    steps = [step for epoch in range(5) for step in epoch_of(order, train_rows, epoch)]
    for ids in steps:
        images = [load_image(Image.open(io.BytesIO(rows.note(i)))) for i in ids]
        labels = torch.tensor([int(rows.labels_of(i)[0]) for i in ids])
        loss = cross_entropy(model(**processor(images, return_tensors="pt")).logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, model


def epoch_of(order: Any, train_rows: Any, epoch: int) -> list[list[int]]:
    own = dataclasses.replace(order, rows=train_rows, lengths=np.ones(len(order.lengths), dtype=np.int64))
    return [[int(i) for sequence in step for i in sequence] for step in own.epoch(epoch)]


CPU = torch.device("cpu")


def test_evaluation_sees_what_the_library_makes_of_the_files(tmp_path: Path, folder: Path) -> None:
    """Whatever training does to them: grey, transparent, turned and animated ones too."""
    data = tmp_path / "odd"
    for i, name in enumerate(pictures.COLOURS):
        (data / name).mkdir(parents=True)
        image = pictures.picture(name, 1)
        turned = Image.Exif()
        turned[274] = 6
        image.save(data / name / "turned.jpg", exif=turned)
        image.convert("L").save(data / name / "grey.png")
        image.convert("RGBA").rotate(20).save(data / name / "clear.webp", lossless=True)
        image.save(data / name / "moving.gif", save_all=True, append_images=[pictures.picture(name, i + 2)])
        (data / name / "Thumbs.db").write_bytes(b"no image")
    augmentation = AUGMENTED | {"horizontalFlip": "1", "cutmix": "1"}
    job = make(
        tmp_path,
        pictures.make_model(tmp_path / "model", "resnet"),
        data,
        {"full": {}},
        dataset={"augmentation": augmentation},
    )
    made = loaded(job, tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert len(made.held_out) == 12
    for row in made.held_out:
        file = made.rows.place(int(row)).removeprefix("file://")
        ours = made.objective.batch(made.rows, [np.array([row])], CPU)
        theirs = processor(load_image(file), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(ours.inputs["pixel_values"], theirs, rtol=0, atol=1e-5)
        assert made.rows.index.classes[int(ours.targets[0])] == Path(file).parent.name


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_what_is_drawn_depends_on_seed_step_and_row_alone(tmp_path: Path, folder: Path, mixing: str) -> None:
    augmentation = AUGMENTED | {"horizontalFlip": "0.5", mixing: "1"}
    model = pictures.make_model(tmp_path / "model")
    made = [
        loaded(
            make(
                tmp_path, model, folder, {"full": {}}, dataset={"augmentation": augmentation}, training={"seed": seed}
            ),
            tmp_path,
        )
        for seed in (1, 1, 2)
    ]
    first, again, other = (
        [one.objective.train_batch(one.rows, [np.array([row])], CPU, 5) for row in range(6)] for one in made
    )
    together = made[0].objective.train_batch(made[0].rows, [np.array([row]) for row in range(6)], CPU, 5)
    later = made[0].objective.train_batch(made[0].rows, [np.array([0])], CPU, 6)
    for one, same in zip(first, again, strict=True):
        assert torch.equal(one.inputs["pixel_values"], same.inputs["pixel_values"]) and torch.equal(
            one.targets, same.targets
        )
    assert torch.equal(torch.cat([one.inputs["pixel_values"] for one in first]), together.inputs["pixel_values"])
    torch.testing.assert_close(together.targets.sum(1), torch.ones(6))
    assert (together.targets.max(1).values < 0.99).any()
    assert not torch.equal(first[0].inputs["pixel_values"], later.inputs["pixel_values"]) and not torch.equal(
        first[0].inputs["pixel_values"], other[0].inputs["pixel_values"]
    )


def test_a_mixed_image_is_what_its_shares_say(tmp_path: Path) -> None:
    """One colour a class, so that shares of classes can be read from the pixels."""
    for name, colour in (("black", 0), ("white", 255)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (40, 40), (colour, colour, colour)).save(tmp_path / "data" / name / f"{i}.png")
    for mixing in ("mixup", "cutmix"):
        made = loaded(
            make(
                tmp_path,
                pictures.make_model(tmp_path / "model"),
                tmp_path / "data",
                {"full": {}},
                dataset={"augmentation": {mixing: "1"}},
            ),
            tmp_path,
        )
        batch = made.objective.train_batch(made.rows, [np.arange(16)], CPU, 0)
        white = (batch.inputs["pixel_values"].mean(dim=(1, 2, 3)) + 1) / 2  # the processor's mean and deviation are 0.5
        torch.testing.assert_close(white, batch.targets[:, 1], rtol=0, atol=1e-5)
        assert float(white.min()) > 0.02 or len(set(white.tolist())) > 6


@pytest.mark.parametrize("name", [*augment.SIGNED, *augment.UNSIGNED])
def test_operations_are_those_of_torchvision(name: str) -> None:
    from torchvision.transforms import InterpolationMode, v2

    theirs = v2.RandAugment(num_ops=1, magnitude=17)
    image = torch.from_numpy(np.array(pictures.picture("red", 3))).permute(2, 0, 1)
    scale, signed = theirs._AUGMENTATION_SPACE[name]
    magnitudes = scale(31, *image.shape[-2:])
    magnitude = 0.0 if magnitudes is None else float(magnitudes[17])
    for sign in (1, -1) if signed else (1,):
        expected = theirs._apply_image_or_video_transform(
            image, name, sign * magnitude, InterpolationMode.NEAREST, theirs._fill
        )
        ours = (augment.SIGNED | augment.UNSIGNED)[name](image, sign * 17 / 30)
        assert (ours.int() - expected.int()).abs().max() <= 1, name


def test_random_parts_fit_and_keep_their_ratio() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        height, width = (int(side) for side in draw.integers(8, 400, 2))
        top, left, h, w = augment._part(height, width, 0.3, draw)
        assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
        assert 0.6 < w / h < 1.6 or min(height, width) < 16


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_two_ranks(tmp_path: Path, folder: Path, family: str) -> None:
    """They train as one does, mixing included; where statistics are those of a rank's images, ranks at least agree on them and resume."""
    model = pictures.make_model(tmp_path / "model", family)
    found = []
    for world in (1, 2):
        job = make(
            tmp_path / str(world),
            model,
            folder,
            {"full": {}},
            dataset={"augmentation": AUGMENTED | {"mixup": "1"}},
            training={"maxSteps": 4},
        )
        verdict = run_ranks(job, tmp_path / str(world), world)
        assert verdict.code == 0, verdict.message
        found.append([float.fromhex(loss) for loss in tiny.losses(tmp_path / str(world) / "output")])
    if family == "vit":
        np.testing.assert_allclose(*found, rtol=0, atol=1e-5)
    if family == "resnet":
        saved = load_file(tmp_path / "2/output/model.safetensors")
        after = float.fromhex(tiny.losses(tmp_path / "2/output", "eval_loss_hex")[-1])
        assert math.isclose(plain_loss(tmp_path / "2/output", folder), after, abs_tol=2e-5)
        assert saved["resnet.embedder.embedder.normalization.running_mean"].abs().max() > 0


def test_two_ranks_that_have_not_as_many_forward_passes_resume_to_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    """Batch normalisation counts its own."""
    model = pictures.make_model(tmp_path / "model", "resnet")
    place, found = tmp_path / "job", []
    for stop_at in (None, 2):
        job = make(place, model, folder, {"full": {}}, training={"maxSteps": 4, "batchSize": 7, "microBatchSize": 2})
        if stop_at:
            assert run_ranks(job, place, 2, run_id="stopped", stop_at=stop_at).code == ExitCode.STOPPED
        assert run_ranks(job, place, 2).code == 0
        found.append(published(place))
        place.rename(tmp_path / str(stop_at))
    assert found[0] == found[1]


def write_table(folder: Path, kind: str) -> Path:
    """The rows of a folder as a table; its images inside, or beside it."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"picture": pictures.encoded(pictures.picture(name, i)), "kind": name}
        for name in pictures.COLOURS
        for i in range(5)
    ]
    if kind == "csv":
        pictures.write_folder(folder / "files")
        lines = ["picture,kind", *(f"files/{name}/{i}.png,{name}" for name in pictures.COLOURS for i in range(5))]
        (folder / "table.csv").write_text("\n".join(lines))
        return folder / "table.csv"
    if kind == "hugging face":
        rows = [{"picture": {"bytes": row["picture"], "path": "x.png"}, "kind": row["kind"]} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "table.parquet")
    return folder / "table.parquet"


@pytest.mark.parametrize("kind", ["csv", "hugging face", "bytes"])
def test_tables_are_the_same_images(tmp_path: Path, folder: Path, kind: str) -> None:
    model = pictures.make_model(tmp_path / "model")
    table = write_table(tmp_path, kind)
    columns = {"columns": {"image": "picture", "label": "kind"}}
    made = [
        loaded(make(tmp_path, model, data, {"full": {}}, dataset=more), tmp_path)
        for data, more in ((folder, {}), (table, columns))
    ]
    notes = [{(one.rows.note(row), int(one.rows.labels_of(row)[0])) for row in range(15)} for one in made]
    assert notes[0] == notes[1] and len(notes[0]) == 15
    if kind == "csv":  # the digest is of the images that the table names, too
        (tmp_path / "files/red/0.png").write_bytes(pictures.encoded(pictures.picture("red", 77)))
        job = make(tmp_path, model, table, {"full": {}}, dataset=columns)
        assert loaded(job, tmp_path).rows.index.digest != made[1].rows.index.digest


def damaged(tmp_path: Path, what: str) -> tuple[Path, str]:
    """Data with one bad image, and what is said of it."""
    folder = pictures.write_folder(tmp_path / "data")
    file = folder / "red/3.png"
    whole = file.read_bytes()
    content = {
        "cut off": whole[: len(whole) // 2],
        "no image": b"<html>not found</html>",
        "deep": pictures.encoded(Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16))),
    }
    if what in content:
        file.write_bytes(content[what])
        return (
            folder,
            "red/3.png: has more than 8 bits"
            if what == "deep"
            else "red/3.png: is no image, or a damaged one; correct or remove it",
        )
    row = {"image": {"missing": "nowhere.png", "climbs": "../data/red/3.png", "a number": 7}[what], "label": "red"}
    names = [{"image": f"data/{name}/0.png", "label": name} for name in pictures.COLOURS]
    table = tiny.write_rows(tmp_path / "table.jsonl", [*names, row])
    return table, "table.jsonl row 4: column 'image' " + (
        "must be bytes in all rows" if what == "a number" else "names no file in the table's folder"
    )


@pytest.mark.parametrize("what", ["cut off", "no image", "deep", "missing", "climbs", "a number"])
def test_a_bad_image_is_named(tmp_path: Path, what: str) -> None:
    data, sentence = damaged(tmp_path, what)
    verdict = run(make(tmp_path, pictures.make_model(tmp_path / "model"), data, {"full": {}}), tmp_path)
    assert (verdict.code, sentence in verdict.message) == (ExitCode.DATA_ERROR, True), verdict.message


@pytest.mark.parametrize("case", ["no processor", "other size", "ragged", "no classes"])
def test_what_cannot_work_is_said_before_training(tmp_path: Path, folder: Path, case: str) -> None:
    model = pictures.make_model(tmp_path / "model", "resnet" if case == "ragged" else "vit")
    config = model / "preprocessor_config.json"
    options: dict[str, Any] = {
        "other size": {"size": {"height": 16, "width": 16}},
        "ragged": {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 32}},
    }
    if case == "no processor":
        config.unlink()
    elif case in options:
        config.write_text(json.dumps(json.loads(config.read_text()) | options[case]))
    sentences = {
        "no processor": "holds no image processor that can be read",
        "other size": "takes images of 32 x 32 and its preprocessor_config.json makes them 16 x 16",
        "ragged": "leaves wide and tall images in sizes of their own",
        "no classes": "images (.png, .jpg",
    }
    verdict = run(make(tmp_path, model, folder / "red" if case == "no classes" else folder, {"full": {}}), tmp_path)
    assert (verdict.code, sentences[case] in verdict.message) == (ExitCode.USER_ERROR, True), verdict.message


@pytest.mark.parametrize("classes", [["cat", "dog", "owl"], [str(i) for i in range(10)]])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_head_for_other_classes_is_replaced(tmp_path: Path, folder: Path, method: str, classes: list[str]) -> None:
    """By one that is drawn as on a model without a head, also where it has as many outputs."""
    model = pictures.make_model(tmp_path / "model", "vit", classes=classes)
    job = make(tmp_path, model, folder, {method: {}}, training={"maxSteps": 3})
    stored = load_file(model / "model.safetensors")["classifier.weight"]
    head = loaded(job, tmp_path / "look").model.inner.classifier
    weight = head.modules_to_save["default"].weight if method == "lora" else head.weight
    assert weight.shape == (3, 32) and 0.05 < float(weight.detach().std()) < 0.15
    assert classes != ["cat", "dog", "owl"] or not torch.equal(weight, stored)
    assert_same_logits(trained(job, tmp_path), opened_as_its_card_says(tmp_path / "output"), tmp_path)


def test_a_head_for_these_classes_is_kept(tmp_path: Path, folder: Path) -> None:
    """Also where the rows have fewer of them, in another order."""
    classes = ["red", "yellow", "blue", "green"]
    model = pictures.make_model(tmp_path / "model", "vit", classes=classes)
    job = make(tmp_path, model, folder, {"full": {}})
    setup_ = loaded(job, tmp_path)
    assert setup_.rows.index.classes == classes
    assert torch.equal(
        setup_.model.inner.classifier.weight, load_file(model / "model.safetensors")["classifier.weight"]
    )


def test_a_merged_adapter_computes_what_was_trained(tmp_path: Path, folder: Path) -> None:
    """With the running statistics of a head that has some."""
    output = {"uri": f"file://{tmp_path}/output", "merged": True}
    job = make(tmp_path, pictures.make_model(tmp_path / "model", "levit"), folder, {"lora": {}}, output=output)
    assert_same_logits(trained(job, tmp_path), opened_as_its_card_says(tmp_path / "output"), tmp_path)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_bf16_and_the_best_step(tmp_path: Path, folder: Path, family: str) -> None:
    """What is published has the running statistics of its own step."""
    job = make(
        tmp_path, pictures.make_model(tmp_path / "model", family), folder, {"full": {}}, training={"precision": "bf16", "learningRate": "1e-2"},
        evaluation={"everySteps": 2, "metric": "eval_accuracy"}, objective={"classification": {"balanceClasses": True}},
    )  # fmt: skip
    verdict = run(job, tmp_path)
    assert verdict.code == 0, verdict.message
    assert json.loads((tmp_path / "output/config.json").read_text())["dtype"] == "float32", "as it was stored"
    record = json.loads((tmp_path / "output/finetune.json").read_text())
    assert (
        record["after"].keys() == {"eval_loss", "eval_accuracy", "eval_f1"} and record["after"]["eval_accuracy"] > 0.6
    )
    assert math.isclose(plain_loss(tmp_path / "output", folder), record["after"]["eval_loss"], abs_tol=2e-2)
