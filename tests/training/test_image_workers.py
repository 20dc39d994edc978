"""Processes that make images: the same as threads make, and none of them outlives who asked."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from finetune_trainer.data import pixels
from finetune_trainer.data.image_workers import ROOM, ImageWorkers, WorkersLost
from finetune_trainer.data.pictures import Unreadable
from finetune_trainer.data.pixels import Pixels

from . import pictures, runs, tiny

LIKE = {
    "mask": torch.zeros(5, dtype=torch.uint8),
    "pixels": torch.zeros(3, 2, 2),
    "shape": torch.zeros(2, dtype=torch.int64),
}


def filled(value: Any) -> dict[str, torch.Tensor]:
    """A maker: of a number."""
    made = {name: torch.full(one.shape, value) for name, one in LIKE.items()}
    return {name: one if one.is_complex() else one.to(LIKE[name].dtype) for name, one in made.items()}


PARENT = """
import time, torch
from functools import partial
from finetune_trainer.data.image_workers import ImageWorkers
if __name__ == "__main__":
    workers = ImageWorkers(partial(dict, one=torch.zeros(3)), {"one": torch.zeros(3)}, 2)
    workers([(), ()])
    print(*(process.pid for process in workers.processes), flush=True)
    time.sleep(600)
"""


def runs_still(pid: int) -> bool:
    """Neither gone nor waiting for somebody to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_each_call_has_its_image_in_whatever_batches_they_come() -> None:
    workers = ImageWorkers(filled, LIKE, 3)
    before = None
    for count in (1, 2, 7, 3, 3 * ROOM, 5 * ROOM + 1, 1):
        made = workers([(float(i + count),) for i in range(count)])
        for name, one in LIKE.items():
            wanted = torch.arange(count, 2 * count).view(-1, *[1] * one.ndim).expand(-1, *one.shape)
            assert made[name].dtype == one.dtype and torch.equal(made[name], wanted.to(one.dtype))
        assert before is None or before[0]["pixels"][:, 2, 1, 1].tolist() == before[1], "an earlier batch changed"
        before = made, made["pixels"][:, 2, 1, 1].tolist()
    for wrong in ("no number", 1 + 1j):  # of which no image is made, and one of another type
        with pytest.raises(WorkersLost, match=r"TypeError|ValueError"):
            workers([(1.0,), (wrong,)])
        assert workers([(5.0,)])["pixels"][0, 0, 0, 0] == 5

    killed = workers.processes[1]
    assert killed.pid
    os.kill(killed.pid, signal.SIGKILL)
    with pytest.raises(WorkersLost, match="was killed"):
        for _ in range(2):  # the first may have been sent before it is gone
            workers([(1.0,)] * 6)


def test_none_is_left_behind_by_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2 and all(map(runs_still, children))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(map(runs_still, children)):
        assert time.monotonic() < deadline, "they still run"
        time.sleep(0.05)


def _at_once(work: Callable[[], Any]) -> "Future[Any]":
    """In place of in_background."""
    done: Future[Any] = Future()
    done.set_result(work())
    return done


def test_a_job_publishes_the_same_bytes_also_if_a_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With changes drawn at random, and another image mixed in."""
    model, data = pictures.make_model(tmp_path / "model", "vit"), pictures.write_folder(tmp_path / "train")
    changes = {"randomResizedCrop": {"minScale": "0.8"}, "randAugment": {"magnitude": 4}, "mixup": "0.2"}
    made: list[Sequence[Any]] = []

    class Killed(ImageWorkers):
        def __call__(self, calls: Sequence[Any]) -> dict[str, torch.Tensor]:
            made.append(calls)
            if len(made) == 3:
                self.processes[0].kill()
                self.processes[0].join()
            return super().__call__(calls)

    monkeypatch.setattr(pixels, "ImageWorkers", Killed)
    monkeypatch.setattr(pixels, "in_background", _at_once)
    monkeypatch.setattr(pixels, "FIRST", 0)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        place = tmp_path / str(threads)
        job = tiny.job(
            place, model, data, task="image-classification", method={"lora": {}},
            dataset={"augmentation": changes}, training={"maxSteps": 3, "batchSize": 8},
            resources={"gpusPerNode": 0, "cpu": 4},
        )  # fmt: skip
        runs.finish(job, place)
        found.append(runs.published(place))
    assert found[0] == found[1]
    assert len(made) == 3
    assert "images are made by threads from now on: a process that makes images was killed" in caplog.text


@pytest.mark.parametrize("family", ["vit", "siglip2"])
def test_what_cannot_be_read_is_told_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Processes read what threads read, with the image processor of a family, and threads say what is wrong."""
    model, data = pictures.make_model(tmp_path / "model", family), pictures.write_folder(tmp_path / "train")
    job = tiny.job(
        tmp_path,
        model,
        data,
        task="image-classification",
        method={"lora": {}},
        resources={"gpusPerNode": 0, "cpu": "3500m"},
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(pixels, "in_background", _at_once)
    made = runs.loaded(job, tmp_path)
    processor = made.image_processor
    content = io.BytesIO()
    Image.effect_noise((50, 40), 60).convert("RGB").save(content, "PNG")
    images = [content.getvalue()] * 5
    ours = Pixels(processor, made.model.inner.config, made.spec)
    by_threads = ours.plain(images)
    assert ours._workers is None

    monkeypatch.setattr(pixels, "FIRST", 0)
    theirs = Pixels(processor, made.model.inner.config, made.spec)
    assert_close(by_threads, theirs.plain(images), rtol=0, atol=0)
    assert theirs._workers and len(theirs._workers.result().processes) == 3
    with pytest.raises(Unreadable, match="is no image"):
        theirs.plain([*images, b"nothing"])
    assert_close(by_threads, theirs.plain(images), rtol=0, atol=0)
