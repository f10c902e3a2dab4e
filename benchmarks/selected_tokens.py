"""Where the selected tokens of a store lie: on the black background, near the border, or on the class token.

    python benchmarks/selected_tokens.py features/fundus448.zarr --name fundus_448

A patch is background where the brightest channel of the stored low-resolution copy is below ``--dark`` grey levels on
average. Writes ``results/selected_tokens_{name}.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from environment import write_result
from fpt_lightning.encoder.config import encoder_shape
from fpt_lightning.store.store import FeatureStore

RING = 2  # patches along the border


def background(copy: NDArray[np.uint8], grid: tuple[int, int], dark: float) -> NDArray[np.bool_]:
    """Which patches (rows, columns) of a low-resolution copy (side, side, 3) are darker than ``dark``."""
    brightest = copy.max(-1).astype(np.float64)
    bands = np.array_split(brightest, grid[0], axis=0)
    return np.array([[part.mean() < dark for part in np.array_split(band, grid[1], axis=1)] for band in bands])


def selected(store: FeatureStore, dark: float) -> dict[str, Any]:
    """Shares of the selected patches of each tapped layer, and of the area, as means over the images."""
    shape, resolution = encoder_shape(store.specification.encoder), store.specification.resolution
    grid = (resolution[0] // shape.patch_size[0], resolution[1] // shape.patch_size[1])
    ring = np.ones(grid, bool)
    ring[RING:-RING, RING:-RING] = False
    found: dict[str, list[Any]] = {"background": [], "border": [], "area": [], "class_token": []}
    for row in np.flatnonzero(store.done).tolist():
        indices = store.read([row], "indices")[0]  # (L, H, T)
        patches = indices - shape.prefix_tokens
        inside, places = patches >= 0, patches.clip(0)
        black = background(store.read([row], "images")[0], grid, dark)
        for name, mask in (("background", black), ("border", ring)):
            found[name].append((mask.ravel()[places] & inside).sum((1, 2)) / inside.sum((1, 2)).clip(1))
        found["area"].append(black.mean())
        found["class_token"].append((indices == 0).any(-1).mean())
    return {
        "encoder": store.specification.encoder,
        "resolution": list(resolution),
        "token_ratio": store.specification.token_ratio,
        "criterion": store.specification.criterion,
        "layers": list(store.specification.layers),
        "images": len(found["area"]),
        "dark": dark,
        "background_of_area": float(np.mean(found["area"])),
        "background_of_selected": np.mean(found["background"], 0).tolist(),
        "border_of_area": float(ring.mean()),
        "border_of_selected": np.mean(found["border"], 0).tolist(),
        "heads_with_class_token": float(np.mean(found["class_token"])) if shape.class_token else None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--dark", type=float, default=16, help="grey levels, of 255")
    args = parser.parse_args(arguments)
    path = write_result(f"selected_tokens_{args.name}", selected(FeatureStore.open(args.store), args.dark))
    print(f"results are in {path}")


if __name__ == "__main__":
    main()
