"""Images for the encoder and views for the side network, straight from the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from fpt_lightning.data.images import FULL_RANGE, Fit, ImageReader, check_extras, unreadable
from fpt_lightning.data.manifest import SPLITS, Kind, Manifest, Sample, check_classes, numbers_of
from fpt_lightning.data.orientations import check_orientations, evaluated_at_once
from fpt_lightning.data.sources import list_images
from fpt_lightning.data.statistics import channel_statistics, deep_pictures, draw_sample
from fpt_lightning.data.statistics import value_range as measured_range
from fpt_lightning.data.transforms import Augmentation, ViewTransform
from fpt_lightning.datamodules.base import ManifestDataModule
from fpt_lightning.datamodules.samples import STORED, ImageSamples, Samples, Views
from fpt_lightning.encoder.config import EncoderConfig, check_resolution, nearest_side
from fpt_lightning.errors import ConfigurationError, DataError, a_few, check_at_least
from fpt_lightning.store.preload import write_left_out
from fpt_lightning.store.specification import FeatureSpecification, from_sample

_RESOLUTION = 512


class ImageDataModule(ManifestDataModule):
    """High-resolution images for the encoder, low-resolution views for a side network; no store.

    The model's ``INPUTS`` say what a batch holds: a method that trains on ``images`` gets augmented ones.

    Args:
        root: folder of the images (``ManifestDataModule``).
        manifest: CSV file instead of class folders; absolute or relative to ``root``.
        resolution: of the encoder's images in pixels: a side, or (height, width); by default the multiple of the
            encoder's patch size that is nearest to 512.
        mean: of each channel (or one for grey), for pixels in [0, 1]; ``auto`` computes it over the training
            images, or with ``fold`` over those of all folds (``fpt_lightning.data.manifest.Manifest.measured``); over
            1,000 of them, if there are more (``fpt_lightning.data.statistics.draw_sample``).
        std: like ``mean``.
        fit: ``squash`` resizes images to the encoder's aspect, ``letterbox`` pads them to it with black first.
        crop_border: whether the dark border of images (fundus, mammograms) is cut off
            (``fpt_lightning.data.images.bright_box``).
        window: of grey DICOM values: ``header``, ``full`` for the whole range, or [centre, width]
            (``fpt_lightning.data.images.read_image``).
        max_pixels: that images may have; Pillow's limit of 179 million by default.
        value_range: [low, high] of the values of 16-bit PNG, TIFF and PGM files that are black and white, such as
            [0, 4095] of 12 bits; ``auto`` measures it over the training images, ``full`` is [0, 65535].
        image_size: side in pixels of the low-resolution copy that augmentation starts from.
        side_resolution: side of the side network's images in pixels; the model's own by default.
        augmentation: ``default`` (the published one), ``strong`` or ``none``.
        preload_batch_size: images that a frozen encoder encodes at once, in every stage; the batches of ``predict``.
        **kwargs: see ``ManifestDataModule``.

    Raises:
        ConfigurationError: values that cannot work.
        DataError: a data set that cannot be used, at ``setup``.
    """

    def __init__(
        self,
        root: str,
        manifest: str | None = None,
        *,
        resolution: int | tuple[int, int] | None = None,
        mean: Literal["auto"] | list[float] = "auto",
        std: Literal["auto"] | list[float] = "auto",
        fit: Fit = "squash",
        crop_border: bool = False,
        window: Literal["header", "full"] | tuple[float, float] = "header",
        max_pixels: int | None = None,
        value_range: Literal["auto", "full"] | tuple[float, float] = "auto",
        image_size: int = 256,
        side_resolution: int | None = None,
        augmentation: Augmentation = "default",
        preload_batch_size: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, manifest, **kwargs)
        side = _RESOLUTION if resolution is None else resolution
        self.resolution = (side, side) if isinstance(side, int) else (side[0], side[1])
        self._nearest = resolution is None  # whether an encoder's patches decide
        named = window if isinstance(window, str) else ",".join(f"{number:g}" for number in window)
        known = FULL_RANGE if isinstance(value_range, str) else value_range
        self.fixed_reader = ImageReader(self.resolution, fit, crop_border, named, max_pixels, known)
        self.value_range = value_range
        self.measured: tuple[float, float] | None = None  # range of values, where 'auto'
        self._deep: bool | None = None  # whether there are 16-bit pictures
        self.mean, self.std = _given_statistics(mean, std)
        self.image_size, self.side_resolution = image_size, side_resolution
        self.augmentation: str = augmentation
        check_at_least("data.preload_batch_size", preload_batch_size, 1)
        self.preload_batch_size = preload_batch_size
        self.computed: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())  # mean and std, where 'auto'
        self.specification: FeatureSpecification | None = None

    def setup(self, stage: str) -> None:
        """Read the manifest and hold it against the model.

        Raises:
            DataError: see ``read_manifest``.
            ConfigurationError: the model and the data do not fit each other.
        """
        self.check(stage)
        if stage == "predict" and self.explained is None:
            told = {name: self.reading[name] for name in ("image_column", "case_column")}
            listed = list_images(self.root, self._kind(), self._declared("num_classes") or 1, self.table, **told)
            check_extras(listed.path(sample) for sample in listed.samples)
            for note in listed.notes:
                rank_zero_info(note)
            self.unlabelled = self._readable(self._drawn(listed))
            encoder = self._declared("encoder_config")
            self.specification = None if encoder is None else self.asked(encoder)
            return
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**32
        self._setup_features(stage)
        if stage == "predict":
            return
        if stage == "fit":
            rank_zero_info("\n".join([self.labelled.summary(), *self.labelled.notes]))
        for split in ("test",) if self.external else SPLITS:
            absent = [
                n for n, count in zip(self.class_names, self.labelled.class_counts(split), strict=True) if not count
            ]
            if absent:
                rank_zero_warn(f"the split {split} has no image of {', '.join(absent)}: its AUC leaves them out.")

    def check(self, stage: str, model: Any = None) -> None:
        """Refuse what cannot work, before any image is read or encoded: options, labels, and the model.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
            model: by default the trainer's, if there is one.

        Raises:
            DataError: see ``fpt_lightning.data.sources.read_manifest``.
            ConfigurationError: naming the option, or what does not fit.
        """
        before, self.model = self.model, self.model if model is None else model
        try:
            ViewTransform(1, self.augmentation)
            if (encoder := self._declared("encoder_config")) is not None:
                self.take_encoder(encoder)
            if stage == "predict" and self.explained is None:
                return
            if self.external and "test" not in (stage, self.explained):
                raise ConfigurationError("data.external is true: all images are for test, none for fit or validate.")
            manifest = self.read_manifest(self._kind())
            check_extras(manifest.path(sample) for sample in manifest.samples)
            self._check_model(stage)
        finally:
            self.model = before

    def take_encoder(self, encoder: EncoderConfig) -> None:
        """Take the resolution that its patches fill, where none was given."""
        if self._nearest:
            side = nearest_side(_RESOLUTION, encoder.shape.patch_size)
            self.resolution = (side, side)

    def _kind(self) -> Kind:
        task = self._declared("task")
        return "single-label" if task is None else task.KIND

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order, and with views, that the seed and the epoch alone decide."""
        return self._loader("train", augmentation=self.augmentation)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Every image below ``root``, through the encoder: no store, no labels; or of the split that is explained."""
        if self.explained is not None:
            images = self._dataset(self.predicted.samples, "none", False)
            return self._dataloader(images, False, self._evaluated_at_once(self.batch_size))
        images = self._image_dataset(self.predicted, self.predicted.samples, "none")
        batch_size = self.preload_batch_size if STORED & self._inputs() else self.batch_size
        return self._dataloader(images, False, self._evaluated_at_once(batch_size))

    def asked(self, encoder: EncoderConfig) -> FeatureSpecification:
        """The specification of the features that an encoder gives for this module's images."""
        values, range_of = self._asked_range()
        return FeatureSpecification(
            encoder=encoder.name,
            weights=encoder.weights(),
            layers=encoder.tapped_layers,
            token_ratio=encoder.token_ratio,
            criterion=encoder.criterion,
            resolution=self.resolution,
            mean=self.mean,
            std=self.std,
            statistics="given" if self.mean else self._over_measured_images(),
            image_size=self.image_size,
            codec="fp32",
            precision=encoder.precision,
            fit=self.fixed_reader.fit,
            crop_border=self.fixed_reader.crop_border,
            window=self.fixed_reader.window,
            value_range=values,
            range_of=range_of,
        )

    def _asked_range(self) -> tuple[tuple[float, ...], str]:
        """``FeatureSpecification``'s value_range and range_of."""
        if not isinstance(self.value_range, str):
            return tuple(map(float, self.value_range)), "given"
        if self.value_range == "full":
            return (), "full"
        return (), self._over_measured_images() if self._has_deep() else "none"

    def _has_deep(self) -> bool:
        """Whether there are 16-bit pictures; True before any image is known."""
        manifest = self.listed or self.unlabelled
        if manifest is None:
            return True
        if self._deep is None:
            training = manifest is self.listed and not self.external
            samples = manifest.to_measure() if training else manifest.samples
            self._deep = bool(deep_pictures([manifest.path(sample) for sample in samples]))
        return self._deep

    def _over_measured_images(self) -> str:
        """``auto``, and over which images."""
        if self.listed is None:
            return "auto"
        return over_images([sample.id for sample in self.listed.to_measure()])

    @property
    def reader(self) -> ImageReader:
        """What reads the images, with the range of values that the model was trained with, or this module's.

        Raises:
            ConfigurationError: there are 16-bit pictures, and neither knows a range.
        """
        trained: FeatureSpecification | None = self._declared("specification")
        if trained is not None:
            low, high = trained.value_range or FULL_RANGE
            return replace(self.fixed_reader, value_range=(low, high))
        if self.measured:
            return replace(self.fixed_reader, value_range=self.measured)
        if self.value_range == "auto" and self._has_deep():
            raise ConfigurationError(
                "data.value_range is 'auto' and there are 16-bit images, but only fit measures it: give a checkpoint "
                "(ckpt_path) or the numbers."
            )
        return self.fixed_reader

    def _setup_features(self, stage: str) -> None:
        if self.manifest is self.listed:  # once
            self.manifest = self._readable(self.labelled if self.explained is None else self.predicted)
        if stage == "fit":
            self._measure()
        encoder = self._declared("encoder_config")
        if encoder is not None:
            asked = self.asked(encoder)
            asked = asked if asked.mean else replace(asked, mean=self.computed[0], std=self.computed[1])
            self.specification = replace(asked, value_range=self.measured) if self.measured else asked

    def _measure(self) -> None:
        """Range of values, mean and std of a sample of ``Manifest.to_measure``, where they are ``auto``."""
        of_values = self.measured is None and self.value_range == "auto" and self._has_deep()
        of_channels = not self.mean and not self.computed[0]
        if not of_values and not of_channels:
            return
        root, paths = self.labelled.root, [self.labelled.path(sample) for sample in self.labelled.to_measure()]
        if of_values:
            deep = deep_pictures(paths)
            drawn = draw_sample(deep, root)
            self.measured = measured_range(drawn, self.fixed_reader.max_pixels)
            rank_zero_info(f"data.value_range: {list(self.measured)}{from_sample('', len(drawn), len(deep))}")
        if of_channels:
            drawn = draw_sample(paths, root)
            self.computed = channel_statistics(drawn, self.resolution, self.reader)
            told = f"data.mean: {list(self.computed[0])}, data.std: {list(self.computed[1])}"
            rank_zero_info(told + from_sample("", len(drawn), len(paths)))

    def _readable(self, listed: Manifest) -> Manifest:
        """What there is without the images that cannot be read, if those are to be left out."""
        if self.on_error == "stop":
            return listed
        reasons = unreadable({sample.id: listed.path(sample) for sample in listed.samples}, self.fixed_reader)
        if reasons:
            folder = "." if self.trainer is None else self.trainer.default_root_dir
            write_left_out(f"{folder}/left_out.csv", reasons)
        return listed.without(reasons)

    def _check_model(self, stage: str) -> None:
        num_classes, encoder = self._declared("num_classes"), self._declared("encoder_config")
        if num_classes is not None and not self.external:  # other hospitals may lack a class
            check_classes("model.num_classes", num_classes, self.labelled)
            self._check_order()
        self._check_cases()
        if encoder is not None:
            check_resolution("data.resolution", self.resolution, encoder.shape.patch_size, encoder.name)
            encoder.check_weights()
        check_orientations("model.test_time_orientations", self._evaluated(), self.resolution)
        if encoder is not None and "side_images" in self._inputs():
            self._side_resolution()
        adapt = getattr(self._declared("task"), "adapt", None)
        if stage == "fit" and adapt is not None:
            adapt(self.training_labels)

    def _check_order(self) -> None:
        """Refuse grades whose order nobody said."""
        named, classes = self.reading["classes"] is not None, self.labelled.classes
        if getattr(self._declared("task"), "ORDERED", False) and not named and numbers_of(classes) is None:
            raise ConfigurationError(
                f"model.task has grades from low to high, but {a_few(classes)} are words in alphabetical order: "
                f"name them from low to high in data.classes, such as [{', '.join(reversed(classes))}]."
            )

    def _check_cases(self) -> None:
        """Refuse cases of several labels where nobody said which one counts (``fpt_lightning.evaluation.cases``)."""
        ordered, classes = getattr(self._declared("task"), "ORDERED", False), self.labelled.classes
        mixed = [] if ordered or self.labelled.kind == "multi-label" else self.labelled.mixed_cases()
        if not mixed:
            return
        said = f"{len(mixed)} cases (data.case_column) have images of several labels ({a_few(mixed)})"
        if self.labelled.kind == "regression" or max(len(classes), self._declared("num_classes") or 0) > 2:
            raise DataError(
                f"{said}: which one counts is known of grades (model.task ordinal or coral), of two classes and of "
                "several labels an image alone. Give each case one label."
            )
        if not self.external and self.reading["classes"] is None and numbers_of(classes) is None:
            raise ConfigurationError(
                f"{said}, of which the second class counts, but {a_few(classes)} are words in alphabetical order: name "
                f"them in data.classes, the finding last, such as [{', '.join(classes)}]."
            )

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
    ) -> Views | None:
        if "side_images" not in self._inputs():
            return None
        return Views(ViewTransform(self._side_resolution(), augmentation, mirror), mean, std, self.seed or 0)

    def _image_dataset(self, manifest: Manifest, samples: Sequence[Sample], augmentation: str) -> Samples:
        mean, std = self._statistics()
        views: Views | None = None
        if self._inputs() & {"images", *STORED}:
            transform = ViewTransform(self.resolution, augmentation if "images" in self._inputs() else "none")
            views = Views(transform, mean, std, self.seed or 0)
        side_views = self._side_views(augmentation, mean, std)
        return ImageSamples(manifest, samples, side_views, views, self.reader, self.image_size)

    def _dataset(self, samples: Sequence[Sample], augmentation: str, training: bool) -> Samples:
        return self._image_dataset(self.labelled, samples, augmentation)

    def _loader(self, split: str, augmentation: str = "none") -> DataLoader[Any]:
        training = split == "train"
        dataset = self._dataset(self.labelled.split(split), augmentation, training)
        batch_size = self.batch_size if training else self._evaluated_at_once(self.batch_size)
        return self._dataloader(dataset, training, batch_size)

    def _evaluated(self) -> int:
        """Orientations that the model evaluates."""
        return self._declared("test_time_orientations") or 1

    def _evaluated_at_once(self, batch_size: int) -> int:
        """Images of a batch in validation, test and prediction."""
        return evaluated_at_once(batch_size, self._evaluated())


def over_images(ids: Sequence[str]) -> str:
    """What ``FeatureSpecification.statistics`` says of images, in ascending order, that ``auto`` is measured over."""
    return f"auto over {len(ids)} images {sha256(chr(10).join(ids).encode()).hexdigest()[:16]}"


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
