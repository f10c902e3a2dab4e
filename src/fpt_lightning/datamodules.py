"""Data modules: where images, labels and stored features meet in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal, TypedDict, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from fpt_lightning.codecs import check_codec
from fpt_lightning.encoder import EncoderConfig, check_resolution
from fpt_lightning.errors import ConfigurationError, DataError, StoreError
from fpt_lightning.images import (
    Augmentation,
    Fit,
    ImageReader,
    OnError,
    ViewTransform,
    channel_statistics,
    normalise,
    stored_copy,
    unreadable,
)
from fpt_lightning.manifest import SPLITS, Fill, Kind, Manifest, Sample, check_classes, list_images, read_manifest
from fpt_lightning.prefetch import PrefetchingLoader
from fpt_lightning.preload import preload, write_left_out
from fpt_lightning.store import FeatureSpecification, FeatureStore


class Batch(TypedDict, total=False):
    """What both data modules yield: ids, labels and those of the rest that the method names in its ``INPUTS``.

    Attributes:
        ids: B sample ids.
        labels: (B,), int64, -1 where unlabelled; (B, classes), fp32, NaN where unknown, in a multi-label task; (B,),
            fp32, in a regression.
        side_images: (B, 3, side, side), fp32, normalised, augmented in training.
        features: keys and values (B, 2, L, H, T, head_dim), as the store's codec has them.
        key_scales: of the codec, where it has any (``fpt_lightning.codecs.Features``).
        value_scales: like those of the keys.
        indices: of the tokens that features are of (B, L, H, T), int32; from a store, where they are explained.
        pooled: pooled features (B, D), fp32.
        images: (B, 3, height, width), fp32, normalised; augmented in training where they are an input themselves, never
            where they stand in for stored features that have yet to be computed.
    """

    ids: list[str]
    labels: Tensor
    side_images: Tensor
    features: Tensor
    key_scales: Tensor
    value_scales: Tensor
    indices: Tensor
    pooled: Tensor
    images: Tensor


STORED = frozenset({"features", "pooled"})
"""Inputs that a feature store holds."""


class ImageDataModule(L.LightningDataModule):
    """High-resolution images for the encoder, low-resolution views for a side network; no store.

    The model's ``INPUTS`` say what a batch holds: a method that trains on ``images`` gets augmented ones.

    Args:
        root: folder of the images: ``{train,val,test}/{class}/image``, or ``{class}/image`` (split 70/10/20).
        manifest: CSV file instead of class folders; absolute or relative to ``root``. Prediction does not read it.
        image_column: its column of image paths, relative to ``root``.
        label_column: its column of class names or numbers; its columns of a multi-label task.
        split_column: its column of ``train``, ``val``, ``test``; by default ``split``, if there is one.
        group_column: its column of groups that a split keeps whole, such as patients; by default ``group``, if any.
        classes: class names in the order wanted, such as grades from low to high; sorted by default.
        missing_labels: what an empty field of a multi-label task stands for: ``ignore``, ``zeros`` or ``ones``.
        uncertain_labels: what -1 stands for in training, likewise; validation and test ignore it.
        split_seed: seed of a random split; apart from the run's seed, so that runs share a split.
        fold: of a cross-validation, from 1 (``fpt_lightning.manifest.read_manifest``); none by default.
        folds: number of folds.
        external: whether all images are test images of a model that was trained on others.
        allow_overlap: whether groups and identical files may be in several splits, with a warning.
        resolution: of the encoder's images in pixels: a side, or (height, width).
        mean: of each channel (or one for grey), for pixels in [0, 1]; ``auto`` computes it over the training images.
        std: like ``mean``.
        fit: ``squash`` resizes images to the encoder's aspect, ``letterbox`` pads them to it with black first.
        crop_border: whether the dark border of images (fundus, mammograms) is cut off (``images.bright_box``).
        image_size: side in pixels of the low-resolution copy that augmentation starts from.
        side_resolution: side of the side network's images in pixels; the model's own by default.
        augmentation: ``default`` (the published one), ``strong`` or ``none``.
        batch_size: of every stage.
        num_workers: processes that prepare batches.
        on_error: of images that cannot be read: ``stop``, or ``skip`` to leave them out of every stage, with a warning
            and a list: ``left_out.csv`` in the run's folder, for which all images are read once before the first batch;
            of a store ``{store}.left_out.csv``.

    Raises:
        ConfigurationError: values that cannot work.
        DataError: a data set that cannot be used, at ``setup``.
    """

    def __init__(
        self,
        root: str,
        manifest: str | None = None,
        image_column: str = "image",
        label_column: str | list[str] = "label",
        split_column: str | None = None,
        group_column: str | None = None,
        classes: list[str] | None = None,
        missing_labels: Fill = "ignore",
        uncertain_labels: Fill = "ignore",
        split_seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
        external: bool = False,
        allow_overlap: bool = False,
        resolution: int | tuple[int, int] = 512,
        mean: Literal["auto"] | list[float] = "auto",
        std: Literal["auto"] | list[float] = "auto",
        fit: Fit = "squash",
        crop_border: bool = False,
        image_size: int = 256,
        side_resolution: int | None = None,
        augmentation: Augmentation = "default",
        batch_size: int = 16,
        num_workers: int = 0,
        on_error: OnError = "stop",
    ) -> None:
        super().__init__()
        self.root, self.table = root, manifest
        self.reading: dict[str, Any] = {  # arguments of ``read_manifest``
            "image_column": image_column,
            "label_column": label_column,
            "split_column": split_column,
            "group_column": group_column,
            "classes": classes,
            "missing_labels": missing_labels,
            "uncertain_labels": uncertain_labels,
            "split_seed": split_seed,
            "fold": fold,
            "folds": folds,
            "external": external,
            "allow_overlap": allow_overlap,
        }
        self.external = external
        self.resolution = (resolution, resolution) if isinstance(resolution, int) else (resolution[0], resolution[1])
        self.reader = ImageReader(self.resolution, fit, crop_border)
        self.mean, self.std = _given_statistics(mean, std)
        self.image_size, self.side_resolution = image_size, side_resolution
        self.augmentation: str = augmentation
        self.batch_size, self.num_workers = batch_size, num_workers
        self.on_error: OnError = on_error
        self.computed: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())  # mean and std, where 'auto'
        self.seed: int | None = None
        self.explained: str | None = None  # the split that predict takes, with its labels, in place of all images
        self.listed: Manifest | None = None  # the whole data set
        self.manifest: Manifest | None = None  # without what is left out
        self.unlabelled: Manifest | None = None
        self.specification: FeatureSpecification | None = None

    # What the trainer calls

    def setup(self, stage: str) -> None:
        """Read the manifest and hold it against the model.

        Raises:
            DataError: see ``read_manifest``.
            ConfigurationError: the model and the data do not fit each other.
        """
        task = self._declared("task")
        kind: Kind = "single-label" if task is None else task.KIND
        if stage == "predict" and self.explained is None:
            self.unlabelled = self._readable(list_images(self.root, kind, self._declared("num_classes") or 1))
            encoder = self._declared("encoder_config")
            self.specification = None if encoder is None else self.asked(encoder)
            return
        if self.external and "test" not in (stage, self.explained):
            raise ConfigurationError("data.external is true: all images are for test, none for fit or validate.")
        self.read_manifest(kind)
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**32
        self._setup_features(stage)
        if stage == "fit":
            rank_zero_info(self.labelled.summary())
        for split in ("test",) if self.external else SPLITS:
            absent = [
                n for n, count in zip(self.class_names, self.labelled.class_counts(split), strict=True) if not count
            ]
            if absent:
                rank_zero_warn(f"the split {split} has no image of {', '.join(absent)}: its AUC leaves them out.")

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order, and with views, that the seed and the epoch alone decide."""
        return self._loader("train", augmentation=self.augmentation)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Every image below ``root``, through the encoder: no store, no labels; or the split that is explained."""
        if self.explained is not None:
            return self._loader(self.explained)
        return self._dataloader(self._image_dataset(self.predicted, self.predicted.samples, "none"), shuffle=False)

    def state_dict(self) -> dict[str, Any]:
        """The seed that orders and augments, so that a resumed run goes on as it would have."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]

    # What others ask

    def read_manifest(self, kind: Kind = "single-label") -> Manifest:
        """The labelled data set, read once.

        Args:
            kind: of the labels; a model's is ``model.task.KIND``.

        Raises:
            DataError: see ``fpt_lightning.manifest.read_manifest``.
        """
        if self.listed is None or self.listed.kind != kind:
            self.manifest = self.listed = read_manifest(self.root, self.table, kind=kind, **self.reading)
        return self.listed

    @property
    def labelled(self) -> Manifest:
        """The manifest after ``setup``, without what is left out."""
        if self.manifest is None:
            raise DataError(f"{type(self).__name__} has not read its manifest: call setup('fit') first.")
        return self.manifest

    @property
    def predicted(self) -> Manifest:
        """What predict takes, after ``setup``: every image below ``root``, or the split that is explained."""
        if self.explained is not None:
            return replace(self.labelled, samples=self.labelled.split(self.explained))
        assert self.unlabelled is not None
        return self.unlabelled

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the label indices."""
        return self.labelled.classes

    @property
    def training_labels(self) -> Tensor:
        """Labels of all training images, as in batches."""
        return _labels(self.labelled, self.labelled.split("train"))

    def asked(self, encoder: EncoderConfig) -> FeatureSpecification:
        """The specification of the features that an encoder gives for this module's images."""
        auto = "auto"
        if self.listed is not None:
            ids = [sample.id for sample in self.listed.split("train")]
            auto += f" over {len(ids)} images {sha256(chr(10).join(ids).encode()).hexdigest()[:16]}"
        return FeatureSpecification(
            encoder=encoder.name,
            weights=encoder.weights(),
            layers=encoder.tapped_layers,
            token_ratio=encoder.token_ratio,
            criterion=encoder.criterion,
            resolution=self.resolution,
            mean=self.mean,
            std=self.std,
            statistics="given" if self.mean else auto,
            image_size=self.image_size,
            codec="fp32",
            precision=encoder.precision,
            fit=self.reader.fit,
            crop_border=self.reader.crop_border,
        )

    # Inside

    def _setup_features(self, stage: str) -> None:
        self._check_model()
        if self.manifest is self.listed:  # once
            self.manifest = self._readable(self.labelled)
        if stage == "fit" and not self.mean and not self.computed[0]:
            paths = [self.labelled.path(sample) for sample in self.labelled.split("train")]
            self.computed = channel_statistics(paths, self.resolution, self.num_workers, self.reader.crop_border)
            rank_zero_info(f"data.mean: {list(self.computed[0])}, data.std: {list(self.computed[1])}")
        encoder = self._declared("encoder_config")
        if encoder is not None:
            asked = self.asked(encoder)
            self.specification = asked if asked.mean else replace(asked, mean=self.computed[0], std=self.computed[1])

    def _readable(self, listed: Manifest) -> Manifest:
        """What there is without the images that cannot be read, if those are to be left out."""
        if self.on_error == "stop":
            return listed
        reasons = unreadable({sample.id: listed.path(sample) for sample in listed.samples}, self.reader)
        if reasons:
            folder = "." if self.trainer is None else self.trainer.default_root_dir
            write_left_out(f"{folder}/left_out.csv", reasons)
        return listed.without(reasons)

    def _check_model(self) -> None:
        num_classes, encoder = self._declared("num_classes"), self._declared("encoder_config")
        if num_classes is not None and not self.external:  # other hospitals may lack a class
            check_classes("model.num_classes", num_classes, self.labelled)
        if encoder is not None:
            check_resolution("data.resolution", self.resolution, encoder.shape.patch_size, encoder.name)

    def _declared(self, name: str) -> Any:
        """What the trainer's model declares that it needs, such as ``side_resolution``; None without one."""
        return getattr(self.trainer.lightning_module, name, None) if self.trainer is not None else None

    def _side_resolution(self) -> int:
        declared: int | None = self._declared("side_resolution")
        if self.side_resolution is None and declared is None:
            raise ConfigurationError("data.side_resolution is not given, and the model declares no side_resolution.")
        if None not in (self.side_resolution, declared) and self.side_resolution != declared:
            raise ConfigurationError(
                f"data.side_resolution is {self.side_resolution}, but model.side_resolution is {declared}: "
                "give the model's alone."
            )
        side = declared if declared is not None else self.side_resolution
        assert side is not None
        if side > self.image_size:
            raise ConfigurationError(
                f"the side network's resolution is {side}, but the low-resolution copies have {self.image_size} "
                f"pixels a side: set data.image_size to at least {side}."
            )
        return side

    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std: the trained model's where it has them, this module's otherwise."""
        trained: FeatureSpecification | None = self._declared("specification")
        for mean, std in (
            (trained.mean, trained.std) if trained is not None else ((), ()),
            (self.mean, self.std),
            self.computed,
        ):
            if mean:
                return mean, std
        raise ConfigurationError(
            "data.mean and data.std are 'auto', which only fit computes: give a checkpoint (ckpt_path) or the numbers."
        )

    def _inputs(self) -> frozenset[str]:
        """What the model's forward takes; what FPT+ takes, for a model that does not say."""
        declared: frozenset[str] | None = self._declared("INPUTS")
        return frozenset({"side_images", "features"}) if declared is None else declared

    def _side_views(
        self, augmentation: str, mean: tuple[float, ...], std: tuple[float, ...], mirror: bool = True
    ) -> _Views | None:
        if "side_images" not in self._inputs():
            return None
        return _Views(ViewTransform(self._side_resolution(), augmentation, mirror), mean, std, self.seed or 0)

    def _image_dataset(self, manifest: Manifest, samples: Sequence[Sample], augmentation: str) -> _Samples:
        mean, std = self._statistics()
        views: _Views | None = None
        if self._inputs() & {"images", *STORED}:
            transform = ViewTransform(self.resolution, augmentation if "images" in self._inputs() else "none")
            views = _Views(transform, mean, std, self.seed or 0)
        side_views = self._side_views(augmentation, mean, std)
        return _ImageSamples(manifest, samples, side_views, views, self.reader, self.image_size)

    def _dataset(self, split: str, augmentation: str) -> _Samples:
        return self._image_dataset(self.labelled, self.labelled.split(split), augmentation)

    def _loader(self, split: str, augmentation: str = "none") -> DataLoader[Any]:
        return self._dataloader(self._dataset(split, augmentation), shuffle=split == "train")

    def _dataloader(self, dataset: _Samples, shuffle: bool) -> DataLoader[Any]:
        rank, world, epoch = 0, 1, 0
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            epoch = progress.processed  # as ``current_epoch`` lags behind in a run that goes on
        sampler = EpochSampler(len(dataset), rank, world, shuffle, self.seed or 0)
        sampler.set_epoch(epoch)
        return PrefetchingLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_collated,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator().manual_seed(0),  # else each loader draws from, and so changes, the global RNG
        )


class PreloadedFeatureDataModule(ImageDataModule):
    """Stored features of the selected tokens with augmented views of the stored low-resolution copies.

    Fit, validate and test read the store alone; predict runs new images through the encoder, as ``ImageDataModule``.
    For a method that takes no stored features, this is ``ImageDataModule``: one configuration serves every method.

    Args:
        root: see ``ImageDataModule``.
        store: local path or fsspec URL of the feature store.
        codec: of the stored keys and values: ``int8``, ``int4``, ``fp16`` or ``fp32``.
        mirrored: whether the store holds every image's mirror image too: augmented training then draws one of the two,
            for tokens and side image alike, where it else mirrors side images alone (paper, section 3.3). Twice the
            bytes and the frozen pass.
        preload_batch_size: images encoded at once by ``preload``.
        cache: folder on a fast local disk for copies of what training reads of a store that is far away; without one,
            every epoch reads it from there.
        in_memory: whether the store is read once, as a whole, into memory that worker processes share. Each training
            process (rank) has its own.
        **kwargs: see ``ImageDataModule``.
    """

    rebuild = "fpt-lightning preload --config CONFIG --overwrite true"

    def __init__(
        self,
        root: str,
        store: str,
        codec: Literal["int8", "int4", "fp16", "fp32"] = "int8",
        mirrored: bool = False,
        preload_batch_size: int = 4,
        cache: str | None = None,
        in_memory: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        check_codec(codec)
        self.url, self.codec, self.mirrored = store, codec, mirrored
        self.preload_batch_size, self.cache, self.in_memory = preload_batch_size, cache, in_memory
        self.store: FeatureStore | None = None

    def preload(
        self,
        model: L.LightningModule | EncoderConfig,
        trainer: L.Trainer | None = None,
        overwrite: bool = False,
        repair: bool = False,
    ) -> FeatureStore:
        """Bring the store up to date: make it where there is none, go on where an earlier preload stopped.

        Args:
            model: the model, whose ``encoder_config`` says which features, or that configuration itself.
            trainer: whose devices encode; by default one device, chosen by Lightning.
            overwrite: remove the store that is there, and start anew.
            repair: read the whole store first, and compute again what is damaged.

        Raises:
            StaleStoreError: the store there was made with other settings.
            ImageError: images that cannot be read, and ``on_error`` is ``stop``; all others are stored.
            ConfigurationError: a model that takes no stored features.
        """
        if not self.uses_store(model):
            raise ConfigurationError(
                f"{type(model).__name__} trains on images, not on stored features: there is nothing to preload."
            )
        encoder = model if isinstance(model, EncoderConfig) else model.encoder_config
        assert isinstance(encoder, EncoderConfig)
        if self.external and not self.mean:
            raise ConfigurationError(
                "data.mean and data.std are 'auto', but data.external is true, so there are no training images to "
                "compute them over: give those of the trained model (data.mean, data.std)."
            )
        self.store = None  # what it holds in memory may change
        check_resolution("data.resolution", self.resolution, encoder.shape.patch_size, encoder.name)
        return preload(
            self.read_manifest(getattr(getattr(model, "task", None), "KIND", "single-label")),
            encoder,
            self.asked_store(encoder),
            self.url,
            batch_size=self.preload_batch_size,
            num_workers=self.num_workers,
            trainer=trainer,
            overwrite=overwrite,
            repair=repair,
            on_error=self.on_error,
            rebuild=self.rebuild,
        )

    def asked_store(self, encoder: EncoderConfig) -> FeatureSpecification:
        """The specification that the store must have."""
        return replace(self.asked(encoder), codec=self.codec, mirrored=self.mirrored)

    @staticmethod
    def uses_store(model: Any) -> bool:
        """Whether a model takes what a store holds; one that does not declare its ``INPUTS`` does."""
        return bool(STORED & getattr(model, "INPUTS", STORED))

    def _setup_features(self, stage: str) -> None:
        if not STORED & self._inputs():
            super()._setup_features(stage)
            return
        self._check_model()
        if not FeatureStore.exists(self.url):
            raise StoreError(
                f"there is no feature store at {self.url} (data.store): make it with `fpt-lightning preload`, or in "
                "Python with `data.preload(model)`."
            )
        before, self.store = self.store, FeatureStore.open(self.url, cache=self.cache)
        encoder = self._declared("encoder_config")
        if encoder is not None:
            self.store.require(self.asked_store(encoder), self.rebuild)
        self._check_complete(self.store)
        self.specification = self.store.specification
        if self.in_memory:
            if before is not None:
                self.store.share(before)
            images = ["images"] if "side_images" in self._inputs() else []
            names = [*self.store.arrays_of(sorted(STORED & self._inputs())), *images]
            self.store.load(names, shared=self.num_workers > 0)

    def _check_complete(self, store: FeatureStore) -> None:
        listed = self.labelled if self.listed is None else self.listed
        ids = [sample.id for sample in listed.samples]
        missing, changed, left_out = store.missing(ids), store.changed(listed.root, ids), store.left_out(ids)
        if missing or changed:
            some = ", ".join([*missing, *changed][:3])
            raise StoreError(
                f"the feature store {self.url} lacks {len(missing)} of {len(ids)} samples, and {len(changed)} images "
                f"have changed since ({some}): complete it with `fpt-lightning preload`, or `data.preload(model)`."
            )
        store.check_present()
        if left_out:
            told = (
                f"the feature store {self.url} left out {len(left_out)} of {len(ids)} samples, as their images could "
                f"not be read ({', '.join(left_out[:3])}; {self.url}.left_out.csv lists them)"
            )
            if self.on_error == "stop":
                raise StoreError(f"{told}: mend them and preload again, or go on without them by data.on_error skip.")
            rank_zero_warn(f"{told}: every stage goes on without them.")
        self.manifest = listed.without(left_out)

    def _dataset(self, split: str, augmentation: str) -> _Samples:
        stored = STORED & self._inputs()
        if not stored:
            return super()._dataset(split, augmentation)
        assert self.store is not None
        spec = self.store.specification
        side_views = self._side_views(augmentation, spec.mean, spec.std, mirror=not spec.mirrored)
        inputs = sorted(stored) if self.explained is None else [*sorted(stored), "indices"]
        samples, arrays = self.labelled.split(split), self.store.arrays_of(inputs)
        seed = self.seed if spec.mirrored and augmentation != "none" else None
        return _StoredSamples(self.labelled, samples, side_views, self.store, arrays, seed)


class EpochSampler(DistributedSampler[Any]):
    """Pairs (epoch, index): with them a view depends on the seed, the epoch and the sample, on no worker.

    Training ranks get equally many pairs, the first ones repeated where needed; others get each sample once.

    Args:
        count: of samples.
        rank: of this process.
        world_size: of all.
        shuffle: a new order each epoch.
        seed: of the orders.
    """

    def __init__(self, count: int, rank: int, world_size: int, shuffle: bool, seed: int) -> None:
        self.count, self.rank, self.world_size = count, rank, world_size
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = list(range(self.count))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist()
            order += (order * self.world_size)[: -self.count % self.world_size]
        return iter([(self.epoch, index) for index in order[self.rank :: self.world_size]])

    def __len__(self) -> int:
        total = self.count + (-self.count % self.world_size if self.shuffle else 0)
        return len(range(self.rank, total, self.world_size))


@dataclass(frozen=True)
class _Views:
    """How images become normalised, augmented ones."""

    transform: ViewTransform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int

    def draw(self, images: Iterable[NDArray[Any]], keys: Sequence[tuple[int, int]]) -> Tensor:
        """(B, 3, height, width), fp32, from B images (height, width, 3) and their (epoch, index)."""
        seeds = [int(np.random.SeedSequence([self.seed, *key]).generate_state(1)[0]) for key in keys]
        views = [self.transform(image, seed) for image, seed in zip(images, seeds, strict=True)]
        return normalise(torch.stack(views), self.mean, self.std)


class _Samples(Dataset[Batch], ABC):
    """Samples by (epoch, index), fetched a batch at a time."""

    def __init__(self, manifest: Manifest, samples: Sequence[Sample], side_views: _Views | None) -> None:
        self.manifest, self.samples, self.side_views = manifest, samples, side_views

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        """A batch of one."""
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        samples = [self.samples[index] for _, index in keys]
        return {
            "ids": [sample.id for sample in samples],
            "labels": _labels(self.manifest, samples),
            **self._fetch(samples, keys),
        }

    @abstractmethod
    def _fetch(self, samples: Sequence[Sample], keys: Sequence[tuple[int, int]]) -> Batch:
        """The inputs of the samples, drawn for their (epoch, index)."""


class _ImageSamples(_Samples):
    def __init__(
        self,
        manifest: Manifest,
        samples: Sequence[Sample],
        side_views: _Views | None,
        views: _Views | None,
        reader: ImageReader,
        image_size: int,
    ) -> None:
        super().__init__(manifest, samples, side_views)
        self.views, self.reader, self.image_size = views, reader, image_size

    def _fetch(self, samples: Sequence[Sample], keys: Sequence[tuple[int, int]]) -> Batch:
        images = [self.reader(self.manifest.path(sample)) for sample in samples]
        batch: Batch = {}
        if self.views is not None:
            batch["images"] = self.views.draw(images, keys)
        if self.side_views is not None:
            batch["side_images"] = self.side_views.draw([stored_copy(i, self.image_size) for i in images], keys)
        return batch


class _StoredSamples(_Samples):
    def __init__(
        self,
        manifest: Manifest,
        samples: Sequence[Sample],
        side_views: _Views | None,
        store: FeatureStore,
        arrays: Sequence[str],
        mirror_seed: int | None,
    ) -> None:
        super().__init__(manifest, samples, side_views)
        self.store, self.arrays, self.mirror_seed = store, arrays, mirror_seed

    def _fetch(self, samples: Sequence[Sample], keys: Sequence[tuple[int, int]]) -> Batch:
        rows = [self.store.rows[sample.id] + self._mirrored(key) for sample, key in zip(samples, keys, strict=True)]
        batch: dict[str, Tensor] = {name: torch.from_numpy(self.store.read(rows, name)) for name in self.arrays}
        if self.side_views is not None:
            batch["side_images"] = self.side_views.draw(self.store.read(rows, "images"), keys)
        return cast(Batch, batch)

    def _mirrored(self, key: tuple[int, int]) -> bool:
        """Whether the mirror image is drawn."""
        if self.mirror_seed is None:
            return False
        return bool(np.random.SeedSequence([self.mirror_seed, *key, 1]).generate_state(1)[0] & 1)


def _labels(manifest: Manifest, samples: Sequence[Sample]) -> Tensor:
    """As a batch has them."""
    if manifest.kind == "single-label":
        return torch.tensor([sample.label for sample in samples])
    targets = torch.tensor([sample.targets for sample in samples])
    return targets if manifest.kind == "multi-label" else targets[:, 0]


def _collated(batch: Any) -> Any:
    return batch  # ``__getitems__`` gave it whole


def _start_worker(worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)  # each worker is one thread; OpenCV would start one a core


def _given_statistics(
    mean: Literal["auto"] | Sequence[float], std: Literal["auto"] | Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if mean == "auto" and std == "auto":
        return (), ()
    values = []
    for name, given in (("mean", mean), ("std", std)):
        if isinstance(given, str) or len(given) not in (1, 3) or (name == "std" and min(given) <= 0):
            raise ConfigurationError(
                f"data.{name} is {given!r}: give one number for grey images or three for colour (std above 0), "
                "or 'auto' for both mean and std."
            )
        values.append(tuple(float(v) for v in given) * (3 // len(given)))
    return values[0], values[1]
