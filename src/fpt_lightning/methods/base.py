"""What every method shares: loss, metrics, optimiser and schedule (paper, section 4.2)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MeanMetric

from fpt_lightning.data.manifest import Manifest, Sample
from fpt_lightning.data.orientations import check_orientations, oriented_pixels, zoomed_pixels
from fpt_lightning.encoder.config import EncoderConfig, EncoderShape
from fpt_lightning.encoder.execution import exporting, sketching
from fpt_lightning.errors import CheckpointError, ConfigurationError, NonFiniteError, check_at_least
from fpt_lightning.evaluation.calibration import Calibration, calibrated, fit_calibration
from fpt_lightning.evaluation.cases import by_case, choose_rule
from fpt_lightning.evaluation.conformal import Sets, fit_nonconformity, prediction_sets, shortage
from fpt_lightning.evaluation.decisions import fit_thresholds
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.methods.tasks import TaskName, Weights, make_task
from fpt_lightning.methods.trained import TrainedModule

_OF_IMAGES = ("features", "key_scales", "value_scales", "indices", "pooled")


def from_all_processes(rows: list[Any]) -> list[Any]:
    """The rows (id, ...) of every process, in ascending order of ids."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, rows)
        rows = [row for process in everyone for row in process]
    return sorted(rows, key=lambda row: str(row[0]))


def samples_of(trainer: L.Trainer) -> tuple[Sample, ...]:
    """Those of the trainer's data module in its stage; none where it is not of this package."""
    manifest: Manifest | None = getattr(
        getattr(trainer, "datamodule", None), "predicted" if trainer.state.fn == "predict" else "manifest", None
    )
    return () if manifest is None else manifest.samples


def in_orientations(batch: Mapping[str, Any], count: int, zoom: float = 1.0) -> dict[str, Any]:
    """The inputs (O * B, ...) of O orientations of a ``fpt_lightning.datamodules.samples.Batch`` of B images.

    All images come first, then all in orientation 1, and so on. Images are turned, and zoomed; features are
    those that a store gave, or are left to be computed of the turned images.

    Raises:
        ConfigurationError: stored features of another number of orientations.
    """

    def in_each(pixels: Tensor) -> Tensor:
        return torch.cat([zoomed_pixels(oriented_pixels(pixels, each), each, zoom) for each in range(count)])

    turned: dict[str, Any] = {name: in_each(batch[name]) for name in ("images", "side_images") if name in batch}
    if "ids" in batch:
        turned["ids"] = list(batch["ids"]) * count
    if "images" in batch:
        return turned
    stored = {name: batch[name] for name in _OF_IMAGES if name in batch}
    for features in stored.values():
        if len(features) != count * len(batch["labels"]):
            raise ConfigurationError(
                f"model.test_time_orientations is {count}, but there are {len(features)} stored features of "
                f"{len(batch['labels'])} images: make the store with as many data.orientations."
            )
    return turned | stored


def as_stored(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A batch of B images with their features alone, where a store gave those of other orientations along."""
    return {name: value[:count] if name in _OF_IMAGES else value for name, value in batch.items()}


def _decimal(numbers: Sequence[Any]) -> NDArray[np.float64]:
    """fp32 numbers as the shortest decimals that stand for them, so that a file of them holds what was scored."""
    return np.array(numbers, np.float32).astype(str).astype(np.float64)


def initialise_head(head: nn.Linear) -> nn.Linear:
    """Truncated normal weights of std 0.02 and no bias, as in the side network."""
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


class ClassificationModule(TrainedModule, ABC):
    """Base of the methods: a subclass says what it takes of a batch, and how that becomes logits.

    Training as published: AdamW, cosine decay to 0 over all steps, cross-entropy (paper, section 4.2.1). All arguments
    are primitive, so that a checkpoint holds them and loads under ``weights_only``.

    Args:
        num_classes: number of classes; of labels in a multi-label task; 1 in a regression. The command line finds it in
            the data where it is not given.
        task: ``multiclass``, ``multilabel``, ``ordinal`` (grades as classes), ``coral`` (grades by ordered thresholds)
            or ``regression``: the head, the loss, the metrics and what the best epoch is chosen by
            (``fpt_lightning.methods.tasks``).
        encoder: a plain ViT of timm, by name, or ``hf-hub:owner/repository`` or ``local-dir:folder`` of timm.
        pretrained: True for the published weights, False for a fixed random initialisation, or a local file or folder.
        learning_rate: the highest. Each method has a default of its own: the best of those tried on real images, or
            near it, where it was (``benchmarks/results/evidence_rates.md``).
        weight_decay: of AdamW, on all learnable parameters.
        betas: of AdamW.
        warmup_epochs: of linear increase from 0.
        class_weights: None, ``balanced`` or one number a class; in a multi-label task, of a class's positive images.
        label_smoothing: of the cross-entropy, in [0, 1).
        calibrate: whether probabilities in test and prediction are calibrated by a temperature and a bias of each
            class, fitted to the validation images (``fpt_lightning.evaluation.calibration``). Not in the paper, and
            nothing to a regression.
        test_time_orientations: of how many orientations of an image validation, test and prediction take the mean
            logits: 1, 2 (its mirror image too), 4 (upside down too) or 8 (quarter turns too, of square images;
            ``fpt_lightning.data.orientations``); a store must have as many (``data.orientations``). Not in the paper.

    Raises:
        ConfigurationError: values that cannot work.
        EncoderError: ``encoder`` is not a plain ViT of timm.
    """

    LABEL: ClassVar[str]
    """The method's name in tables."""

    INPUTS: ClassVar[frozenset[str]]
    """What ``forward`` takes of a ``Batch``: of ``side_images``, ``features``, ``pooled`` and ``images``."""

    side_resolution: int | None = None
    encoder_config: EncoderConfig

    def __init__(
        self,
        num_classes: int | None = None,
        encoder: str = "vit_base_patch16_224.augreg_in21k",
        pretrained: bool | str = True,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_epochs: int = 0,
        class_weights: Weights = None,
        label_smoothing: float = 0.0,
        task: TaskName = "multiclass",
        calibrate: bool = True,
        test_time_orientations: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if num_classes is None:
            raise ConfigurationError("num_classes is not given: only the command line finds it in the data.")
        self.num_classes = num_classes
        self.task = make_task(task, num_classes, class_weights, label_smoothing)
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, (betas[0], betas[1])
        self.warmup_epochs = warmup_epochs
        check_orientations("model.test_time_orientations", test_time_orientations)
        self.calibrate = calibrate and self.task.KIND != "regression"
        self.test_time_orientations = test_time_orientations
        self._steps = 0  # that the optimiser had taken when the last batch ended
        self._validated: list[tuple[str, Any, Any]] = []
        self.val_metrics, self.test_metrics = self.task.metrics("val_"), self.task.metrics("test_")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()  # over images, of however many processes

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The method's arguments and their defaults; one that it passes on has the default of its base."""
        found: dict[str, Any] = {}
        for each in cls.__mro__:
            if issubclass(each, ClassificationModule):
                found = {name: of.default for name, of in signature(each).parameters.items()} | found
        return found

    @property
    def encoder_shape(self) -> EncoderShape:
        return self.encoder_config.shape

    @property
    def learnable_parameters(self) -> int:
        """Number of parameters that learn."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def frozen_parameters(self) -> int:
        """Number of parameters that the method uses and does not train."""
        return sum(p.numel() for p in self.parameters() if not p.requires_grad)

    @property
    def learnable_ratio(self) -> float:
        """Learnable parameters / all (paper, section 4.2.2)."""
        return self.learnable_parameters / (self.learnable_parameters + self.frozen_parameters)

    @abstractmethod
    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, ``task.outputs``) of a ``fpt_lightning.datamodules.samples.Batch``."""

    # Steps

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss = self.task.loss(self(batch).float(), batch["labels"])
        size = len(batch["labels"])
        self.log("train_loss_step", loss, batch_size=size)  # of this process; on the bar, every step would wait for it
        self.log("train_loss_epoch", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        found = self._evaluate(batch, self.val_loss)
        self._validated += zip(batch["ids"], found["labels"].tolist(), found["scores"].tolist(), strict=True)
        return found

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        found = self._evaluate(batch, self.test_loss)
        self.test_metrics.update(found["scores"], self.task.targets(found["labels"]))
        return found

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """``ids`` (B), ``labels`` as in the batch, and ``scores``: probabilities (B, classes) or numbers (B,), fp32."""
        return {"ids": batch["ids"], "labels": batch["labels"], "scores": self.scores(self.evaluated(batch))}

    def evaluated(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, ``task.outputs``) as evaluation takes them, fp32: the mean of ``test_time_orientations``.

        Raises:
            ConfigurationError: stored features of fewer orientations.
            NonFiniteError: NaN or infinity, as of a training that diverges.
        """
        count = self.test_time_orientations
        zoom = 1.0 if self.specification is None else self.specification.zoom
        logits: Tensor = self(batch if count == 1 else in_orientations(batch, count, zoom)).float()
        if count > 1:
            logits = logits.view(count, -1, *logits.shape[1:]).mean(0)
        if not exporting() and sketching() is None:
            self._check_finite(logits, batch.get("ids"))
        return logits

    def _check_finite(self, logits: Tensor, ids: Sequence[str] | None) -> None:
        finite = logits.isfinite().all(-1)
        if bool(finite.all()):
            return
        place = int((~finite).nonzero()[0, 0])
        which = f"image {place} of the batch" if ids is None else ids[place]
        if self._trainer is not None and self.trainer.state.fn == "fit":
            raise NonFiniteError(
                f"the model's outputs for {which} are not finite after {self.trainer.global_step} steps "
                f"(epoch {self.current_epoch}): training diverges. Give a smaller model.learning_rate than "
                f"{self.learning_rate:g}, trainer.gradient_clip_val, or another trainer.precision than "
                f"{self.trainer.precision}; last.ckpt is of an earlier epoch."
            )
        path = None if self._trainer is None else self.trainer.ckpt_path
        raise NonFiniteError(
            f"the model's outputs for {which} are not finite{'' if path is None else f', with the checkpoint {path}'}: "
            "its training diverged, or the file is damaged. Use an earlier checkpoint."
        )

    def _evaluate(self, batch: Mapping[str, Any], loss: MeanMetric) -> dict[str, Any]:
        logits, labels = self.evaluated(batch), self.own_labels(batch["labels"])
        loss.update(self.evaluated_loss(logits, labels), len(labels))
        return {"ids": batch["ids"], "labels": labels, "scores": self.scores(logits)}

    def _log_evaluation(self, stage: str, metrics: Any, loss: MeanMetric) -> None:
        """Once an epoch: with few images at once, logging would take longer than they."""
        self.log(f"{stage}_loss", loss)
        monitor = f"val_{self.task.MONITOR[0]}"
        for name, metric in metrics.items(keep_base=False, copy_state=False):
            self.log(name, metric, prog_bar=name == monitor)

    def evaluated_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss, scalar, of what ``evaluated`` gives."""
        return self.task.loss(logits, labels)

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities (B, classes), calibrated but in fit, or numbers (B,), of ``forward``'s fp32."""
        scores = self.task.scores(logits)
        fitting = self.trainer.state.fn == "fit" if self._trainer is not None else False
        return scores if fitting or not self.calibrate else self.task.calibrated(scores, self.calibration)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test", self.test_metrics, self.test_loss)

    def on_validation_epoch_start(self) -> None:
        self._validated = []

    def on_validation_epoch_end(self) -> None:
        """Fit to this epoch's validation images what decides later.

        It is the calibration if wanted, what prediction sets come from, thresholds, and how cases are predicted. All
        are kept in checkpoints, and of calibrated probabilities, as metrics are, in validation too.
        """
        own, self._validated = self._validated, []
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            predictions = self.predictions(from_all_processes(own), samples_of(self.trainer))
            if predictions.known.any():
                self._fit(predictions)
        if own:  # at once, as only now it is known by which calibration
            labels, scores = (torch.tensor([row[i] for row in own], device=self.device) for i in (1, 2))
            if self.trainer.state.fn == "fit" and self.is_calibrated:
                scores = self.task.calibrated(scores, self.calibration)
            self.val_metrics.update(scores, self.task.targets(labels))
        self._log_evaluation("val", self.val_metrics, self.val_loss)

    def _fit(self, predictions: Predictions) -> None:
        """Fit calibration, sets, thresholds and the rule of cases to labelled predictions."""
        if self.calibrate:
            weights: Tensor | None = getattr(self.task, "weights", None)
            self.calibration = fit_calibration(predictions, None if weights is None else weights.tolist())
            predictions = calibrated(predictions, self.calibration)
        self.nonconformity = fit_nonconformity(predictions)
        if self.task.KIND == "regression":
            return
        self.thresholds = fit_thresholds(predictions)
        if predictions.cases:
            self.case_rule = choose_rule(predictions)
            cases = by_case(predictions, self.case_rule)
            self.case_thresholds = fit_thresholds(cases) if cases.known.any() else {}

    @property
    def is_calibrated(self) -> bool:
        """Whether test and prediction give probabilities by what was fitted to validation images."""
        return self.calibrate and any(each != Calibration() for each in self.calibrations)

    def check_coverage(self, coverage: float) -> None:
        """Refuse a coverage that this model has no prediction sets of.

        Raises:
            CheckpointError: it knows nothing of validation images.
            ConfigurationError: it is no share, or there were too few validation images for it.
        """
        if not self.nonconformity:
            raise CheckpointError(
                "the model has no prediction sets, as its checkpoint holds nothing of validation images: it is of an "
                "earlier version, or they had no labels. Train it again, with labelled validation images."
            )
        if why := shortage(self.nonconformity, coverage):
            raise ConfigurationError(f"there are no prediction sets: {why}. Give a smaller coverage.")

    def sets(self, predictions: Predictions, coverage: float) -> Sets:
        """What may be true of each image of this model's predictions (``fpt_lightning.evaluation.conformal``).

        Raises:
            CheckpointError: see ``check_coverage``.
            ConfigurationError: likewise.
        """
        self.check_coverage(coverage)
        return prediction_sets(predictions, self.nonconformity, coverage)

    def predictions(self, rows: Sequence[tuple[str, Any, Any]], samples: Iterable[Sample] = ()) -> Predictions:
        """Predictions of images.

        Args:
            rows: (id, label, scores) of each, in ascending order of ids; see ``predict_step``.
            samples: that tell their groups and cases.
        """
        ids, labels, scores = zip(*rows, strict=True)
        known = np.array(labels, np.int64) if self.task.KIND == "single-label" else _decimal(labels)
        classes = () if self.task.KIND == "regression" else self.output_names
        wanted = {*ids}
        of = {sample.id: (sample.group, sample.case) for sample in samples if sample.id in wanted}
        groups, cases = zip(*(of.get(id, ("", "")) for id in ids), strict=True)
        return Predictions(
            self.task.KIND,
            ids,
            known,
            _decimal(scores),
            classes,
            groups if any(groups) else (),
            self.task.ORDERED,
            cases if any(cases) else (),
        )

    @staticmethod
    def check_trainer(trainer: L.Trainer) -> None:
        """Refuse a trainer whose training has no end, or no step.

        Raises:
            ConfigurationError: naming the argument.
        """
        if trainer.max_epochs in (-1, None) and trainer.max_steps == -1:
            raise ConfigurationError("trainer.max_epochs is -1: the cosine schedule needs a last step; give a number.")
        check_at_least("trainer.gradient_clip_val", trainer.gradient_clip_val or 0, 0)
        if trainer.check_val_every_n_epoch is not None:
            check_at_least("trainer.check_val_every_n_epoch", trainer.check_val_every_n_epoch, 1)
        check_at_least("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, 1)

    def configure_optimizers(self) -> Any:
        """AdamW over what is learnable, and a cosine decay to 0 by step after an optional linear warm-up."""
        learnable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            learnable, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        self.check_trainer(self.trainer)

        def factor(step: int) -> float:
            if step == 0:  # asked for before a resumed run knows its epoch, when loading the data would be too early
                return 0.0 if self.warmup_epochs else 1.0
            steps = int(self.trainer.estimated_stepping_batches)
            warmup = int(steps * self.warmup_epochs / (self.trainer.max_epochs or 1))
            if step < warmup:
                return step / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step > self._steps:
            self._steps = self.trainer.global_step
            self.after_step(self._steps)

    def after_step(self, step: int) -> None:
        """Free the gradients, which Lightning would keep until the next forward pass has run.

        Args:
            step: number of steps that the optimiser has taken.
        """
        self.zero_grad()

    # One seed, one run: whatever was drawn before, an epoch's dropout depends on the seed and the epoch alone

    def on_train_epoch_start(self) -> None:
        entropy = [self._seed or 0, self.current_epoch, self.trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))

    def on_train_start(self) -> None:
        """Go on where the schedule of now stands, and say so where that is not where it stood before.

        The optimizer's state holds the learning rate of the schedule to the last step that was asked for then.
        """
        self._steps = self.trainer.global_step
        schedule = self.lr_schedulers()
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR) or self.trainer.ckpt_path is None:
            return
        before, step = schedule.get_last_lr(), schedule.last_epoch
        now = [rate * factor(step) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        if now != before:
            for group, rate in zip(schedule.optimizer.param_groups, now, strict=True):
                group["lr"] = rate
            rank_zero_info(
                f"the cosine schedule now ends after {self.trainer.estimated_stepping_batches:,.0f} steps: at step "
                f"{step:,} the learning rate is {now[0]:.3g}, where it was {before[0]:.3g}"
            )

    def on_fit_start(self) -> None:
        if self._seed is None:
            self._seed = torch.initial_seed() % 2**32
        self.meet_data(trained=self.trainer.ckpt_path is not None)
        labels: Tensor | None = getattr(getattr(self.trainer, "datamodule", None), "training_labels", None)
        if labels is not None:
            self.task.adapt(labels.to(self.device))
        elif self.task.adapts:
            raise ConfigurationError(
                f"model.task {self.hparams['task']!r} with class_weights {self.hparams['class_weights']!r} needs the "
                "training labels: use a data module that has them as `training_labels`."
            )
