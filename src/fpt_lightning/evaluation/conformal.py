"""Prediction sets that hold the truth as often as is asked for, by split-conformal prediction from validation images.

A set holds what conforms to the model at least as well as the truth did in all but a few of the validation images
(Vovk et al., Algorithmic Learning in a Random World, 2005). Patients with several images count once: scores are weighed
by one over their patient's images (hierarchical conformal prediction; Lee, Barber and Willett, arXiv:2306.06342).

What is guaranteed, where a new patient is exchangeable with those of validation: an image drawn from the patient's has
the truth in its set with at least the probability asked for. That is a mean over patients, not a promise for each class
or each kind of patient, and none for another hospital; it does not know that the epoch was chosen on the same images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.errors import ConfigurationError, a_few
from fpt_lightning.evaluation.estimates import Estimate, number
from fpt_lightning.evaluation.predictions import Predictions, set_columns
from fpt_lightning.evaluation.resampling import bounded, require_labelled, resampled_weights

DEFAULT_COVERAGE = 0.9
"""Of the sets that a test reports."""

Nonconformity = dict[str, list[list[float]]]
"""By label of several, else by an empty name: how little the truth of each validation image conformed to the model, in
ascending order, and what share of its patient's images it is."""

_ROUNDING = 1e-9  # of sums of shares, and of a coverage times a whole number


def fit_nonconformity(predictions: Predictions) -> Nonconformity:
    """How little the truth conforms to predictions of labelled validation images.

    - One class an image: 1 - its probability, and 0 of the most probable one, so that no set is empty (Sadinle, Lei and
      Wasserman, JASA 2019). Of grades, in place of a grade's probability that of it or one further away from the most
      probable grade, so that sets are intervals.
    - Several labels: likewise, of each label present or absent.
    - A number: the distance of the predicted one.

    Raises:
        DataError: no labelled image.
    """
    labelled = require_labelled(predictions)
    units, fitted = np.array(labelled.units), {}
    for name, rows, scores in _of_truth(labelled):
        _, of, counts = np.unique(units[rows], return_inverse=True, return_counts=True)
        order = np.argsort(scores, kind="stable")
        fitted[name] = [scores[order].tolist(), (1 / counts[of])[order].tolist()]
    return fitted


@dataclass(frozen=True, eq=False)
class Sets:
    """What may be true of each of N images.

    Attributes:
        coverage: that was asked for.
        images: of validation, from which they come; of several labels, of the one that is known of fewest patients.
        units: patients that those are of; the images where none are known.
        members: of one class an image (N, C) bool, whether the set holds each class; of several labels (N, C, 2) bool,
            whether each may be absent, and present; of a number (N, 2), the lowest and the highest.
    """

    coverage: float
    images: int
    units: int
    members: NDArray[Any]

    def columns(self, predictions: Predictions) -> dict[str, list[Any]]:
        """As a table has them, by column, of the predictions that they are of.

        ``set``, the classes joined by ``|``, and ``abstains``, 1 where these are not exactly one; of several labels
        ``set_{class}``, which is ``0``, ``1``, or ``0|1`` where it abstains; of a number ``low`` and ``high``.
        """
        names = set_columns(predictions.kind, predictions.classes)
        if predictions.kind == "regression":
            return dict(zip(names, self.members.T.tolist(), strict=True))
        if predictions.kind == "multi-label":
            by_label = self.members.swapaxes(0, 1)
            return {name: _joined("01", own) for name, own in zip(names, by_label, strict=True)}
        abstains = (self.members.sum(1) != 1).astype(int).tolist()
        return dict(zip(names, (_joined(predictions.classes, self.members), abstains), strict=True))


def _joined(values: Sequence[str], members: NDArray[np.bool_]) -> list[str]:
    return ["|".join(value for value, held in zip(values, row, strict=True) if held) for row in members]


def shortage(nonconformity: Nonconformity, coverage: float) -> str:
    """Why validation images give no sets of a coverage; empty where they do.

    Raises:
        ConfigurationError: a coverage that is no share.
    """
    if not 0 < coverage < 1:
        raise ConfigurationError(f"coverage is {coverage}: give a share between 0 and 1, such as 0.9.")
    units = {name: round(math.fsum(shares)) for name, (_, shares) in nonconformity.items()}
    few = [(name, count) for name, count in units.items() if count < _rank(coverage, count)]
    if not few:
        return "" if units else "no validation image has a label"
    needed = math.ceil(coverage / (1 - coverage) - 1e-6)
    short = a_few([f"{name} {count:,}" if name else f"{count:,}" for name, count in few])
    return (
        f"a coverage of {coverage:g} needs {needed:,} labelled validation patients (images, where no patients are "
        f"known), and there are {short}"
    )


def prediction_sets(predictions: Predictions, nonconformity: Nonconformity, coverage: float) -> Sets:
    """The sets of a coverage.

    A set holds all whose nonconformity is at most the smallest that ``coverage`` of the n + 1 patients do not exceed,
    where the one that is predicted counts as infinite: of n images, the ceil((n + 1) coverage)-th smallest.

    Args:
        predictions: of the model.
        nonconformity: of the same model's validation images (``fit_nonconformity``).
        coverage: share of images, averaged over patients, whose set shall hold the truth.

    Raises:
        ConfigurationError: a coverage that is no share, or too few validation images for it.
    """
    largest = quantiles(nonconformity, coverage)
    if predictions.kind == "regression":
        members: NDArray[Any] = predictions.scores[:, None] + largest[""] * np.array([-1, 1])
    else:
        several = predictions.kind == "multi-label"
        bounds = np.array([largest[name] for name in predictions.classes])[:, None] if several else largest[""]
        members = _nonconformity(predictions) <= bounds
    fewest = min(nonconformity.values(), key=lambda each: math.fsum(each[1]))
    return Sets(coverage, len(fewest[0]), round(math.fsum(fewest[1])), members)


def quantiles(nonconformity: Nonconformity, coverage: float) -> dict[str, float]:
    """The largest nonconformity of what a set holds, by label of several, else by an empty name.

    Raises:
        ConfigurationError: see ``prediction_sets``.
    """
    if why := shortage(nonconformity, coverage):
        raise ConfigurationError(f"there are no prediction sets: {why}. Give a smaller coverage.")
    found = {}
    for name, (scores, shares) in nonconformity.items():
        place = np.searchsorted(np.cumsum(shares), _rank(coverage, round(math.fsum(shares))))
        found[name] = scores[min(int(place), len(scores) - 1)]
    return found


def _rank(coverage: float, units: int) -> float:
    return coverage * (units + 1) - _ROUNDING


def _nonconformity(predictions: Predictions) -> NDArray[np.float64]:
    """Of each class (N, C); of several labels, of each absent and present (N, C, 2)."""
    scores = predictions.scores
    if predictions.kind == "multi-label":
        scores = np.stack([1 - scores, scores], -1)
    elif predictions.ordered:
        scores = _from_there_on(scores)
    return np.where(scores == scores.max(-1, keepdims=True), 0.0, 1 - scores)


def _from_there_on(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The probability of each grade or one further away from the most probable one (N, C), which itself has 1."""
    grades, top = np.arange(scores.shape[1]), scores.argmax(1)[:, None]
    lower, higher = scores.cumsum(1), scores[:, ::-1].cumsum(1)[:, ::-1]
    return np.where(grades == top, 1.0, np.where(grades < top, lower, higher).clip(0, 1))


def _of_truth(labelled: Predictions) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.float64]]]:
    """The rows whose truth is known, and its nonconformity, of each label of several, else of all."""
    every = np.arange(len(labelled.ids))
    if labelled.kind == "regression":
        yield "", every, np.abs(labelled.labels - labelled.scores)
        return
    scores = _nonconformity(labelled)
    if labelled.kind == "single-label":
        yield "", every, scores[every, labelled.labels]
        return
    for index, name in enumerate(labelled.classes):
        rows = np.flatnonzero(labelled.known[:, index])
        yield name, rows, scores[rows, index, labelled.labels[rows, index].astype(int)]


# What they are worth


@dataclass(frozen=True)
class Coverage:
    """How often prediction sets hold the truth, and how large they are; each patient weighs the same.

    Shares have Clopper-Pearson intervals of patients, which are on the safe side where a patient has several images;
    sizes those of the bootstrap.

    Attributes:
        asked: the coverage that they were made for.
        images: of validation, from which they come.
        units: patients that those are of.
        covered: the share that hold the truth.
        single: the share that hold one class alone (of several labels: of these); NaN of a regression.
        size: how many classes they hold (of several labels: of absent and present); of a regression their width.
        per_class: the share that hold the truth, of the images of each class; of several labels, of each.
    """

    asked: float
    images: int
    units: int
    covered: Estimate
    single: Estimate
    size: Estimate
    per_class: dict[str, Estimate]

    @property
    def basis(self) -> str:
        """What they were made for and from."""
        of = "" if self.units == self.images else f" of {self.units:,} groups"
        return f"for a coverage of {100 * self.asked:g}%, from {self.images:,} validation images{of}"

    def __str__(self) -> str:
        if not self.per_class:
            size = f"they are {self.size} wide"
        else:
            size = f"they hold {self.size} classes, and one alone for {self.single}"
        by_class = ", ".join(f"{name} {number(each.value)}" for name, each in self.per_class.items())
        listed = f" Coverage by class, for which nothing is promised: {by_class}." if by_class else ""
        return f"Prediction sets {self.basis}: {self.covered} hold the truth; {size}.{listed}"


def assess(predictions: Predictions, sets: Sets, *, resamples: int = 2000, seed: int = 0) -> Coverage:
    """How often sets hold the truth, and how large they are.

    Args:
        predictions: that they are of; unlabelled ones are left out.
        sets: of all of them.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: no labelled image.
    """
    labelled, members = require_labelled(predictions), sets.members[predictions.labelled_rows]
    units, rows, labels = np.array(labelled.units), np.arange(len(labelled.ids)), labelled.labels
    single = Estimate(*[math.nan] * 3)
    per_class = {}
    if predictions.kind == "regression":
        held: NDArray[Any] = (members[:, 0] <= labels) & (labels <= members[:, 1])
        size = members[:, 1] - members[:, 0]
    elif predictions.kind == "single-label":
        held, size = members[rows, labels], members.sum(1)
        single = _share(size == 1, units)
        for label, name in enumerate(labelled.classes):
            per_class[name] = _share(held[labels == label], units[labels == label])
    else:
        known = labelled.known
        each = np.take_along_axis(members, np.nan_to_num(labels).astype(int)[..., None], 2)[..., 0]
        held, size = _mean_of_known(each, known), _mean_of_known(members.sum(2), known)
        single = _share(_mean_of_known(members.sum(2) == 1, known), units)
        for label, name in enumerate(labelled.classes):
            per_class[name] = _share(each[known[:, label], label], units[known[:, label]])
    width = _mean_size(labelled, size.astype(np.float64), units, resamples, seed)
    return Coverage(sets.coverage, sets.images, sets.units, _share(held, units), single, width, per_class)


def _mean_of_known(values: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean (N,) over the labels (N, C) that are known."""
    return np.asarray((values * known).sum(1) / known.sum(1))


def _share(values: NDArray[Any], units: NDArray[np.str_]) -> Estimate:
    """Mean over units of the mean of values in [0, 1], with its Clopper-Pearson interval; NaN of none."""
    from scipy.special import betaincinv  # SciPy takes half a second

    names, of = np.unique(units, return_inverse=True)
    n = len(names)
    if not n:
        return Estimate(*[math.nan] * 3)
    k = min(float((np.bincount(of, values) / np.bincount(of)).sum()), n)
    low = float(betaincinv(k, n - k + 1, 0.025)) if k > 0 else 0.0
    high = float(betaincinv(k + 1, n - k, 0.975)) if k < n else 1.0
    return Estimate(k / n, low, high)


def _mean_size(
    labelled: Predictions, size: NDArray[np.float64], units: NDArray[np.str_], resamples: int, seed: int
) -> Estimate:
    _, of, counts = np.unique(units, return_inverse=True, return_counts=True)
    shares = 1 / counts[of]
    drawn = [weights @ (shares * size) / (weights @ shares) for weights in resampled_weights(labelled, resamples, seed)]
    return bounded(float(shares @ size / shares.sum()), np.concatenate(drawn))
