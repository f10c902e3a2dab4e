"""Images a second of the frozen pass where the encoder takes no time, by the number of threads that decode.

    python benchmarks/decoding.py --out runs/decoding     # 3 minutes on two CPU cores

JPEG photographs of 2048 x 1536 pixels, drawn here, as for ViT-B at 512 pixels (int8). One decoder is a plain loop that
reads, resizes and normalises; then the loader alone with threads and with worker processes, and the whole pass, whose
stand-in encoder gives the same features for every image. Rates are medians of
turns. Writes ``results/decoding.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from environment import RESULTS, environment, write_result
from fpt_lightning.data.prefetch import PrefetchingLoader, usable_threads
from fpt_lightning.datamodules.preloaded import PreloadedFeatureDataModule
from fpt_lightning.datamodules.synthetic import fundus_image
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import Encoded
from fpt_lightning.store.codecs import encode
from fpt_lightning.store.index import FileRecord
from fpt_lightning.store.layout import SHARD
from fpt_lightning.store.preload import FrozenPass, feature_shape

SIZE = (1536, 2048)  # height, width of the photographs
RESOLUTION, ENCODER, BATCH = 512, "vit_base_patch16_224.augreg_in21k", 4
DRAWN = 8  # different photographs


class StandIn(nn.Module):
    """An encoder that takes no time."""

    digest = "0" * 64

    def __init__(self, config: EncoderConfig, resolution: tuple[int, int]) -> None:
        super().__init__()
        shape = feature_shape(config, resolution)
        drawn = torch.Generator().manual_seed(0)
        self.features = torch.randn(2, shape.layers, shape.heads, shape.tokens, shape.head_dim, generator=drawn)
        self.indices = torch.arange(shape.tokens).expand(shape.layers, shape.heads, -1)
        self.pooled = torch.zeros(shape.width)

    def forward(self, images: Tensor) -> Encoded:
        def of_all(one: Tensor) -> Tensor:
            return one.expand(len(images), *one.shape)

        return Encoded(of_all(self.features), of_all(self.indices), of_all(self.pooled))


def write_photographs(root: Path, count: int) -> None:
    """``count`` JPEG files in two classes, of ``DRAWN`` photographs."""
    side = max(SIZE)
    drawn = [Image.fromarray(fundus_image(seed % 2, seed, side)[: SIZE[0], : SIZE[1]]) for seed in range(DRAWN)]
    for number in range(count):
        path = root / "ab"[number % 2] / f"{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn[number % DRAWN].save(path, quality=90, comment=str(number))  # no two files are the same


def data_of(out: Path, threads: int = 1) -> PreloadedFeatureDataModule:
    return PreloadedFeatureDataModule(
        str(out / "images"),
        str(out / "store.zarr"),
        resolution=RESOLUTION,
        mean=[0.5],
        std=[0.25],
        decoding_threads=threads,
        preload_batch_size=BATCH,
    )


def rate(run: Callable[[], int], turns: int) -> float:
    """Images a second, a median of turns; ``run`` returns how many it did."""

    def of_turn() -> float:
        start = time.perf_counter()
        count = run()
        return count / (time.perf_counter() - start)

    return median(of_turn() for _ in range(turns))


class Clock(L.Callback):
    """Seconds of the pass, without what precedes and follows any."""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.start


def quiet_trainer(*callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def measured(out: Path, threads: Sequence[int], turns: int) -> dict[str, Any]:
    """All rates, in images a second."""
    config = EncoderConfig(ENCODER, pretrained=False)
    data = data_of(out)
    manifest = data.read_manifest().look()
    frozen_pass = FrozenPass(manifest, config, data.asked_store(config), data.url, BATCH, overwrite=True)
    frozen_pass.trainer = quiet_trainer()
    frozen_pass.prepare_data()
    frozen_pass.setup("predict")
    loader = frozen_pass.predict_dataloader()
    dataset: Any = loader.dataset
    batches = list(loader.sampler)

    def one() -> int:
        return len([dataset.prepare(rows) for batch in batches for rows in batch])

    def through(made: DataLoader[Any]) -> int:
        return sum(len(batch.rows) for batch in made)

    def whole(count: int) -> float:
        clock = Clock()
        store = data_of(out, count).preload(config, quiet_trainer(clock), overwrite=True)
        return len(store.ids) / clock.seconds

    def of_threads(count: int) -> DataLoader[Any]:
        return PrefetchingLoader(dataset, count, batch_size=None, sampler=loader.sampler)

    def of_processes(count: int) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=None, sampler=loader.sampler, num_workers=count)

    def coded() -> int:
        features = frozen_pass._build()(torch.empty(BATCH, 3, 1, 1)).features
        for _ in range(SHARD // BATCH):
            encode(features, frozen_pass.specification, [""] * BATCH)
        return SHARD

    assert frozen_pass.store is not None
    store, shard = frozen_pass.store, list(range(SHARD))
    content = {name: np.zeros((SHARD, *shape), dtype) for name, (shape, dtype) in store.sample_arrays.items()}

    def written() -> int:
        store.write(shard, content, [FileRecord(0, 0, 0)] * SHARD)
        return SHARD

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = {name: rate(run, turns) for name, run in (("decoding", one), ("coding", coded), ("writing", written))}
    torch.set_num_threads(before)
    frozen_pass.unlock()
    ways: dict[str, Callable[[int], float]] = {
        "loader": lambda n: rate(lambda: through(of_threads(n)), turns),
        "processes": lambda n: rate(lambda: through(of_processes(n)), turns),
        "pass": lambda n: median(whole(n) for _ in range(turns)),
    }
    rows = []
    for count in threads:
        found = {way: measure(count) for way, measure in ways.items()}
        rows.append({"threads": count, **found})
        print(rows[-1], flush=True)
    return {"images": len(manifest.samples), "alone": alone, "bytes": store.bytes_per_row, "rows": rows}


def report(result: Mapping[str, Any]) -> str:
    machine, alone, cores = result["machine"], result["alone"], result["cores"]
    seconds = {name: 1 / each for name, each in alone.items()}
    every = cores / sum(seconds.values())
    lines = [
        "# Decoding",
        "",
        f"JPEG photographs of {SIZE[1]} x {SIZE[0]} pixels, for ViT-B at {RESOLUTION} pixels, with an encoder that "
        f"takes no time; {machine['processor']}, {cores} cores. Medians of {result['turns']} turns of "
        f"{result['images']} images. Alone, on one core: decoding, resizing and normalising {alone['decoding']:.1f} "
        f"images a second, coding as int8 (on a GPU where there is one) {alone['coding']:.1f}, writing "
        f"{alone['writing']:.1f}. Made by `benchmarks/decoding.py`.",
        "",
        "| threads | loader, images/s | of the limit | with as many processes | of the limit | whole pass | of the "
        "limit | MB/s written |",
        "|---:" * 8 + "|",
    ]
    for row in result["rows"]:
        limit = alone["decoding"] * min(cores, row["threads"])
        rates = [f"{row[way]:.1f} | {row[way] / limit:.2f}" for way in ("loader", "processes")]
        rates += [f"{row['pass']:.1f} | {row['pass'] / min(limit, every):.2f}"]
        lines.append(f"| {row['threads']} | {' | '.join(rates)} | {row['pass'] * result['bytes'] / 1e6:.0f} |")
    lines += [
        "",
        "The loader's limit is one decoder's rate times the threads, or the cores where there are fewer; that of the "
        f"whole pass no more than what the cores need for all three, {every:.1f} images a second.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the photographs and the store")
    parser.add_argument("--images", type=int, default=8 * SHARD, help="a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", help="by default 1, 2, 4 up to twice the cores")
    args = parser.parse_args(arguments)
    cores = usable_threads(None, 1)
    threads = args.threads or [2**power for power in range((2 * cores).bit_length())]
    shutil.rmtree(args.out / "images", ignore_errors=True)
    write_photographs(args.out / "images", args.images)
    with mock.patch("fpt_lightning.store.preload.FrozenEncoder", StandIn):
        result = {"cores": cores, "turns": args.turns, **measured(args.out, threads, args.turns)}
    path = write_result("decoding", result)
    (RESULTS / "decoding.md").write_text(report({**environment(), **result}))
    print(f"results are in {path}, and .md beside it")


if __name__ == "__main__":
    main()
