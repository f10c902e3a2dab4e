"""Time and memory of a training step of FPT+ beside the published code's, and how both grow.

    python benchmarks/training_step.py --published FOLDER     # 4 minutes on two CPU cores

FOLDER holds a stand-in for the published step: a module ``published_step`` whose ``published_step(batch_size, tokens)``
returns a ready step, its model, optimiser and batch. Without it, FPT+ is measured alone. Steps take turns, so that
other work on the machine slows all of them; ratios are of the fastest turns. Writes ``results/training_step.json`` and
``.md``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor, nn, optim

from environment import RESULTS, environment, write_result
from fpt_lightning.methods import FPTPlusModule
from fpt_lightning.planning.memory import (
    LiveTensorBytes,
    Precision,
    TrainingStep,
    example_batch,
    predict_training_memory,
)

ENCODER, CLASSES, MIB = "vit_base_patch16_224.augreg_in21k", 5, 2**20
CODECS = ("fp32", "fp16", "int8", "int4")
DEFAULT = ("int8", False)
PUBLISHED_MIB = 344.7  # what the published code itself was measured to take
BATCHES, RESOLUTIONS = (1, 2, 4, 8, 16, 32, 64, 128), (256, 384, 512, 768, 1024, 1536, 2048)


def make(gradient_checkpointing: bool) -> FPTPlusModule:
    """FPT+ as the paper sets it."""
    return FPTPlusModule(
        CLASSES,
        encoder=ENCODER,
        pretrained=False,
        prompt_head=False,  # as published
        gradient_checkpointing=gradient_checkpointing,
    )


def steps(batch_size: int = 16, resolution: int = 512) -> dict[str, TrainingStep]:
    """A step of each codec, with and without gradient checkpointing, in fp32."""
    made = {}
    for codec, saving in product(CODECS, (False, True)):
        module = make(saving)
        made[name_of(codec, saving)] = TrainingStep(
            module, example_batch(module, (resolution, resolution), batch_size, codec=codec)
        )
    return made


def name_of(codec: str, saving: bool) -> str:
    return codec + (", gradient checkpointing" if saving else "")


def in_turns(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Fastest and median seconds of each, after a round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: {"fastest": min(s), "median": float(np.median(s))} for name, s in seconds.items()}


def live_bytes(step: Callable[[], Any], model: nn.Module, optimizer: optim.Optimizer, batch: Sequence[Tensor]) -> int:
    """Peak live tensor bytes of a published step, counted as ``TrainingStep.live_bytes`` counts."""
    step()
    with LiveTensorBytes() as live:
        live.count([list(model.parameters()), [p.grad for p in model.parameters()], batch])
        live.count(list(optimizer.state.values()))
        step()
    peak: int = live.peak
    return peak


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of the power law that fits the upper half of the sizes."""
    upper = len(sizes) // 2
    slope, _ = np.polyfit(np.log(sizes[upper:]), np.log(values[upper:]), 1)
    return float(slope)


def memory(resolution: int, batch_size: int, codec: str, saving: bool, precision: Precision = "32-true") -> int:
    """Predicted peak live bytes; the tests hold predictions to real steps within 1%."""
    return predict_training_memory(
        lambda: make(saving), (resolution, resolution), batch_size, precision=precision, codec=codec
    )


def growth() -> dict[str, Any]:
    """Predicted memory by batch size and by resolution, of both ends of the trade."""
    found: dict[str, Any] = {}
    for codec, saving in (DEFAULT, ("int4", True)):
        by_batch = [memory(512, batch, codec, saving) for batch in BATCHES]
        by_resolution = [memory(resolution, 16, codec, saving) for resolution in RESOLUTIONS]
        found[name_of(codec, saving)] = {
            "batch": dict(zip(BATCHES, by_batch, strict=True)),
            "batch_exponent": exponent(BATCHES, by_batch),
            "resolution": dict(zip(RESOLUTIONS, by_resolution, strict=True)),
            "resolution_exponent": exponent(RESOLUTIONS, by_resolution),
        }
    return found


def time_growth(rounds: int) -> dict[str, Any]:
    """Seconds of a step of the default by batch size."""
    functions = {}
    for batch in BATCHES[:6]:
        module = make(DEFAULT[1])
        functions[str(batch)] = TrainingStep(module, example_batch(module, (512, 512), batch, codec=DEFAULT[0]))
    seconds = {int(batch): found["fastest"] for batch, found in in_turns(functions, rounds).items()}
    return {"seconds": seconds, "exponent": exponent(list(seconds), list(seconds.values()))}


def report(result: Mapping[str, Any]) -> str:
    """The Markdown file."""
    machine, published = result["machine"], result["published"]
    reference = "" if published is None else f" The published step took {published['seconds']['fastest']:.3f} s."
    lines = [
        "# A training step of FPT+",
        "",
        f"ViT-B/16, 512 pixels, side images of 128, 16 prompts, token ratio 0.2, 6 layers, batch 16, fp32 arithmetic; "
        f"{machine['processor']}, {machine['threads']} threads, no GPU. Memory is peak live tensor bytes (parameters, "
        f"gradients, AdamW and batch included), counted. The published code itself was measured at {PUBLISHED_MIB} MiB."
        f"{reference} Made by `benchmarks/training_step.py`.",
        "",
        "| stored tokens | MiB | of published | MiB, bf16 autocast (predicted) | s a step | x published |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    if published is not None:
        mib, seconds = published["bytes"] / MIB, published["seconds"]["fastest"]
        lines.append(f"| published stand-in (fp32) | {mib:.1f} | {mib / PUBLISHED_MIB:.2f} | | {seconds:.3f} | 1.00 |")
    for row in result["steps"]:
        mib, seconds = row["bytes"] / MIB, row["seconds"]["fastest"]
        ratio = "" if published is None else f"{seconds / published['seconds']['fastest']:.2f}"
        bold = "**" if (row["codec"], row["gradient_checkpointing"]) == DEFAULT else ""
        lines.append(
            f"| {bold}{name_of(row['codec'], row['gradient_checkpointing'])}{bold} | {mib:.1f} "
            f"| {mib / PUBLISHED_MIB:.2f} | {row['bytes_bf16'] / MIB:.1f} | {seconds:.3f} | {ratio} |"
        )
    lines += ["", "In bold, the default.", "", "## Growth (predicted MiB)", ""]
    for kind, sizes, label in (
        ("batch", BATCHES, "batch, at 512 pixels"),
        ("resolution", RESOLUTIONS, "pixels, batch 16"),
    ):
        lines += [
            f"| {label} | " + " | ".join(str(s) for s in sizes) + " | exponent |",
            "|---" * (len(sizes) + 2) + "|",
        ]
        for name, found in result["growth"].items():
            values = " | ".join(f"{value / MIB:,.0f}" for value in found[kind].values())
            lines.append(f"| {name} | {values} | {found[kind + '_exponent']:.2f} |")
        lines.append("")
    seconds = result["time_growth"]["seconds"]
    lines += [
        f"Seconds of a step (int8): {', '.join(f'{s:.3f} at batch {b}' for b, s in seconds.items())}; exponent "
        f"{result['time_growth']['exponent']:.2f}. Exponents are fitted to the upper half of the sizes. Tokens grow "
        "with the square of the resolution, and so do the stored bytes that memory follows.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--published", help="folder with published_step.py")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args(arguments)
    ours = steps()
    functions: dict[str, Callable[[], Any]] = dict(ours)
    theirs = None
    if args.published is not None:
        sys.path.insert(0, args.published)
        theirs = importlib.import_module("published_step").published_step()
        functions["published"] = theirs[0]
    seconds = in_turns(functions, args.rounds)
    rows: list[dict[str, Any]] = []
    for codec, saving in product(CODECS, (False, True)):
        name = name_of(codec, saving)
        rows.append(
            {
                "codec": codec,
                "gradient_checkpointing": saving,
                "bytes": ours[name].live_bytes(),
                "bytes_predicted": memory(512, 16, codec, saving),
                "bytes_bf16": memory(512, 16, codec, saving, "bf16-mixed"),
                "seconds": seconds[name],
            }
        )
        print(name, round(rows[-1]["bytes"] / MIB, 1), seconds[name], flush=True)
    published = None
    if theirs is not None:
        published = {"bytes": live_bytes(*theirs), "seconds": seconds["published"]}
    result = {"published": published, "steps": rows, "growth": growth(), "time_growth": time_growth(4)}
    path = write_result("training_step", result)
    (RESULTS / "training_step.md").write_text(report({**environment(), **result}))
    print(f"results are in {path}, and .md beside it")


if __name__ == "__main__":
    main()
