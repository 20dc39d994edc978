"""What tuning does to real data, beside a baseline that was not tuned: writes docs/results.md.

    PYTHONPATH=crds:trainer_image:tests python bench/results.py                  every section: three quarters of an hour on two cores
    PYTHONPATH=crds:trainer_image:tests python bench/results.py --only sft       one; the others stay as they are

A section is a function of a folder below build/results that returns its text; SECTIONS lists them. What was measured is kept there (result.json of each job), and an interrupted
run goes on. All data and the model come out of packages.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results_text
from result_jobs import run

from training import pictures

PAGE = Path(__file__).parents[1] / "docs/results.md"
BUILD = Path(__file__).parents[1] / "build/results"
HEAD = """# Results

Written by `bench/results.py`: jobs of `finetune local`, on real data that comes in packages, each beside what is reached without tuning. Small models, few rows, a few minutes on
2 CPU cores that other work kept busy (so CPU time is given: all of a job, start-up and evaluation included); one run each, with the default seed. These figures show that training learns, not what a large model can do.
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
                f"| {name} | {augmentation} | {found['before']['eval_accuracy']:.3f} | {found['after']['eval_accuracy']:.3f} | {found['after']['eval_f1']:.3f} | {found['cpu_seconds']:.0f} s |"
            )
    return f"""Handwritten digits (scikit-learn's `load_digits`, 8 x 8 pixels): 1,347 images in folders by class to train on, 450 held out. The most frequent class is right for
{majority:.3f} of them. Tiny models of random weights (`SHAPES` in `tests/training/pictures.py`, the ViT with four blocks), `method: full`, twenty epochs of AdamW at 1e-3.

| model | augmentation | accuracy before | accuracy after | macro F1 after | CPU time |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


SECTIONS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "images": ("Image classification", images),
    "classification": ("Text classification", results_text.classification),
    "sft": ("Instructions: sft", results_text.sft),
    "dpo": ("Preferences: dpo", results_text.dpo),
    "pretrain": ("A domain's texts: pretrain", results_text.pretrain),
}
"""Heading and writer by name."""


def main() -> None:
    """Writes the sections that are asked for into the page, in the order of SECTIONS."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], metavar="NAME", help=f"of {', '.join(SECTIONS)}")
    for name in parser.parse_args().only or SECTIONS:
        print(name, file=sys.stderr)
        heading, write = SECTIONS[name]
        folder = BUILD / name
        folder.mkdir(parents=True, exist_ok=True)
        text = write(folder)
        there = re.split(r"^## (.*)\n\n", PAGE.read_text(), flags=re.MULTILINE)[1:] if PAGE.exists() else []
        texts = dict(zip(there[::2], there[1::2], strict=True)) | {heading: text}
        ordered = [heading for heading, _ in SECTIONS.values() if heading in texts]
        PAGE.write_text(HEAD + "".join(f"\n## {heading}\n\n{texts[heading].strip()}\n" for heading in ordered))


if __name__ == "__main__":
    main()
