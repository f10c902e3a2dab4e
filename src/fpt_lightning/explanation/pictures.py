"""Pictures of what a model looked at, as PNG: of an image (paper, Fig. 9) and of a data set (Fig. 5, deletion)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import matplotlib
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from torch.nn import functional as F

from fpt_lightning.evaluation.estimates import Estimate
from fpt_lightning.evaluation.figures import ACCENT, MUTED, SECOND, STYLE
from fpt_lightning.files import whole_file

LARGEST = 1200
"""Pixels of the longer side of a picture's image at most."""

_TOKENS, _OPACITY = "#19e68c", 0.85
_HEAT = ListedColormap(colormaps["plasma"](np.linspace(0.2, 1, 256)))  # without its blue, which darkens
_EVEN = "line in the scale: all patches alike"
_VERDICTS = {True: ("\u2713 right", ACCENT), False: ("\u2717 wrong", SECOND)}  # blue and orange: safe for all eyes
_LEFT_OUT = 80  # characters of a name that fit above a picture

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Explanation:
    """What is drawn of one image.

    Attributes:
        pixels: (height, width, 3) in [0, 1], cropped and padded as the encoder sees it, in its own aspect
            (``shrunk``).
        selected: (rows, columns), how many heads selected each patch.
        heads: how many could.
        attention: (rows, columns), the prompts' attention to the patches in the same layer and heads.
        overlay: (rows, columns), the same over all layers and heads.
        caption: lines above the pictures: which image, what is predicted.
        right: whether the prediction is that of the label; None where that is not known or not such.
        where: which layer and heads.
        prefix: what the prefix tokens have, in words; empty for an encoder without.
    """

    pixels: NDArray[np.float32]
    selected: NDArray[np.int64]
    heads: int
    attention: Floats
    overlay: Floats
    caption: str
    right: bool | None
    where: str
    prefix: str


def draw_image(axes: Axes, explanation: Explanation) -> None:
    """The image alone."""
    _background(axes, explanation.pixels, "The image")


def draw_tokens(axes: Axes, explanation: Explanation) -> None:
    """Selected tokens: outlined where at least half of the heads selected them, and tinted by how many did."""
    found, heads = explanation.selected, explanation.heads
    _background(axes, explanation.pixels, f"Selected tokens, {explanation.where}")
    extent = _extent(explanation.pixels)
    tint = np.zeros((*found.shape, 4))
    tint[..., :3], tint[..., 3] = to_rgb(_TOKENS), 0.45 * found / heads
    axes.imshow(tint, extent=extent, interpolation="nearest")
    cell = np.array([extent[1] / found.shape[1], extent[2] / found.shape[0]])
    axes.add_collection(LineCollection(outline(2 * found >= max(heads, 2)) * cell, colors=_TOKENS, linewidths=0.9))
    if heads > 1:
        axes.set_xlabel(f"tint: how many of {heads} heads; outline: at least half of them", loc="left")
    else:
        axes.set_xlabel(f"{int(found.sum()):,} of {found.size:,} patches", loc="left")


def draw_attention(axes: Axes, explanation: Explanation) -> None:
    """The prompts' attention over the patches, patch by patch."""
    _heat(
        axes,
        explanation.pixels,
        explanation.attention,
        f"Prompts' attention, share a patch, {explanation.where}",
        smooth=False,
    )
    axes.set_xlabel("\n".join(part for part in (explanation.prefix, _EVEN) if part), loc="left")


def draw_overlay(axes: Axes, explanation: Explanation) -> None:
    """The prompts' attention averaged over layers and heads, smoothly over the image."""
    _heat(
        axes,
        explanation.pixels,
        explanation.overlay,
        "Prompts' attention, share a patch, all layers and heads",
        smooth=True,
    )
    axes.set_xlabel(_EVEN, loc="left")


_PANELS = {"image": draw_image, "tokens": draw_tokens, "attention": draw_attention, "overlay": draw_overlay}


def write_pictures(folder: Path, name: str, explanation: Explanation) -> None:
    """Write ``folder/KIND/name.png``: ``tokens``, ``attention``, ``overlay``, and a ``sheet`` of all and the image."""
    height, width = explanation.pixels.shape[:2]
    tall = float(np.clip(height / width, 0.4, 2.5))
    with matplotlib.rc_context(STYLE):
        for kind in ("tokens", "attention", "overlay"):
            figure = Figure(figsize=(6, 5.5 * tall + 0.6), layout="constrained")
            _PANELS[kind](figure.subplots(), explanation)
            _save(figure, folder / kind / f"{name}.png")
        figure = Figure(figsize=(9, 8.2 * tall + 1.5), layout="constrained")
        figure.suptitle(explanation.caption, x=0.01, ha="left", fontsize=9, linespacing=1.5)
        if explanation.right is not None:
            said, colour = _VERDICTS[explanation.right]
            figure.text(0.99, 0.995, said, ha="right", va="top", fontsize=10, fontweight="bold", color=colour)
        for axes, draw in zip(figure.subplots(2, 2).flat, _PANELS.values(), strict=True):
            draw(axes, explanation)
        _save(figure, folder / "sheet" / f"{name}.png")


def write_deletion(path: Path, fractions: Sequence[float], curves: Mapping[str, Sequence[Estimate]], note: str) -> None:
    """Write the mean score by the share of tokens deleted, a curve with its band for each order."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _plot("selected tokens deleted", "score of the predicted class")
        for (name, means), colour in zip(curves.items(), (ACCENT, MUTED, SECOND), strict=True):
            _curve(axes, fractions, means, colour, name)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.legend()
        axes.set_title(note, loc="left", fontsize=7.5)
        _save(figure, path)


def write_side_attention(path: Path, blocks: Sequence[int], shares: Sequence[Estimate], uniform: float) -> None:
    """Write the share of attention that side tokens pay to the prompts, by tapped block (Fig. 5)."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _plot("tapped block of the encoder", "side tokens' attention to the prompts")
        axes.axhline(uniform, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)), label="if all were attended alike")
        _curve(axes, blocks, shares, ACCENT, "mean over images, heads and tokens", marker="o")
        axes.set_ylim(0, 1.15 * max(uniform, *(share.value for share in shares)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend()
        _save(figure, path)


def outline(mask: NDArray[np.bool_]) -> Floats:
    """The edges between true and false cells of (rows, columns): (E, 2, 2), two ends (x, y) each, in cells."""
    padded = np.pad(mask, 1)
    rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    flat = np.stack([columns, rows, columns + 1, rows], -1)
    rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    upright = np.stack([columns, rows, columns, rows + 1], -1)
    return np.concatenate([flat, upright]).reshape(-1, 2, 2).astype(np.float64)


def shortened(name: str) -> str:
    """A name whose beginning is left out where it is too long to stand above a picture."""
    return name if len(name) <= _LEFT_OUT else f"...{name[-_LEFT_OUT:]}"


def _extent(pixels: NDArray[np.float32]) -> tuple[float, float, float, float]:
    return 0.0, float(pixels.shape[1]), float(pixels.shape[0]), 0.0


def _background(axes: Axes, pixels: NDArray[np.float32], title: str) -> None:
    axes.imshow(pixels, extent=_extent(pixels), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=8)


def _heat(axes: Axes, pixels: NDArray[np.float32], values: Floats, title: str, smooth: bool) -> None:
    """Values over the image in grey, so that colour is theirs alone; its opacity grows with them from nothing."""
    _background(axes, pixels.mean(-1), title)
    size = pixels.shape[:2]
    mode = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest-exact"}
    heat = F.interpolate(torch.from_numpy(values.astype(np.float32))[None, None], size, **mode)[0, 0].numpy()
    largest = float(heat.max()) or 1.0
    drawn = axes.imshow(heat, cmap=_HEAT, vmin=0, vmax=largest, alpha=_OPACITY * (heat / largest) ** 1.5)
    colours = cast(Figure, axes.get_figure()).colorbar(
        ScalarMappable(drawn.norm, drawn.cmap),
        cax=axes.inset_axes((1.015, 0, 0.025, 1)),
        ticks=MaxNLocator(4),
        format=PercentFormatter(1),
    )
    colours.outline.set_visible(False)
    colours.ax.axhline(float(values.mean()), color="white", linewidth=1.2)


def _plot(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def _curve(
    axes: Axes, x: Sequence[float], means: Sequence[Estimate], colour: str, label: str, marker: str = ""
) -> None:
    axes.plot(x, [mean.value for mean in means], color=colour, label=label, marker=marker, markersize=3.5)
    low, high = [mean.low for mean in means], [mean.high for mean in means]
    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
