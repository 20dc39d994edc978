"""What tuning does to real data, beside a baseline that was not tuned: writes docs/results.md.

    PYTHONPATH=crds:trainer_image:tests python bench/results.py              every section: some minutes
    PYTHONPATH=crds:trainer_image:tests python bench/results.py images       one; the others stay as they are

A section is a function of a scratch folder that returns its text; SECTIONS lists them. All data comes out of packages: nothing is downloaded.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune_crds.resolution import Defaults, resolve
from finetune_crds.v1alpha1 import FineTuneJob
from finetune_trainer import train
from training import pictures, tiny

PAGE = Path(__file__).parents[1] / "docs/results.md"
HEAD = """# Results

Written by `bench/results.py`: jobs as a cluster runs them, on real data that comes with Python packages, each beside what is reached without tuning. Small models and a few minutes
on one CPU core: these figures show that training learns, not what a large model can do.
"""


def digits(folder: Path) -> tuple[Path, Path, float]:
    """scikit-learn's handwritten digits (1,797 of 8 x 8 pixels, UCI) as folders of images: for training, for evaluation, and the accuracy of the most frequent class."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    parts = train_test_split(found.images, found.target, test_size=0.25, random_state=0, stratify=found.target)
    for part, images, labels in (("train", parts[0], parts[2]), ("test", parts[1], parts[3])):
        for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            file = folder / part / str(label) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * (255 / 16)).astype("uint8")).save(file)
    most = max(set(parts[2].tolist()), key=parts[2].tolist().count)
    return folder / "train", folder / "test", float((parts[3] == most).mean())


def images(folder: Path) -> str:
    """Digits with a tiny ViT and a tiny ResNet from random weights, with and without augmentation."""
    data, test, majority = digits(folder / "data")
    models = {
        "ViT": pictures.make_model(folder / "vit", "vit", num_hidden_layers=4, initializer_range=0.02),
        "ResNet": pictures.make_model(folder / "resnet", "resnet"),
    }
    augmentations: dict[str, dict[str, Any]] = {
        "none": {},
        "randomResizedCrop, randAugment": {
            "augmentation": {"randomResizedCrop": {"minScale": "0.7"}, "randAugment": {"magnitude": 3}}
        },
    }
    rows = []
    for name, model in models.items():
        for augmentation, dataset in augmentations.items():
            place = folder / f"{name}-{len(dataset)}"
            found = run(
                place, model, data, task="image-classification", method={"full": {}},
                dataset=dataset | {"evaluation": {"sources": [{"uri": f"file://{test}"}]}},
                training={"epochs": "20", "batchSize": 32, "learningRate": "1e-3"},
            )  # fmt: skip
            rows.append(
                f"| {name} | {augmentation} | {found['before']['eval_accuracy']:.3f} | {found['after']['eval_accuracy']:.3f} | {found['after']['eval_f1']:.3f} | {found['seconds']:.0f} s |"
            )
    return f"""Handwritten digits (scikit-learn's `load_digits`, 8 x 8 pixels): 1,347 images in folders by class to train on, 450 held out. The most frequent class is right for
{majority:.3f} of them. Tiny models of random weights (`SHAPES` in `tests/training/pictures.py`, the ViT with four blocks), `method: full`, twenty epochs of AdamW at 1e-3.

| model | augmentation | accuracy before | accuracy after | macro F1 after | time |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


SECTIONS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "images": ("Image classification", images),
}
"""Heading and writer by name."""


def run(folder: Path, model: Path, data: Path, /, **spec: Any) -> dict[str, Any]:
    """A job from its manifest to its verdict: metrics before and after, and seconds."""
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "results", "uid": "11111111-2222-3333-4444-555555555555"},
        "spec": {
            "model": {"uri": f"file://{model}"},
            "output": {"uri": f"file://{folder}/output"},
            "resources": {"gpusPerNode": 0},
            **spec,
            "dataset": {"train": [{"uri": f"file://{data}"}], **spec.get("dataset", {})},
        },
    }
    job = resolve(FineTuneJob.model_validate(manifest), Defaults(trainer_image="local"))
    began = time.monotonic()
    verdict = train.run(job, tiny.context(job, folder / "scratch"))
    if verdict.code or verdict.evaluation is None:
        sys.exit(f"the run in {folder} failed: {verdict.message}")
    sides = {"before": verdict.evaluation.before, "after": verdict.evaluation.after}
    metrics = {side: {one.name: float(one.value) for one in listed or ()} for side, listed in sides.items()}
    return {**metrics, "seconds": time.monotonic() - began}


def main() -> None:
    """Writes the sections that are asked for into the page, in the order of SECTIONS."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("section", nargs="*", choices=[*SECTIONS, []], help="default: all")
    wanted = parser.parse_args().section or list(SECTIONS)
    torch.set_num_threads(1)  # so that the machine's other work does not matter
    there = re.split(r"^## (.*)\n\n", PAGE.read_text(), flags=re.MULTILINE)[1:] if PAGE.exists() else []
    texts = dict(zip(there[::2], there[1::2], strict=True))
    for name in wanted:
        heading, write = SECTIONS[name]
        with tempfile.TemporaryDirectory() as folder:
            texts[heading] = write(Path(folder))
        ordered = [heading for heading, _ in SECTIONS.values() if heading in texts]
        PAGE.write_text(HEAD + "".join(f"\n## {heading}\n\n{texts[heading].strip()}\n" for heading in ordered))


if __name__ == "__main__":
    main()
