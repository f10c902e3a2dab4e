"""Metrics of a stage, from torchmetrics, and the paper's efficiency metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCohenKappa,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
    MultilabelAUROC,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, PearsonCorrCoef, R2Score, SpearmanCorrCoef
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.wrappers.abstract import WrapperMetric

from fpt_lightning.errors import ConfigurationError


class MacroAUROC(MulticlassAUROC):
    """Macro one-vs-rest AUC over the classes that can be scored.

    A class without an image, or with nothing but its images, has no AUC: it is left out of the mean (torchmetrics
    would count it as 0). NaN if no class can be scored. Takes probabilities (B, classes) and labels (B,).
    """

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, average="none", **kwargs)

    def compute(self) -> Tensor:  # type: ignore[override]
        """Scalar."""
        if not self.update_called:
            return torch.tensor(float("nan"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No (positive|negative) samples in targets")
            per_class = torch.as_tensor(super().compute())
        target = dim_zero_cat(self.target)
        counts = torch.bincount(target, minlength=self.num_classes)
        return per_class[(counts > 0) & (counts < counts.sum())].mean()


class MacroLabelAUROC(MultilabelAUROC):
    """Macro AUC over the labels that can be scored: those with a positive and a negative image.

    Takes probabilities (B, classes) and labels (B, classes), -1 where unknown. NaN if no label can be scored.
    """

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, average="none", ignore_index=-1, **kwargs)

    def compute(self) -> Tensor:  # type: ignore[override]
        """Scalar."""
        return _mean_over_scored(self, binary_auroc)


class MacroLabelAveragePrecision(MultilabelAveragePrecision):
    """Macro average precision over the labels that can be scored, like ``MacroLabelAUROC``."""

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, average="none", ignore_index=-1, **kwargs)

    def compute(self) -> Tensor:  # type: ignore[override]
        """Scalar."""
        return _mean_over_scored(self, binary_average_precision)


def _mean_over_scored(metric: Metric, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Label by label, as torchmetrics raises on one of which nothing is known."""
    if not metric.update_called:
        return torch.tensor(float("nan"))
    preds, target = (dim_zero_cat(cast(list[Tensor], state)) for state in (metric.preds, metric.target))
    scored = (target == 1).any(0) & (target == 0).any(0)
    values = [
        score(preds[known, label], target[known, label])
        for label in scored.nonzero()[:, 0].tolist()
        for known in [target[:, label] >= 0]
    ]
    return torch.stack(values).mean() if values else preds.new_tensor(float("nan"))


class MacroLabelF1(MultilabelF1Score):
    """Macro F1 at 0.5 over the labels of which something is known (torchmetrics would count the others as 0).

    Takes probabilities (B, classes) and labels (B, classes), -1 where unknown.
    """

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, average="none", ignore_index=-1, **kwargs)

    def compute(self) -> Tensor:
        """Scalar."""
        counts = sum(cast(Tensor, state) for state in (self.tp, self.fp, self.tn, self.fn))
        return torch.as_tensor(super().compute())[torch.as_tensor(counts) > 0].mean()


class ScoredLabels(Metric):
    """How many labels have an AUC: those with a positive and a negative image."""

    full_state_update = False
    higher_is_better = None

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(2, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count labels (B, classes)."""
        self.counts: Tensor = self.counts + torch.stack([(target == value).sum(0) for value in (0, 1)])

    def compute(self) -> Tensor:
        """Scalar."""
        return (self.counts > 0).all(0).sum().float()


class ScoredClasses(Metric):
    """How many classes have an AUC: those with an image, but not with all of them."""

    full_state_update = False
    higher_is_better = None

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count labels (B,)."""
        self.counts: Tensor = self.counts + torch.bincount(target, minlength=len(self.counts))

    def compute(self) -> Tensor:
        """Scalar."""
        return ((self.counts > 0) & (self.counts < self.counts.sum())).sum().float()


class BalancedAccuracy(MulticlassRecall):
    """Mean recall over the classes that have an image (torchmetrics counts a wrongly predicted absent one as 0)."""

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, average="none", **kwargs)

    def compute(self) -> Tensor:
        """Scalar."""
        present = (cast(Tensor, self.tp) + cast(Tensor, self.fn)) > 0
        return torch.as_tensor(super().compute())[present].mean()


def performance_efficiency(score: float, ratio: float) -> float:
    """What a score is worth at a cost: ``score * exp(-log10(ratio + 1))`` (paper, equations 9 and 10).

    Args:
        score: such as a mean AUC, in any unit.
        ratio: of the learnable parameters to all, for PPE; of the method's training memory to full fine-tuning's, for
            PME.

    Returns:
        PPE or PME, in the score's unit.

    Raises:
        ConfigurationError: a negative ratio.
    """
    if not ratio >= 0:
        raise ConfigurationError(f"the ratio is {ratio}: give a share of parameters or memory, such as 0.0103.")
    return score * math.exp(-math.log10(ratio + 1))


class PerformanceEfficiency(WrapperMetric):
    """PPE or PME of another metric (``performance_efficiency``).

    Args:
        metric: the score, such as ``MacroAUROC``; it is updated through this one.
        ratio: of parameters (PPE) or of memory (PME).

    Raises:
        ConfigurationError: a negative ratio.
    """

    higher_is_better = True

    def __init__(self, metric: Metric, ratio: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metric = metric
        self.factor = performance_efficiency(1.0, ratio)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Update the score."""
        self.metric.update(*args, **kwargs)

    def compute(self) -> Tensor:
        """Scalar."""
        return torch.as_tensor(self.metric.compute()) * self.factor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Update, and the value of this batch alone."""
        return torch.as_tensor(self.metric(*args, **kwargs)) * self.factor

    def reset(self) -> None:
        self.metric.reset()


def classification_metrics(num_classes: int, prefix: str, ordered: bool = False) -> MetricCollection:
    """The metrics of a stage, from probabilities (B, classes) and labels (B,).

    Args:
        num_classes: number of classes.
        prefix: of their names, such as ``val_``.
        ordered: whether the classes are grades from low to high.

    Returns:
        ``auc`` (macro one-vs-rest), ``auc_classes`` (how many classes it is the mean of), ``accuracy``,
        ``balanced_accuracy``, ``f1``, ``precision``, ``recall`` (macro) and ``kappa`` (Cohen's, without weights); of
        grades ``quadratic_kappa`` in its place.
    """
    return MetricCollection(
        {
            "auc": MacroAUROC(num_classes),
            "auc_classes": ScoredClasses(num_classes),
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "balanced_accuracy": BalancedAccuracy(num_classes),
            "f1": MulticlassF1Score(num_classes, average="macro"),
            "precision": MulticlassPrecision(num_classes, average="macro"),
            "recall": MulticlassRecall(num_classes, average="macro"),
            **(
                {"quadratic_kappa": MulticlassCohenKappa(num_classes, weights="quadratic")}
                if ordered
                else {"kappa": MulticlassCohenKappa(num_classes)}
            ),
        },
        prefix=prefix,
        compute_groups=False,
    )


def multilabel_metrics(num_classes: int, prefix: str) -> MetricCollection:
    """The metrics of a stage, from probabilities (B, classes) and labels (B, classes), -1 where unknown.

    Args:
        num_classes: number of labels.
        prefix: of their names, such as ``val_``.

    Returns:
        ``auc`` and ``average_precision`` (macro), ``auc_classes`` (how many labels they are the mean of) and ``f1``
        (macro, at 0.5).
    """
    return MetricCollection(
        {
            "auc": MacroLabelAUROC(num_classes),
            "auc_classes": ScoredLabels(num_classes),
            "average_precision": MacroLabelAveragePrecision(num_classes),
            "f1": MacroLabelF1(num_classes),
        },
        prefix=prefix,
        compute_groups=False,
    )


def regression_metrics(prefix: str) -> MetricCollection:
    """The metrics of a stage, from predicted and true numbers (B,), in their own unit.

    Args:
        prefix: of their names, such as ``val_``.

    Returns:
        ``mae``, ``rmse``, ``r2``, ``pearson`` and ``spearman``.
    """
    return MetricCollection(
        {
            "mae": MeanAbsoluteError(),
            "rmse": MeanSquaredError(squared=False),
            "r2": _R2(),
            "pearson": PearsonCorrCoef(),
            "spearman": SpearmanCorrCoef(),
        },
        prefix=prefix,
        compute_groups=False,
    )


class _R2(R2Score):
    """NaN of fewer than two numbers, where torchmetrics raises."""

    def compute(self) -> Tensor:
        return super().compute() if int(self.total) > 1 else torch.tensor(float("nan"))
