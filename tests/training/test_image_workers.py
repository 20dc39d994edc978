"""Processes that make images: the same as one makes, and none of them outlives who asked."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from finetune_trainer.data.image_workers import ImageWorkers
from finetune_trainer.data.pictures import Unreadable

from . import pictures, runs, tiny

LIKE = torch.zeros(3, 2, 2)
FILLED = partial(torch.full, LIKE.shape)
"""A maker: of a number."""
SLEEPER = """
import time, torch
from functools import partial
from finetune_trainer.data.image_workers import ImageWorkers
if __name__ == "__main__":
    workers = ImageWorkers(partial(torch.full, (3, 2, 2)), torch.zeros(3, 2, 2), 2)
    workers([(1.0,), (2.0,)])
    print(*workers._processes._processes, flush=True)
    time.sleep(600)
"""


def test_each_call_has_its_image_in_whatever_batches_they_come() -> None:
    workers = ImageWorkers(FILLED, LIKE, 3)
    before = None
    for count in (1, 2, 7, 3, 60, 1):
        made = workers([(float(i + count),) for i in range(count)])
        assert made.shape == (count, 3, 2, 2)
        assert made[:, 0, 0, 0].tolist() == [i + count for i in range(count)]
        assert before is None or before[0][:, 2, 1, 1].tolist() == before[1], "an earlier batch changed"
        before = made, made[:, 2, 1, 1].tolist()
    with pytest.raises(TypeError):
        workers([(1.0,), ("no number",)])
    assert workers([(5.0,)])[0, 0, 0, 0] == 5

    os.kill(next(iter(workers._processes._processes)), signal.SIGKILL)
    with pytest.raises(BrokenProcessPool):
        for _ in range(100):
            workers([(1.0,)] * 6)
            time.sleep(0.05)


def test_a_job_publishes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With changes drawn at random, and another image mixed in."""
    model, data = pictures.make_model(tmp_path / "model", "vit"), pictures.write_folder(tmp_path / "train")
    dataset = {"augmentation": {"randomResizedCrop": {"minScale": "0.8"}, "randAugment": {"magnitude": 4}, "mixup": "0.2"}}  # fmt: skip
    made: list[Sequence[Any]] = []

    def counted(*arguments: Any) -> Callable[..., torch.Tensor]:
        workers = ImageWorkers(*arguments)
        return lambda calls: made.append(calls) or workers(calls)  # type: ignore[func-returns-value]

    monkeypatch.setattr("finetune_trainer.data.pixels.ImageWorkers", counted)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        place = tmp_path / str(threads)
        job = tiny.job(
            place, model, data, task="image-classification", method={"lora": {}}, dataset=dataset,
            training={"maxSteps": 3, "batchSize": 8},
        )  # fmt: skip
        runs.finish(job, place)
        found.append(runs.published(place))
    assert found[0] == found[1]
    assert made


def test_none_is_left_behind_by_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "they still run"
        time.sleep(0.05)


def test_pictures_are_read_there(tmp_path: Path) -> None:
    """By the image processor of a family, which is pickled."""
    from finetune_trainer.data.pixels import Maker

    processor = pictures.image_processor("vit", 32)
    maker = Maker(processor, "RGB", 0, None, (32, 32))
    content = io.BytesIO()
    Image.effect_noise((50, 40), 60).convert("RGB").save(content, "PNG")
    workers = ImageWorkers(maker, maker(content.getvalue()), 2)
    assert torch.equal(workers([(content.getvalue(),)] * 3)[2], maker(content.getvalue()))
    with pytest.raises(Unreadable):
        workers([(b"nothing",)])
