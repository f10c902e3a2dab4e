"""Reading image files and preparing them at both resolutions; the only module that imports albumentations."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from fpt_lightning.errors import ConfigurationError, ImageError
from fpt_lightning.pages import file_and_page, page_index, too_large

Augmentation = Literal["default", "strong", "none"]
AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation)
Fit = Literal["squash", "letterbox"]
FITS: tuple[str, ...] = get_args(Fit)
OnError = Literal["stop", "skip"]
DICOM_SUFFIXES = (".dcm", ".dicom")

INTERPOLATION = "bicubic, antialiased"


def read_image(path: str | Path) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Read an image file as RGB, upright.

    JPEG, PNG, TIFF, BMP and WebP; grey is repeated, palettes are looked up, transparency is dropped, the EXIF
    orientation is applied. 16-bit grey files keep their depth (the full scale is 65,535). DICOM, by its suffix or by
    its content: see ``fpt_lightning.dicom.read_dicom``.

    Args:
        path: of the file; ``scan.dcm#12`` is its page or frame 12, counted from 1.

    Returns:
        (height, width, 3), uint8 or uint16.

    Raises:
        ImageError: the file is missing, damaged, not an image, of a kind without a known scale, of several pages of
            which none is asked for, or DICOM without pydicom being installed.
    """
    name, page = file_and_page(path)
    try:
        with open(name, "rb") as file:  # opened by path, turned grey TIFFs are sheared
            return _read_dicom(file, name, page) if _is_dicom(file, name) else _read_picture(file, name, page)
    except FileNotFoundError as error:
        raise ImageError(f"the image {path} does not exist.") from error
    except ImageError:
        raise
    except Exception as error:  # Pillow's and pydicom's readers raise errors of many kinds on damaged files
        raise ImageError(f"the image {path} cannot be read: {type(error).__name__}: {error}.") from error


def _is_dicom(file: BinaryIO, path: Path) -> bool:
    head = file.read(132)
    file.seek(0)
    return path.suffix.lower() in DICOM_SUFFIXES or head[128:] == b"DICM"


def _read_dicom(file: BinaryIO, path: Path, page: int | None) -> NDArray[np.uint8] | NDArray[np.uint16]:
    try:
        from fpt_lightning.dicom import read_dicom
    except ModuleNotFoundError as error:
        if error.name != "pydicom":
            raise
        raise ImageError(f"the image {path} is DICOM: pip install 'fpt-lightning[dicom]' to read it.") from error
    return read_dicom(file, path, page)


def _read_picture(file: BinaryIO, path: Path, page: int | None) -> NDArray[np.uint8] | NDArray[np.uint16]:
    with Image.open(file) as image:
        pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a camera's JPEG with its preview
        image.seek(page_index(path, pages, page))
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("I", "F"):
            raise ImageError(f"the image {path} has 32-bit pixels, whose scale is unknown: save it with 8 or 16.")
        if upright.mode.startswith("I;16"):
            grey = np.asarray(upright).astype(np.uint16)
            return np.repeat(grey[..., None], 3, axis=2)
        if "transparency" in upright.info:
            upright = upright.convert("RGBA")
        return np.array(upright.convert("RGB"), dtype=np.uint8)


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of a data set, for the encoder and for the side network alike.

    Args:
        aspect: (height, width) of the encoder's images; their ratio counts.
        fit: ``squash`` leaves an image as it is, so that resizing changes its aspect; ``letterbox`` pads it with black,
            evenly on two sides, to the encoder's.
        crop_border: whether the dark border is cut off first (``bright_box``).

    Raises:
        ConfigurationError: an unknown fit.
    """

    aspect: tuple[int, int]
    fit: str = "squash"
    crop_border: bool = False

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ConfigurationError(f"data.fit is {self.fit!r}: choose one of {', '.join(FITS)}.")

    def __call__(self, path: str | Path) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """(height, width, 3), uint8 or uint16, as ``read_image`` gives it and raises.

        Raises:
            ImageError: also an image so thin that padding would make it larger than Pillow reads any.
        """
        return self.framed(read_image(path), str(path))

    def framed(
        self, image: NDArray[np.uint8] | NDArray[np.uint16], name: str
    ) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """The same of an image (height, width, 3) that has been read, whose name is for errors."""
        if self.crop_border:
            image = image[bright_box(image)]
        if self.fit == "squash":
            return image
        rows, columns = _padding(image.shape[:2], self.aspect)
        height, width = image.shape[:2]
        if too_large(height + sum(rows), width + sum(columns)):
            raise ImageError(f"the image {name} of {height} x {width} pixels is too thin to letterbox.")
        padded: NDArray[Any] = np.pad(image, (rows, columns, (0, 0)))
        return padded


def _padding(shape: tuple[int, ...], aspect: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows (above, below) and columns (left, right) that give (height, width) an aspect."""
    (height, width), (tall, wide) = shape, aspect
    rows, columns = max(0, round(width * tall / wide) - height), max(0, round(height * wide / tall) - width)
    return (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)


def bright_box(image: NDArray[np.uint8] | NDArray[np.uint16]) -> tuple[slice, slice]:
    """The rows and columns of an image without its dark border, such as those of fundus images and mammograms.

    They bound the pixels whose brightest channel exceeds a tenth of the image's 99th percentile, which noise, JPEG
    ringing and not quite black backgrounds stay below. Connected parts of less than a tenth of the largest one's area,
    such as burnt-in letters, do not count. Found on a copy of at most 512 pixels a side. An image where less than a
    twentieth of the area would be left is taken to be dark as a whole and stays as it is.

    Args:
        image: (height, width, 3).
    """
    import cv2

    height, width = image.shape[:2]
    scale = min(1, 512 / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA).max(axis=2)
    bright = (small > np.percentile(small, 99) / 10).astype(np.uint8)
    _, _, parts, _ = cv2.connectedComponentsWithStats(bright)
    parts = parts[1:]  # the first is the background
    parts = parts[10 * parts[:, cv2.CC_STAT_AREA] >= parts[:, cv2.CC_STAT_AREA].max(initial=0)]
    starts = parts[:, [cv2.CC_STAT_TOP, cv2.CC_STAT_LEFT]]
    stops = starts + parts[:, [cv2.CC_STAT_HEIGHT, cv2.CC_STAT_WIDTH]]
    if not len(parts):
        return slice(0, height), slice(0, width)
    (top, left), (bottom, right) = starts.min(axis=0), stops.max(axis=0)
    if 20 * (bottom - top) * (right - left) < small.size:
        return slice(0, height), slice(0, width)
    rows, columns = height / size[1], width / size[0]
    return (
        slice(int(top * rows), min(height, int(np.ceil(bottom * rows)))),
        slice(int(left * columns), min(width, int(np.ceil(right * columns)))),
    )


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


def stored_copy(image: NDArray[np.uint8] | NDArray[np.uint16], size: int) -> NDArray[np.uint8]:
    """The low-resolution copy that training augments: (size, size, 3), uint8."""
    if image.dtype == np.uint8:
        small = resize(image, (size, size))
    else:
        small = (unit_pixels(image, (size, size)) * 255).round().to(torch.uint8)
    return small.permute(1, 2, 0).contiguous().numpy()


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(pixels - mean) / std`` for each channel of (..., 3, height, width) in [0, 1]."""
    shape = (3, 1, 1)
    return (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)


def unreadable(paths: Mapping[str, Path], reader: ImageReader) -> dict[str, str]:
    """Those of the images that cannot be read, and why; each is read and decoded."""

    def reason(path: Path) -> str | None:
        try:
            reader(path)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        reasons = zip(paths, pool.map(reason, paths.values()), strict=True)
        return {name: why for name, why in reasons if why is not None}


class ImageFiles(Dataset["Tensor | str"]):
    """Image files resized for the encoder: (3, height, width) fp32 in [0, 1], or why one cannot be read."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], reader: ImageReader) -> None:
        self.paths, self.size, self.reader = paths, size, reader

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return unit_pixels(self.reader(self.paths[index]), self.size)
        except ImageError as error:
            return str(error)


def channel_statistics(
    paths: Sequence[Path],
    size: tuple[int, int],
    num_workers: int = 0,
    crop_border: bool = False,
    on_error: OnError = "stop",
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels of the images, resized to (height, width).

    The dark border counts unless it is cropped; the padding of a letterbox never does. Images that cannot be read are
    left out where ``on_error`` is ``skip``.

    Returns:
        (mean, std), rounded to 4 decimals as published ones are, for pixels in [0, 1].

    Raises:
        ImageError: images that cannot be read, all of them by name.
        ConfigurationError: a channel that never varies, whose std cannot divide.
    """
    loader = DataLoader(
        ImageFiles(paths, size, ImageReader(size, crop_border=crop_border)), batch_size=None, num_workers=num_workers
    )
    total, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    broken: list[str] = []
    for pixels in tqdm(loader, desc="mean and std of the training images", unit="image"):
        if isinstance(pixels, str):
            broken.append(pixels)
            continue
        total += pixels.double().mean((1, 2))
        squares += pixels.double().square().mean((1, 2))
    count = len(paths) - len(broken)
    if broken and (on_error == "stop" or not count):
        raise ImageError(
            f"{len(broken)} of {len(paths)} training images cannot be read:\n  " + "\n  ".join(broken) + "\nMend them, "
            "or take them out of the data set; or leave them out by data.on_error skip."
        )
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if std.min() < 1e-4:
        raise ConfigurationError(
            "data.mean and data.std are 'auto', but a channel of the training images never varies "
            f"(std {[round(v, 6) for v in std.tolist()]}): look at the images, or give numbers."
        )
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


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
        self._compose: dict[int, Any] = {}  # by interpolation

    def __call__(self, image: NDArray[np.uint8] | NDArray[np.uint16], seed: int) -> Tensor:
        """One view of an image.

        Args:
            image: (height, width, 3).
            seed: the view drawn; the same seed draws the same view in any process.

        Returns:
            (3, height, width), fp32 in [0, 1].
        """
        if self.augmentation == "none":
            return unit_pixels(image, self.size)
        interpolation = _shrinking(image.shape, self.size)
        if interpolation not in self._compose:
            self._compose[interpolation] = _albumentations(self.size, self.augmentation, self.mirror, interpolation)
        compose = self._compose[interpolation]
        compose.set_random_seed(seed)
        deep = image.dtype != np.uint8  # albumentations takes uint8, or fp32 in [0, 1]
        view = compose(image=image.astype(np.float32) / np.iinfo(image.dtype).max if deep else image)["image"]
        pixels = torch.from_numpy(view).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        return pixels if deep else pixels / 255

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_compose": {}}  # each worker process builds its own


def _shrinking(shape: tuple[int, ...], size: tuple[int, int]) -> int:
    """OpenCV's interpolation for (height, width, ...) to a size: to half, bilinear averages 2 x 2 pixels as area does.

    It takes a tenth of the time of area, which only more than halving needs.
    """
    import cv2

    halved = all(2 * small >= large for small, large in zip(size, shape[:2], strict=True))
    return int(cv2.INTER_LINEAR if halved else cv2.INTER_AREA)


def _albumentations(size: tuple[int, int], augmentation: str, mirror: bool, interpolation: int) -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for a newer version
    import albumentations as A
    import cv2

    steps = [
        A.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=(0.7, 1.3), interpolation=interpolation),
        *([A.HorizontalFlip(p=0.5)] if mirror else []),
    ]
    if augmentation == "strong":
        steps += [
            A.VerticalFlip(p=0.5),
            A.Rotate(limit=30, border_mode=cv2.BORDER_CONSTANT, p=0.5),
            A.GaussianBlur(sigma_limit=(0.1, 1.5), p=0.3),
        ]
    steps.append(A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(1, 1), hue=(0, 0), p=1.0))
    return A.Compose(steps)
