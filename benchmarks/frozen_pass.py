"""Time and memory of the frozen pass beside the published code's and plain fused attention, and how both grow.

    python benchmarks/frozen_pass.py --published FOLDER     # 5 minutes on two CPU cores

FOLDER holds a stand-in for the published pass: a module ``published_encoder``, ``PublishedEncoder(resolution=...)``.
Plain is timm's ViT with fused attention, all blocks and no selection: what any frozen pass costs at least. ViT-B, one
image, fp32. Passes take turns; ratios are of the fastest turns. Writes ``results/frozen_pass.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from environment import RESULTS, environment, write_result
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import FrozenEncoder, build_encoder
from fpt_lightning.planning.memory import encoding_bytes, predict_encoding_memory
from training_step import exponent, in_turns

ENCODER, MIB = "vit_base_patch16_224.augreg_in21k", 2**20
RESOLUTIONS, LARGEST = (512, 1024), 2048
TIMED, PREDICTED = (256, 384, 512, 768, 1024), (256, 384, 512, 768, 1024, 1536, 2048)


def config() -> EncoderConfig:
    return EncoderConfig(ENCODER, pretrained=False)


def passes(resolution: int, published: bool) -> dict[str, nn.Module]:
    """Each pass by name; nothing in them learns."""
    size = (resolution, resolution)
    ours, plain = FrozenEncoder(config(), size), build_encoder(config(), size).eval().requires_grad_(False)
    cast(Any, plain).reset_classifier(0)
    made: dict[str, nn.Module] = {"FPT+": ours, "plain": plain}
    if published:
        made["published"] = importlib.import_module("published_encoder").PublishedEncoder(resolution=resolution).eval()
    return made


def compared(resolution: int, rounds: int, published: bool) -> list[dict[str, Any]]:
    """Bytes and seconds of every pass over one image."""
    made, images = passes(resolution, published), torch.randn(1, 3, resolution, resolution)
    seconds = in_turns({name: lambda m=m: m(images) for name, m in made.items()}, rounds)  # type: ignore[misc]
    rows = [
        {"pass": name, "resolution": resolution, "bytes": encoding_bytes(each, images), "seconds": seconds[name]}
        for name, each in made.items()
    ]
    for row in rows:
        print(row, flush=True)
    return rows


def growth(rounds: int) -> dict[str, Any]:
    """Predicted memory and measured seconds by resolution; exponents are of the upper half."""
    taken = [predict_encoding_memory(config(), (side, side), 1) for side in PREDICTED]
    seconds = []
    for side in TIMED:
        encoder, images = FrozenEncoder(config(), (side, side)), torch.randn(1, 3, side, side)
        seconds.append(in_turns({"": lambda e=encoder, i=images: e(i)}, rounds)[""]["fastest"])  # type: ignore[misc]
    return {
        "bytes": dict(zip(PREDICTED, taken, strict=True)),
        "bytes_exponent": exponent(PREDICTED, taken),
        "seconds": dict(zip(TIMED, seconds, strict=True)),
        "seconds_exponent": exponent(TIMED, seconds),
    }


def largest_image() -> dict[str, Any]:
    """One image of ``LARGEST`` pixels, in fact."""
    encoder, images = FrozenEncoder(config(), (LARGEST, LARGEST)), torch.randn(1, 3, LARGEST, LARGEST)
    start = time.perf_counter()
    taken = encoding_bytes(encoder, images)
    return {"resolution": LARGEST, "bytes": taken, "seconds": time.perf_counter() - start}


def report(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        "# Frozen pass",
        "",
        f"ViT-B, one image, fp32, fastest of {result['rounds']} turns; {machine['processor']}, {machine['cores']} "
        f"cores, {machine['threads']} PyTorch threads. MiB of live tensors, weights included. Plain: timm's ViT "
        "with fused attention, all blocks, no selection. Made by `benchmarks/frozen_pass.py`. No GPU was used.",
        "",
        "| pixels | pass | MiB | x published | s | x published |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in result["passes"]:
        same = [other for other in result["passes"] if other["resolution"] == row["resolution"]]
        base = next((other for other in same if other["pass"] == "published"), None)
        taken = "" if base is None else f"{row['bytes'] / base['bytes']:.2f}"
        fastest = row["seconds"]["fastest"]
        ratio = "" if base is None else f"{fastest / base['seconds']['fastest']:.2f}"
        lines.append(
            f"| {row['resolution']} | {row['pass']} | {row['bytes'] / MIB:,.0f} | {taken} | {fastest:.2f} | {ratio} |"
        )
    most, found = result["largest"], result["growth"]
    seconds = {side: f"{taken:.2f}" for side, taken in found["seconds"].items()}
    lines += [
        "",
        f"One image of {most['resolution']} pixels: {most['bytes'] / MIB:,.0f} MiB, {most['seconds']:.0f} s.",
        "",
        "| pixels | " + " | ".join(str(s) for s in PREDICTED) + " | exponent |",
        "|---" * (len(PREDICTED) + 2) + "|",
        f"| MiB (predicted) | {' | '.join(f'{v / MIB:,.0f}' for v in found['bytes'].values())} "
        f"| {found['bytes_exponent']:.2f} |",
        f"| s | {' | '.join(seconds.get(side, '') for side in PREDICTED)} | {found['seconds_exponent']:.2f} |",
        "",
        "Exponents are fitted to the upper half of the sizes; the arithmetic of attention grows with the fourth power "
        "of the resolution.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--published", help="folder with published_encoder.py")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    if args.published is not None:
        sys.path.insert(0, args.published)
    rows = [row for side in RESOLUTIONS for row in compared(side, args.rounds, args.published is not None)]
    result = {"rounds": args.rounds, "passes": rows, "largest": largest_image(), "growth": growth(args.rounds)}
    path = write_result("frozen_pass", result)
    (RESULTS / "frozen_pass.md").write_text(report({**environment(), **result}))
    print(f"results are in {path}, and .md beside it")


if __name__ == "__main__":
    main()
