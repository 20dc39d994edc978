"""What bench/results.py measures of images: scikit-learn's handwritten digits, tiny models from random weights."""

import shutil
from pathlib import Path
from typing import Any

from result_jobs import Found, Lab, Task, Work, sources

from training import pictures


def digits(folder: Path, count: int) -> tuple[Path, Path, Found]:
    """1,797 digits of 8 x 8 pixels (UCI) as folders of images: for training, for evaluation, and what a support vector machine makes of the pixels."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    found = load_digits()
    parts = train_test_split(
        found.images[:count], found.target[:count], test_size=0.25, random_state=0, stratify=found.target[:count]
    )
    shutil.rmtree(folder, ignore_errors=True)  # of another split
    for part, images, labels in (("train", parts[0], parts[2]), ("test", parts[1], parts[3])):
        for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            file = folder / part / str(label) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * (255 / 16)).astype("uint8")).save(file)
    most = max(set(parts[2].tolist()), key=parts[2].tolist().count)
    machine = SVC(gamma=0.001).fit(parts[0].reshape(len(parts[0]), -1), parts[2])
    return folder / "train", folder / "test", {
        "majority": float((parts[3] == most).mean()),
        "svm": float(machine.score(parts[1].reshape(len(parts[1]), -1), parts[3])),
        "train": len(parts[0]),
        "held_out": len(parts[1]),
    }  # fmt: skip


def images(lab: Lab) -> dict[str, Task]:
    """A ViT and a ResNet, with and without augmentation."""
    data, test, baselines = digits(lab.folder / "digits", lab.size(1797, 120))
    folder = lab.folder / "models"
    models = {
        "ViT": pictures.make_model(folder / "vit", "vit", num_hidden_layers=4, initializer_range=0.02),
        "ResNet": pictures.make_model(folder / "resnet", "resnet"),
    }
    augmentations: dict[str, dict[str, Any]] = {
        "none": {},
        "randomResizedCrop, randAugment": {"augmentation": {"randomResizedCrop": {"minScale": "0.7"}, "randAugment": {"magnitude": 3}}},
    }  # fmt: skip

    def tuned(name: str, model: Path, dataset: dict[str, Any]) -> Work:
        return lambda: lab.run(
            f"images-{name}-{len(dataset)}", data, model=model, task="image-classification", method={"full": {}},
            dataset={**dataset, "evaluation": {"sources": sources(test)}},
            training={"epochs": "20", "batchSize": 32, "learningRate": "1e-3"},
        )  # fmt: skip

    return {"images/baselines": Task(0, lambda: baselines)} | {
        f"images/{name}, {augmentation}": Task(5, tuned(name, model, dataset))
        for augmentation, dataset in augmentations.items()
        for name, model in models.items()
    }
