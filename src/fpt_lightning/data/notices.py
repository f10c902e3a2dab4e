"""What is said of an image that was read, though not as its file asks."""

from __future__ import annotations

import warnings


class ImageNotice(UserWarning):
    """An image whose file contradicts itself or leaves something out, and what was taken in its place."""


def tell(notices: list[str] | None, text: str) -> None:
    """Add a notice to those that are collected; where none are, warn."""
    if notices is None:
        warnings.warn(text, ImageNotice, stacklevel=2)
    else:
        notices.append(text)
