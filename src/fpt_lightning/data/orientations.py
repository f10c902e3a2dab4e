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
_CLOSER = (0.0, 0.5, 0.9, 0.7, 1.0, 0.45, 0.8, 0.85)
"""Of each orientation: how far it goes from the whole image to the smallest part, zoomed."""
SMALLEST_PART = 0.2
"""Of each side: nearer, hardly anything would be left of an image."""
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


def check_zoom(name: str, zoom: float, orientations: int) -> None:
    """Refuse parts of images that cannot be shown.

    Args:
        name: of the option.
        zoom: the smallest part of each side that an orientation shows; 1 for the whole image.
        orientations: of each image.

    Raises:
        ConfigurationError: a zoom out of its range, or of the only orientation, which shows the whole image.
    """
    if not SMALLEST_PART <= zoom <= 1:
        raise ConfigurationError(
            f"{name} is {zoom}: give the smallest part of each side that is shown, from {SMALLEST_PART} to 1."
        )
    if zoom < 1 and orientations == 1:
        raise ConfigurationError(
            f"{name} is {zoom}, which is of further orientations: give data.orientations 2, 4 or 8."
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


def parts_shown(orientations: int, zoom: float) -> list[float]:
    """What parts of each side the further ones of several orientations show, ascending."""
    return sorted(_shown(orientation, zoom) for orientation in range(1, orientations))


def _shown(orientation: int, zoom: float) -> float:
    return 1 - (1 - zoom) * _CLOSER[orientation]


def zoomed(image: NDArray[Any], orientation: int, zoom: float) -> NDArray[Any]:
    """What an orientation shows of an image (height, width, ...) in it: a view.

    The first shows the whole image, the further ones parts of it (``parts_shown``).
    """
    (top, bottom), (left, right) = _part(image.shape[0], image.shape[1], orientation, zoom)
    return image[top:bottom, left:right]


def zoomed_pixels(pixels: Tensor, orientation: int, zoom: float) -> Tensor:
    """What an orientation shows of images (B, C, height, width) in it, at their size; bicubic.

    Tokens are then of fewer pixels, though of no more detail: parts of the files' own pixels were worth no more.
    """
    from torch.nn import functional as F

    size = pixels.shape[-2:]
    (top, bottom), (left, right) = _part(size[0], size[1], orientation, zoom)
    if (bottom - top, right - left) == tuple(size):
        return pixels
    return F.interpolate(pixels[..., top:bottom, left:right], size, mode="bicubic")


def _part(height: int, width: int, orientation: int, zoom: float) -> list[tuple[int, int]]:
    """First and last row, and column, that an orientation shows."""
    part = []
    for length, step in zip((height, width), _STEPS, strict=True):
        shown = round(length * _shown(orientation, zoom))
        start = round(step * orientation % 1 * (length - shown))
        part.append((start, start + shown))
    return part


def oriented_pixels(pixels: Tensor, orientation: int) -> Tensor:
    """Images (..., height, width) in one of their orientations, 0 to 7, as ``oriented`` has them."""
    if orientation & _EXCHANGED:
        pixels = pixels.transpose(-1, -2)
    along = [axis for bit, axis in ((_UPSIDE_DOWN, -2), (_MIRRORED, -1)) if orientation & bit]
    return pixels.flip(along) if along else pixels
