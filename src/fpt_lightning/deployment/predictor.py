"""A trained model on new images, in Python: from files, arrays or a folder to a table of probabilities."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpt_lightning.data.images import stretched
from fpt_lightning.data.manifest import UNLABELLED
from fpt_lightning.data.orientations import evaluated_at_once
from fpt_lightning.data.sources import list_images
from fpt_lightning.data.transforms import normalise, stored_copy, unit_pixels
from fpt_lightning.deployment.checkpoints import load_trained
from fpt_lightning.deployment.hub import download
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.encoder.selection import parts
from fpt_lightning.errors import ConfigurationError, DataError, ImageError
from fpt_lightning.evaluation.conformal import Sets
from fpt_lightning.evaluation.decisions import checked_thresholds, decide
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.files import write_rows
from fpt_lightning.methods.features import FeatureModule

NOTICE = "For research only. This is not a medical device: do not diagnose or treat anyone by what it predicts."

Picture = str | Path | NDArray[np.uint8] | NDArray[np.uint16]
"""An image: the path of a file, ``scan.dcm#12`` too, or pixels (height, width, 3) or (height, width)."""


class Predictor:
    """A checkpoint's model, ready for images: ``Predictor("runs/run/best.ckpt")("images/")``.

    For research only. This is not a medical device: do not diagnose or treat anyone by what it predicts.

    Images are read, cropped, padded, resized and normalised as in training, which the checkpoint says; the numbers are
    those of ``fpt-lightning predict``. The encoder's weights are loaded once, and are those of training. Threads may
    share a predictor: it holds nothing of a call.

    Args:
        checkpoint: written by ``fpt-lightning fit`` or by a trainer with a data module of this package, or a folder
            (``from_pretrained``).
        device: where the model runs, such as ``cpu`` or ``cuda``.
        batch_size: images at once.
        pretrained: the encoder's weights, where the file that the checkpoint names has moved.

    Raises:
        CheckpointError: no such checkpoint, or encoder weights that are gone or others than in training.
        ConfigurationError: a device that is not there, or a batch size below 1.
        EncoderError: weights that are out of reach or do not fit.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str | torch.device = "cpu",
        batch_size: int = 4,
        pretrained: str | bool | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigurationError(f"batch_size is {batch_size}: give at least 1.")
        self.device, self.batch_size = _checked_device(device), batch_size
        module, self.specification = load_trained(checkpoint, pretrained)
        if isinstance(module, FeatureModule):
            module.use_encoder(FrozenEncoder(module.encoder_config, self.specification.resolution))
            module.images_at_once = batch_size
        self.module = module.to(self.device)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        batch_size: int = 4,
        pretrained: str | bool | None = None,
        revision: str | None = None,
    ) -> Predictor:
        """A model of the Hugging Face hub, or of a folder that ``export --format hub`` wrote.

        A folder needs no network, and neither does a repository that is in the cache, with ``HF_HUB_OFFLINE=1``.

        Args:
            source: folder, or ``organisation/name``.
            device: where the model runs.
            batch_size: images at once.
            pretrained: the encoder's weights, where the folder neither has them nor names weights of timm.
            revision: branch, tag or commit of the repository.

        Raises:
            CheckpointError: no such folder or repository, files that are missing, damaged or changed, or encoder
                weights that are gone or others than in training.
            ConfigurationError: see ``Predictor``; or a revision of a folder.
            EncoderError: weights that are out of reach or do not fit.
        """
        if not Path(source).is_dir():
            return cls(download(str(source), revision), device, batch_size, pretrained)
        if revision is not None:
            raise ConfigurationError(f"revision is {revision!r}, but {source} is a folder: leave it out.")
        return cls(source, device, batch_size, pretrained)

    def __call__(self, images: Picture | Sequence[Picture]) -> Predictions:
        """Predict.

        Args:
            images: a folder, of which every image below is taken; or one image, or several: paths, ``scan.dcm#12`` for
                a frame or page, or arrays (height, width, 3) in RGB or (height, width), uint8 or uint16 at full scale.

        Returns:
            Predictions without labels, in the order given, of calibrated probabilities. The ids are
            paths: below the folder, as in ``fpt-lightning predict``, or as given; of arrays ``array_0``, by position.

        Raises:
            DataError: no image, or one twice.
            ImageError: an image that cannot be read, or an array of another shape or dtype.
        """
        pictures = _by_id(images)
        ids, scores = list(pictures), list[Any]()
        with torch.inference_mode():
            for some in parts(len(ids), evaluated_at_once(self.batch_size, self.module.test_time_orientations)):
                pixels = [self._read(id, pictures[id]) for id in ids[some]]
                batch = {**self._batch(pixels), "ids": ids[some]}
                scores += self.module.scores(self.module.evaluated(batch)).tolist()
        unknown: Any = {
            "single-label": UNLABELLED,
            "multi-label": [math.nan] * self.module.num_classes,
            "regression": math.nan,
        }[self.module.task.KIND]
        return self.module.predictions([(id, unknown, score) for id, score in zip(ids, scores, strict=True)])

    def decide(self, predictions: Predictions) -> NDArray[np.bool_]:
        """Which classes each image is decided for, by the thresholds fitted to the validation images: (N, C).

        Classes are decided for one by one, as in ``fpt_lightning.evaluation.decisions.decide``.

        Raises:
            ConfigurationError: a regression, or predictions of other classes.
        """
        return decide(predictions, self.module.thresholds)

    def sets(self, predictions: Predictions, coverage: float) -> Sets:
        """What may be true of each image, so that the truth is among it as often as is asked for.

        What that promises is in ``fpt_lightning.evaluation.conformal``.

        Args:
            predictions: of this model.
            coverage: share of images, averaged over patients, whose set shall hold the truth.

        Raises:
            CheckpointError: the checkpoint holds nothing of validation images.
            ConfigurationError: a coverage that is no share, or too few validation images for it.
        """
        return self.module.sets(predictions, coverage)

    def table(
        self, predictions: Predictions, path: str | Path | None = None, coverage: float | None = None
    ) -> list[dict[str, Any]]:
        """Predictions and decisions, a row an image.

        Args:
            predictions: of this model.
            path: of a CSV file that is written too, if given.
            coverage: of the prediction sets that the table has too, if given.

        Returns:
            ``path``; of a regression ``prediction``; else ``prob_{class}``, ``threshold_{class}`` and
            ``decided_{class}`` (0 or 1) of each class, and for single-label data ``most_probable``. A class is decided
            for from its threshold on, so that another than the most probable one may be, or several or none; where the
            threshold is empty, the class is decided for where it is the most probable. With a coverage, also what
            ``fpt_lightning.evaluation.conformal.Sets.columns`` gives.

        Raises:
            CheckpointError: see ``sets``.
            ConfigurationError: likewise.
        """
        classes = predictions.classes
        if predictions.kind == "regression":
            columns: dict[str, list[Any]] = {"prediction": predictions.scores.tolist()}
        else:
            decided = self.decide(predictions).astype(int)
            columns = {f"prob_{name}": predictions.scores[:, i].tolist() for i, name in enumerate(classes)}
            used = checked_thresholds(predictions, self.module.thresholds)
            columns |= {f"threshold_{name}": [used.get(name, "")] * len(decided) for name in classes}
            columns |= {f"decided_{name}": decided[:, i].tolist() for i, name in enumerate(classes)}
        if predictions.kind == "single-label":
            columns["most_probable"] = [classes[i] for i in predictions.scores.argmax(1)]
        beside = {} if coverage is None else self.sets(predictions, coverage).columns(predictions)
        columns = {"path": list(predictions.ids), **columns, **beside}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if path is not None:
            write_rows(Path(path), [list(columns), *(list(row.values()) for row in rows)])
        return rows

    def _read(self, id: str, picture: Picture) -> NDArray[np.uint8] | NDArray[np.uint16]:
        reader = self.specification.reader
        if not isinstance(picture, np.ndarray):
            return reader(picture)
        pixels = _rgb(id, picture)
        return reader.framed(stretched(pixels, reader.value_range) if pixels.dtype == np.uint16 else pixels, id)

    def _batch(self, images: Sequence[NDArray[np.uint8] | NDArray[np.uint16]]) -> dict[str, Tensor]:
        """The images as ``fpt_lightning.datamodules.samples.Batch`` has them, never augmented."""
        asked = self.specification
        views = {"images": [unit_pixels(image, asked.resolution) for image in images]}
        if self.module.side_resolution is not None:
            size = (self.module.side_resolution, self.module.side_resolution)
            views["side_images"] = [unit_pixels(stored_copy(image, asked.image_size), size) for image in images]
        return {
            name: normalise(torch.stack(view).to(self.device), asked.mean, asked.std) for name, view in views.items()
        }


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"device is {str(device)!r}: {reason} Give cpu, or cuda where there is one."
        ) from error


def _by_id(images: Picture | Sequence[Picture]) -> dict[str, Picture]:
    if isinstance(images, str | Path) and os.path.isdir(images):
        manifest = list_images(images)
        return {sample.id: manifest.path(sample) for sample in manifest.samples}
    pictures: list[Any] = [images]
    if not isinstance(images, str | Path | np.ndarray) or (isinstance(images, np.ndarray) and images.ndim > 3):
        pictures = list(images)
    ids = [f"array_{i}" if isinstance(each, np.ndarray) else str(each) for i, each in enumerate(pictures)]
    if not ids:
        raise DataError("there is no image to predict: give paths, arrays or a folder.")
    if twice := [id for id, count in Counter(ids).items() if count > 1]:
        raise DataError(f"the image {twice[0]!r} is there more than once.")
    return dict(zip(ids, pictures, strict=True))


def _rgb(id: str, pixels: NDArray[Any]) -> NDArray[Any]:
    grey = pixels.ndim == 2
    if pixels.dtype not in (np.uint8, np.uint16) or not (grey or pixels.shape[2:] == (3,)) or 0 in pixels.shape:
        raise ImageError(
            f"{id} has the shape {pixels.shape} and dtype {pixels.dtype}: give (height, width, 3) or (height, width), "
            "uint8 or uint16."
        )
    return np.repeat(pixels[..., None], 3, axis=2) if grey else pixels
