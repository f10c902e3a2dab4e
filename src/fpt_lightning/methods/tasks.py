"""What is learned: a class, several labels, an ordinal grade or a number; each with its head, loss and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from fpt_lightning.data.manifest import Kind
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.evaluation.calibration import SMALLEST_OF_A_LABEL, SMALLEST_PROBABILITY, Calibration
from fpt_lightning.evaluation.metrics import classification_metrics, multilabel_metrics, regression_metrics

TaskName = Literal["multiclass", "multilabel", "ordinal", "coral", "regression"]
TASKS: tuple[str, ...] = get_args(TaskName)
Weights = Literal["balanced"] | list[float] | None


class Task(nn.Module, ABC):
    """A task: how wide a method's head is, and what its outputs mean.

    Attributes:
        KIND: of the labels, as a manifest has them.
        MONITOR: the metric whose best epoch is kept, and whether that is its largest or smallest value.
        ORDERED: whether its classes are grades from low to high.
        outputs: of a method's linear head.
        adapts: whether the training labels are needed (``adapt``).
    """

    KIND: ClassVar[Kind]
    MONITOR: ClassVar[tuple[str, Literal["max", "min"]]]
    ORDERED: ClassVar[bool] = False
    outputs: int
    adapts = False

    def adapt(self, labels: Tensor) -> None:
        """Take from the training labels what they decide, such as balanced weights.

        Raises:
            ConfigurationError: they cannot decide it.
        """

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar, of outputs (B, ``outputs``), fp32, and labels (B,) or (B, classes)."""

    @abstractmethod
    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities (B, classes), or predicted numbers (B,), of outputs (B, ``outputs``), fp32."""

    @abstractmethod
    def metrics(self, prefix: str) -> MetricCollection:
        """What is measured in validation and test, from scores and ``targets``."""

    def calibrated(self, scores: Tensor, calibration: Calibration) -> Tensor:
        """Probabilities as ``fpt_lightning.evaluation.calibration.calibrated`` changes them."""
        return _shifted(scores.clamp(min=SMALLEST_PROBABILITY).log(), calibration).softmax(-1)

    def targets(self, labels: Tensor) -> Tensor:
        """Labels as the metrics take them."""
        return labels

    def example_labels(self, count: int) -> Tensor:
        """Labels of zeros."""
        return torch.zeros(count, dtype=torch.long)


class Multiclass(Task):
    """One class of several: softmax and cross-entropy (paper, section 4.2.1), macro one-vs-rest AUC.

    Args:
        num_classes: C, at least 2.
        class_weights: None, ``balanced`` (inverse to the training images of a class) or one number a class.
        label_smoothing: in [0, 1).
    """

    KIND = "single-label"
    MONITOR = ("auc", "max")
    weights: Tensor | None

    def __init__(self, num_classes: int, class_weights: Weights, label_smoothing: float) -> None:
        super().__init__()
        self.outputs = self.num_classes = num_classes
        self.adapts, self.label_smoothing = class_weights == "balanced", label_smoothing
        given = torch.tensor(class_weights) if isinstance(class_weights, list) else None
        self.register_buffer("weights", given, persistent=False)

    def adapt(self, labels: Tensor) -> None:
        if self.adapts:
            counts = torch.bincount(labels.cpu(), minlength=self.num_classes)
            if counts.min() == 0:
                raise ConfigurationError(
                    f"model.class_weights is 'balanced', but the training images of each class are {counts.tolist()}: "
                    "give a list."
                )
            self.weights = (counts.sum() / (self.num_classes * counts)).to(labels.device)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, self.weights, label_smoothing=self.label_smoothing)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def metrics(self, prefix: str) -> MetricCollection:
        return classification_metrics(self.num_classes, prefix, self.ORDERED)


class Ordinal(Multiclass):
    """Grades from low to high as classes: cross-entropy, quadratic-weighted kappa."""

    MONITOR = ("quadratic_kappa", "max")
    ORDERED = True


class Coral(Task):
    """Grades from low to high by one number and C - 1 ordered thresholds (CORAL, Cao et al., arXiv:1901.07884).

    The probability of a grade above k is ``sigmoid(output - threshold_k)``. Thresholds are the first one and positive
    steps, so that no grade has a negative probability.

    Args:
        num_classes: C, at least 2.
    """

    KIND = "single-label"
    MONITOR = ("quadratic_kappa", "max")
    ORDERED = True
    outputs = 1

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.first = nn.Parameter(torch.full((1,), -(num_classes - 2) / 2))
        self.steps = nn.Parameter(torch.full((num_classes - 2,), 1.0).expm1().log())  # softplus of it is 1

    def above(self, logits: Tensor) -> Tensor:
        """Logits (B, C - 1) of a grade above 0, 1, ..., C - 2."""
        steps = F.softplus(self.steps)
        risen = steps.expand(len(steps), -1).tril().sum(1)  # of torch 2.6, cumsum has no deterministic form on a GPU
        return logits - torch.cat([self.first, self.first + risen])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean binary cross-entropy over the thresholds."""
        grades = torch.arange(self.num_classes - 1, device=labels.device)
        return F.binary_cross_entropy_with_logits(self.above(logits), (labels[:, None] > grades).float())

    def scores(self, logits: Tensor) -> Tensor:
        above = F.pad(self.above(logits).sigmoid(), (1, 1))
        above[:, 0] = 1
        return above[:, :-1] - above[:, 1:]

    def metrics(self, prefix: str) -> MetricCollection:
        return classification_metrics(self.num_classes, prefix, self.ORDERED)


class Multilabel(Task):
    """Several labels, each true or false: sigmoid and binary cross-entropy over the known ones, macro AUC.

    Args:
        num_classes: C, at least 1.
        class_weights: of the positive images: None, ``balanced`` (negative / positive training images of a class) or
            one number a class.
    """

    KIND = "multi-label"
    MONITOR = ("auc", "max")
    weights: Tensor | None

    def __init__(self, num_classes: int, class_weights: Weights) -> None:
        super().__init__()
        self.outputs = self.num_classes = num_classes
        self.adapts = class_weights == "balanced"
        given = torch.tensor(class_weights) if isinstance(class_weights, list) else None
        self.register_buffer("weights", given, persistent=False)

    def adapt(self, labels: Tensor) -> None:
        positive, negative = (labels == 1).sum(0), (labels == 0).sum(0)
        if self.adapts:
            if min(positive.min(), negative.min()) == 0:
                raise ConfigurationError(
                    "model.class_weights is 'balanced', but the training images have, of each class, "
                    f"{positive.tolist()} positive and {negative.tolist()} negative: give a list."
                )
            self.weights = negative / positive

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the labels that are known (not NaN)."""
        known = ~labels.isnan()
        losses = F.binary_cross_entropy_with_logits(
            logits, labels.nan_to_num(), pos_weight=self.weights, reduction="none"
        )
        return losses.where(known, 0).sum() / known.sum().clamp(min=1)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def metrics(self, prefix: str) -> MetricCollection:
        return multilabel_metrics(self.num_classes, prefix)

    def calibrated(self, scores: Tensor, calibration: Calibration) -> Tensor:
        return _shifted(scores.logit(SMALLEST_OF_A_LABEL), calibration).sigmoid()

    def targets(self, labels: Tensor) -> Tensor:
        """-1 where unknown."""
        return labels.nan_to_num(-1).long()

    def example_labels(self, count: int) -> Tensor:
        return torch.zeros(count, self.num_classes)


class Regression(Task):
    """A number: mean squared error of what is standardised by the training labels; mean absolute error."""

    KIND = "regression"
    MONITOR = ("mae", "min")
    outputs = 1
    adapts = True
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def adapt(self, labels: Tensor) -> None:
        if len(labels) < 2 or labels.std() == 0:
            raise ConfigurationError(
                f"model.task is 'regression', but the {len(labels)} training labels are all {labels[0].item():g}."
            )
        self.mean, self.std = labels.mean(), labels.std()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(logits[:, 0], (labels - self.mean) / self.std)

    def scores(self, logits: Tensor) -> Tensor:
        return logits[:, 0] * self.std + self.mean

    def metrics(self, prefix: str) -> MetricCollection:
        return regression_metrics(prefix)

    def example_labels(self, count: int) -> Tensor:
        return torch.zeros(count)


def task_class(name: str) -> type[Task]:
    """The class of a task by name, which knows the kind of its labels and its metric.

    Raises:
        ConfigurationError: an unknown name.
    """
    classes: dict[str, type[Task]] = {
        "multiclass": Multiclass,
        "multilabel": Multilabel,
        "ordinal": Ordinal,
        "coral": Coral,
        "regression": Regression,
    }
    if name not in classes:
        raise ConfigurationError(f"model.task is {name!r}: choose one of {', '.join(TASKS)}.")
    return classes[name]


def _shifted(logits: Tensor, calibration: Calibration) -> Tensor:
    scaled = logits / calibration.temperature
    return scaled + scaled.new_tensor(calibration.biases) if calibration.biases else scaled


def make_task(name: str, num_classes: int, class_weights: Weights = None, label_smoothing: float = 0.0) -> Task:
    """A task by name.

    Raises:
        ConfigurationError: an unknown name, a number of classes that it cannot have, or weights that it does not take.
    """
    make: dict[type[Task], Callable[[], Task]] = {
        Multiclass: lambda: Multiclass(num_classes, class_weights, label_smoothing),
        Multilabel: lambda: Multilabel(num_classes, class_weights),
        Ordinal: lambda: Ordinal(num_classes, class_weights, label_smoothing),
        Coral: lambda: Coral(num_classes),
        Regression: Regression,
    }
    kind = task_class(name)
    if name == "regression" and num_classes != 1:
        raise ConfigurationError(f"model.num_classes is {num_classes}: it is 1 for the task 'regression'.")
    least = 1 if name in ("multilabel", "regression") else 2
    if num_classes < least:
        raise ConfigurationError(f"model.num_classes is {num_classes}: give at least {least}.")
    unused: dict[str, Any] = {
        "class_weights": class_weights if name in ("coral", "regression") else None,
        "label_smoothing": label_smoothing if name not in ("multiclass", "ordinal") else 0,
    }
    for argument, value in unused.items():
        if value:
            raise ConfigurationError(f"model.{argument} is {value}, which the task {name!r} does not take.")
    if isinstance(class_weights, list) and len(class_weights) != num_classes:
        raise ConfigurationError(f"model.class_weights has {len(class_weights)} numbers for {num_classes} classes.")
    return make[kind]()
