"""From pixels to what networks take: resized, normalised, augmented; the only importer of albumentations."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fpt_lightning.errors import ConfigurationError

Augmentation = Literal["default", "strong", "none"]
AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation)
SCALE, RATIO, JITTER = (0.8, 1.0), (0.7, 1.3), (0.8, 1.2)
"""Of the published set: area and aspect of crops, brightness and contrast (paper, section 4.2.1)."""


def resize(image: NDArray[np.uint8] | NDArray[np.uint16], size: tuple[int, int]) -> Tensor:
    """Resize to (height, width) in pixels without keeping the aspect; bicubic with antialiasing.

    Returns:
        (3, height, width); uint8 for a uint8 image, else fp32 in the image's own scale.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image if image.dtype == np.uint8 else image.astype(np.float32)))
    batch = pixels.permute(2, 0, 1)[None]
    if batch.shape[-2:] != size:
        batch = F.interpolate(batch, size=size, mode="bicubic", antialias=True)
    if batch.dtype != torch.uint8:
        batch = batch.clamp(0, np.iinfo(image.dtype).max)
    return batch[0]


def unit_pixels(image: NDArray[np.uint8] | NDArray[np.uint16], size: tuple[int, int]) -> Tensor:
    """The image resized to (height, width), as (3, height, width) fp32 in [0, 1]."""
    return resize(image, size).float() / float(np.iinfo(image.dtype).max)


def shrunk(image: NDArray[np.uint8] | NDArray[np.uint16], longest: int) -> NDArray[np.float32]:
    """An image (height, width, 3) at no more than ``longest`` pixels a side, in its aspect and in [0, 1]."""
    height, width = image.shape[:2]
    scale = min(1.0, longest / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return np.asarray(unit_pixels(image, size).permute(1, 2, 0).numpy())


def stored_copy(image: NDArray[np.uint8] | NDArray[np.uint16], size: int) -> NDArray[np.uint8]:
    """The low-resolution copy that training augments: (size, size, 3), uint8."""
    if image.dtype == np.uint8:
        small = resize(image, (size, size))
    else:
        small = (unit_pixels(image, (size, size)) * 255).round().to(torch.uint8)
    return small.permute(1, 2, 0).contiguous().numpy()


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor | None = None) -> Tensor:
    """``(pixels - mean) / std`` for each channel of (..., 3, height, width) in [0, 1], in ``out`` if given."""
    shape = (3, 1, 1)
    return torch.sub(pixels, pixels.new_tensor(mean).view(shape), out=out).div_(pixels.new_tensor(std).view(shape))


class ViewTransform:
    """Draw augmented views of images: of low-resolution copies for the side network, or of high-resolution images.

    ``default`` is the published set (paper, section 4.2.1): RandomResizedCrop (scale 0.8 to 1.0, ratio 0.7 to 1.3),
    horizontal flip, brightness and contrast jitter of 0.2. ``strong`` adds vertical flip, rotation and blur. ``none``
    only resizes.

    Args:
        size: (height, width) of a view in pixels, or its side.
        augmentation: ``default``, ``strong`` or ``none``.
        mirror: whether half of the views are flipped horizontally.

    Raises:
        ConfigurationError: an unknown augmentation.
    """

    def __init__(self, size: int | tuple[int, int], augmentation: str = "default", mirror: bool = True) -> None:
        if augmentation not in AUGMENTATIONS:
            raise ConfigurationError(f"augmentation is {augmentation!r}: choose one of {', '.join(AUGMENTATIONS)}.")
        self.size = (size, size) if isinstance(size, int) else size
        self.augmentation, self.mirror = augmentation, mirror
        self._steps = threading.local()  # of each thread, as they are seeded for each view: by interpolation

    def __call__(self, image: NDArray[np.uint8] | NDArray[np.uint16], seed: int) -> Tensor:
        """One view of an image.

        Args:
            image: (height, width, 3).
            seed: the view drawn; the same seed draws the same view in any process.

        Returns:
            (3, height, width), fp32 in [0, 1].
        """
        return self.draw([image], [seed])[0]

    def draw(self, images: Iterable[NDArray[Any]], seeds: Sequence[int]) -> Tensor:
        """One view of each of B images: (B, 3, height, width), fp32 in [0, 1], in any order of memory."""
        if self.augmentation == "none":
            return torch.stack([unit_pixels(image, self.size) for image in images])
        views = np.empty((len(seeds), *self.size, 3), np.float32)
        for view, image, seed in zip(views, images, seeds, strict=True):
            draw = self._drawing(image.shape)
            if image.dtype == np.uint8:
                np.divide(draw(image, seed), 255, out=view, dtype=np.float32)
            else:  # albumentations takes uint8, or fp32 in [0, 1]
                view[:] = draw(image.astype(np.float32) / np.iinfo(image.dtype).max, seed)
        return torch.from_numpy(views).permute(0, 3, 1, 2)

    def _drawing(self, shape: tuple[int, ...]) -> _Steps:
        interpolation = _shrinking(shape, self.size)
        known: dict[Any, _Steps] = self._steps.__dict__
        if interpolation not in known:
            known[interpolation] = _Steps(_albumentations(self.size, self.augmentation, self.mirror, interpolation))
        return known[interpolation]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.size, self.augmentation, self.mirror)  # each worker process builds its own steps


def _shrinking(shape: tuple[int, ...], size: tuple[int, int]) -> int:
    """OpenCV's interpolation for (height, width, ...) to a size: to half, bilinear averages 2 x 2 pixels as area does.

    It takes a tenth of the time of area, which only more than halving needs.
    """
    import cv2

    halved = all(2 * small >= large for small, large in zip(size, shape[:2], strict=True))
    return int(cv2.INTER_LINEAR if halved else cv2.INTER_AREA)


class _Steps:
    """Albumentations' transforms one after the other; its ``Compose`` does the same in three times the time."""

    def __init__(self, steps: Sequence[Any]) -> None:
        self.steps, self.random, self.generator = steps, random.Random(), np.random.Generator(np.random.PCG64())
        for step in steps:
            step.set_random_state(self.generator, self.random)

    def __call__(self, image: NDArray[Any], seed: int) -> NDArray[Any]:
        """The view of an image (height, width, 3) that the seed draws."""
        self.random.seed(seed)
        self.generator.bit_generator.state = np.random.PCG64(seed).state
        for step in self.steps:
            image = step(image=image)["image"]
        return image


def _albumentations(size: tuple[int, int], augmentation: str, mirror: bool, interpolation: int) -> list[Any]:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for a newer version
    import albumentations as A
    import cv2

    steps = [
        A.RandomResizedCrop(size, scale=SCALE, ratio=RATIO, interpolation=interpolation),
        *([A.HorizontalFlip(p=0.5)] if mirror else []),
    ]
    if augmentation == "strong":
        steps += [
            A.VerticalFlip(p=0.5),
            A.Rotate(limit=30, border_mode=cv2.BORDER_CONSTANT, p=0.5),
            A.GaussianBlur(sigma_limit=(0.1, 1.5), p=0.3),
        ]
    steps.append(A.ColorJitter(brightness=JITTER, contrast=JITTER, saturation=(1, 1), hue=(0, 0), p=1.0))
    return steps
