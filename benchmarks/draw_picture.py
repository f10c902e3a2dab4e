"""Draw the README's picture: what the encoder sees, which of its tokens are kept, and what is left at 128 pixels.

Writes ``docs/quickstart.png``. Run from the repository's root: ``python benchmarks/draw_picture.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from numpy.typing import NDArray

from environment import DOCS, take_no_arguments
from fpt_lightning import FPTPlusModule
from fpt_lightning.data.transforms import normalise, stored_copy, unit_pixels
from fpt_lightning.datamodules.synthetic import CLASSES, fundus_image
from fpt_lightning.encoder.frozen import FrozenEncoder

ROOT = Path(__file__).parent.parent
EYE = 7


def kept_tokens(
    image: NDArray[np.uint8], encoder: FrozenEncoder, mean: list[float], std: list[float]
) -> NDArray[np.int64]:
    """How many (layer, head) pairs keep each patch: (rows, columns)."""
    pixels = normalise(unit_pixels(image, encoder.resolution), mean, std)
    indices = encoder(pixels[None]).indices
    counts = torch.bincount(indices.flatten(), minlength=encoder.tokens)[encoder.shape.prefix_tokens :]
    rows = encoder.resolution[0] // encoder.shape.patch_size[0]
    return counts.view(rows, -1).numpy()


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    take_no_arguments(__doc__, arguments)
    config = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    data = config["data"]["init_args"]
    module = FPTPlusModule(**config["model"]["init_args"])
    size, side = data["resolution"], module.side_resolution
    assert side is not None
    encoder = FrozenEncoder(module.encoder_config, (size, size))
    images = [fundus_image(row, EYE, size) for row in range(len(CLASSES))]
    kept = [kept_tokens(image, encoder, data["mean"], data["std"]) for image in images]
    pairs = len(module.encoder_config.tapped_layers) * encoder.shape.heads
    figure = Figure(figsize=(11, 9.2), layout="constrained")
    panels = figure.subplots(3, 4)
    titles = (
        f"{size} x {size}\nto the frozen encoder",
        "detail",
        "its tokens that are kept",
        f"{side} x {side}\nto the side network",
    )
    for row, (name, image, counts, axes) in enumerate(zip(CLASSES, images, kept, panels, strict=True)):
        for each, shown in zip(axes, (image, image[110:190, 120:200], image, stored_copy(image, side)), strict=True):
            each.imshow(shown, interpolation="nearest")
            each.set(xticks=[], yticks=[])
        overlaid = axes[2].imshow(
            counts,
            cmap="viridis",
            alpha=0.65,
            vmin=0,
            vmax=max(each.max() for each in kept),
            extent=(0, size, size, 0),
            interpolation="nearest",
        )
        axes[0].set_ylabel(name, fontsize=13)
        for each, title in zip(axes, titles if row == 0 else [""] * 4, strict=True):
            each.set_title(title, fontsize=12)
    key = figure.colorbar(overlaid, ax=panels, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    key.set_label(f"colour of a token: how many of the {pairs} pairs of a layer and a head keep it", fontsize=11)
    path = DOCS / "quickstart.png"
    figure.savefig(path, dpi=80)
    print(path)


if __name__ == "__main__":
    main()
