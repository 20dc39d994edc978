"""Images as a model takes them: decoded, scaled and normalised by its own image processor, and for training changed at random.

What is drawn for an image is a function of (seed, step, row) and of nothing else, so it is the same for any number of ranks, any
micro-batch and after any resume. Called by objectives.
"""

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from finetune_crds import quantities
from finetune_crds.resolved import ResolvedAugmentation, ResolvedFineTune

from ..errors import UserError
from ..modelling import anatomy
from .image_workers import Call, Images, ImageWorkers
from .pictures import opened

T = TypeVar("T")

log = logging.getLogger("finetune.pixels")

FEW: Final = 2
"""Processors with which threads are as fast."""
MOST: Final = 16
"""Processes of a rank. Each takes 50 MiB of its own, and all together 400 (as measured with images of 224 x 224)."""
FIRST: Final = 1000
"""Images that threads make before processes are started, which takes seconds: small jobs and preflights do without."""
_DRAWN: Final = 4
"""Of the seed's streams the one for images (see order and train)."""
_PROBES: Final = ((320, 240), (240, 320))


class Pixels:
    """A model's image processor, with what training does besides."""

    def __init__(self, processor: Any, config: Any, spec: ResolvedFineTune) -> None:
        """Args: processor: of load_image_processor; config: of the model; spec: the job's."""
        mode = anatomy.mode(config)
        self._maker = Maker(
            processor, mode, anatomy.of(config.model_type).inputs, spec.training.seed, spec.dataset.augmentation
        )
        self._like = _like(self._maker, mode)
        self.size = _size(self._like)
        """Height and width of what the model gets of an image, where that is of one size."""
        if anatomy.takes_pixels(config):
            self._maker = replace(self._maker, size=self.size)
        cpus = quantities.amount(str(spec.resources.cpu)) / max(1, spec.resources.gpus_per_node)
        self._processors = max(1, min(int(cpus), torch.get_num_threads(), MOST))
        self._threads = ThreadPoolExecutor(self._processors, "pixels", initializer=_be_one_thread)
        self._workers: Future[ImageWorkers] | None = None
        self._made = 0

    def plain(self, images: Sequence[bytes]) -> Images:
        """As the processor makes them of files."""
        return self._images([(image,) for image in images])

    def augmented(self, images: Sequence[bytes], step: int, keys: Sequence[Sequence[int]]) -> Images:
        """The same with random changes; `keys` tell images of one step apart."""
        return self._images([(image, step, *key) for image, key in zip(images, keys, strict=True)])

    def draw(self, step: int, *key: int) -> np.random.Generator:
        """What is drawn for one image of a step."""
        return self._maker.draw(step, *key)

    def _images(self, calls: Sequence[Call]) -> Images:
        """By threads until there are processes, and when there are none any more: the same images."""
        self._made += len(calls)
        if self._workers is None and self._processors > FEW and self._made > FIRST:
            imports = (__name__, type(self._maker.processor).__module__)
            self._workers = in_background(lambda: ImageWorkers(self._maker, self._like, self._processors, imports))
        if self._workers is not None and self._workers.done():
            try:
                return self._workers.result()(calls)
            except Exception as error:
                log.warning("images are made by threads from now on: %s", error)
                self._workers, self._processors = None, 0  # no others either
        made = list(self._threads.map(lambda call: self._maker(*call), calls))
        return {name: torch.stack([one[name] for one in made]) for name in self._like}


def in_background(work: Callable[[], T]) -> Future[T]:
    """What a function gives, once it has ended."""
    once = ThreadPoolExecutor(1)
    future = once.submit(work)
    once.shutdown(wait=False)
    return future


@dataclass(frozen=True)
class Maker:
    """What makes an image of a file's bytes, here or in another process."""

    processor: Any
    mode: Literal["RGB", "L"]
    inputs: tuple[str, ...]
    """What is made of an image."""
    seed: int
    augmentation: ResolvedAugmentation | None
    size: tuple[int, int] | None = None
    """What random parts are scaled to; None: the processor scales them."""

    def __call__(self, image: bytes, step: int | None = None, *key: int) -> Images:
        """What is made of an image: as the processor does, or of a step with random changes."""
        return self._plain(image) if step is None or self.augmentation is None else self._changed(image, step, *key)

    def draw(self, step: int, *key: int) -> np.random.Generator:
        """What is drawn for one image of a step."""
        return np.random.default_rng([self.seed, _DRAWN, step, *key])

    def _plain(self, image: bytes) -> Images:
        return self.processed(opened(image, self.mode))

    def _changed(self, image: bytes, step: int, *key: int) -> Images:
        from torchvision.transforms.v2 import functional

        from . import augment

        chosen = self.augmentation
        assert chosen
        draw = self.draw(step, *key)
        pixels: Tensor = functional.pil_to_tensor(opened(image, self.mode))
        if chosen.random_resized_crop:
            smallest = float(chosen.random_resized_crop.min_scale)
            pixels = augment.random_resized_crop(pixels, self.size, smallest, self._interpolation, draw)
        if draw.random() < float(chosen.horizontal_flip or 0):
            pixels = functional.horizontal_flip(pixels)
        if chosen.rand_augment:
            strength = chosen.rand_augment
            pixels = augment.rand_augment(pixels, strength.operations, strength.magnitude, draw)
        cut = {"do_resize": False, "do_center_crop": False} if chosen.random_resized_crop and self.size else {}
        return self.processed(pixels, input_data_format="channels_first", **cut)

    def processed(self, image: Any, **options: Any) -> Images:
        """What the processor makes of an image."""
        made = self.processor(image, return_tensors="pt", **options)
        return {name: made[name][0] for name in self.inputs}

    @property
    def _interpolation(self) -> Any:
        from torchvision.transforms import InterpolationMode
        from transformers.image_utils import PILImageResampling, pil_torch_interpolation_mapping

        resample = getattr(self.processor, "resample", None)
        return (
            InterpolationMode.BILINEAR
            if resample is None
            else pil_torch_interpolation_mapping[PILImageResampling(resample)]
        )


def _be_one_thread() -> None:
    """Of threads that compute side by side none takes all processors: the limit is the calling thread's own, once torch has set its."""
    from threadpoolctl import threadpool_limits

    torch.get_num_threads()
    threadpool_limits(1, "openmp")


def _like(maker: Maker, mode: str) -> Images:
    """What becomes of an image. A wide and a tall one must be of one size, or they could not be in one batch."""
    from PIL import Image

    wide, tall = (maker.processed(Image.new(mode, size)) for size in _PROBES)
    if any(wide[name].shape != tall[name].shape for name in wide):
        raise UserError(
            "spec.model: its preprocessor_config.json leaves wide and tall images in sizes of their own; add do_center_crop with crop_size, or a size with height and width"
        )
    return wide


def _size(like: Images) -> tuple[int, int] | None:
    """Height and width of an image, of which a model gets pixels or a sequence of colours; patches with their places are of any."""
    if set(like) == {anatomy.PIXELS}:
        height, width = like[anatomy.PIXELS].shape[-2:]
        return height, width
    if anatomy.COLOURS not in like:
        return None
    side = math.isqrt(len(like[anatomy.COLOURS]))
    return side, side
