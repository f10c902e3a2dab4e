"""The published augmentation of a whole batch at once, on its device, which threads would keep waiting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fpt_lightning.data.transforms import JITTER, RATIO, SCALE, normalise
from fpt_lightning.errors import ConfigurationError

_TRIES = 10  # at a crop that fits, as albumentations makes
_NUMBERS = 2 * _TRIES + 6
_MOST_SHRINKING = 2.1  # bilinear interpolation skips pixels of images that shrink more
_GREY = (0.299, 0.587, 0.114)  # OpenCV's weights of the channels


class DeviceViews:
    """Draw ``default`` views (``fpt_lightning.data.transforms.ViewTransform``) of the low-resolution copies of a batch.

    The distribution is the same, the views that a seed draws are others. Nothing is rounded to 8 bits between steps.

    Args:
        size: side in pixels of a view.
        image_size: of a copy.
        mirror: whether half of the views are flipped horizontally.
        mean: of each channel.
        std: of each channel.
        seed: of all views.

    Raises:
        ConfigurationError: copies that are much more than twice as large as views.
    """

    def __init__(
        self, size: int, image_size: int, mirror: bool, mean: Sequence[float], std: Sequence[float], seed: int
    ) -> None:
        if image_size > _MOST_SHRINKING * size:
            raise ConfigurationError(
                f"data.augment_on is 'device', which shrinks low-resolution copies to half, but data.image_size is "
                f"{image_size} for a side resolution of {size}: set it to {2 * size}, or augment in the loader."
            )
        self.size, self.mirror, self.mean, self.std, self.seed = size, mirror, mean, std, seed

    def numbers(self, keys: Sequence[tuple[int, int]]) -> Tensor:
        """What decides the views of samples, by their (epoch, index): uniform in [0, 1), fp32, (B, 26)."""
        drawn = [np.random.default_rng([self.seed, *key]).random(_NUMBERS, np.float32) for key in keys]
        return torch.from_numpy(np.stack(drawn))

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """One view of each image, normalised.

        Args:
            images: copies (B, image size, image size, 3), uint8.
            numbers: see ``numbers``.

        Returns:
            (B, 3, size, size), fp32, on the device of the images.
        """
        boxes = crops(numbers[:, : 2 * _TRIES + 2], images.shape[1])
        flip, brightness, contrast, order = numbers[:, -4:].unbind(1)
        pixels = images.permute(0, 3, 1, 2).float().div_(255)
        views = resized_crops(pixels, boxes, self.size, (flip < 0.5) & self.mirror)
        low, high = JITTER
        brightness, contrast = low + (high - low) * brightness, low + (high - low) * contrast
        return normalise(jittered(views, brightness, contrast, order < 0.5), self.mean, self.std)


def crops(numbers: Tensor, side: int) -> Tensor:
    """Boxes of RandomResizedCrop in square images: (B, 4), left, top, width and height in whole pixels.

    Args:
        numbers: uniform in [0, 1): area and aspect of each of ten tries, then the place (B, 22).
        side: of the images in pixels.
    """
    tries, place = numbers[:, :-2].reshape(-1, 2, _TRIES), numbers[:, -2:]
    area = side**2 * (SCALE[0] + (SCALE[1] - SCALE[0]) * tries[:, 0])
    low, high = np.log(RATIO)
    ratio = torch.exp(low + (high - low) * tries[:, 1])
    sizes = torch.stack([(area * ratio).sqrt().round(), (area / ratio).sqrt().round()], 2)  # (B, tries, 2)
    fits = (sizes <= side).all(2)
    first = fits.int().argmax(1)  # the whole image, where none fits
    size = sizes.gather(1, first.view(-1, 1, 1).expand(-1, 1, 2))[:, 0].where(fits.any(1, keepdim=True), float(side))
    return torch.cat([((side - size + 1) * place).floor(), size], 1)


def resized_crops(pixels: Tensor, boxes: Tensor, size: int, flipped: Tensor) -> Tensor:
    """Boxes of images, resized bilinearly to (B, 3, size, size), as OpenCV does, and flipped.

    Args:
        pixels: (B, 3, side, side), fp32.
        boxes: (B, 4), as ``crops`` gives them.
        size: in pixels.
        flipped: which views, (B,), bool.
    """
    side = pixels.shape[-1]
    steps = (torch.arange(size, device=pixels.device) + 0.5) / size
    start, extent = boxes[:, :2, None], boxes[:, 2:, None]  # (B, 2, 1): of columns and of rows
    places = (start + extent * steps - 0.5).maximum(start).minimum(start + extent - 1)  # in the crop alone
    columns, rows = ((2 * places + 1) / side - 1).unbind(1)
    columns = columns.flip(1).where(flipped[:, None], columns)
    grid = torch.stack([columns[:, None, :].expand(-1, size, -1), rows[:, :, None].expand(-1, -1, size)], 3)
    return F.grid_sample(pixels, grid, mode="bilinear", align_corners=False)


def jittered(views: Tensor, brightness: Tensor, contrast: Tensor, brightness_first: Tensor) -> Tensor:
    """Views (B, 3, height, width) in [0, 1] times brightness, and their distance from their mean grey times contrast.

    Args:
        views: fp32.
        brightness: (B,).
        contrast: (B,).
        brightness_first: which views, (B,), bool.
    """
    brightness, factor, first = (each[:, None, None, None] for each in (brightness, contrast, brightness_first))
    views = (views * brightness.where(first, 1.0)).clamp_(0, 1)
    grey = torch.einsum("bchw,c->b", views, views.new_tensor(_GREY)) / views[0, 0].numel()
    views = (views * factor + grey[:, None, None, None] * (1 - factor)).clamp_(0, 1)
    return (views * brightness.where(~first, 1.0)).clamp_(0, 1)
