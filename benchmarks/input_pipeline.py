"""Images a second of the training input, beside the published loader and a memory-mapped gather of the same bytes.

    python benchmarks/input_pipeline.py --published FOLDER     # 3 minutes on two CPU cores

FOLDER holds a stand-in for the published loader: a module ``published_loader`` with ``PublishedDataset(folder)``. The
stores are of ViT-B at 512 pixels, with invented content; batches of 16 are shuffled, views augmented as published, the
page cache is warm. PyTorch has one thread. Readers take turns. Writes ``results/input_pipeline.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from environment import RESULTS, environment, write_result
from fpt_lightning import PreloadedFeatureDataModule
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.progress import significant
from fpt_lightning.store.index import FileRecord
from fpt_lightning.store.layout import SHARD
from fpt_lightning.store.preload import feature_shape
from fpt_lightning.store.writing import WritableStore
from training_step import exponent

ENCODER = EncoderConfig("vit_base_patch16_224.augreg_in21k", pretrained=False)
CODECS = ("fp16", "int8", "int4")
LOADERS: dict[str, dict[str, Any]] = {
    "1 thread": {"decoding_threads": 1},
    "2 threads": {"decoding_threads": 2},
    "1 worker process": {"num_workers": 1},
    "2 worker processes": {"num_workers": 2},
    "1 thread, device augments": {"decoding_threads": 1, "augment_on": "device"},
    "2 threads, device augments": {"decoding_threads": 2, "augment_on": "device"},
}
RESOLUTION, SIDE, BATCH_SIZE, SAMPLES = 512, 128, 16, 512
GROWTH = (100, 300, 1000, 3000, 10000)


def make_data(folder: Path, codec: str, samples: int, **settings: Any) -> PreloadedFeatureDataModule:
    """A data module on a store of invented content; every sample has the same, so that writing it is quick."""
    url, images = str(folder / f"{codec}-{samples}.zarr"), folder / f"images-{samples}"
    data = PreloadedFeatureDataModule(
        str(images),
        url,
        codec=codec,  # type: ignore[arg-type]
        resolution=RESOLUTION,
        mean=[0.5],
        std=[0.25],
        allow_overlap=True,
        side_resolution=SIDE,
        batch_size=BATCH_SIZE,
        **settings,
    )
    if not images.exists():
        for index in range(samples):
            path = images / ("train", "train", "train", "train", "val", "test")[index % 6] / "ab"[index // 6 % 2]
            path.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path / f"{index:05d}.png")
    manifest = data.read_manifest()
    if not WritableStore.exists(url):
        specification = replace(data.asked_store(ENCODER), weights_digest="none")
        shape = feature_shape(ENCODER, data.resolution)
        store = WritableStore.create(url, specification, shape, {}).extend([sample.id for sample in manifest.samples])
        rng = np.random.default_rng(0)
        block = {
            name: np.broadcast_to(rng.integers(0, 100, size).astype(dtype), (SHARD, *size))
            for name, (size, dtype) in store.sample_arrays.items()
        }
        for start in range(0, samples, SHARD):
            rows = range(start, min(start + SHARD, samples))
            files = [FileRecord.of(images / store.ids[row]) for row in rows]
            store.write(rows, {name: part[: len(rows)] for name, part in block.items()}, files)
    data.setup("fit")
    return data


def pass_over(loader: DataLoader[Any]) -> int:
    """Images of one pass, each batch touched as a copy to a device would."""
    return sum(len(batch["labels"]) for batch in loader)


def gather(data: PreloadedFeatureDataModule) -> Callable[[], int]:
    """The same bytes of the same samples in the same kind of order, from memory-mapped plain arrays."""
    store = data.store
    assert store is not None
    count = len(data.labelled.split("train"))
    maps = []
    for name in (*store.arrays_of(["features"]), "images"):
        size, dtype = store.sample_arrays[name]
        path = Path(store.url + f".{name}.raw")
        np.memmap(path, dtype, "w+", shape=(count, *size))[:] = store.read([0], name)
        maps.append(np.memmap(path, dtype, "r", shape=(count, *size)))
    buffers = [np.empty((BATCH_SIZE, *array.shape[1:]), array.dtype) for array in maps]

    def run() -> int:
        order = np.random.permutation(count)
        for start in range(0, count, BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            for array, buffer in zip(maps, buffers, strict=True):
                np.take(array, rows, axis=0, out=buffer[: len(rows)])
        return count

    return run


def in_turns(functions: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, float]]:
    """Images a second of each, best and median, after a round of warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            count = function()
            if turn:
                rates[name].append(count / (time.perf_counter() - start))
    return {name: {"best": max(rate), "median": float(np.median(rate))} for name, rate in rates.items()}


def published(folder: str, images: Path) -> Callable[[], int]:
    """The published loader over 32 large JPEGs."""
    sys.path.insert(0, folder)
    dataset = importlib.import_module("published_loader").PublishedDataset(images)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=BATCH_SIZE)
    return lambda: sum(len(batch[0]) for batch in loader)


def growth(folder: Path) -> dict[str, Any]:
    """Seconds to open a store and images a second by the size of the data set, int8."""
    opening, rates = [], []
    for samples in GROWTH:
        data = make_data(folder, "int8", samples)
        start = time.perf_counter()
        data.setup("fit")
        opening.append(time.perf_counter() - start)
        rates.append(in_turns({"ours": lambda data=data: pass_over(data.train_dataloader())}, 1)["ours"]["best"])  # type: ignore[misc]
        print(samples, opening[-1], rates[-1], flush=True)
    return {
        "samples": GROWTH,
        "opening_seconds": opening,
        "opening_exponent": exponent(GROWTH, opening),
        "images_per_second": rates,
        "rate_exponent": exponent(GROWTH, rates),
    }


def report(result: Mapping[str, Any]) -> str:
    """The Markdown file."""
    machine = result["machine"]
    lines = [
        "# Training input",
        "",
        f"Images a second (median of {result['rounds']} turns) of ViT-B at {RESOLUTION} pixels, batches of "
        f"{BATCH_SIZE} of {SAMPLES} samples, shuffled, augmented; {machine['processor']}, {machine['cores']} cores, "
        "one PyTorch thread, warm page cache. The gather copies the same bytes from memory-mapped arrays on one "
        "core and augments nothing. Made by `benchmarks/input_pipeline.py`.",
        "",
        "| reader | images/s | x published | x gather |",
        "|---|---:|---:|---:|",
    ]
    rates = {name: rate["median"] for name, rate in result["rates"].items()}
    for name, rate in rates.items():
        base = rates.get("published")
        codec = name.split(",")[0]
        ratio = f"{rate / rates[f'{codec}, memory-mapped gather']:.2f}" if codec in CODECS else ""
        lines.append(f"| {name} | {rate:,.0f} | {'' if base is None else f'{rate / base:.1f}'} | {ratio} |")
    found = result["growth"]
    lines += ["", "## Growth (int8)", "", "| samples | " + " | ".join(f"{s:,}" for s in GROWTH) + " | exponent |"]
    lines.append("|---" * (len(GROWTH) + 2) + "|")
    for label, key, fit in (
        ("seconds to open", "opening_seconds", "opening_exponent"),
        ("images/s", "images_per_second", "rate_exponent"),
    ):
        lines.append(f"| {label} | " + " | ".join(significant(v, 3) for v in found[key]) + f" | {found[fit]:.2f} |")
    lines += ["", "Every sample has the same content. The largest store is 20 GB, more than half of the memory.", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--published", help="folder with published_loader.py")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        functions: dict[str, Callable[[], int]] = {}
        if args.published is not None:
            functions["published"] = published(args.published, folder)
        for codec in CODECS:
            for name, settings in LOADERS.items():
                data = make_data(folder, codec, SAMPLES, **settings)
                loader = data.train_dataloader()
                functions[f"{codec}, {name}"] = lambda loader=loader: pass_over(loader)  # type: ignore[misc]
            functions[f"{codec}, memory-mapped gather"] = gather(data)
        rates = in_turns(functions, args.rounds)
        del functions, loader, data
        result = {"rounds": args.rounds, "rates": rates, "growth": growth(folder)}
    path = write_result("input_pipeline", result)
    (RESULTS / "input_pipeline.md").write_text(report({**environment(), **result}))
    print(f"results are in {path}, and .md beside it")


if __name__ == "__main__":
    main()
