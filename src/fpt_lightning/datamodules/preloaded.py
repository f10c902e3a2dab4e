"""Stored features with augmented views of the stored low-resolution copies (paper, sections 3.3 and 3.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray

from fpt_lightning.data.device_views import DeviceViews
from fpt_lightning.data.image_files import ImageFiles
from fpt_lightning.data.manifest import Manifest, Sample
from fpt_lightning.data.orientations import check_orientations, check_zoom
from fpt_lightning.datamodules.images import ImageDataModule, over_images
from fpt_lightning.datamodules.samples import STORED, Samples, StoredSamples, Views
from fpt_lightning.encoder.config import EncoderConfig, check_resolution
from fpt_lightning.errors import ConfigurationError, StoreError
from fpt_lightning.store.codecs import check_codec
from fpt_lightning.store.damage import check_present
from fpt_lightning.store.place import resolve
from fpt_lightning.store.preload import preload
from fpt_lightning.store.specification import FeatureSpecification, is_over
from fpt_lightning.store.store import FeatureStore


class PreloadedFeatureDataModule(ImageDataModule):
    """Stored features of the selected tokens with augmented views of the stored low-resolution copies.

    Fit, validate and test read the store alone; predict runs new images through the encoder, as ``ImageDataModule``.
    For a method that takes no stored features, this is ``ImageDataModule``: one configuration serves every method.

    Args:
        root: folder of the images (``ManifestDataModule``).
        store: local path or fsspec URL of the feature store.
        codec: of the stored keys and values: ``int8``, ``int4``, ``fp16`` or ``fp32``.
        orientations: of each image that the store holds: 1, 2 (its mirror image too), 4 (both upside down too) or 8
            (quarter turns too, of square images). Augmented training draws one of them, for tokens and side image
            alike, where it else mirrors side images alone (paper, section 3.3). As many times the bytes and the frozen
            pass.
        zoom: the smallest part of each side of the image that a further orientation shows, such as 0.55; each shows
            another part, so that the model meets, and in evaluation takes the mean of, several scales and places
            (``fpt_lightning.data.orientations``). Not in the paper.
        cache: folder on a fast local disk for copies of what training reads of a store that is far away; without one,
            every epoch reads it from there.
        in_memory: whether the store is read once, as a whole, into memory that worker processes share. Each training
            process (rank) has its own.
        augment_on: where the ``default`` side images of training are drawn: in the ``loader``, or on the ``device``, a
            batch at once, which the loader would keep waiting (in a loop of your own, ``on_after_batch_transfer``).
        check: how image files are held against those that the store is of: ``time`` by their size and time of change,
            and by their content where the time alone differs; ``digest`` reads all of them, once a process.
        **kwargs: see ``ImageDataModule``.
    """

    rebuild = "fpt-lightning preload --config CONFIG --overwrite true"

    def __init__(
        self,
        root: str,
        store: str,
        codec: Literal["int8", "int4", "fp16", "fp32"] = "int8",
        orientations: Literal[1, 2, 4, 8] = 1,
        zoom: float = 1.0,
        cache: str | None = None,
        in_memory: bool = False,
        augment_on: Literal["loader", "device"] = "loader",
        check: Literal["time", "digest"] = "time",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        check_codec(codec)
        check_orientations("data.orientations", orientations)
        check_zoom("data.zoom", zoom, orientations)
        self.url, self.codec, self.orientations, self.zoom = resolve(store), codec, orientations, zoom
        self.cache, self.in_memory = cache, in_memory
        if augment_on not in ("loader", "device"):
            raise ConfigurationError(f"data.augment_on is {augment_on!r}: choose 'loader' or 'device'.")
        self.augment_on: str = augment_on
        self._device_views: DeviceViews | None = None  # of the training loader
        if check not in ("time", "digest"):
            raise ConfigurationError(f"data.check is {check!r}: choose 'time' or 'digest'.")
        self.by_content = check == "digest"
        self.store: FeatureStore | None = None  # opened once
        self._complete: Manifest | None = None  # what the store was found to hold
        self._looked = False  # whether the files that the manifest knows have served a preload or a stage

    def preload(
        self,
        model: L.LightningModule | EncoderConfig,
        trainer: L.Trainer | None = None,
        overwrite: bool = False,
        repair: bool = False,
    ) -> FeatureStore:
        """Bring the store up to date: make it where there is none, go on where an earlier preload stopped.

        Stages that follow take the image files as they are now, and a store that they found complete as it is.

        Args:
            model: the model, whose ``encoder_config`` says which features, or that configuration itself.
            trainer: whose devices encode; by default one device, chosen by Lightning.
            overwrite: remove the store that is there, and start anew.
            repair: read the whole store first, and compute again what is damaged.

        Raises:
            StaleStoreError: the store there was made with other settings.
            ImageError: images that cannot be read, and ``on_error`` is ``stop``; all others are stored.
            ConfigurationError: a model that takes no stored features, or that the data do not fit.
        """
        if not self.uses_store(model):
            raise ConfigurationError(
                f"{type(model).__name__} trains on images, not on stored features: there is nothing to preload."
            )
        encoder = model if isinstance(model, EncoderConfig) else model.encoder_config
        assert isinstance(encoder, EncoderConfig)
        if isinstance(model, EncoderConfig):
            self.take_encoder(encoder)
            check_resolution("data.resolution", self.resolution, encoder.shape.patch_size, encoder.name)
        else:
            self.check("test" if self.external else "fit", model)
        manifest = self.read_manifest(getattr(getattr(model, "task", None), "KIND", "single-label"))
        if self._looked:
            manifest = self._take_files(ImageFiles.look(manifest.root, [sample.id for sample in manifest.samples]))
        self._looked = True
        if self.external:
            self._check_measured()
        asked = self._of_store(encoder) if overwrite else self.asked_store(encoder)
        before, self.store = None if overwrite or repair else self._open(), None  # until it is complete
        store = preload(
            manifest,
            encoder,
            asked,
            self.url,
            store=before,
            batch_size=self.preload_batch_size,
            decoding_threads=self.decoding_threads,
            trainer=trainer,
            overwrite=overwrite,
            repair=repair,
            on_error=self.on_error,
            rebuild=self.rebuild,
            max_pixels=self.fixed_reader.max_pixels,
            by_content=self.by_content,
        )
        if store is before:
            self.store = store
        else:  # a pass may have taken days
            assert manifest.files is not None
            self._take_files(manifest.files.look_again())
        return store

    def _take_files(self, files: ImageFiles) -> Manifest:
        """The data set with its files as they were just looked at."""
        assert self.listed is not None
        self.manifest = self.listed = replace(self.listed, files=files)
        self._deep = None
        return self.listed

    def _open(self) -> FeatureStore | None:
        """The store, opened once; None where there is none."""
        if self.store is None and FeatureStore.exists(self.url):
            self.store = FeatureStore.open(self.url, cache=self.cache)
        return self.store

    def _known(self) -> FeatureStore | None:
        """The store, of whatever settings, for what it knows of the images; None where it cannot be opened."""
        try:
            return self._open()
        except StoreError:  # which is said where its features are needed
            return None

    def _digests(self, files: ImageFiles) -> NDArray[np.int64]:
        store = self._known()
        return super()._digests(files) if store is None else store.digests(files)

    def _has_deep(self) -> bool:
        """Known from a store of these images, as opening each takes long."""
        listed = self.listed
        if self._deep is None and listed is not None and listed.files is not None:
            store = self._known()
            if store is not None and not store.missing(listed.files.ids) and not store.changed(listed.files):
                range_of = store.specification.range_of
                self._deep = range_of != "none" if range_of.startswith(("none", "auto")) else None
        return super()._has_deep()

    def _check_measured(self) -> None:
        """Refuse ``auto`` where there are no training images."""
        auto = {
            "data.mean and data.std": not self.mean,
            "data.value_range": self.value_range == "auto" and self._has_deep(),
        }
        for names, measured in auto.items():
            if measured:
                raise ConfigurationError(
                    f"{names}: 'auto' is measured over training images, but data.external is true and there are none: "
                    "give the numbers of the trained model."
                )

    def _check_model(self, stage: str) -> None:
        super()._check_model(stage)
        if stage == "fit" and self._augments_on_device(self.augmentation):
            self._on_device((0.0,), (1.0,), self.orientations)
        evaluated = self._evaluated()
        if STORED & self._inputs() and evaluated > self.orientations:
            raise ConfigurationError(
                f"model.test_time_orientations is {evaluated}, but data.orientations {self.orientations}: make the "
                f"feature store {self.url} with data.orientations {evaluated}."
            )

    def check_store(self, encoder: EncoderConfig) -> None:
        """Hold the store, if there is one, against what an encoder gives.

        Raises:
            StaleStoreError: it was made with other settings.
            StoreError: it cannot be reached or opened.
        """
        if (store := self._open()) is not None:
            store.require(self.asked_store(encoder), self.rebuild)

    def asked_store(self, encoder: EncoderConfig) -> FeatureSpecification:
        """The specification that the store must have; of a fold, statistics of a store without folds are as good."""
        asked, store = self._of_store(encoder), self._known()
        if store is not None and self.listed is not None and self.listed.unfolded:
            made, unfolded = store.specification, over_images(self.listed.unfolded)
            if asked.statistics.startswith("auto") and is_over(made.statistics, unfolded):
                asked = replace(asked, statistics=unfolded)
            if asked.range_of.startswith("auto") and is_over(made.range_of, unfolded):
                asked = replace(asked, range_of=unfolded)
        return asked

    def _of_store(self, encoder: EncoderConfig) -> FeatureSpecification:
        check_orientations("data.orientations", self.orientations, self.resolution)
        return replace(self.asked(encoder), codec=self.codec, orientations=self.orientations, zoom=self.zoom)

    @staticmethod
    def uses_store(model: Any) -> bool:
        """Whether a model takes what a store holds; one that does not declare its ``INPUTS`` does."""
        return bool(STORED & getattr(model, "INPUTS", STORED))

    def _setup_features(self, stage: str) -> None:
        if not STORED & self._inputs():
            super()._setup_features(stage)
            return
        store, self._looked = self._open(), True
        if store is None:
            raise StoreError(
                f"there is no feature store at {self.url} (data.store): make it with `fpt-lightning preload`, or in "
                "Python with `data.preload(model)`."
            )
        encoder = self._declared("encoder_config")
        try:
            if encoder is not None:
                store.require(self.asked_store(encoder), self.rebuild)
            elif (model := self._model()) is not None:
                rank_zero_warn(
                    f"{type(model).__name__} does not say its encoder: the features of {self.url} are not held against "
                    "it. Give it an encoder_config, as the methods of fpt-lightning have."
                )
            if self._complete is not self.listed:
                self._check_complete(store)
        except StoreError:
            self.store = None  # to be opened anew when it has been mended
            raise
        self.specification = store.specification
        if self.in_memory:
            images = ["images"] if "side_images" in self._inputs() else []
            names = [*store.arrays_of(sorted(STORED & self._inputs())), *images]
            store.load(names, shared=self.num_workers > 0)

    def _check_complete(self, store: FeatureStore) -> None:
        """Find, once, all images in the store, as they are, and their rows in its shards."""
        listed = self.listed
        assert listed is not None
        assert listed.files is not None
        ids = listed.files.ids
        missing, changed = store.missing(ids), store.changed(listed.files, self.by_content)
        left_out = store.left_out(ids)
        if missing or changed:
            some = ", ".join([*missing, *changed][:3])
            raise StoreError(
                f"the feature store {self.url} lacks {len(missing)} of {len(ids)} samples, and {len(changed)} images "
                f"have changed since ({some}): complete it with `fpt-lightning preload`, or `data.preload(model)`."
            )
        check_present(store)
        if left_out:
            told = (
                f"the feature store {self.url} left out {len(left_out)} of {len(ids)} samples, as their images could "
                f"not be read ({', '.join(left_out[:3])}; `fpt-lightning store info {self.url}` lists them)"
            )
            if self.on_error == "stop":
                raise StoreError(f"{told}: mend them and preload again, or go on without them by data.on_error skip.")
            rank_zero_warn(f"{told}: every stage goes on without them.")
        self.manifest, self._complete = listed.without(left_out), listed

    def _augments_on_device(self, augmentation: str) -> bool:
        return self.augment_on == "device" and augmentation != "none" and "side_images" in self._inputs()

    def _on_device(self, mean: Sequence[float], std: Sequence[float], orientations: int) -> DeviceViews:
        if self.augmentation != "default":
            raise ConfigurationError(
                f"data.augment_on is 'device', where data.augmentation {self.augmentation!r} is not made: choose "
                "'default', or augment in the loader."
            )
        return DeviceViews(self._side_resolution(), self.image_size, orientations == 1, mean, std, self.seed or 0)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Draw the side images that were left to the device."""
        if isinstance(batch, dict) and "copies" in batch:
            assert self._device_views is not None
            batch["side_images"] = self._device_views(batch.pop("copies"), batch.pop("view_numbers"))
        return batch

    def _dataset(self, samples: Sequence[Sample], augmentation: str, training: bool) -> Samples:
        stored = STORED & self._inputs()
        if not stored:
            return super()._dataset(samples, augmentation, training)
        assert self.store is not None
        spec = self.store.specification
        if self._augments_on_device(augmentation):
            self._device_views = self._on_device(spec.mean, spec.std, spec.orientations)
            side_views: Views | DeviceViews | None = self._device_views
        else:
            side_views = self._side_views(augmentation, spec.mean, spec.std, mirror=spec.orientations == 1)
        inputs = sorted(stored) if self.explained is None else [*sorted(stored), "indices"]
        seed = self.seed if spec.orientations > 1 and augmentation != "none" else None
        evaluated = 1 if training else self._evaluated()
        arrays = self.store.arrays_of(inputs)
        return StoredSamples(self.labelled, samples, side_views, self.store, arrays, seed, evaluated)
