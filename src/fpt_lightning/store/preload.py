"""The frozen pass: every image through the encoder once, into the feature store (paper, section 3.6)."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from fpt_lightning.data.image_files import ImageFiles
from fpt_lightning.data.images import OnError, unreadable
from fpt_lightning.data.manifest import Manifest
from fpt_lightning.data.orientations import oriented, zoomed, zoomed_pixels
from fpt_lightning.data.pages import file_and_page
from fpt_lightning.data.prefetch import PrefetchingLoader, items_in_threads, usable_threads
from fpt_lightning.data.statistics import channel_statistics, deep_pictures, draw_sample, value_range
from fpt_lightning.data.transforms import normalise, stored_copy, unit_pixels
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.execution import device_name
from fpt_lightning.encoder.frozen import Encoded, FrozenEncoder, check_finite
from fpt_lightning.encoder.precision import check_precision
from fpt_lightning.encoder.selection import number_of_tokens
from fpt_lightning.errors import ImageError, StoreError
from fpt_lightning.files import read_rows, write_rows
from fpt_lightning.progress import duration
from fpt_lightning.store.codecs import check_codec, encode
from fpt_lightning.store.damage import forget_damaged
from fpt_lightning.store.index import FileRecord
from fpt_lightning.store.layout import SHARD
from fpt_lightning.store.lock import lock_store, share_lock
from fpt_lightning.store.place import is_local, resolve
from fpt_lightning.store.specification import FeatureShape, FeatureSpecification, from_sample
from fpt_lightning.store.store import FeatureStore, bytes_per_row
from fpt_lightning.store.writing import WritableStore

Rows = tuple[int, ...]
"""Of one sample: of some or all of its orientations."""
_FILES = 64  # whose records are remembered, as more of their pages may follow


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
    store: FeatureStore | None = None,
    batch_size: int = 4,
    decoding_threads: int | None = None,
    trainer: L.Trainer | None = None,
    overwrite: bool = False,
    repair: bool = False,
    on_error: OnError = "stop",
    rebuild: str = "fpt-lightning preload --config CONFIG --overwrite true",
    max_pixels: int | None = None,
    by_content: bool = False,
) -> FeatureStore:
    """Encode the samples that a store lacks; a store that lacks none is returned at once, without loading weights.

    Samples that are complete are never computed again, whatever stopped an earlier preload, unless their image file has
    changed (``FeatureStore.changed``). With several processes (the trainer's devices and nodes), each writes whole
    shards of its own. A broken image stops nothing until all others are stored.

    Args:
        manifest: the samples, of all splits.
        encoder: the frozen encoder and its selection.
        specification: what is asked; mean and std may still be empty (``auto``).
        url: of the store, which is made where there is none.
        store: the same, if it is open already.
        batch_size: images encoded at once.
        decoding_threads: threads of each process that read images (``fpt_lightning.data.prefetch.usable_threads``).
        trainer: whose devices do it; one device, chosen by Lightning, by default.
        overwrite: remove the store that is there, and start anew.
        repair: read the whole store first, and compute again what is damaged.
        on_error: ``stop`` with the list of all images that cannot be read, at the end; or ``skip`` them: the store
            records them as left out, and ``{url}.left_out.csv`` lists them.
        rebuild: the command that a mismatch names.
        max_pixels: that images may have (``fpt_lightning.data.images.read_image``).
        by_content: whether all images are read to find those that have changed (``FeatureStore.changed``).

    Returns:
        The complete store.

    Raises:
        ConfigurationError: a trainer whose precision changes images.
        StaleStoreError: the store there was made with other settings.
        ImageError: images that cannot be read; all others are stored.
        EncoderError: features that are not finite, naming the image.
        StoreError: another preload is writing it, too little disk space, a place that cannot be written, or features
            that do not fit the codec, naming the image.
    """
    if trainer is not None:
        check_precision(trainer)
    url = resolve(url)
    ids = [sample.id for sample in manifest.samples]
    manifest = manifest if manifest.files is not None else manifest.look()
    assert manifest.files is not None
    if (store is not None or FeatureStore.exists(url)) and not overwrite and not repair:
        store = FeatureStore.open(url) if store is None else store
        store.require(specification, rebuild)
        fresh = store.extended and not store.missing(ids) and not store.changed(manifest.files, by_content)
        if fresh and (on_error == "skip" or not store.left_out(ids)):
            if store.retime(manifest.files):
                _record_times(url, manifest.files)
            return store
    frozen_pass = FrozenPass(
        manifest,
        encoder,
        specification,
        url,
        batch_size,
        decoding_threads,
        overwrite,
        repair,
        on_error,
        rebuild,
        max_pixels,
        by_content,
    )
    if trainer is None:
        trainer = L.Trainer(devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False)
    writer = _StoreWriter()
    trainer.callbacks.append(writer)  # type: ignore[attr-defined]
    try:
        trainer.predict(frozen_pass, return_predictions=False)
    finally:
        trainer.callbacks.remove(writer)  # type: ignore[attr-defined]
        frozen_pass.unlock()
    trainer.strategy.barrier("preloaded")  # here, as a process without a share never enters the loop
    store = FeatureStore.open(url)
    if missing := store.missing(ids):
        raise StoreError(f"the feature store {url} still lacks {len(missing)} of {len(ids)} samples after its preload.")
    _report_notices(url)
    _report_left_out(store, manifest, on_error)
    return store


@rank_zero_only
def _record_times(url: str, files: ImageFiles) -> None:
    """Spare the next preload reading images whose time of change alone is another, as of a data set that was copied."""
    try:
        lock = lock_store(url)
        WritableStore.open(url).retime(files)
    except StoreError as error:
        rank_zero_warn(f"times of change cannot be recorded, so that such images are read at every start: {error}")
        return
    if lock is not None:
        lock.close()


@rank_zero_only
def _report_notices(url: str) -> None:
    """Join what the processes noticed to what earlier preloads did, in ``{url}.notices.csv``, and say how many.

    A preload that goes on does not read again what is stored, so notices of it stay.
    """
    if not is_local(url):
        return  # each was warned of at once
    path, noticed = Path(f"{url}.notices.csv"), dict[str, str]()
    parts = sorted(path.parent.glob(f"{path.name}.*[0-9]"))
    for part in [path, *parts] if parts else []:
        noticed |= _read_notices(part)
    if noticed:
        write_rows(path, [["image", "notice"], *sorted(noticed.items())])
        for part in parts:
            part.unlink()
        rank_zero_warn(f"{len(noticed)} images are not shown as their files ask: {path} lists them and why.")


def _read_notices(path: Path) -> dict[str, str]:
    """By image; none where there is no such list."""
    rows = read_rows(path, "list of notices") if path.is_file() else []
    return {row["image"]: row["notice"] for row in rows}


def _report_left_out(store: FeatureStore, manifest: Manifest, on_error: OnError) -> None:
    broken = store.left_out([sample.id for sample in manifest.samples])
    if not broken:
        Path(f"{store.url}.left_out.csv").unlink(missing_ok=True)  # of an earlier preload
        return
    reasons = unreadable({id: manifest.root / id for id in broken}, store.specification.reader)
    listed = "\n  ".join(reasons.values())
    if on_error == "stop":
        raise ImageError(
            f"{len(broken)} of {len(manifest.samples)} images cannot be read, all others are stored:\n  {listed}\nMend "
            "them, or take them out of the data set, and preload again; or leave them out by data.on_error skip."
        )
    write_left_out(f"{store.url}.left_out.csv", reasons)


def write_left_out(path: str, reasons: Mapping[str, str]) -> None:
    """Warn of images that are left out, and list them in a CSV file (image, reason) on the first process.

    Where the path is a URL, the warning lists them.
    """
    told = f"{len(reasons)} images cannot be read and are left out"
    if "://" in path:
        rank_zero_warn("\n  ".join([f"{told}:", *reasons.values()]))
        return
    rank_zero_warn(f"{told}: {path} lists them.")
    rank_zero_only(write_rows)(Path(path), [["image", "reason"], *reasons.items()])


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
        decoding_threads: int | None = None,
        overwrite: bool = False,
        repair: bool = False,
        on_error: OnError = "stop",
        rebuild: str = "",
        max_pixels: int | None = None,
        by_content: bool = False,
    ) -> None:
        super().__init__()
        self.max_pixels, self.by_content = max_pixels, by_content
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer shards to do than processes
        self.manifest, self.config, self.url, self.rebuild = manifest, encoder, resolve(url), rebuild
        self.specification = specification
        self.batch_size, self.decoding_threads = batch_size, decoding_threads
        self.overwrite, self.repair, self.on_error = overwrite, repair, on_error
        self.encoder: FrozenEncoder | None = None
        self.store: WritableStore | None = None
        self._lock: IO[bytes] | None = None

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
        size = asked.orientations * bytes_per_row(asked.codec, shape, asked.image_size)
        self._lock = lock_store(self.url)
        if self.overwrite and WritableStore.exists(self.url):
            WritableStore.delete(self.url)
        if WritableStore.exists(self.url):
            store = WritableStore.open(self.url, tolerant=self.repair)
            store.require(asked, self.rebuild)
            store.remove_partial_files()
            if self.repair:
                rank_zero_info(f"repair: {len(forget_damaged(store))} samples of {self.url} are damaged")
            assert self.manifest.files is not None
            store.forget(store.changed(self.manifest.files, self.by_content))
            store.retime(self.manifest.files)
            if self.on_error == "stop":
                store.forget(store.left_out(ids))
            _check_space(self.url, len(store.missing(ids)) * size)
        else:
            _check_space(self.url, len(ids) * size)
            made_with = _made_with(self.trainer.strategy.root_device)
            store = WritableStore.create(self.url, self._measured(asked), shape, made_with)
        store.extend(ids)
        if self._lock is not None:
            share_lock(self._lock, self.url)

    def _measured(self, asked: FeatureSpecification) -> FeatureSpecification:
        """With range of values, mean and std of a sample of ``Manifest.to_measure``, where they are ``auto``."""
        root, paths = self.manifest.root, [self.manifest.path(sample) for sample in self.manifest.to_measure()]
        if asked.range_of.startswith("auto"):
            deep = deep_pictures(paths)
            drawn = draw_sample(deep, root)
            values = value_range(drawn, self.max_pixels, self.on_error)
            asked = replace(asked, value_range=values, range_of=from_sample(asked.range_of, len(drawn), len(deep)))
            rank_zero_info(f"data.value_range: {list(values)}, {asked.range_of}")
        if not asked.mean:
            reader, drawn = replace(asked.reader, max_pixels=self.max_pixels), draw_sample(paths, root)
            mean, std = channel_statistics(drawn, asked.resolution, reader, self.on_error)
            asked = replace(asked, mean=mean, std=std, statistics=from_sample(asked.statistics, len(drawn), len(paths)))
            rank_zero_info(f"data.mean: {list(mean)}, data.std: {list(std)}, {asked.statistics}")
        return asked

    def unlock(self) -> None:
        """Let other preloads write."""
        if self._lock is not None:
            self._lock.close()

    def setup(self, stage: str) -> None:
        if self._lock is None:
            self._lock = lock_store(self.url, shared=True)
        self._build()
        self.store = WritableStore.open(self.url)
        self.specification = self.store.specification

    def predict_dataloader(self) -> PrefetchingLoader:
        """This process's share of the missing samples, whole shards of them, in the order of their rows."""
        assert self.store is not None
        rows = self.store.missing_rows([sample.id for sample in self.manifest.samples])
        shards = [list(shard) for _, shard in groupby(rows, lambda row: row // SHARD)]
        mine = shards[self.trainer.global_rank :: self.trainer.world_size]
        batches = [
            self._by_sample(shard[start : start + self.batch_size])
            for shard in mine
            for start in range(0, len(shard), self.batch_size)
        ]
        images = _PreloadImages(self.manifest, self.store, self.specification, self.max_pixels)
        threads = usable_threads(self.decoding_threads, self.trainer.num_devices)
        return PrefetchingLoader(images, threads, batch_size=None, sampler=_ShardBatches(batches))

    def _by_sample(self, rows: Sequence[int]) -> list[Rows]:
        assert self.store is not None
        each = self.store.orientations
        return [tuple(own) for _, own in groupby(rows, lambda row: row // each)]

    def on_predict_start(self) -> None:
        """Say what is about to be done: images, bytes and time."""
        assert self.store is not None
        samples, spec = self.manifest.samples, self.specification
        missing = self.store.missing_rows([sample.id for sample in samples])
        images = len({row // spec.orientations for row in missing})
        size = self.store.bytes_per_row * spec.orientations
        seconds = self._seconds_per_pass() * len(missing) / self.trainer.world_size
        rank_zero_info(
            f"preload: {images:,} of {len(samples):,} images"
            f"{f' in {spec.orientations} orientations' if spec.orientations > 1 else ''} through {spec.encoder} at "
            f"{spec.resolution[0]} x {spec.resolution[1]} into {self.url}: "
            f"{len(missing) * self.store.bytes_per_row / 1e6:,.0f} MB ({size / 1e6:.2f} MB an image), "
            f"about {duration(seconds)} on {self.trainer.world_size} device(s)"
        )

    def _seconds_per_pass(self) -> float:
        for _ in range(2):  # the first run warms up
            start = time.perf_counter()
            self._build()(torch.zeros(1, 3, *self.specification.resolution, device=self.device)).features.cpu()
        return time.perf_counter() - start

    def predict_step(self, batch: _PreloadBatch, batch_idx: int) -> Encoded | tuple[()]:
        """What the encoder gives for the batch's images, of which there may be none."""
        if not batch.rows:
            return ()
        encoded: Encoded = self._build()(batch.images)
        return encoded


class _ShardBatches(DistributedSampler[list[Rows]]):
    """This process's batches; as a distributed sampler, it is left alone by Lightning."""

    def __init__(self, batches: Sequence[list[Rows]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Rows]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _PreloadBatch(NamedTuple):
    """Rows of one shard.

    Attributes:
        rows: those with an image.
        images: (len(rows), 3, height, width), fp32, normalised.
        copies: the low-resolution copies (len(rows), size, size, 3), uint8.
        broken: rows whose images cannot be read.
        files: of all images, by row.
        notices: of images that are not shown as their files ask, by id.
    """

    rows: list[int]
    images: Tensor
    copies: NDArray[np.uint8]
    broken: list[int]
    files: dict[int, FileRecord]
    notices: dict[str, str]


class _Decoded(NamedTuple):
    """An image for its rows, an orientation each; without pixels where it cannot be read."""

    rows: Rows
    id: str
    file: FileRecord
    notices: list[str]
    pixels: list[Tensor]
    copies: list[NDArray[np.uint8]]


class _PreloadImages(Dataset[_PreloadBatch]):
    """Batches by the rows of their images."""

    def __init__(
        self,
        manifest: Manifest,
        store: FeatureStore,
        specification: FeatureSpecification,
        max_pixels: int | None = None,
    ) -> None:
        self.root, self.source, self.specification = manifest.root, store.source, specification
        self.reader = replace(specification.reader, max_pixels=max_pixels)
        self.local = is_local(store.url)
        self._record = lru_cache(_FILES)(FileRecord.of)

    def __getitem__(self, batch: list[Rows]) -> _PreloadBatch:
        return self.gather([self.prepare(rows) for rows in batch])

    def in_threads(self, batches: Iterable[list[Rows]], threads: int) -> Generator[_PreloadBatch, None, None]:
        """The same of several batches (``PrefetchingLoader``)."""
        return items_in_threads(self.prepare, self.gather, batches, threads)

    def prepare(self, rows: Rows) -> _Decoded:
        """Read, resize and normalise one image, in any thread."""
        spec, notices = self.specification, list[str]()
        sources = [self.source(row) for row in rows]
        id = sources[0][0]
        file = self._record(file_and_page(self.root / id)[0])  # before it is read
        read = self._read(id, notices if self.local else None)  # else warned of at once
        views = [] if read is None else [oriented(read, orientation) for _, orientation in sources]
        pixels = [normalise(unit_pixels(view, spec.resolution), spec.mean, spec.std) for view in views]
        shown = [orientation for _, orientation in sources[: len(views)]]
        views = [zoomed(view, each, spec.zoom) for view, each in zip(views, shown, strict=True)]
        pixels = [zoomed_pixels(image[None], each, spec.zoom)[0] for image, each in zip(pixels, shown, strict=True)]
        return _Decoded(rows, id, file, notices, pixels, [stored_copy(view, spec.image_size) for view in views])

    def gather(self, decoded: Sequence[_Decoded]) -> _PreloadBatch:
        """A batch of what ``prepare`` gave."""
        pixels = [each for image in decoded for each in image.pixels]
        return _PreloadBatch(
            [row for image in decoded if image.pixels for row in image.rows],
            torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0),
            np.array([copy for image in decoded for copy in image.copies], np.uint8),
            [row for image in decoded if not image.pixels for row in image.rows],
            {row: image.file for image in decoded for row in image.rows},
            {image.id: " ".join(image.notices) for image in decoded if image.notices},
        )

    def _read(self, id: str, notices: list[str] | None) -> NDArray[Any] | None:
        try:
            return self.reader(self.root / id, notices)
        except ImageError as error:
            warnings.warn(str(error), stacklevel=2)  # at once; the list comes at the end
            return None


class _StoreWriter(L.Callback):
    """Collects a shard's samples and writes them together, in a thread beside the next batches.

    What was computed is written whatever stops the pass.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[int, dict[str, NDArray[Any]], FileRecord]] = []  # row, its arrays, its image's file
        self.notices: dict[str, str] = {}
        self._thread = ThreadPoolExecutor(1, "writing")
        self._writing: Future[None] | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the list of a pass that was stopped: what it stored is not read again."""
        assert isinstance(pl_module, FrozenPass)
        self.listed = Path(f"{pl_module.url}.notices.csv.{trainer.global_rank}")
        self.notices = _read_notices(self.listed)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(pl_module, FrozenPass)
        assert pl_module.store is not None
        if batch.broken:
            self._beside(pl_module.store.leave_out, batch.broken, [batch.files[row] for row in batch.broken])
        if not batch.rows:
            return
        if self.pending and self.pending[0][0] // SHARD != batch.rows[0] // SHARD:
            self._flush(pl_module.store)
        self.notices |= batch.notices
        names = [str(pl_module.manifest.root / pl_module.store.source(row)[0]) for row in batch.rows]
        check_finite(outputs, names, pl_module.config)
        content = {
            **encode(outputs.features, pl_module.specification, names),
            "indices": outputs.indices.to("cpu", torch.int32).numpy(),
            "pooled": outputs.pooled.cpu().numpy(),
            "images": batch.copies,
        }
        samples = [{name: block[i] for name, block in content.items()} for i in range(len(batch.rows))]
        self.pending += zip(batch.rows, samples, [batch.files[row] for row in batch.rows], strict=True)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._finish(pl_module)

    def _finish(self, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, FrozenPass)
        try:
            if pl_module.store is not None:
                self._flush(pl_module.store)
            self._wait()
        finally:
            self._thread.shutdown()

    def _flush(self, store: WritableStore) -> None:
        if self.pending:
            self._beside(_write, store, self.pending, self.listed, dict(self.notices))
            self.pending = []

    def _beside(self, write: Callable[..., None], *arguments: Any) -> None:
        """Write in the thread, after what it writes now, so that no more than two shards are held."""
        self._wait()
        self._writing = self._thread.submit(write, *arguments)

    def _wait(self) -> None:
        error, self._writing = None if self._writing is None else self._writing.exception(), None
        if error is not None:
            self.pending = []  # which is not tried after an error
            raise error


def _write(
    store: WritableStore,
    pending: Sequence[tuple[int, dict[str, NDArray[Any]], FileRecord]],
    listed: Path,
    notices: Mapping[str, str],
) -> None:
    rows, samples, files = zip(*pending, strict=True)
    if notices:
        write_rows(listed, [["image", "notice"], *notices.items()])
    store.write(rows, {name: np.stack([s[name] for s in samples]) for name in samples[0]}, files)


def _made_with(device: torch.device) -> dict[str, str]:
    versions = {name: version(name) for name in ("torch", "timm", "zarr", "pillow", "fpt-lightning")}
    return {**versions, "device": device_name(device)}


def _check_space(url: str, needed: int) -> None:
    if not is_local(url):
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
