"""Stored features with augmented views of the stored low-resolution copies (paper, sections 3.3 and 3.6)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from fpt_lightning.datamodules.images import ImageDataModule
from fpt_lightning.datamodules.samples import STORED, Samples, StoredSamples
from fpt_lightning.encoder.config import EncoderConfig, check_resolution
from fpt_lightning.errors import ConfigurationError, StoreError, check_at_least
from fpt_lightning.store.codecs import check_codec
from fpt_lightning.store.damage import check_present
from fpt_lightning.store.place import resolve
from fpt_lightning.store.preload import preload
from fpt_lightning.store.specification import FeatureSpecification
from fpt_lightning.store.store import FeatureStore


class PreloadedFeatureDataModule(ImageDataModule):
    """Stored features of the selected tokens with augmented views of the stored low-resolution copies.

    Fit, validate and test read the store alone; predict runs new images through the encoder, as ``ImageDataModule``.
    For a method that takes no stored features, this is ``ImageDataModule``: one configuration serves every method.

    Args:
        root: folder of the images (``ManifestDataModule``).
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
        self.url, self.codec, self.mirrored = resolve(store), codec, mirrored
        check_at_least("data.preload_batch_size", preload_batch_size, 1)
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
            ConfigurationError: a model that takes no stored features, or that the data do not fit.
        """
        if not self.uses_store(model):
            raise ConfigurationError(
                f"{type(model).__name__} trains on images, not on stored features: there is nothing to preload."
            )
        encoder = model if isinstance(model, EncoderConfig) else model.encoder_config
        assert isinstance(encoder, EncoderConfig)
        if isinstance(model, EncoderConfig):
            check_resolution("data.resolution", self.resolution, encoder.shape.patch_size, encoder.name)
        else:
            self.check("test" if self.external else "fit", model)
        manifest = self.read_manifest(getattr(getattr(model, "task", None), "KIND", "single-label"))
        if FeatureStore.exists(self.url) and not overwrite and not repair:
            made = FeatureStore.open(self.url)
            if not made.missing([sample.id for sample in manifest.samples]):
                self._take_depth(made.specification)
        if self.external:
            self._check_measured()
        self.store = None  # what it holds in memory may change
        return preload(
            manifest,
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
            max_pixels=self.fixed_reader.max_pixels,
        )

    def _take_depth(self, made: FeatureSpecification) -> None:
        """Know from a store of these images whether any has 16 bits, as opening each takes long."""
        if made.range_of == "none" or made.range_of.startswith("auto"):
            self._deep = made.range_of != "none"

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
        if STORED & self._inputs() and self._declared("test_time_mirroring") and not self.mirrored:
            raise ConfigurationError(
                f"model.test_time_mirroring is true, but the feature store {self.url} has no mirror images: make it "
                "with data.mirrored true."
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
        if not FeatureStore.exists(self.url):
            raise StoreError(
                f"there is no feature store at {self.url} (data.store): make it with `fpt-lightning preload`, or in "
                "Python with `data.preload(model)`."
            )
        before, self.store = self.store, FeatureStore.open(self.url, cache=self.cache)
        self._take_depth(self.store.specification)
        encoder = self._declared("encoder_config")
        if encoder is not None:
            self.store.require(self.asked_store(encoder), self.rebuild)
        elif (model := self._model()) is not None:
            rank_zero_warn(
                f"{type(model).__name__} does not say its encoder: the features of {self.url} are not held against it. "
                "Give it an encoder_config, as the methods of fpt-lightning have."
            )
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
        check_present(store)
        if left_out:
            told = (
                f"the feature store {self.url} left out {len(left_out)} of {len(ids)} samples, as their images could "
                f"not be read ({', '.join(left_out[:3])}; `fpt-lightning store info {self.url}` lists them)"
            )
            if self.on_error == "stop":
                raise StoreError(f"{told}: mend them and preload again, or go on without them by data.on_error skip.")
            rank_zero_warn(f"{told}: every stage goes on without them.")
        self.manifest = listed.without(left_out)

    def _dataset(self, split: str, augmentation: str) -> Samples:
        stored = STORED & self._inputs()
        if not stored:
            return super()._dataset(split, augmentation)
        assert self.store is not None
        spec = self.store.specification
        side_views = self._side_views(augmentation, spec.mean, spec.std, mirror=not spec.mirrored)
        inputs = sorted(stored) if self.explained is None else [*sorted(stored), "indices"]
        samples, arrays = self.labelled.split(split), self.store.arrays_of(inputs)
        seed = self.seed if spec.mirrored and augmentation != "none" else None
        both = split != "train" and bool(self._declared("test_time_mirroring"))
        return StoredSamples(self.labelled, samples, side_views, self.store, arrays, seed, both)
