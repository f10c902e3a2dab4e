"""Metrics of R resamples at once, from how often each holds each image: weights (R, N)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.evaluation.decisions import decide
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.resampling import counted_auc, mean_of_known, require_labelled, resampled_counts

CALIBRATION_BINS = 15
Values = dict[tuple[str, str], NDArray[np.float64]]  # of R resamples, by class (empty of all) and metric


def confusion_matrix(predictions: Predictions) -> NDArray[np.int64]:
    """Labelled single-label images by true class and most probable class: (C, C)."""
    labelled = require_labelled(predictions)
    ones, top = np.ones((1, len(labelled.ids))), labelled.scores.argmax(1)
    (counts,) = _confusion(labelled.labels, top, len(labelled.classes), ones).astype(np.int64)
    return np.asarray(counts)


def measure(
    predictions: Predictions,
    thresholds: Mapping[str, float],
    specificity: float,
    weights: NDArray[np.float64],
    per_class: bool = True,
    decided: NDArray[np.bool_] | None = None,
) -> Values:
    """Every metric of labelled predictions.

    Args:
        predictions: N, labelled.
        thresholds: by class, from which score on it is decided for.
        specificity: at which a sensitivity is given.
        weights: (R, N).
        per_class: whether each class's own metrics are given beside the overall ones.
        decided: which classes each image is decided for (N, C), in place of decisions by the thresholds.
    """
    if predictions.kind == "regression":
        return {("", metric): value for metric, value in _regression(predictions, weights).items()}
    decided = decide(predictions, thresholds) if decided is None else decided
    classes: dict[str, dict[str, NDArray[np.float64]]] = {}
    for index, name in enumerate(predictions.classes):
        known, positive, scores = predictions.of_class(index)
        drawn = weights if known.all() else weights[:, known]
        classes[name] = _one_class(scores, positive, decided[known, index], specificity, drawn)
        if predictions.kind == "multi-label":
            classes[name] |= _calibration(scores, positive, drawn, (scores - positive) ** 2)
    means = {
        metric: mean_of_known([values[metric] for values in classes.values()])
        for metric in next(iter(classes.values()))
    }
    if predictions.kind == "single-label":
        means = {name: means[name] for name in ("auc", "average_precision")} | _single_label(predictions, weights)
    overall = {("", metric): value for metric, value in means.items()}
    return overall | {
        (name, metric): value for name, values in classes.items() for metric, value in values.items() if per_class
    }


def _one_class(
    scores: NDArray[np.float64],
    positive: NDArray[np.bool_],
    decided: NDArray[np.bool_],
    specificity: float,
    weights: NDArray[np.float64],
) -> dict[str, NDArray[np.float64]]:
    of_class, of_others = resampled_counts(scores, positive, weights)
    true_positives, false_positives = (
        of_class[:, ::-1].cumsum(1),
        of_others[:, ::-1].cumsum(1),
    )  # from the highest score down
    positives, negatives = true_positives[:, -1], false_positives[:, -1]
    precision = _ratio(true_positives, true_positives + false_positives, 0)
    kept = false_positives <= (1 - specificity) * negatives[:, None] + 1e-9
    return {
        "auc": counted_auc(of_class, of_others),
        "average_precision": _ratio((of_class[:, ::-1] * precision).sum(1), positives),
        "sensitivity": _ratio(weights @ (positive & decided), positives),
        "specificity": _ratio(weights @ ~(positive | decided), negatives),
        "sensitivity_at_specificity": np.where(
            negatives > 0, _ratio((true_positives * kept).max(1), positives), np.nan
        ),
    }


def _single_label(predictions: Predictions, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    labels, scores, count = predictions.labels, predictions.scores, len(predictions.classes)
    top = scores.argmax(1)
    confusion = _confusion(labels, top, count, weights)  # (R, true, predicted)
    true, predicted, right = confusion.sum(2), confusion.sum(1), confusion.diagonal(axis1=1, axis2=2)
    total = true.sum(1)
    steps = np.abs(np.arange(count)[:, None] - np.arange(count))
    name, cost = ("quadratic_kappa", steps**2) if predictions.ordered else ("kappa", steps.clip(max=1))
    by_chance = np.einsum("ri,ij,rj->r", true, cost, predicted) / total
    squared = ((scores - (labels[:, None] == np.arange(count))) ** 2).sum(1)
    return {
        "accuracy": right.sum(1) / total,
        "balanced_accuracy": mean_of_known(list(_ratio(right, true).T)),
        "f1": mean_of_known(list(np.where(true > 0, _ratio(2 * right, true + predicted), np.nan).T)),
        name: 1 - _ratio((confusion * cost).sum((1, 2)), by_chance),
        **_calibration(scores.max(1), top == labels, weights, squared),
    }


def _confusion(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], count: int, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(R, true, predicted)."""
    cells, cell = np.unique(labels * count + predicted, return_inverse=True)
    order = cell.argsort(kind="stable")
    confusion = np.zeros((len(weights), count * count))
    confusion[:, cells] = np.add.reduceat(
        weights[:, order], np.searchsorted(cell[order], np.arange(len(cells))), axis=1
    )
    return confusion.reshape(-1, count, count)


def _calibration(
    scores: NDArray[np.float64],
    true: NDArray[np.bool_],
    weights: NDArray[np.float64],
    squared: NDArray[np.float64],
) -> dict[str, NDArray[np.float64]]:
    """Brier score from the cases' squared differences, and expected calibration error."""
    gaps = (calibration_bin(scores)[:, None] == np.arange(CALIBRATION_BINS)) * (scores - true)[:, None]
    total = weights.sum(1)
    return {
        "brier": _ratio(weights @ squared, total),
        "calibration_error": _ratio(np.abs(weights @ gaps).sum(1), total),
    }


def calibration_bin(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of the ``CALIBRATION_BINS`` bins of equal width from 0 to 1 a probability is in."""
    return np.minimum((scores * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)


def net_benefit(
    positive: NDArray[np.bool_], scores: NDArray[np.float64], thresholds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Net benefit of a decision for a class by its probability (Vickers and Elkin, Medical Decision Making 2006).

    The share of images that have the class and are decided for, less that of images decided for without having it
    times the odds of the threshold. A score of 1 for every image is the decision for all, one of 0 that for none.

    Args:
        positive: (N,), at least one image.
        scores: (N,), probabilities, presumed to be calibrated.
        thresholds: (T,), above 0 and below 1, from which score on the class is decided for.

    Returns:
        (T,), at most the share of ``positive``.
    """
    true, false = (
        len(each) - np.searchsorted(np.sort(each), thresholds) for each in (scores[positive], scores[~positive])
    )
    return np.asarray((true - false * thresholds / (1 - thresholds)) / len(scores))


def _regression(predictions: Predictions, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    true, found = predictions.labels, predictions.scores
    total, error = weights.sum(1), found - true
    mean = weights @ true / total
    spread = (weights * (true - mean[:, None]) ** 2).sum(1)
    return {
        "mae": weights @ np.abs(error) / total,
        "rmse": np.sqrt(weights @ error**2 / total),
        "r2": 1 - _ratio(weights @ error**2, spread),
        "pearson": _correlation(true, found, weights),
        "spearman": _correlation(_ranks(true, weights), _ranks(found, weights), weights),
    }


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of x and y, each (N,) or (R, N)."""
    total = weights.sum(1, keepdims=True)
    x, y = (each - (weights * each).sum(1, keepdims=True) / total for each in (x, y))
    scale = np.sqrt((weights * x**2).sum(1) * (weights * y**2).sum(1))
    return _ratio((weights * x * y).sum(1), np.where(scale > 1e-12, scale, 0))


def _ranks(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mid-rank (R, N) of each value in each resample."""
    distinct, place = np.unique(values, return_inverse=True)
    order = place.argsort(kind="stable")
    counts = np.add.reduceat(weights[:, order], np.searchsorted(place[order], np.arange(len(distinct))), axis=1)
    return (counts.cumsum(1) - counts / 2)[:, place]


def _ratio(top: NDArray[Any], bottom: NDArray[Any], otherwise: float = math.nan) -> NDArray[np.float64]:
    quotient = np.full(np.shape(bottom), otherwise, dtype=np.float64)
    np.divide(top, bottom, out=quotient, where=bottom > 0)
    return quotient
