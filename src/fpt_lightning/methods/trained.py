"""What a model knows of its training: kept in its checkpoint, and held against whatever it meets later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from torch import Tensor

from fpt_lightning.data.manifest import Manifest
from fpt_lightning.encoder.precision import check_precision
from fpt_lightning.encoder.weight_files import OF_FILES
from fpt_lightning.errors import CheckpointError, a_few
from fpt_lightning.evaluation.calibration import Calibration
from fpt_lightning.evaluation.cases import Rule
from fpt_lightning.evaluation.conformal import Nonconformity
from fpt_lightning.methods.record import KEY, TrainingRecord, check_resumable
from fpt_lightning.methods.saved_files import keep_own_files
from fpt_lightning.methods.tasks import Task
from fpt_lightning.store.specification import FeatureSpecification


class TrainedModule(L.LightningModule):
    """Classes, features, split and fitted decisions of a training; a later test or prediction must fit them.

    Attributes:
        task: what is learned.
        num_classes: number of classes.
        class_names: in the order of the outputs; empty for a model that never met a data module of this package.
        specification: of the features trained on, which says what images must be; None likewise.
        thresholds: by class, fitted to the validation images.
        calibration: fitted likewise; at first one that changes nothing.
        case_rule: by which cases are predicted from their images, chosen on validation; None without cases.
        case_thresholds: by class, fitted to the validation cases.
        nonconformity: of the validation images, from which prediction sets come.
    """

    ARCHITECTURE: ClassVar[tuple[str, ...]] = ("num_classes", "task", "encoder", "pretrained")
    """Arguments that a checkpoint must share with the module that loads it."""

    OPTIMIZER: ClassVar[tuple[str, ...]] = ("learning_rate", "weight_decay", "betas")
    """Arguments that the optimizer's state in a checkpoint would silently put back when training goes on."""

    task: Task
    num_classes: int

    def __init__(self) -> None:
        super().__init__()
        self.class_names: tuple[str, ...] = ()
        self.specification: FeatureSpecification | None = None
        self.calibration, self.thresholds = Calibration(), dict[str, float]()
        self.case_rule: Rule | None = None
        self.case_thresholds: dict[str, float] = {}
        self.nonconformity: Nonconformity = {}
        self._digest = ""  # of the encoder's weights, once they are loaded
        self._split_digest = ""  # of the split trained on, where it was drawn
        self._seen: dict[str, Tensor] = {}  # digests of the training and of the validation images and groups
        self._columns: list[int] | None = None  # of the data's classes among this model's, where they differ
        self._seed: int | None = None

    @property
    def output_names(self) -> tuple[str, ...]:
        """The classes' names; numbers for a model that never met a data module of this package."""
        return self.class_names or tuple(f"class_{label}" for label in range(self.num_classes))

    @property
    def calibrations(self) -> list[Calibration]:
        """Of each model whose probabilities are averaged; of one."""
        return [self.calibration]

    def check_weights(self, digest: str) -> None:
        """Hold the weights of the encoder that was loaded against those that this model was trained with.

        Args:
            digest: ``weights_digest`` of the encoder.

        Raises:
            CheckpointError: they differ.
        """
        self._digest = digest
        if self.specification is None:
            return
        if self.specification.weights_digest not in ("", digest):
            raise CheckpointError(
                f"this model was trained with other weights of {self.specification.encoder} than those loaded now "
                f"({self.specification.weights}; digest {self.specification.weights_digest[:16]}, now "
                f"{digest[:16]}): give the original weights as model.pretrained."
            )
        self.specification = replace(self.specification, weights_digest=digest)

    def own_labels(self, labels: Tensor) -> Tensor:
        """Labels of data whose classes are others, or in another order, than this model's."""
        if self._columns is None:
            return labels
        if labels.ndim == 1:
            return torch.tensor(self._columns, device=labels.device)[labels]
        own = labels.new_full((len(labels), self.num_classes), torch.nan)
        own[:, self._columns] = labels
        return own

    def setup(self, stage: str) -> None:
        """Refuse a trainer that changes labels and features (``fpt_lightning.encoder.precision.check_precision``)."""
        check_precision(self.trainer)

    def on_validation_start(self) -> None:
        if self.trainer.state.fn != "fit":
            self.meet_data(trained=True)

    def on_test_start(self) -> None:
        self.meet_data(trained=True)

    def on_predict_start(self) -> None:
        self.meet_data(trained=True)

    def meet_data(self, trained: bool) -> None:
        """Take over, or hold against what this model was trained with, the data module's classes and features.

        Args:
            trained: whether this model has been trained, so that the data must fit it.

        Raises:
            CheckpointError: other classes, another random split, or features made with other settings.
        """
        data, stage = getattr(self.trainer, "datamodule", None), self.trainer.state.fn or ""
        specification: FeatureSpecification | None = getattr(data, "specification", None)
        manifest = _labelled(data, stage)
        if trained:
            self.check_data(data, stage, specification)
        elif manifest is not None:
            self._remember_split(getattr(data, "listed", None) or manifest)
        if not trained or not self.class_names:
            self.class_names = () if manifest is None else tuple(getattr(data, "class_names", ()))
        if not trained or self.specification is None:
            self.specification = specification
        if self._digest:
            self.check_weights(self._digest)

    def check_data(self, data: Any, stage: str, specification: FeatureSpecification | None) -> None:
        """Hold a data module that has read its manifest against what this model was trained with.

        Args:
            data: it.
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
            specification: of the data's features.

        Raises:
            CheckpointError: other classes, another random split, or features made with other settings.
        """
        manifest = _labelled(data, stage)
        names: tuple[str, ...] = () if manifest is None else tuple(getattr(data, "class_names", ()))
        if self.class_names and names and self.task.KIND != "regression":
            self._match_classes(names, stage)
        if manifest is not None:
            self._check_split(data, getattr(data, "listed", None) or manifest, stage)
        if self.specification is None or specification is None:
            return
        if specification.value_range:  # whatever images it was measured over
            specification = replace(specification, range_of="given")
        ignore = ["codec", "precision", "orientations", "format"]
        if specification.orientations == 1:
            ignore.append("zoom")  # which these images are not, and their further orientations will be
        if specification.weights.startswith(OF_FILES) and not specification.weights_digest:
            ignore.append("weights")  # files may hold the same by another name: ``check_weights``, when they are loaded
        differences = self.specification.differences(specification, ignore)
        differences = [line for line in differences if not line.startswith(("statistics", "range_of"))]
        if differences:
            raise CheckpointError(
                "this model was trained on features made with other settings:\n  " + "\n  ".join(differences)
            )

    def _match_classes(self, names: tuple[str, ...], stage: str) -> None:
        """Find the data's classes among this model's, by name; when training goes on, they are the same."""
        fits = names == self.class_names if stage == "fit" else set(names) <= set(self.class_names)
        if not fits:
            raise CheckpointError(
                f"this model was trained with the classes {list(self.class_names)}, the data have {list(names)}: name "
                "them alike."
            )
        self._columns = None if names == self.class_names else [self.class_names.index(name) for name in names]

    def _remember_split(self, manifest: Manifest) -> None:
        self._split_digest = manifest.split_digest() if manifest.random else ""
        self._seen = {split: _digests(_names(manifest, split)) for split in ("train", "val")}

    def _check_split(self, data: Any, manifest: Manifest, stage: str) -> None:
        """Where a split is drawn, it must be the one trained on, or training images would be tested."""
        digest = manifest.split_digest() if manifest.random else ""
        if digest and self._split_digest not in ("", digest):
            raise CheckpointError(
                f"the data set {manifest.root} is split at random, and not as it was in training (other images, "
                "data.split_seed, data.fold or data.folds): give the run's split.csv as data.manifest, or "
                "data.external true to test on all of these images."
            )
        allowed = getattr(data, "external", False) or getattr(data, "reading", {}).get("allow_overlap", False)
        if stage in ("test", "validate") and not allowed:
            self._check_unseen(manifest, stage)

    def _check_unseen(self, manifest: Manifest, stage: str) -> None:
        """Refuse to test images, or groups, that were trained on or chosen by; or to validate those trained on."""
        split, seen = ("test", ("train", "val")) if stage == "test" else ("val", ("train",))
        names = _names(manifest, split)
        known = torch.cat([self._seen[part] for part in seen if part in self._seen] or [_digests([])])
        again = [name for name, met in zip(names, torch.isin(_digests(names), known).tolist(), strict=True) if met]
        if again:
            raise CheckpointError(
                f"{len(again)} of the images and groups of the split {split} of {manifest.root} were trained on or "
                f"validated in this model's training: {a_few(again)}. Give its own split (the run's split.csv as "
                "data.manifest), data.external true for another data set with the same names, or data.allow_overlap "
                "true."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        record = TrainingRecord(
            type(self).__name__,
            self.class_names,
            self.specification,
            self._seed,
            self._split_digest,
            self._seen,
            self.thresholds,
            self.calibration,
            self.case_rule,
            self.case_thresholds,
            self.nonconformity,
        )
        checkpoint[KEY] = record.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Hold a checkpoint against this module.

        Raises:
            CheckpointError: it is not from this package, is damaged, or from another method, encoder or architecture.
        """
        if self._trainer is not None:
            keep_own_files(checkpoint, self.trainer.callbacks)  # type: ignore[attr-defined]
            if self.trainer.state.fn == "fit":
                self.check_optimizer(checkpoint)
        record = TrainingRecord.of(checkpoint)
        self._check_belongs(record.method, checkpoint["hyper_parameters"])
        if record.classes and self.task.KIND != "regression" and len(record.classes) != self.num_classes:
            raise CheckpointError(
                f"the checkpoint is damaged: it names {len(record.classes)} classes, has {self.num_classes} outputs."
            )
        self.class_names, self.specification = record.classes, record.specification
        labels = {*self.output_names} if self.task.KIND == "multi-label" else {""}
        if record.nonconformity and record.nonconformity.keys() != labels:
            raise CheckpointError(
                f"the checkpoint is damaged: its nonconformity is of {a_few(sorted(map(str, record.nonconformity)))}."
            )
        if len(record.calibration.biases) not in (0, len(self.output_names)):
            raise CheckpointError(
                f"the checkpoint is damaged: it has {len(record.calibration.biases)} biases of "
                f"{len(self.output_names)} classes."
            )
        self._seed, self._split_digest, self._seen = record.seed, record.split, record.seen
        self.thresholds, self.calibration = record.thresholds, record.calibration
        self.case_rule, self.case_thresholds = record.case_rule, record.case_thresholds
        self.nonconformity = record.nonconformity

    def check_optimizer(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings of the optimizer than a checkpoint has, or without its state.

        Raises:
            CheckpointError: each that differs, with both values; or a checkpoint of weights alone.
        """
        check_resumable(checkpoint)
        saved = checkpoint.get("hyper_parameters", {})
        differences = [
            f"model.{name}: {saved[name]!r} in the checkpoint, {self.hparams[name]!r} here"
            for name in self.OPTIMIZER
            if name in saved and name in self.hparams and not np.array_equal(saved[name], self.hparams[name])
        ]
        if differences:
            raise CheckpointError(
                "training goes on with the optimizer that the checkpoint holds:\n  "
                + "\n  ".join(differences)
                + "\nGive its values, or start a new run with yours."
            )

    def _check_belongs(self, method: str, arguments: Mapping[str, Any]) -> None:
        saved = {"method": method, **arguments}
        own = {"method": type(self).__name__, **self.hparams}
        by_path = any(isinstance(given.get("pretrained"), str) for given in (saved, own))  # told by what the files hold
        differences = [
            f"{name}: {saved.get(name)!r} in the checkpoint, {own.get(name)!r} here"
            for name in ("method", *self.ARCHITECTURE)
            if not (by_path and name == "pretrained")
            and (saved.get(name) or None) != (own.get(name) or None)  # an earlier version lacks options, which were off
        ]
        if differences:
            raise CheckpointError("the checkpoint does not belong to this model:\n  " + "\n  ".join(differences))


def _labelled(data: Any, stage: str) -> Manifest | None:
    """The data module's manifest, where the stage takes labels."""
    if stage == "predict" and getattr(data, "explained", None) is None:
        return None
    manifest: Manifest | None = getattr(data, "manifest", None)
    return manifest


def _names(manifest: Manifest, split: str) -> list[str]:
    """Of a split's images, and of its groups."""
    samples = manifest.split(split)
    return [*(sample.id for sample in samples), *sorted({sample.group for sample in samples if sample.group})]


def _digests(names: Sequence[str]) -> Tensor:
    """The first 8 bytes of each name's SHA-256 (N,), int64."""
    return torch.tensor(
        [int.from_bytes(sha256(name.encode()).digest()[:8], "little", signed=True) for name in names], dtype=torch.int64
    )
