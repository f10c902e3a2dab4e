"""Which page or frame of an image file is meant (``scan.dcm#12``), and how large it may be."""

from __future__ import annotations

import math
import os
from pathlib import Path

from PIL import Image

from fpt_lightning.errors import ImageError


def file_and_page(path: str | Path) -> tuple[Path, int | None]:
    """The file that an image's path names, and which of its pages or frames, counted from 1; None where not said.

    ``scan.dcm#12`` is frame 12 of ``scan.dcm``, unless there is a file of that very name.
    """
    file, page = named_page(os.fspath(path))
    if page is None or os.path.isfile(path):
        return Path(path), None
    return Path(file), page


def named_page(path: str) -> tuple[str, int | None]:
    """The same by the name alone, whatever files there are."""
    file, _, page = path.rpartition("#")
    if file and not file.endswith("/") and page.isdecimal() and len(page) < 10:
        return file, int(page)
    return path, None


def page_index(path: str | Path, pages: int, page: int | None) -> int:
    """The index, from 0, of the page that is asked for.

    Raises:
        ImageError: none is asked for where there are several, or there is no such page.
    """
    if page is None and pages > 1:
        raise ImageError(
            f"the image {path} has {pages} pages or frames: ask for one in the manifest, counted from 1, as "
            f"{Path(path).name}#1, or save the one wanted alone."
        )
    if page is not None and not 1 <= page <= pages:
        raise ImageError(f"the image {path} has {pages} pages or frames, counted from 1: it has no {page}.")
    return 0 if page is None else page - 1


def largest() -> float:
    """How many pixels Pillow reads at most: its guard against small files that fill the memory."""
    return math.inf if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def allow(pixels: int) -> None:
    """Raise the limit to a number of pixels, in this process."""
    if pixels > largest():
        Image.MAX_IMAGE_PIXELS = -(-pixels // 2)


def too_large(height: int, width: int) -> bool:
    """Whether an image has more pixels than Pillow reads."""
    return height * width > largest()
