"""Windows of grey values that a data set is given in place of those of its files' headers."""

from __future__ import annotations

import math

from fpt_lightning.errors import ConfigurationError


def centre_and_width(window: str) -> tuple[float, float] | None:
    """Of a window ``centre,width``; None for ``header`` and ``full``.

    Raises:
        ConfigurationError: another text, or no width.
    """
    if window in ("header", "full"):
        return None
    try:
        centre, width = (float(number) for number in window.split(","))
    except ValueError:
        centre, width = math.nan, math.nan
    if not (math.isfinite(centre) and 0 < width < math.inf):
        raise ConfigurationError(f"data.window is {window!r}: give header, full, or [centre, width], a width above 0.")
    return centre, width
