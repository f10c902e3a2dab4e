"""A number with its interval, and what people call a metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_LABELS = {
    "auc": "AUC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "kappa": "Cohen's kappa",
    "quadratic_kappa": "quadratic kappa",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "sensitivity_at_specificity": "sensitivity at specificity {specificity:g}",
    "brier": "Brier score",
    "calibration_error": "calibration error",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "r2": "R²",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval; NaN where there is none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        bounds = f" [{number(self.low)}, {number(self.high)}]" if self.low == self.low else ""
        return f"{number(self.value)}{bounds}"


def label(metric: str, specificity: float) -> str:
    """What people call a metric; one of them names the specificity it is at."""
    return _LABELS[metric].format(specificity=specificity)


def number(value: float, sign: Literal["", "+"] = "") -> str:
    """A number for people: three decimals, fewer of large ones; a dash for NaN."""
    if value != value:
        return "-"
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign},.1f}"
