"""Requests and seconds of an epoch over a store in an object storage that answers each request after a quarter second.

    python benchmarks/remote_store.py     # a minute

80 images in batches of 16, shuffled, with an own copy of each shard (``data.cache``) and without. The storage is moto's
on this machine, so that neither bandwidth nor the storage itself counts. Writes ``results/remote_store.json``.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
from PIL import Image

from environment import write_result
from fpt_lightning import PreloadedFeatureDataModule
from fpt_lightning.encoder.config import EncoderConfig
from object_storage import ObjectStorage, object_storage

IMAGES, BATCH_SIZE, DELAY = 80, 16, 0.25
ENCODER = EncoderConfig("test_vit", pretrained=False)


def make_data(folder: Path, store: str, **settings: Any) -> PreloadedFeatureDataModule:
    """A data module on generated images, all but two of them for training."""
    images = folder / "images"
    if not images.exists():
        for index in range(IMAGES + 2):
            path = images / ("train", "val", "test")[max(0, index - IMAGES + 1)] / "ab"[index % 2]
            path.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (index, 0, 0)).save(path / f"{index:03d}.png")
    given = {"resolution": 64, "image_size": 48, "side_resolution": 32, "mean": [0.5], "std": [0.25], **settings}
    return PreloadedFeatureDataModule(str(images), store, batch_size=BATCH_SIZE, **given)


def measured(storage: ObjectStorage, call: Callable[[], Any]) -> dict[str, float]:
    """Seconds and requests of a call."""
    storage.requests.clear()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    methods = Counter(method for method, _ in storage.requests)
    return {"seconds": seconds, "requests": methods.total(), **{name.lower(): n for name, n in methods.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.parse_args(arguments)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with TemporaryDirectory() as name, object_storage() as storage:
        folder = Path(name)
        os.environ.update(storage.environment)
        storage.make_bucket("bucket")
        local = make_data(folder, str(folder / "store.zarr"))
        local.preload(ENCODER)
        fsspec.filesystem("s3").put(local.url, "s3://bucket/store.zarr", recursive=True)
        storage.delay = DELAY
        result: dict[str, Any] = {"images": IMAGES, "batch_size": BATCH_SIZE, "seconds_a_request": DELAY}
        for label, settings in {"no cache": {}, "cache": {"cache": str(folder / "cache")}}.items():
            data = make_data(folder, "s3://bucket/store.zarr", **settings)
            result[label] = {
                "setup": measured(storage, lambda data=data: data.setup("fit")),  # type: ignore[misc]
                "epochs": [
                    measured(storage, lambda data=data: list(data.train_dataloader()))  # type: ignore[misc]
                    for _ in range(2)
                ],
            }
            print(label, result[label], flush=True)
    print(f"results are in {write_result('remote_store', result)}")


if __name__ == "__main__":
    main()
