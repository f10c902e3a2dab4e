"""Draw the documentation's figure: from images to logits, with the shape of everything that passes.

Writes ``docs/overview.svg``. Run from the repository's root: ``python benchmarks/draw_overview.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from environment import DOCS, take_no_arguments

PATH = DOCS / "overview.svg"
FROZEN, LEARNS, DATA = "#d6e4f0", "#fbe3c0", "#eeeeee"
HEIGHT = 1.5


def box(axes: Axes, x: float, y: float, width: float, colour: str, title: str, text: str) -> None:
    """A rounded box whose lower left corner is (x, y), with a title and what is in it below that."""
    shape = FancyBboxPatch((x, y), width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec="#555555")
    axes.add_patch(shape)
    axes.text(x + width / 2, y + HEIGHT - 0.32, title, ha="center", va="center", fontsize=11, weight="bold")
    axes.text(x + width / 2, y + (HEIGHT - 0.45) / 2, text, ha="center", va="center", fontsize=9, linespacing=1.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": "#333333", "lw": 1.4})
    if text:
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        down = start[0] == end[0]
        axes.text(
            middle[0] + (0.12 if down else 0),
            middle[1] + (0 if down else 0.13),
            text,
            ha="left" if down else "center",
            va="center" if down else "bottom",
            fontsize=9,
        )


def draw(axes: Axes) -> None:
    upper, lower = 3.5, 0.2
    axes.text(0, upper + HEIGHT + 0.3, "Once an image, without gradient", fontsize=12, color="#2b5d8a", weight="bold")
    axes.text(0, lower + HEIGHT + 0.3, "Every training step", fontsize=12, color="#a86a00", weight="bold")
    box(axes, 0, upper, 2.1, DATA, "image", "512 x 512\nnot augmented")
    box(axes, 3.3, upper, 2.9, FROZEN, "frozen ViT", "keys and values of L blocks\n(L, H, N, D/H)")
    box(axes, 7.6, upper, 2.9, FROZEN, "selection", "T tokens a head, by the\nmean attention they get")
    box(axes, 11.9, upper, 2.9, DATA, "store (Zarr)", "(2, L, H, T, D/H), int8\nand a 256 x 256 copy")
    box(axes, 11.9, lower, 2.9, LEARNS, "fusion", "prompts (L, M, D) ask\nthe tokens; D to d, shared")
    box(axes, 3.3, lower, 2.9, DATA, "low-resolution image", "128 x 128\naugmented")
    box(axes, 7.6, lower, 2.9, LEARNS, "side ViT", "L blocks of width d\nblock l reads prompts l")
    box(axes, 0, lower, 2.1, DATA, "logits", "(B, classes)")
    up, down = upper + HEIGHT / 2, lower + HEIGHT / 2
    arrow(axes, (2.1, up), (3.3, up), "N tokens")
    arrow(axes, (6.2, up), (7.6, up), "K, V")
    arrow(axes, (10.5, up), (11.9, up), "T of N")
    arrow(axes, (13.35, upper), (13.35, lower + HEIGHT), "tokens\nof B images")
    arrow(axes, (11.9, down), (10.5, down), "L x (B, M, d)")
    arrow(axes, (6.2, down), (7.6, down), "(B, 3, s, s)")
    axes.plot([12.4, 12.4, 4.75], [upper, upper - 0.55, upper - 0.55], color="#333333", lw=1.4)
    arrow(axes, (4.75, upper - 0.55), (4.75, lower + HEIGHT))
    axes.text(8.6, upper - 0.5, "copies", ha="center", va="bottom", fontsize=9)
    axes.plot([9.05, 9.05, 1.05], [lower, lower - 0.4, lower - 0.4], color="#333333", lw=1.4)
    arrow(axes, (1.05, lower - 0.4), (1.05, lower))
    for number, (colour, text) in enumerate(((FROZEN, "frozen"), (LEARNS, "learns"), (DATA, "data"))):
        axes.add_patch(
            FancyBboxPatch((9.2 + 1.9 * number, 5.55), 0.3, 0.2, boxstyle="square,pad=0", fc=colour, ec="#555555")
        )
        axes.text(9.65 + 1.9 * number, 5.65, text, va="center", fontsize=10)
    axes.set(xlim=(-0.1, 14.9), ylim=(-0.35, 5.95), aspect="equal")
    axes.axis("off")


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    take_no_arguments(__doc__, arguments)
    matplotlib.rcParams["svg.hashsalt"] = "fpt-lightning"  # the same file every time
    figure = Figure(figsize=(13, 5.5), layout="constrained", facecolor="white")
    draw(figure.subplots())
    figure.savefig(PATH, metadata={"Date": None})
    print(PATH)


if __name__ == "__main__":
    main()
