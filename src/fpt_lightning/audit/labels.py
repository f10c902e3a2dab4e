"""Labels that are likely wrong: out-of-fold probes and the nearest images of others both speak against them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.audit.probe import out_of_fold, out_of_fold_numbers
from fpt_lightning.data.manifest import UNLABELLED, Kind, Sample

FAR = 2.0
"""Robust standard deviations from which a number is away from what is expected of it."""

_Floats = NDArray[np.float64]


class Doubt(NamedTuple):
    """A label that both speak against.

    Attributes:
        row: of the image.
        name: of the label, of a data set with several; else empty.
        given: as the data set has it.
        suggested: what the probe says in its place.
        probe: probability of the given and of the suggested class; of a number NaN, and what the probe gives.
        nearest: share of the nearest images with the given and with the suggested class; of a number NaN, and their
            mean.
        weight: by which doubts are ranked, the largest first.
    """

    row: int
    name: str
    given: str
    suggested: str
    probe: tuple[float, float]
    nearest: tuple[float, float]
    weight: float


def doubtful_labels(
    samples: Sequence[Sample],
    kind: Kind,
    classes: Sequence[str],
    ordered: bool,
    pooled: NDArray[np.float32],
    neighbours: NDArray[np.int64],
    folds: NDArray[np.int64],
) -> list[Doubt]:
    """Labels that are likely wrong, the likeliest first.

    Of classes (each label of several by itself): the probe holds another class for likely, and so do the nearest
    images. For likely is held what has at least the mean probability (share) that it has where it is the label
    (Northcutt et al., JAIR 2021), so that a rare class is not suspected for its rarity. Grades must be two apart at
    least, as people differ by one. Of numbers: the probe and the mean of the nearest images are both ``FAR`` from
    it, to one side.

    Args:
        samples: N.
        kind: of their labels.
        classes: names.
        ordered: whether classes are grades from low to high.
        pooled: (N, C), features.
        neighbours: (N, K), rows of the nearest images of other groups; -1 where there are fewer.
        folds: (N,), of the probes.
    """
    if kind == "multi-label":
        targets = np.array([sample.targets for sample in samples])
        found = []
        for index, name in enumerate(classes):
            labels = np.where(np.isnan(targets[:, index]), UNLABELLED, targets[:, index]).astype(np.int64)
            found += _of_classes(labels, ("0", "1"), pooled, neighbours, folds, name)
    elif kind == "regression":
        found = _of_numbers(np.array([sample.targets[0] for sample in samples]), pooled, neighbours, folds)
    else:
        labels = np.array([sample.label for sample in samples])
        found = _of_classes(labels, classes, pooled, neighbours, folds, apart=2 if ordered else 1)
    return sorted(found, key=lambda doubt: (-doubt.weight, doubt.row))


def _of_classes(
    labels: NDArray[np.int64],
    classes: Sequence[str],
    pooled: NDArray[np.float32],
    neighbours: NDArray[np.int64],
    folds: NDArray[np.int64],
    name: str = "",
    apart: int = 1,
) -> list[Doubt]:
    known = np.flatnonzero(labels != UNLABELLED)
    own, rows = labels[known], np.arange(len(known))
    if len(np.unique(own)) < 2:
        return []
    probabilities = out_of_fold(pooled[known], own, len(classes), folds[known])
    shares = _shares(np.where(neighbours < 0, UNLABELLED, labels[neighbours]), len(classes))[known]
    likely = (probabilities >= _usual(probabilities, own)) & (shares >= _usual(shares, own))
    likely &= (probabilities > probabilities[rows, own, None]) & (shares > shares[rows, own, None])
    likely &= np.abs(np.arange(len(classes)) - own[:, None]) >= apart
    suggested = np.where(likely, probabilities, -1).argmax(1)
    return [
        Doubt(
            int(known[i]),
            name,
            classes[own[i]],
            classes[suggested[i]],
            (float(probabilities[i, own[i]]), float(probabilities[i, suggested[i]])),
            (float(shares[i, own[i]]), float(shares[i, suggested[i]])),
            float(np.diff(probabilities[i, [own[i], suggested[i]]])[0] + np.diff(shares[i, [own[i], suggested[i]]])[0]),
        )
        for i in np.flatnonzero(likely.any(1)).tolist()
    ]


def _shares(labels: NDArray[np.int64], count: int) -> _Floats:
    """Shares (N, K) of the classes among the known of labels (N, neighbours); 0 where none is known."""
    counts = np.stack([(labels == index).sum(1) for index in range(count)], 1)
    return np.asarray(counts / np.maximum(counts.sum(1, keepdims=True), 1))


def _usual(scores: _Floats, labels: NDArray[np.int64]) -> _Floats:
    """Mean score (K,) of each class where it is the label; infinite where it never is."""
    return np.array(
        [
            scores[labels == index, index].mean() if (labels == index).any() else np.inf
            for index in range(scores.shape[1])
        ]
    )


def _of_numbers(
    numbers: _Floats, pooled: NDArray[np.float32], neighbours: NDArray[np.int64], folds: NDArray[np.int64]
) -> list[Doubt]:
    known = np.flatnonzero(~np.isnan(numbers))
    if not len(known):
        return []
    own, found = numbers[known], neighbours[known]
    around = np.where(found < 0, np.nan, numbers[found])
    heard = ~np.isnan(around)
    nearest = np.where(heard.any(1), np.where(heard, around, 0).sum(1) / np.maximum(heard.sum(1), 1), own)
    probed = out_of_fold_numbers(pooled[known], own, folds[known])
    away = [(expected - own) / max(robust_scale(expected - own), 1e-12) for expected in (probed, nearest)]
    doubted = (np.minimum(*np.abs(away)) > FAR) & (away[0] * away[1] > 0)
    return [
        Doubt(
            int(known[i]),
            "",
            f"{own[i]:.6g}",
            f"{probed[i]:.4g}",
            (math.nan, float(probed[i])),
            (math.nan, float(nearest[i])),
            float(abs(away[0][i] + away[1][i])),
        )
        for i in np.flatnonzero(doubted).tolist()
    ]


def robust_scale(values: _Floats) -> float:
    """The standard deviation of a normal distribution with their median absolute deviation."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))
