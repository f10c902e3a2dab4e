"""The eight orientations of an image: its flips and quarter turns, the symmetries of a square.

Orientation 0 is the image, 1 its mirror image, 2 and 3 these two upside down, 4 to 7 all four with rows and columns
exchanged. The first 1, 2, 4 or 8 lead to one another, so that their mean is the same for each of them; zoomed, each
shows a part of the image alone, of a size and at a place of its own, and their means differ. Training on several, and
the mean of several in evaluation, are not in the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from fpt_lightning.errors import ConfigurationError

if TYPE_CHECKING:  # `store info` starts without PyTorch
    from torch import Tensor

COUNTS = (1, 2, 4, 8)
_MIRRORED, _UPSIDE_DOWN, _EXCHANGED = 1, 2, 4  # bits of an orientation
_SHOWN = (1.0, 0.93, 0.85, 0.89, 0.81, 0.95, 0.87, 0.83)
"""Of each orientation, zoomed: the part of height and of width that it shows."""
_STEPS = (0.7549, 0.5698)
"""From one to the next, down and to the right, in parts of what is not shown: a sequence that fills a square evenly."""


def check_orientations(name: str, count: int, resolution: tuple[int, int] | None = None) -> None:
    """Refuse a number of orientations that there is not.

    Args:
        name: of the option.
        count: of the orientations.
        resolution: (height, width) of the images in pixels, where it is known.

    Raises:
        ConfigurationError: not one of ``COUNTS``, or quarter turns of images that are not square.
    """
    if count not in COUNTS:
        raise ConfigurationError(f"{name} is {count!r}: choose one of {', '.join(map(str, COUNTS))}.")
    if resolution is not None and count > _EXCHANGED and resolution[0] != resolution[1]:
        raise ConfigurationError(
            f"{name} is {count}, quarter turns among them, but images have {resolution[0]} x {resolution[1]} pixels: "
            f"give {_EXCHANGED}, or a square data.resolution."
        )


def evaluated_at_once(batch_size: int, orientations: int) -> int:
    """Images of a batch of which several orientations are evaluated, so that its inputs are as many as asked for."""
    return max(1, batch_size // orientations)


def oriented(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """A view of an image (height, width, ...) in one of its orientations, 0 to 7."""
    if orientation & _EXCHANGED:
        image = image.swapaxes(0, 1)
    if orientation & _UPSIDE_DOWN:
        image = image[::-1]
    return image[:, ::-1] if orientation & _MIRRORED else image


def zoomed(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """What an orientation shows of an image (height, width, ...) in it, zoomed: a view, 81 to 95% of each side."""
    (top, bottom), (left, right) = _part(image.shape[0], image.shape[1], orientation)
    return image[top:bottom, left:right]


def zoomed_pixels(pixels: Tensor, orientation: int) -> Tensor:
    """What an orientation shows of images (B, C, height, width) in it, zoomed, at their size; bicubic."""
    from torch.nn import functional as F

    size = pixels.shape[-2:]
    (top, bottom), (left, right) = _part(size[0], size[1], orientation)
    return F.interpolate(pixels[..., top:bottom, left:right], size, mode="bicubic") if orientation else pixels


def _part(height: int, width: int, orientation: int) -> list[tuple[int, int]]:
    """First and last row, and column, that an orientation shows."""
    part = []
    for length, step in zip((height, width), _STEPS, strict=True):
        shown = round(length * _SHOWN[orientation])
        start = round(step * orientation % 1 * (length - shown))
        part.append((start, start + shown))
    return part


def oriented_pixels(pixels: Tensor, orientation: int) -> Tensor:
    """Images (..., height, width) in one of their orientations, 0 to 7, as ``oriented`` has them."""
    if orientation & _EXCHANGED:
        pixels = pixels.transpose(-1, -2)
    along = [axis for bit, axis in ((_UPSIDE_DOWN, -2), (_MIRRORED, -1)) if orientation & bit]
    return pixels.flip(along) if along else pixels
