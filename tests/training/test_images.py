"""Classes of images: every family and method, parity with transformers, what is drawn at random, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers.image_utils import load_image

from finetune_crds.support import FAMILIES
from finetune_crds.verdict import ExitCode
from finetune_trainer import setup, train
from finetune_trainer.data import augment
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.methods.layers import linear_below
from finetune_trainer.setup import Setup

from . import pictures, tiny
from .spawn import run_ranks
from .test_methods import opened_as_its_card_says
from .test_parity import order_of

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "freeze": {"trainLastBlocks": 1},
    "gradualUnfreezing": {"everySteps": 3},
    "lora": {"dropout": "0.1"},
    "adapter": {"placement": "houlsby"},
    "ia3": {},
}
AUGMENTED = {"randomResizedCrop": {"minScale": "0.8"}, "randAugment": {"magnitude": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write_folder(tmp_path_factory.mktemp("images") / "train")


def make(tmp_path: Path, model: Path, data: Path, method: dict[str, Any], /, **spec: Any) -> Any:
    """A job that is evaluated on what it trains on."""
    training = {"maxSteps": 20, "batchSize": 12, "learningRate": "3e-3"} | spec.pop("training", {})
    dataset = {"evaluation": {"sources": [{"uri": f"file://{data}"}]}} | spec.pop("dataset", {})
    return tiny.job(
        tmp_path, model, data, task="image-classification", method=method, training=training, dataset=dataset, **spec
    )


def run(job: Any, folder: Path, **options: Any) -> Any:
    return train.run(job, tiny.context(job, folder / "scratch", **options))


def loaded(job: Any, folder: Path) -> Setup:
    context = tiny.context(job, folder / "scratch")
    return setup.load(setup.read(job.spec, context), context.ranks)


CELLS = [
    pytest.param(family, method, id=f"{family}-{method}")
    for family, known in FAMILIES.items()
    if "image-classification" in known.tasks
    for method in known.methods
]


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_every_cell_learns_resumes_and_opens_as_its_card_says(
    tmp_path: Path, folder: Path, family: str, method: str
) -> None:
    """With augmentation: a stopped run ends with the same bytes, and the plain library finds the held-out loss from the files."""
    model = pictures.make_model(tmp_path / "model", family)
    files = []
    for name, stop_at in (("whole", None), ("stopped", 7)):
        rate = "1e-2" if method in ("lora", "ia3", "adapter") else "3e-3"
        job = make(
            tmp_path / name, model, folder, {method: METHODS[method]}, training={"learningRate": rate},
            dataset={"augmentation": AUGMENTED | {"mixup": "0.2"}},
        )  # fmt: skip
        if stop_at:
            stopped = run(job, tmp_path / name, reporter=tiny.Recorder(stop_at=stop_at))
            assert stopped.code == ExitCode.STOPPED and stopped.step, stopped.message
        verdict = run(job, tmp_path / name, run_id="second")
        assert verdict.code == 0, verdict.message
        assert verdict.tokens_per_second is None and verdict.inputs.tokens is None
        files.append(json.loads((tmp_path / name / "output/finetune.json").read_text())["files"])
    assert files[0] == files[1]
    before, after = (float.fromhex(loss) for loss in tiny.losses(tmp_path / "whole/output", "eval_loss_hex"))
    assert after < before - 0.02
    assert math.isclose(plain_loss(tmp_path / "whole/output", folder), after, abs_tol=2e-5)


def plain_loss(output: Path, folder: Path) -> float:
    """Mean over the files, each alone, by the code of the card."""
    model = opened_as_its_card_says(output).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(output)
    losses = []
    for file in sorted(folder.glob("*/*.png")):
        with torch.no_grad():
            logits = model(**processor(load_image(str(file)), return_tensors="pt")).logits
        losses.append(float(cross_entropy(logits, torch.tensor([model.config.label2id[file.parent.name]]))))
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
    training = {"maxSteps": 10, "batchSize": 12, "microBatchSize": 12, "learningRate": "2e-3", "warmupSteps": 2,
                "weightDecay": "0.1", "maxGradNorm": "0.5"}  # fmt: skip
    job = make(tmp_path, model, folder, method, training=training)
    verdict = run(job, tmp_path)
    assert verdict.code == 0, verdict.message
    rows = RowSet.open(next((tmp_path / "scratch/prepared").iterdir()))
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
    order = order_of(rows, 12, seed=42)
    train_rows, _ = rows.split(0)
    assert list(train_rows) == list(range(24))
    losses = []
    steps = [step for epoch in range(5) for step in epoch_of(order, train_rows, epoch)]
    for ids in steps:
        images = [load_image(pil(rows.note(i))) for i in ids]
        labels = torch.tensor([int(rows.labels_of(i)[0]) for i in ids])
        loss = cross_entropy(model(**processor(images, return_tensors="pt")).logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, model


def pil(content: bytes) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(content))


def epoch_of(order: Any, train_rows: Any, epoch: int) -> list[list[int]]:
    import dataclasses

    own = dataclasses.replace(order, rows=train_rows, lengths=np.ones(len(order.lengths), dtype=np.int64))
    return [[int(i) for sequence in step for i in sequence] for step in own.epoch(epoch)]
