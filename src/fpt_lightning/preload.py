"""The frozen pass: every image through the encoder once, into the feature store (paper, section 3.6)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from fpt_lightning.codecs import FeatureShape, check_codec
from fpt_lightning.encoder import Encoded, EncoderConfig, FrozenEncoder
from fpt_lightning.errors import StoreError
from fpt_lightning.images import channel_statistics, normalise, stored_copy, unit_pixels
from fpt_lightning.manifest import Manifest
from fpt_lightning.pages import file_and_page
from fpt_lightning.prefetch import PrefetchingLoader
from fpt_lightning.selection import number_of_tokens
from fpt_lightning.store import SHARD, FeatureSpecification, FeatureStore, bytes_per_row, encode


def feature_shape(encoder: EncoderConfig, resolution: tuple[int, int]) -> FeatureShape:
    """The shape of one sample's features, without loading weights.

    Raises:
        ConfigurationError: the resolution is not a multiple of the patch size.
    """
    shape = encoder.shape
    tokens = number_of_tokens(shape.tokens(resolution), encoder.token_ratio)
    return FeatureShape(len(encoder.tapped_layers), shape.heads, tokens, shape.head_dim)


def preload(
    manifest: Manifest,
    encoder: EncoderConfig,
    specification: FeatureSpecification,
    url: str,
    *,
    batch_size: int = 4,
    num_workers: int = 0,
    trainer: L.Trainer | None = None,
    overwrite: bool = False,
    rebuild: str = "fpt-lightning preload --config CONFIG --overwrite true",
) -> FeatureStore:
    """Encode the samples that a store lacks; a store that lacks none is returned at once, without loading weights.

    Samples that are complete are never computed again, whatever stopped an earlier preload, unless the size of their
    image file has changed. With several processes
    (the trainer's devices and nodes), each writes whole shards of its own.

    Args:
        manifest: the samples, of all splits.
        encoder: the frozen encoder and its selection.
        specification: what is asked; mean and std may still be empty (``auto``).
        url: of the store, which is made where there is none.
        batch_size: images encoded at once.
        num_workers: processes that read images ahead.
        trainer: whose devices do it; one device, chosen by Lightning, by default.
        overwrite: remove the store that is there, and start anew.
        rebuild: the command that a mismatch names.

    Returns:
        The complete store.

    Raises:
        StaleStoreError: the store there was made with other settings.
        ImageError: an image that cannot be read; what was complete before it is kept.
        StoreError: too little disk space, or features that do not fit the codec, naming the image.
    """
    ids = [sample.id for sample in manifest.samples]
    if FeatureStore.exists(url) and not overwrite:
        store = FeatureStore.open(url)
        store.require(specification, rebuild)
        if not store.missing(ids) and not store.changed(manifest.root, ids):
            return store
    frozen_pass = FrozenPass(manifest, encoder, specification, url, batch_size, num_workers, overwrite, rebuild)
    if trainer is None:
        trainer = L.Trainer(devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False)
    writer = _StoreWriter()
    trainer.callbacks.append(writer)  # type: ignore[attr-defined]
    try:
        trainer.predict(frozen_pass, return_predictions=False)
    finally:
        trainer.callbacks.remove(writer)  # type: ignore[attr-defined]
    store = FeatureStore.open(url)
    if missing := store.missing(ids):
        raise StoreError(f"the feature store {url} still lacks {len(missing)} of {len(ids)} samples after its preload.")
    return store


class FrozenPass(L.LightningModule):
    """The frozen encoder as the trainer's predict loop runs it."""

    prepare_data_per_node = False

    def __init__(
        self,
        manifest: Manifest,
        encoder: EncoderConfig,
        specification: FeatureSpecification,
        url: str,
        batch_size: int,
        num_workers: int,
        overwrite: bool,
        rebuild: str,
    ) -> None:
        super().__init__()
        self.manifest, self.config, self.url, self.rebuild = manifest, encoder, url, rebuild
        self.specification = specification
        self.batch_size, self.num_workers, self.overwrite = batch_size, num_workers, overwrite
        self.encoder: FrozenEncoder | None = None
        self.store: FeatureStore | None = None

    def _build(self) -> FrozenEncoder:
        if self.encoder is None:
            self.encoder = FrozenEncoder(self.config, self.specification.resolution)
        return self.encoder

    def prepare_data(self) -> None:
        """On the first process: make the store or hold the one there against the loaded weights, and add its rows."""
        shape = feature_shape(self.config, self.specification.resolution)
        check_codec(self.specification.codec, shape.head_dim)
        ids = [sample.id for sample in self.manifest.samples]
        asked = replace(self.specification, weights_digest=self._build().digest)
        size = asked.views * bytes_per_row(asked.codec, shape, asked.image_size)
        if self.overwrite and FeatureStore.exists(self.url):
            FeatureStore.delete(self.url)
        if FeatureStore.exists(self.url):
            store = FeatureStore.open(self.url, writable=True)
            store.require(asked, self.rebuild)
            store.forget(store.changed(self.manifest.root, ids))
            _check_space(self.url, len(store.missing(ids)) * size)
        else:
            _check_space(self.url, len(ids) * size)
            if not asked.mean:
                paths = [self.manifest.path(sample) for sample in self.manifest.split("train")]
                mean, std = channel_statistics(paths, asked.resolution, self.num_workers, asked.crop_border)
                asked = replace(asked, mean=mean, std=std)
            store = FeatureStore.create(self.url, asked, shape, _made_with())
        store.extend(ids)

    def setup(self, stage: str) -> None:
        self._build()
        self.store = FeatureStore.open(self.url, writable=True)
        self.specification = self.store.specification

    def predict_dataloader(self) -> PrefetchingLoader:
        """This process's share of the missing samples, whole shards of them, in the order of their rows."""
        assert self.store is not None
        rows = self.store.missing_rows([sample.id for sample in self.manifest.samples])
        shards = [list(shard) for _, shard in groupby(rows, lambda row: row // SHARD)]
        mine = shards[self.trainer.global_rank :: self.trainer.world_size]
        batches = [
            shard[start : start + self.batch_size] for shard in mine for start in range(0, len(shard), self.batch_size)
        ]
        images = _PreloadImages(self.manifest, self.store, self.specification)
        return PrefetchingLoader(images, batch_size=None, sampler=_ShardBatches(batches), num_workers=self.num_workers)

    def on_predict_start(self) -> None:
        """Say what is about to be done: images, bytes and time."""
        assert self.store is not None
        missing = self.store.missing_rows([sample.id for sample in self.manifest.samples])
        spec = self.specification
        size = self.store.bytes_per_row
        seconds = self._seconds_per_image(self.store.source(missing[0])[0]) * len(missing) / self.trainer.world_size
        rank_zero_info(
            f"preload: {len(missing):,} of {spec.views * len(self.manifest.samples):,} images"
            f"{' and mirror images' if spec.mirrored else ''} through {spec.encoder} at "
            f"{spec.resolution[0]} x {spec.resolution[1]} into {self.url}: {len(missing) * size / 1e6:,.0f} MB "
            f"({size / 1e6:.2f} MB an image), about {_duration(seconds)} on {self.trainer.world_size} device(s)"
        )

    def _seconds_per_image(self, id: str) -> float:
        spec = self.specification
        for _ in range(2):  # the first run warms up
            start = time.perf_counter()
            pixels = unit_pixels(spec.reader(self.manifest.root / id), spec.resolution)
            self._build()(normalise(pixels, spec.mean, spec.std)[None].to(self.device)).features.cpu()
        return time.perf_counter() - start

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Encoded:
        """What the encoder gives for the batch's images."""
        encoded: Encoded = self._build()(batch[1])
        return encoded


class _ShardBatches(DistributedSampler[list[int]]):
    """This process's batches of rows; as a distributed sampler, it is left alone by Lightning."""

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _PreloadImages(Dataset[Any]):
    """From rows of the store to (rows, images (B, 3, height, width), low-resolution copies, file sizes)."""

    def __init__(self, manifest: Manifest, store: FeatureStore, specification: FeatureSpecification) -> None:
        self.root, self.source, self.specification = manifest.root, store.source, specification

    def __getitem__(self, rows: list[int]) -> tuple[list[int], Tensor, NDArray[np.uint8], list[int]]:
        spec = self.specification
        sources = [self.source(row) for row in rows]
        read = {id: spec.reader(self.root / id) for id in dict.fromkeys(id for id, _ in sources)}
        images = [read[id][:, ::-1] if mirrored else read[id] for id, mirrored in sources]
        pixels = torch.stack([unit_pixels(image, spec.resolution) for image in images])
        copies = np.stack([stored_copy(image, spec.image_size) for image in images])
        return (
            rows,
            normalise(pixels, spec.mean, spec.std),
            copies,
            [file_and_page(self.root / id)[0].stat().st_size for id, _ in sources],
        )


class _StoreWriter(L.Callback):
    """Collects a shard's samples and writes them together; what was computed is written whatever stops the pass."""

    def __init__(self) -> None:
        self.pending: list[tuple[int, dict[str, NDArray[Any]], int]] = []  # row, its arrays, its image's file size

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(pl_module, FrozenPass)
        assert pl_module.store is not None
        rows, _images, copies, sizes = batch
        if self.pending and self.pending[0][0] // SHARD != rows[0] // SHARD:
            self._flush(pl_module.store)
        names = [str(pl_module.manifest.root / pl_module.store.source(row)[0]) for row in rows]
        content = {
            **encode(outputs.features, pl_module.specification, names),
            "indices": outputs.indices.to("cpu", torch.int32).numpy(),
            "pooled": outputs.pooled.cpu().numpy(),
            "images": copies.cpu().numpy(),
        }
        samples = [{name: block[i] for name, block in content.items()} for i in range(len(rows))]
        self.pending += zip(rows, samples, sizes, strict=True)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, FrozenPass)
        assert pl_module.store is not None
        self._flush(pl_module.store)
        trainer.strategy.barrier("preloaded")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, FrozenPass) and pl_module.store is not None:
            self._flush(pl_module.store)

    def _flush(self, store: FeatureStore) -> None:
        if self.pending:
            rows, samples, sizes = zip(*self.pending, strict=True)
            store.write(rows, {name: np.stack([s[name] for s in samples]) for name in samples[0]}, sizes)
            self.pending = []


def _made_with() -> dict[str, str]:
    versions = {name: version(name) for name in ("torch", "timm", "zarr", "pillow", "fpt-lightning")}
    return {**versions, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def _check_space(url: str, needed: int) -> None:
    if "://" in url:
        return
    folder = Path(url).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"the feature store {url} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free: choose "
            "another data.store, or a smaller token_ratio, resolution or codec."
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
