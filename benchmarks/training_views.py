"""What side images are best made of: stored copies or whole files; flipped or not, and with tokens that follow or not.

    python benchmarks/training_views.py --data FOLDER --manifest labels.csv --out runs/views   # an hour on two cores

FPT+ is trained on one encoder, fine-tuned on the training images here, with several seeds for each way:

- copies: the default. Side images are augmented from the stored low-resolution copies, half of them flipped, beside
  tokens of the image as it is (as published).
- whole files: the same, augmented from the decoded files at their full resolution (as published).
- mirrored: ``data.orientations: 2``; tokens and side image are both of the image, or both of its mirror image.
- never flipped: neither is ever flipped.

Differences are between the same seeds. Writes ``results/training_views.json`` and ``.md``. It goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import lightning as L

from environment import RESULTS, environment, write_result
from fpt_lightning import FPTPlusModule, PreloadedFeatureDataModule
from fpt_lightning.data.images import read_image
from fpt_lightning.data.manifest import Sample
from fpt_lightning.datamodules.samples import Batch, Samples, StoredSamples, Views
from fpt_lightning.encoder.config import EncoderConfig
from store_codecs import ENCODERS, Setting, auc, evaluated, weights

LABEL = "ViT-Ti, fine-tuned"


class WholeFiles(PreloadedFeatureDataModule):
    """Side images from decoded files."""

    def _dataset(self, samples: Sequence[Sample], augmentation: str, training: bool) -> Samples:
        stored = super()._dataset(samples, augmentation, training)
        assert isinstance(stored, StoredSamples)
        return _WholeFileSamples(
            stored.manifest, stored.samples, stored.side_views, stored.store, stored.arrays, stored.orientation_seed
        )


class _WholeFileSamples(StoredSamples):
    def _batch(self, keys: Sequence[Any], *how: Any) -> Batch:
        assert self.side_views is not None
        images = [read_image(self.manifest.path(self.samples[index])) for _, index in keys]
        views = self.side_views.draw(images, keys, self.side_views.empty(len(keys)))
        return {**super()._batch(keys, *how), "side_images": views}


class NeverFlipped(PreloadedFeatureDataModule):
    """Side images that are never flipped, beside tokens that never are."""

    def _side_views(
        self, augmentation: str, mean: tuple[float, ...], std: tuple[float, ...], mirror: bool = True
    ) -> Views | None:
        return super()._side_views(augmentation, mean, std, mirror=False)


WAYS: dict[str, type[PreloadedFeatureDataModule]] = {
    "copies": PreloadedFeatureDataModule,
    "whole files": WholeFiles,
    "mirrored": PreloadedFeatureDataModule,
    "never flipped": NeverFlipped,
}


def data_of(setting: Setting, way: str) -> PreloadedFeatureDataModule:
    if way == "mirrored":
        return setting.data(setting.out / "mirrored.zarr", "int8", orientations=2)
    return setting.data(setting.out / "plain.zarr", "int8", WAYS[way])


def trained(setting: Setting, way: str, seed: int) -> dict[str, float]:
    """Test AUC and seconds of training; kept in a file."""
    path = setting.out / f"{way.replace(' ', '-')}-{seed}.json"
    if not path.is_file():
        L.seed_everything(seed)
        data = data_of(setting, way)
        classes = len(data.read_manifest().classes)
        model = FPTPlusModule(
            classes,
            encoder=ENCODERS[LABEL],
            pretrained=weights(setting, LABEL),
            prompt_head=False,
            learning_rate=3e-3,
        )
        start = time.perf_counter()
        setting.fit(model, data, setting.epochs)
        seconds = time.perf_counter() - start
        found = auc(evaluated(model, data_of(setting, way)), classes)
        path.write_text(json.dumps({"auc": found, "seconds": seconds}))
        print(way, seed, path.read_text(), flush=True)
    return cast(dict[str, float], json.loads(path.read_text()))


def report(ways: dict[str, list[dict[str, float]]], setting: Setting, images: int) -> str:
    """The table."""
    described = " ".join((__doc__ or "").split("\n\n")[2].split())
    points = (__doc__ or "").split("\n\n")[3]
    lines = [
        f"{described} {setting.epochs} epochs, {setting.seeds} seeds, {images} test images at {setting.resolution} "
        f"pixels; {environment()['machine']['processor']}.",
        "",
        points.replace("``", "`"),
        "",
        "| way | test AUC x 100 (mean ± standard deviation) | minus copies, same seed (mean ± standard error) |",
        "|---|---:|---:|",
    ]
    base = [100 * row["auc"] for row in ways["copies"]]
    for way, rows in ways.items():
        scores = [100 * row["auc"] for row in rows]
        differences = [score - other for score, other in zip(scores, base, strict=True)]
        error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
        spread = f" ± {stdev(scores):.2f}" if len(scores) > 1 else ""
        lines.append(
            f"| {way} | {mean(scores):.2f}{spread} "
            f"| {'' if way == 'copies' else f'{mean(differences):+.2f} ± {error:.2f}'} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True, help="folder of the images")
    parser.add_argument("--manifest", help="CSV file instead of class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of weights, stores and results")
    parser.add_argument("--epochs", type=int, default=15, help="of FPT+")
    parser.add_argument("--tuning-epochs", type=int, default=8, help="of the encoder")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--resolution", type=int, default=448)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.data, args.manifest, args.out, args.epochs, args.tuning_epochs, args.seeds, args.resolution)
    encoder = EncoderConfig(ENCODERS[LABEL], weights(setting, LABEL))
    for way in ("copies", "mirrored"):
        data_of(setting, way).preload(encoder)
    ways: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in range(setting.seeds):
        for way, rows in ways.items():
            rows.append(trained(setting, way, seed))
    images = len(data_of(setting, "copies").read_manifest().split("test"))
    about = {name: getattr(args, name) for name in ("epochs", "tuning_epochs", "seeds", "resolution")}
    path = write_result("training_views", {**about, "images": images, "ways": ways})
    (RESULTS / "training_views.md").write_text(report(ways, setting, images) + "\n")
    print(f"results are in {path} and .md beside it")


if __name__ == "__main__":
    main()
