"""What half precision changes in the frozen pass: tokens selected, their keys and values, time.

    python benchmarks/encoder_precision.py --data DIR --manifest labels.csv --out runs/codecs [--dinov2 FILE]

It takes 15 minutes. The encoders are those of ``store_codecs.py``, whose folder of weights ``--out`` may be, and DINOv2
ViT-S/14 with its own weights where they are given. Each encodes the first test images with its linear layers in fp32
and under autocast to bf16 and fp16; attention maps and norms are fp32 in all. Writes ``results/encoder_precision.json``
and ``.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from environment import RESULTS, environment, write_result
from fpt_lightning.data.images import read_image
from fpt_lightning.data.transforms import normalise, unit_pixels
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import Encoded, FrozenEncoder
from fpt_lightning.encoder.precision import HALF, PRECISIONS
from store_codecs import ENCODERS, RESOLUTION, Setting, weights
from training_step import in_turns


def spread(encoded: Encoded, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values at their tokens' places (B, L, H, N, 2, head_dim), and where they are (B, L, H, N)."""
    features = encoded.features.permute(0, 2, 3, 4, 1, 5)  # (B, L, H, T, 2, head_dim)
    places = encoded.indices[..., None, None].expand(features.shape)
    shape = (*features.shape[:3], tokens, *features.shape[4:])
    present = torch.zeros(shape[:4], dtype=torch.bool).scatter(3, encoded.indices, True)
    return torch.zeros(shape).scatter(3, places, features), present


def compared(exact: Encoded, rounded: Encoded, tokens: int) -> dict[str, Any]:
    """Share of the selected tokens that are others, by tapped layer, and relative RMS errors of what is common."""
    (one, kept), (other, also) = spread(exact, tokens), spread(rounded, tokens)
    both = kept & also
    one, other = one[both], other[both]
    keys, values = ((one - other).square().mean((0, 2)) / one.square().mean((0, 2))).sqrt().tolist()
    pooled = float((exact.pooled - rounded.pooled).norm() / exact.pooled.norm())
    others = 1 - both.sum((0, 2, 3)) / kept.sum((0, 2, 3))
    return {"other_tokens": others.tolist(), "keys": keys, "values": values, "pooled": pooled}


@torch.no_grad()
def measured(setting: Setting, label: str, config: EncoderConfig, images: int, rounds: int) -> dict[str, Any]:
    """One encoder."""
    size = (setting.resolution, setting.resolution)
    manifest = setting.data(setting.out / "none", "fp32").read_manifest()
    paths = [manifest.path(sample) for sample in manifest.split("test")[:images]]
    pixels = torch.stack([normalise(unit_pixels(read_image(path), size), [0.5] * 3, [0.25] * 3) for path in paths])
    encoders = {name: FrozenEncoder(replace(config, precision=name), size) for name in PRECISIONS}
    exact = encoders["fp32"](pixels)
    found = {name: compared(exact, encoders[name](pixels), encoders["fp32"].tokens) for name in HALF}
    seconds = in_turns({name: lambda e=e: e(pixels[:1]) for name, e in encoders.items()}, rounds)  # type: ignore[misc]
    row = {"encoder": label, **found, "seconds": {name: taken["fastest"] for name, taken in seconds.items()}}
    print(row, flush=True)
    return row


def report(rows: Sequence[dict[str, Any]], images: int, resolution: int) -> str:
    """The table."""
    machine = environment()["machine"]
    lines = [
        f"{images} images at {resolution} pixels; {machine['processor']}, {machine['cores']} cores. In percent: "
        "selected tokens that half precision replaces by others (mean, and in the first and last tapped layer), and "
        "errors relative to fp32 of the keys and values of tokens that both select, and of the pooled feature. Seconds "
        "an image beside those of fp32 on this CPU, the fastest of several turns. Made by "
        "`benchmarks/encoder_precision.py`.",
        "",
        "| encoder | precision | other tokens | first | last | keys | values | pooled | s | s, fp32 |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row, name in product(rows, HALF):
        found, seconds = row[name], row["seconds"]
        others = found["other_tokens"]
        percent = [sum(others) / len(others), others[0], others[-1], found["keys"], found["values"], found["pooled"]]
        cells = [f"{100 * value:.3f}" for value in percent] + [f"{seconds[each]:.2f}" for each in (name, "fp32")]
        lines.append(f"| {row['encoder']} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True, help="folder of the images")
    parser.add_argument("--manifest", help="CSV file instead of class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of weights")
    parser.add_argument("--dinov2", help="weights of DINOv2 ViT-S/14")
    parser.add_argument("--tuning-epochs", type=int, default=8, help="of the encoder that is fine-tuned")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resolution", type=int, default=RESOLUTION)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.data, args.manifest, args.out, 0, args.tuning_epochs, 0, args.resolution)
    encoders = {label: EncoderConfig(name, weights(setting, label)) for label, name in ENCODERS.items()}
    if args.dinov2:
        encoders["DINOv2 ViT-S"] = EncoderConfig("vit_small_patch14_dinov2", args.dinov2)
    rows = [measured(setting, label, config, args.images, args.rounds) for label, config in encoders.items()]
    path = write_result("encoder_precision", {"images": args.images, "resolution": args.resolution, "rows": rows})
    (RESULTS / "encoder_precision.md").write_text(report(rows, args.images, args.resolution) + "\n")
    print(f"results are in {path} and .md beside it")


if __name__ == "__main__":
    main()
