"""What is measured over the training images: the range of their values, their mean and standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from fpt_lightning.data.images import FULL_RANGE, ImageReader, OnError, is_deep, read_image
from fpt_lightning.data.transforms import unit_pixels
from fpt_lightning.errors import ConfigurationError, ImageError


def deep_pictures(paths: Sequence[Path]) -> list[Path]:
    """Those of the files that are 16-bit pictures, by their headers."""
    with ThreadPoolExecutor() as pool:
        return [path for path, deep in zip(paths, pool.map(is_deep, paths), strict=True) if deep]


def value_range(
    paths: Sequence[Path], max_pixels: int | None = None, on_error: OnError = "stop"
) -> tuple[float, float]:
    """The smallest and the largest value of all 16-bit pictures among the files, whose other files do not count.

    Cameras and detectors write 10, 12 or 14 bits into such files, of which hardly any were left in 8 bits. The full
    range for pictures of one value.

    Args:
        paths: of the images.
        max_pixels: that images may have.
        on_error: of images that cannot be read.

    Raises:
        ImageError: images that cannot be read, all of them by name.
    """

    def extremes(path: Path) -> tuple[int, int] | str:
        try:
            image = read_image(path, [], max_pixels=max_pixels)  # notices come when it is used
        except ImageError as error:
            return str(error)
        return int(image.min()), int(image.max())

    deep = deep_pictures(paths)
    with ThreadPoolExecutor() as pool:
        found = list(tqdm(pool.map(extremes, deep), "range of the training images", len(deep), unit="image"))
    known = [each for each in found if isinstance(each, tuple)]
    _check_readable([each for each in found if isinstance(each, str)], len(deep), on_error)
    low, high = min(each[0] for each in known), max(each[1] for each in known)
    return (float(low), float(high)) if low < high else FULL_RANGE


def _check_readable(broken: Sequence[str], count: int, on_error: OnError) -> None:
    if broken and (on_error == "stop" or len(broken) == count):
        raise ImageError(
            f"{len(broken)} of {count} training images cannot be read:\n  " + "\n  ".join(broken) + "\nMend them, "
            "or take them out of the data set; or leave them out by data.on_error skip."
        )


class ImageFiles(Dataset["Tensor | str"]):
    """Image files resized for the encoder: (3, height, width) fp32 in [0, 1], or why one cannot be read."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], reader: ImageReader) -> None:
        self.paths, self.size, self.reader = paths, size, reader

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return unit_pixels(self.reader(self.paths[index], []), self.size)  # notices come when it is used
        except ImageError as error:
            return str(error)


def channel_statistics(
    paths: Sequence[Path],
    size: tuple[int, int],
    num_workers: int = 0,
    reader: ImageReader | None = None,
    on_error: OnError = "stop",
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels of the images, resized to (height, width).

    The dark border counts unless it is cropped; the padding of a letterbox never does. Images that cannot be read are
    left out where ``on_error`` is ``skip``.

    Args:
        paths: of the images.
        size: (height, width).
        num_workers: processes that read.
        reader: of the images; one that takes them as they are by default.
        on_error: of images that cannot be read.

    Returns:
        (mean, std), rounded to 4 decimals as published ones are, for pixels in [0, 1].

    Raises:
        ImageError: images that cannot be read, all of them by name.
        ConfigurationError: a channel that never varies, whose std cannot divide.
    """
    unpadded = ImageReader(size) if reader is None else replace(reader, fit="squash")
    loader = DataLoader(ImageFiles(paths, size, unpadded), batch_size=None, num_workers=num_workers)
    total, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    broken: list[str] = []
    for pixels in tqdm(loader, desc="mean and std of the training images", unit="image"):
        if isinstance(pixels, str):
            broken.append(pixels)
            continue
        total += pixels.double().mean((1, 2))
        squares += pixels.double().square().mean((1, 2))
    count = len(paths) - len(broken)
    _check_readable(broken, len(paths), on_error)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if std.min() < 1e-4:
        raise ConfigurationError(
            "data.mean and data.std are 'auto', but a channel of the training images never varies "
            f"(std {[round(v, 6) for v in std.tolist()]}): look at the images, or give numbers."
        )
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())
