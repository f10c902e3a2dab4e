"""Several trained models of one method as one, such as those of a cross-validation: the mean of their scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from fpt_lightning.errors import CheckpointError, ConfigurationError
from fpt_lightning.evaluation.calibration import Calibration
from fpt_lightning.evaluation.conformal import Nonconformity
from fpt_lightning.methods import METHODS
from fpt_lightning.methods.base import ClassificationModule
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.record import KEY, TrainingRecord, calibration_of

MOST = 1000
"""Members that an ensemble may have: a stranger's checkpoint may ask for any number."""

_OF_ENCODER = frozenset({"features", "pooled"})
_SHARED = {*FeatureModule.defaults()} - {"kwargs"}
"""Arguments of every method on a frozen encoder's features."""


class EnsembleModule(FeatureModule):
    """Trained models of one method on a frozen encoder's features, whose scores are averaged.

    The encoder is loaded, and sees an image, once for all members. An ensemble validates, tests and predicts; what is
    trained are its members.

    Args:
        num_classes: number of classes.
        member: the members' class, such as ``FPTPlusModule``.
        calibrations: one a member, fitted to its validation images, as plain values
            (``fpt_lightning.evaluation.calibration.Calibration``).
        **kwargs: the arguments that the members were made with.

    Raises:
        ConfigurationError: another class, no or too many members, or calibrations that are none.
    """

    def __init__(self, num_classes: int, member: str, calibrations: list[dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(num_classes, **{name: value for name, value in kwargs.items() if name in _SHARED})
        self.save_hyperparameters()
        method = feature_method(member)
        if method is None:
            raise ConfigurationError(f"member is {member!r}, which is no method on a frozen encoder's features.")
        self._calibrations = _calibrations(calibrations, num_classes)
        members = _build(method, len(self._calibrations), {"num_classes": num_classes, **kwargs})
        self.members, first = nn.ModuleList(members), members[0]
        self.encoder_config, self.side_resolution = first.encoder_config, first.side_resolution
        self.LABEL = f"{method.LABEL}, mean of {len(members)}"  # type: ignore[misc]
        self.INPUTS = first.INPUTS  # type: ignore[misc]
        self.ARCHITECTURE = (*first.ARCHITECTURE, "member")  # type: ignore[misc]

    @property
    def calibrations(self) -> list[Calibration]:
        """Of each member."""
        return self._calibrations

    @classmethod
    def of(
        cls,
        checkpoints: Mapping[str, dict[str, Any]],
        thresholds: Mapping[str, float],
        nonconformity: Nonconformity | None = None,
    ) -> EnsembleModule:
        """The ensemble of trained models.

        Args:
            checkpoints: of the members, by file name.
            thresholds: by class, which the ensemble decides by.
            nonconformity: from which its prediction sets come; without, it has none.

        Raises:
            CheckpointError: no checkpoint, one of a method that trains the encoder, or of another method, other
                arguments, classes or images than the first.
        """
        if not checkpoints:
            raise CheckpointError("there is no checkpoint to make an ensemble of: give one or more.")
        records = {path: TrainingRecord.of(checkpoint) for path, checkpoint in checkpoints.items()}
        given = {path: _arguments(checkpoint) for path, checkpoint in checkpoints.items()}
        (path, first), *others = records.items()
        if feature_method(first.method) is None:
            raise CheckpointError(
                f"the checkpoint {path} is of {first.method}: an ensemble is of a method of fpt-lightning on a frozen "
                "encoder's features, which its members share."
            )
        for other, record in others:
            for name in ("method", "classes", "specification"):
                _require_same(name, path, getattr(first, name), other, getattr(record, name))
            _require_same("hyper_parameters", path, given[path], other, given[other])
        calibrations = [asdict(record.calibration) for record in records.values()]
        ensemble = cls(member=first.method, calibrations=calibrations, **given[path])
        for member, checkpoint in zip(ensemble.members, checkpoints.values(), strict=True):
            cast(FeatureModule, member).on_load_checkpoint(checkpoint)
            member.load_state_dict(checkpoint["state_dict"])
        ensemble.class_names, ensemble.specification = first.classes, first.specification
        ensemble.thresholds, ensemble.nonconformity = dict(thresholds), nonconformity or {}
        ensemble._seen = {
            split: torch.cat([record.seen[split] for record in records.values() if split in record.seen])
            for split in first.seen
        }
        return ensemble

    @classmethod
    def like(cls, module: ClassificationModule, checkpoint: Mapping[str, Any]) -> ClassificationModule:
        """The ensemble of a checkpoint with members like a module, which itself is given back for other checkpoints.

        Args:
            module: of a method on a frozen encoder's features; others are given back.
            checkpoint: that will be loaded.

        Raises:
            CheckpointError: damaged.
            ConfigurationError: calibrations that are none.
        """
        name = type(module).__name__
        if not is_ensemble(checkpoint) or feature_method(name) is not type(module):
            return module
        TrainingRecord.of(checkpoint)
        calibrations = checkpoint["hyper_parameters"].get("calibrations", [])
        own = _arguments({"hyper_parameters": dict(module.hparams)})
        return cls(member=name, calibrations=calibrations, **own)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits of every member (B, members, ``task.outputs``), of a batch as the members take it.

        Raises:
            ConfigurationError: features of another encoder or of other layers.
        """
        if not batch.keys() >= _OF_ENCODER & self.INPUTS:
            encoded = self._encoded(batch)
            batch = {**batch, "features": encoded.features, "pooled": encoded.pooled}
        return torch.stack([member(batch).float() for member in self.members], 1)

    def scores(self, logits: Tensor) -> Tensor:
        """The mean of the members' probabilities (B, classes), each calibrated, or of their numbers (B,)."""
        scored = []
        for i, calibration in enumerate(self.calibrations):
            task = cast(ClassificationModule, self.members[i]).task
            scores = task.scores(logits[:, i])
            scored.append(task.calibrated(scores, calibration) if self.calibrate else scores)
        return torch.stack(scored).mean(0)

    def evaluated_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean of the members' losses, scalar."""
        losses = [
            cast(ClassificationModule, member).task.loss(logits[:, i], labels) for i, member in enumerate(self.members)
        ]
        return torch.stack(losses).mean()

    def configure_optimizers(self) -> Any:
        """Refuse to train.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError("an ensemble is not trained itself: train its members, and put them together.")


def is_ensemble(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint, which may hold anything, says that it is of an ensemble."""
    about = checkpoint.get(KEY)
    return isinstance(about, dict) and about.get("method") == EnsembleModule.__name__


def feature_method(name: str) -> type[FeatureModule] | None:
    """The method on a frozen encoder's features whose class has a name; None where there is none."""
    found = {method.__name__: method for method in METHODS.values() if issubclass(method, FeatureModule)}
    return found.get(name)


def _calibrations(given: Any, classes: int) -> list[Calibration]:
    """Of what a stranger's checkpoint may hold."""
    found = [calibration_of(each) for each in given] if isinstance(given, list) else []
    sound = [each for each in found if each is not None and len(each.biases) in (0, classes)]
    if len(sound) != len(found) or not 1 <= len(found) <= MOST:
        raise ConfigurationError(
            f"calibrations is {given!r:.80}: give 1 to {MOST}, each a temperature above 0 and a bias of each class."
        )
    return sound


def _build(method: type[FeatureModule], count: int, given: dict[str, Any]) -> list[FeatureModule]:
    """Modules of the same arguments.

    Here, as a module that is made in another's ``__init__`` would take that one's arguments for its hyperparameters.
    """
    return [method(**given) for _ in range(count)]


def _arguments(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a checkpoint's model was made with, without LightningCLI's own."""
    return {str(name): v for name, v in checkpoint["hyper_parameters"].items() if not str(name).startswith("_")}


def _require_same(name: str, path: str, one: object, other_path: str, other: object) -> None:
    if one == other:
        return
    if isinstance(one, dict) and isinstance(other, dict):
        name = next(key for key in {**one, **other} if one.get(key) != other.get(key))
        one, other = one.get(name), other.get(name)
    raise CheckpointError(
        f"an ensemble is of models that differ in their training images and seed alone, but {name} is {one!r:.200} in "
        f"{path} and {other!r:.200} in {other_path}."
    )
