"""The bootstrap: resamples that keep groups whole, intervals from them, and the AUC of many resamples at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.errors import ConfigurationError, DataError
from fpt_lightning.evaluation.estimates import Estimate
from fpt_lightning.evaluation.predictions import Predictions

WITHOUT_INTERVAL = frozenset({"calibration_error"})
"""Metrics that the bootstrap cannot bound: chance makes the bins' gaps larger, in the images and again in each
resample, so that percentiles leave out what is true, and often the value itself."""
_CHUNK = 2**21  # resampled weights held at once: 16 MiB, and several times that in passing


def check_numbers(resamples: int, specificity: float) -> None:
    """Refuse no resamples, or a specificity that is no share.

    Raises:
        ConfigurationError: one of them is out of its range.
    """
    if resamples < 1 or not 0 < specificity < 1:
        raise ConfigurationError(
            f"resamples is {resamples} and specificity {specificity}: give at least 1, and a share between 0 and 1."
        )


def require_labelled(predictions: Predictions) -> Predictions:
    """Those with a known label.

    Raises:
        DataError: there are none.
    """
    labelled = predictions.labelled()
    if not labelled.ids:
        raise DataError(f"none of the {len(predictions.ids)} predictions has a label: there is nothing to score.")
    return labelled


def resample(
    groups: Sequence[str] | NDArray[Any], count: int, seed: int | np.random.Generator = 0
) -> NDArray[np.int64]:
    """How often each of N cases is in each of ``count`` resamples (count, N); whole groups are drawn."""
    _, members = np.unique(groups, return_inverse=True)
    total = int(members.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(total, [1 / total] * total, size=count)
    return drawn[:, members]


def resampled_weights(predictions: Predictions, count: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each resample holds each image, (R, N) for a few of the ``count`` at a time; groups stay whole."""
    yield from weights_of(predictions.units, count, seed)


def weights_of(groups: Sequence[str] | NDArray[Any], count: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """``resampled_weights`` of N images by their groups."""
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // len(groups))
    for start in range(0, count, step):
        yield resample(groups, min(step, count - start), generator).astype(np.float64)


def resampled_values(
    chunks: Sequence[Mapping[tuple[str, str], NDArray[np.float64]]], key: tuple[str, str]
) -> NDArray[np.float64]:
    """A class's metric in all resamples (R,); nothing of one that they cannot bound."""
    bounded = () if key[1] in WITHOUT_INTERVAL else chunks
    return np.concatenate([np.empty(0), *(chunk[key] for chunk in bounded)])


def interval(differences: NDArray[np.float64]) -> dict[str, float]:
    """The 95% interval of resampled differences, and the two-sided p of none (at least 1 / (resamples + 1)).

    Those that are NaN are left out; all is NaN where none is left.
    """
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return {"low": math.nan, "high": math.nan, "p": math.nan}
    p = 2 * min((differences <= 0).mean(), (differences >= 0).mean())
    low, high = np.percentile(differences, [2.5, 97.5])
    return {"low": float(low), "high": float(high), "p": float(np.clip(p, 1 / (len(differences) + 1), 1))}


def bounded(value: float, resampled: NDArray[np.float64]) -> Estimate:
    """A value with its 95% interval of a metric in resamples (R,); all NaN where the value is."""
    bounds = interval(resampled)
    return Estimate(float(value), bounds["low"], bounds["high"]) if value == value else Estimate(*[math.nan] * 3)


def resampled_counts(
    scores: NDArray[Any], positive: NDArray[np.bool_], weights: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How many positive and negative cases each of R resamples has at each score.

    Args:
        scores: (N,), with D distinct values.
        positive: (N,), whether a case is of the class.
        weights: (R, N), how many times each resample holds each case.

    Returns:
        Positives and negatives (R, D), in ascending order of the score; of no case one column of zeros.
    """
    if not len(scores):
        return np.zeros((len(weights), 1)), np.zeros((len(weights), 1))
    order = np.argsort(scores, kind="stable")
    ascending, of_class = scores[order], positive[order]
    starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]])
    drawn = weights[:, order]
    return (
        np.add.reduceat(drawn * of_class, starts, axis=1, dtype=np.float64),
        np.add.reduceat(drawn * ~of_class, starts, axis=1, dtype=np.float64),
    )


def counted_auc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> NDArray[np.float64]:
    """AUC (R,) of ``resampled_counts``, exactly; ties count half. NaN without a positive or without a negative."""
    pairs = positive.sum(1) * negative.sum(1)
    won = (positive * (negative.cumsum(1) - negative / 2)).sum(1)
    return np.where(pairs > 0, won / np.where(pairs > 0, pairs, 1), np.nan)


def mean_of_known(values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Mean (R,) of C arrays (R,), those that are NaN left out; NaN where all are."""
    known = ~np.isnan(values)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, values, 0).sum(0) / np.maximum(count, 1), np.nan)


def resampled_auc(probabilities: NDArray[Any], labels: NDArray[Any], weights: NDArray[Any]) -> NDArray[np.float64]:
    """Macro one-vs-rest AUC of R resamples of the same N cases, exactly; ties count half.

    Args:
        probabilities: (N, C).
        labels: (N,), class indices.
        weights: (R, N), how many times each resample holds each case.

    Returns:
        (R,). A class that has none or all of a resample is left out of its mean; NaN if no class is left.
    """
    return mean_of_known(
        [
            counted_auc(*resampled_counts(probabilities[:, label], labels == label, weights))
            for label in range(probabilities.shape[1])
        ]
    )
