"""Training memory of every method by resolution, for ViT-B and ViT-L (the paper's table 2 and figure 2).

    python benchmarks/memory_by_resolution.py                  # predicted on fake tensors: no GPU, 30 minutes
    python benchmarks/memory_by_resolution.py --device cuda    # measured

Writes ``results/memory_by_resolution.json`` and ``.md``, with the paper's figures, and a figure for the documentation,
``docs/memory_by_resolution.png`` (``..._cuda`` with a GPU).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from environment import DOCS, RESULTS, write_result
from fpt_lightning import methods
from fpt_lightning.methods import ClassificationModule, FPTPlusModule
from fpt_lightning.methods.tuning import EncoderModule, EncoderTuningModule, build_on_meta
from fpt_lightning.planning.memory import (
    Attention,
    Precision,
    TrainingStep,
    example_batch,
    predict_training_memory,
)

CLASSES, BATCH_SIZE = 5, 16
RESOLUTIONS = (128, 256, 384, 512, 640, 768, 1024, 2048)
ENCODERS = {"ViT-B": "vit_base_patch16_384.augreg_in21k_ft_in1k", "ViT-L": "vit_large_patch16_384.augreg_in21k_ft_in1k"}
METHODS = {kind.LABEL: kind for kind in methods.METHODS.values()}
MIB = 2**20

PREDICTED = """In MiB: peak live tensor bytes of a training step (parameters, gradients, AdamW state, batch and
activations) on a CPU, predicted on fake tensors; the tests hold such predictions to real steps within 1% and to real
runs within 5%. A GPU adds its context and the allocator's reserve, some 0.5 to 2 GB. **No GPU was used.**"""
MEASURED = """In MiB: allocated / reserved by PyTorch / used on the device (its context and others included), at the
peak of three training steps after two of warm-up."""
SETTING = f"""Batch {BATCH_SIZE}, {CLASSES} classes, AdamW. FPT+ with side images of 128 pixels, 16 prompts, token ratio
0.2 and the upper half of the blocks; FPT with 224 pixels and all blocks; stored tokens in int8, widened a few images at
a time. The published code computed eager attention in fp32: compare the paper's figures with that table. Made by
`benchmarks/memory_by_resolution.py`; versions and commit are in the JSON file beside this one."""


@dataclass(frozen=True)
class Variant:
    """How a step is computed."""

    precision: Precision
    attention: Attention
    gradient_checkpointing: bool = False

    def __str__(self) -> str:
        arithmetic = {"32-true": "fp32", "bf16-mixed": "bf16 autocast"}[self.precision]
        recomputed = ", gradient checkpointing" if self.gradient_checkpointing else ""
        return f"{arithmetic}, {self.attention} attention{recomputed}"


VARIANTS = (
    Variant("32-true", "eager"),
    Variant("32-true", "fused"),
    Variant("bf16-mixed", "fused"),
    Variant("bf16-mixed", "fused", gradient_checkpointing=True),
)

PAPER: dict[tuple[str, str], dict[int, int | None]] = {  # MB on an RTX A6000 (48 GB); None: out of memory
    **{
        ("ViT-L", method): dict(zip((128, 256, 384, 512, 640), row, strict=True))  # table 2
        for method, row in {
            "Full fine-tuning": (7816, 12168, 26470, None, None),
            "Linear probing": (1640, 1884, 2778, 5066, 9716),
            "Prompt tuning": (3128, 7602, 20392, None, None),
            "Attention tuning": (4340, 8710, 21516, None, None),
            "Adapter": (3248, 7608, 20394, None, None),
            "BitFit": (3058, 7186, 20074, None, None),
            "LoRA": (3152, 7810, 21190, None, None),
            "AdaLoRA": (3142, 7806, 21056, None, None),
            "FPT": (2546, 2724, 3152, 3730, 4456),
            "FPT+": (570, 630, 718, 862, 1050),
        }.items()
    },
    **{
        ("ViT-B", method): {512: value}  # table 1
        for method, value in {
            "Full fine-tuning": 23128,
            "Linear probing": 3416,
            "Prompt tuning": 20582,
            "Attention tuning": 20792,
            "Adapter": 19360,
            "BitFit": 20382,
            "LoRA": 20970,
            "AdaLoRA": 20960,
            "FPT": 1824,
            "FPT+": 736,
        }.items()
    },
}


def make(method: str, encoder: str, variant: Variant) -> ClassificationModule:
    """A method as the table has it."""
    kind = METHODS[method]
    options: dict[str, Any] = {"gradient_checkpointing": True} if variant.gradient_checkpointing else {}
    if issubclass(kind, FPTPlusModule):
        options["prompt_head"] = False  # as published
    return kind(CLASSES, encoder=ENCODERS[encoder], pretrained=False, **options)


def cells(resolutions: Sequence[int], encoders: Sequence[str]) -> Iterator[tuple[str, str, int, Variant]]:
    """Every combination that makes sense."""
    for encoder in encoders:
        for method, kind in METHODS.items():
            for variant in VARIANTS:
                if issubclass(kind, EncoderTuningModule) or not variant.gradient_checkpointing:
                    yield from ((encoder, method, resolution, variant) for resolution in resolutions)


def learnable_percent(method: str, encoder: str) -> float:
    """By the paper's definition, at the encoder's native resolution (384)."""
    return 100 * build_on_meta(lambda: make(method, encoder, VARIANTS[0]), (384, 384)).learnable_ratio


def measured(method: str, encoder: str, resolution: int, variant: Variant) -> dict[str, int | None]:
    """Bytes on CUDA over three steps after two of warm-up; None where memory did not suffice.

    ``allocated`` and ``reserved`` are the peaks of PyTorch's allocator, ``device`` what the device counts as used, the
    CUDA context included, if no other process uses it.
    """
    size = (resolution, resolution)
    gc.collect()
    torch.cuda.empty_cache()
    try:
        module = make(method, encoder, variant)
        if isinstance(module, EncoderModule):
            module.build(size)
        module.to("cuda")
        batch = example_batch(module, size, BATCH_SIZE, device="cuda")
        step = TrainingStep(module, batch, variant.precision, variant.attention)
        step()
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return {"allocated": None, "reserved": None, "device": None}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "device": total - free,
    }


def predicted(method: str, encoder: str, resolution: int, variant: Variant) -> dict[str, int | None]:
    """Live tensor bytes of a step on fake tensors."""
    size = (resolution, resolution)
    live = predict_training_memory(
        lambda: make(method, encoder, variant),
        size,
        BATCH_SIZE,
        precision=variant.precision,
        attention=variant.attention,
    )
    return {"live": live}


def shown(value: int) -> str:
    """MiB, with a decimal where there is little."""
    return f"{value / MIB:,.{0 if value >= 10 * MIB else 1}f}"


def table(results: Sequence[dict[str, Any]], encoder: str, variant: Variant, ratios: dict[str, float]) -> list[str]:
    """Markdown lines: a row a method, a column a resolution."""
    own = [r for r in results if r["encoder"] == encoder and r["variant"] == str(variant)]
    resolutions = sorted({r["resolution"] for r in own})
    lines = [
        "| method | learnable % | " + " | ".join(str(r) for r in resolutions) + " |",
        "|---" * (2 + len(resolutions)) + "|",
    ]
    for method in METHODS:
        row = {r["resolution"]: r["bytes"] for r in own if r["method"] == method}
        if row:
            values = [
                " / ".join("out of memory" if v is None else shown(v) for v in row[r].values()) for r in resolutions
            ]
            lines.append(f"| {method} | {ratios[method]:.2f} | " + " | ".join(values) + " |")
    return lines


def paper_table(encoder: str) -> list[str]:
    """The published figures, as Markdown lines."""
    rows = {method: row for (own, method), row in PAPER.items() if own == encoder}
    resolutions = sorted({r for row in rows.values() for r in row})
    lines = [
        "| method (paper, MB) | " + " | ".join(str(r) for r in resolutions) + " |",
        "|---" * (1 + len(resolutions)) + "|",
    ]
    for method, row in rows.items():
        values = ["out of memory" if row[r] is None else f"{row[r]:,}" for r in resolutions]
        lines.append(f"| {method} | " + " | ".join(values) + " |")
    return lines


def report(results: Sequence[dict[str, Any]], encoders: Sequence[str], device: str) -> str:
    """The Markdown file."""
    kind = PREDICTED if device == "cpu" else MEASURED
    lines = ["# Training memory by resolution", "", kind, "", SETTING]
    for encoder in encoders:
        ratios = {method: learnable_percent(method, encoder) for method in METHODS}
        lines += ["", f"## {encoder} (`{ENCODERS[encoder]}`)", ""]
        lines += [*paper_table(encoder), ""]
        for variant in VARIANTS:
            lines += [f"### {variant}", "", *table(results, encoder, variant, ratios), ""]
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], encoders: Sequence[str], path: Path) -> None:
    """The paper's figure 2: memory against resolution, a line a method; the paper's own figures as crosses."""
    variants = (VARIANTS[0], VARIANTS[2])
    resolutions = sorted({r["resolution"] for r in results})
    figure = Figure(figsize=(13, 5.5 * len(encoders)), layout="constrained")
    panels = figure.subplots(len(encoders), 2, sharex=True, sharey=True, squeeze=False)
    for row, encoder in zip(panels, encoders, strict=True):
        for axes, variant in zip(row, variants, strict=True):
            for index, method in enumerate(METHODS):
                own = [
                    (r["resolution"], value / MIB)
                    for r in results
                    if (r["encoder"], r["method"], r["variant"]) == (encoder, method, str(variant))
                    and (value := next(iter(r["bytes"].values()))) is not None
                ]
                style = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else ":"}
                axes.plot(*zip(*own, strict=True), marker=".", label=method, **style)
                published = [(r, v) for r, v in PAPER.get((encoder, method), {}).items() if v is not None]
                if published and variant == variants[0]:
                    axes.plot(*zip(*published, strict=True), "x", color=style["color"])
            axes.axhline(48 * 1024, color="grey", linewidth=0.8)
            axes.set(xscale="log", yscale="log", title=f"{encoder}, {variant}")
            axes.set_xticks(resolutions, [str(r) for r in resolutions], rotation=45)
            axes.yaxis.set_major_formatter("{x:,.9g}")
            axes.minorticks_off()
            axes.tick_params(labelbottom=True, labelleft=True)
            axes.grid(alpha=0.3)
    figure.supxlabel("resolution (pixels)")
    figure.supylabel("MiB")
    lines = panels[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside right center", title="crosses: the paper\ngrey line: 48 GB")
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu predicts, cuda measures")
    parser.add_argument("--resolutions", type=int, nargs="+", default=list(RESOLUTIONS))
    parser.add_argument("--encoders", nargs="+", choices=list(ENCODERS), default=list(ENCODERS))
    parser.add_argument("--name", help="of the result files; memory_by_resolution by default")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch sees no GPU")
    name = args.name or "memory_by_resolution" + ("_cuda" if args.device == "cuda" else "")
    results = []
    for encoder, method, resolution, variant in cells(args.resolutions, args.encoders):
        find = measured if args.device == "cuda" else predicted
        found = find(method, encoder, resolution, variant)
        results.append(
            {
                "encoder": encoder,
                "method": method,
                "resolution": resolution,
                "variant": str(variant),
                **asdict(variant),
                "bytes": found,
            }
        )
        print(encoder, method, resolution, variant, {k: v and round(v / MIB) for k, v in found.items()}, flush=True)
    published = [
        {"encoder": e, "method": m, "resolution": r, "mb": mb} for (e, m), row in PAPER.items() for r, mb in row.items()
    ]
    path = write_result(name, {"batch_size": BATCH_SIZE, "classes": CLASSES, "cells": results, "paper": published})
    (RESULTS / f"{name}.md").write_text(report(results, args.encoders, args.device) + "\n")
    draw(results, args.encoders, DOCS / f"{name}.png")
    print(f"results are in {path}, and .md beside it; the figure is in {DOCS}")


if __name__ == "__main__":
    main()
