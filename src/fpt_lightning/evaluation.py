"""Scores of predictions with bootstrap intervals, decision thresholds, a temperature, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, log_softmax, logit, softmax

from fpt_lightning.errors import ConfigurationError, DataError
from fpt_lightning.files import align
from fpt_lightning.manifest import Kind
from fpt_lightning.metrics import counted_auc, mean_of_known, resampled_counts
from fpt_lightning.predictions import Predictions

CALIBRATION_BINS = 15
FEW = 10
DEFAULT_THRESHOLD = 0.5

_LABELS = {
    "auc": "AUC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "kappa": "quadratic kappa",
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

_CHUNK = 2**21  # resampled weights held at once: 16 MiB, and several times that in passing
SMALLEST_PROBABILITY = 5e-7
"""Half of the last decimal of a predictions file: logits are of probabilities from here on."""
_TEMPERATURES = (0.05, 20.0)

Values = dict[tuple[str, str], NDArray[np.float64]]  # of R resamples, by class (empty of all) and metric


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval; NaN where there is none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]" if self.value == self.value else "-"


@dataclass(frozen=True)
class Evaluation:
    """What predictions are worth.

    Attributes:
        kind: see ``Predictions``.
        images: how many have a label.
        unlabelled: how many were left out, having none.
        groups: how many groups the images are of; None where none is known.
        resamples: of the bootstrap.
        specificity: at which a sensitivity is given.
        thresholds: by class, from which score on it was decided for; a single-label class that is not there was
            decided for where it was the most probable.
        positives: by class, how many images it has.
        negatives: by class, how many images it does not have; unknown ones are neither.
        overall: by metric.
        per_class: by class and metric.
        notes: what a reader must know.
    """

    kind: Kind
    images: int
    unlabelled: int
    groups: int | None
    resamples: int
    specificity: float
    thresholds: dict[str, float]
    positives: dict[str, int]
    negatives: dict[str, int]
    overall: dict[str, Estimate]
    per_class: dict[str, dict[str, Estimate]]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None there."""
        plain: dict[str, Any] = without_nan(asdict(self))
        return plain

    def basis(self) -> str:
        """What the numbers rest on, in a sentence."""
        sample = f"{self.images:,} images" + ("" if self.groups is None else f" of {self.groups:,} groups")
        unit = "images" if self.groups is None else "groups"
        return f"{sample}; 95% intervals from {self.resamples:,} bootstrap resamples of {unit}."

    def table(self) -> str:
        """For people: the metrics, the classes, the notes."""
        parts = [
            self.basis(),
            align([[label(name, self.specificity), str(value)] for name, value in self.overall.items()]),
        ]
        if self.per_class:
            metrics = list(next(iter(self.per_class.values())))
            rows = [["class", "positives", *(label(metric, self.specificity) for metric in metrics)]]
            rows += [
                [name, f"{self.positives[name]:,}", *(str(values[metric]) for metric in metrics)]
                for name, values in self.per_class.items()
            ]
            parts.append(align(rows))
        if self.thresholds:
            listed = ", ".join(f"{name} {number(value)}" for name, value in self.thresholds.items())
            parts.append(f"Thresholds: {listed}.")
        return "\n\n".join([*parts, *self.notes])


@dataclass(frozen=True)
class Difference:
    """A metric of two sets of predictions: the second's minus the first's, its 95% interval and two-sided p."""

    first: float
    second: float
    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """Two sets of predictions of the same images.

    Attributes:
        images: how many have a label.
        groups: how many groups they are of; None where none is known.
        resamples: of the paired bootstrap.
        specificity: at which a sensitivity is given.
        differences: by metric.
    """

    images: int
    groups: int | None
    resamples: int
    specificity: float
    differences: dict[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None there."""
        plain: dict[str, Any] = without_nan(asdict(self))
        return plain

    def table(self) -> str:
        """For people, a row a metric."""
        rows = [["metric", "first", "second", "difference", "95% interval", "p"]]
        for metric, d in self.differences.items():
            bounds = f"[{number(d.low, '+')}, {number(d.high, '+')}]"
            values = [number(d.first), number(d.second), number(d.value, "+"), bounds, f"{d.p:.4f}"]
            rows.append([label(metric, self.specificity), *values])
        unit = "images" if self.groups is None else f"groups ({self.groups:,})"
        return (
            f"{self.images:,} images; second minus first; {self.resamples:,} paired bootstrap resamples of {unit}.\n\n"
            + align(rows)
        )


def evaluate(
    predictions: Predictions,
    thresholds: Mapping[str, float] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    specificity: float = 0.9,
) -> Evaluation:
    """Score predictions, each number with its 95% percentile bootstrap interval.

    Whole groups are resampled where they are known; an image without one is its own group. A class that has no AUC,
    for want of an image of it or of any other, is left out of the macro means, and so in each resample.

    - Single-label: macro AUC and average precision (one-vs-rest); accuracy, balanced accuracy, macro F1 (of the classes
      that have an image) and quadratic-weighted kappa (of classes in their order) of the most probable class; Brier
      score, the sum over the classes of squared differences, from 0 to 2; calibration error of the top probability.
    - Multi-label: of each class where its label is known, and the mean over the classes; the Brier score is one class's
      squared difference, from 0 to 1, and the calibration error that of the class's probability.
    - Regression: mean absolute and root mean squared error, R², Pearson and Spearman correlation.

    Each class has AUC, average precision, sensitivity and specificity of the decision for it, and the largest
    sensitivity of all thresholds that keep ``specificity``. The calibration error is the expected one (ECE; Guo et al.,
    ICML 2017) over 15 bins of equal width; resampling adds noise to its bins, so that its interval lies high.

    Args:
        predictions: unlabelled ones are left out.
        thresholds: by class, from which score on the class is decided for. A class that is not named is decided for
            where it is the most probable (single-label), or from 0.5 on (multi-label).
        resamples: of the bootstrap.
        seed: of the bootstrap.
        specificity: to keep.

    Raises:
        ConfigurationError: a threshold of no class, or a number out of its range.
        DataError: no labelled image.
    """
    _check_numbers(resamples, specificity)
    used = _checked_thresholds(predictions, thresholds or {})
    labelled = _labelled(predictions)
    ones = np.ones((1, len(labelled.ids)))
    values = _measure(labelled, used, specificity, ones)
    chunks = [
        _measure(labelled, used, specificity, weights) for weights in resampled_weights(labelled, resamples, seed)
    ]
    estimates = {
        key: _estimate(value[0], np.concatenate([chunk[key] for chunk in chunks])) for key, value in values.items()
    }
    positives, negatives = _class_counts(labelled)
    unlabelled = len(predictions.ids) - len(labelled.ids)
    return Evaluation(
        kind=predictions.kind,
        images=len(labelled.ids),
        unlabelled=unlabelled,
        groups=_group_count(labelled),
        resamples=resamples,
        specificity=specificity,
        thresholds=used,
        positives=positives,
        negatives=negatives,
        overall={metric: estimate for (name, metric), estimate in estimates.items() if not name},
        per_class={
            name: {metric: estimate for (of, metric), estimate in estimates.items() if of == name}
            for name in predictions.classes
        },
        notes=[
            *_sample_notes(labelled, unlabelled),
            *_class_notes(positives, negatives, estimates),
            *_threshold_notes(predictions, thresholds),
            *_calibration_notes(estimates.get(("", "calibration_error"))),
        ],
    )


def compare(
    first: Predictions, second: Predictions, *, resamples: int = 2000, seed: int = 0, specificity: float = 0.9
) -> Comparison:
    """Compare two sets of predictions of the same images by a paired bootstrap, metric by metric.

    The metrics are the overall ones of ``evaluate`` without thresholds; groups are those of ``first``.

    Args:
        first: the reference.
        second: what is held against it.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        specificity: at which the sensitivity of multi-label predictions is compared.

    Raises:
        ConfigurationError: a number out of its range.
        DataError: other images, classes or labels in ``second``, or no labelled image.
    """
    _check_numbers(resamples, specificity)
    second = _matched(first, second)
    pair, thresholds = (_labelled(first), _labelled(second)), _checked_thresholds(first, {})

    def both(weights: NDArray[np.float64]) -> list[Values]:
        return [_measure(each, thresholds, specificity, weights, per_class=False) for each in pair]

    before, after = both(np.ones((1, len(pair[0].ids))))
    chunks = [both(weights) for weights in resampled_weights(pair[0], resamples, seed)]
    differences = {}
    for key in before:
        resampled = np.concatenate([there[key] - here[key] for here, there in chunks])
        values = float(before[key][0]), float(after[key][0])
        differences[key[1]] = Difference(*values, values[1] - values[0], **interval(resampled))
    return Comparison(len(pair[0].ids), _group_count(pair[0]), resamples, specificity, differences)


def fit_thresholds(predictions: Predictions, criterion: Literal["youden", "f1"] = "youden") -> dict[str, float]:
    """The decision threshold of each class that does best on predictions of validation images.

    Args:
        predictions: of classes, labelled.
        criterion: ``youden`` for the largest sensitivity plus specificity (Youden, Cancer 1950), ``f1`` for the largest
            F1.

    Returns:
        By class, the score midway between the best one and the next below. A class without a positive or without a
        negative image has none.

    Raises:
        ConfigurationError: another criterion, or regression.
        DataError: no labelled image.
    """
    if predictions.kind == "regression" or criterion not in ("youden", "f1"):
        raise ConfigurationError(
            f"a threshold for {predictions.kind} by {criterion!r}: choose youden or f1, for predictions of classes."
        )
    labelled = _labelled(predictions)
    fitted = {}
    for index, name in enumerate(labelled.classes):
        _, positive, scores = labelled.of_class(index)
        if not 0 < positive.sum() < len(positive):
            continue
        of_class, of_others = (counts[0] for counts in resampled_counts(scores, positive, np.ones((1, len(scores)))))
        true_positives, false_positives = (np.flip(np.flip(each).cumsum()) for each in (of_class, of_others))
        if criterion == "youden":
            quality = true_positives / of_class.sum() - false_positives / of_others.sum()
        else:
            quality = 2 * true_positives / (true_positives + false_positives + of_class.sum())
        distinct, best = np.unique(scores), int(quality.argmax())
        fitted[name] = float((distinct[best] + distinct[max(0, best - 1)]) / 2)
    return fitted


def decide(predictions: Predictions, thresholds: Mapping[str, float] | None = None) -> NDArray[np.bool_]:
    """Which classes each image is decided for: one, several or none of them, as each has its own threshold.

    Args:
        predictions: of classes.
        thresholds: by class, from which score on it is decided for. A class that is not named is decided for where it
            is the most probable one of single-label data, and from 0.5 on of multi-label data.

    Returns:
        (N, C).

    Raises:
        ConfigurationError: a threshold of no class, or regression.
    """
    if predictions.kind == "regression":
        raise ConfigurationError("a decision is for probabilities: these predictions are of regression.")
    used = _checked_thresholds(predictions, thresholds or {})
    decided: NDArray[np.bool_] = predictions.scores.argmax(1)[:, None] == np.arange(len(predictions.classes))
    for index, name in enumerate(predictions.classes):
        if name in used:
            decided[:, index] = predictions.scores[:, index] >= used[name]
    return decided


def fit_temperature(predictions: Predictions) -> float:
    """The temperature that makes the log loss of labelled validation images smallest (Guo et al., ICML 2017).

    Returns:
        T from 0.05 to 20; above 1 where the model was too sure of itself.

    Raises:
        ConfigurationError: regression.
        DataError: no labelled image.
    """
    labelled = _labelled(predictions)
    rows = np.arange(len(labelled.ids))
    logits = _logits(labelled)

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        if labelled.kind == "single-label":
            return -float(log_softmax(scaled, axis=1)[rows, labelled.labels].mean())
        return -float(log_expit(np.where(labelled.labels == 1, scaled, -scaled))[labelled.known].mean())

    low, high = map(math.log, _TEMPERATURES)
    return math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x)


def with_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """The predictions with ``softmax(log p / T)`` in place of p; of multi-label, ``sigmoid(logit p / T)``.

    Raises:
        ConfigurationError: regression, or a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ConfigurationError(f"temperature is {temperature}: give a number above 0, such as fit_temperature finds.")
    scaled = _logits(predictions) / temperature
    scores = softmax(scaled, axis=1) if predictions.kind == "single-label" else expit(scaled)
    return replace(predictions, scores=scores)


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
    _, groups = np.unique(_grouped(predictions) or predictions.ids, return_inverse=True)
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // len(groups))
    for start in range(0, count, step):
        yield resample(groups, min(step, count - start), generator).astype(np.float64)


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


def confusion_matrix(predictions: Predictions) -> NDArray[np.int64]:
    """Labelled single-label images by true class and most probable class: (C, C)."""
    labelled = _labelled(predictions)
    ones, top = np.ones((1, len(labelled.ids))), labelled.scores.argmax(1)
    (counts,) = _confusion(labelled.labels, top, len(labelled.classes), ones).astype(np.int64)
    return np.asarray(counts)


def label(metric: str, specificity: float) -> str:
    """What people call a metric; one of them names the specificity it is at."""
    return _LABELS[metric].format(specificity=specificity)


def number(value: float, sign: Literal["", "+"] = "") -> str:
    """A number for people: three decimals, fewer of large ones; a dash for NaN."""
    if value != value:
        return "-"
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign},.1f}"


# What is evaluated


def _labelled(predictions: Predictions) -> Predictions:
    labelled = predictions.labelled()
    if not labelled.ids:
        raise DataError(f"none of the {len(predictions.ids)} predictions has a label: there is nothing to score.")
    return labelled


def _check_numbers(resamples: int, specificity: float) -> None:
    if resamples < 1 or not 0 < specificity < 1:
        raise ConfigurationError(
            f"resamples is {resamples} and specificity {specificity}: give at least 1, and a share between 0 and 1."
        )


def _checked_thresholds(predictions: Predictions, given: Mapping[str, float]) -> dict[str, float]:
    for name, value in given.items():
        if name not in predictions.classes or not 0 <= value <= 1:
            raise ConfigurationError(
                f"the threshold of {name!r} is {value}: give a probability from 0 to 1 for one of the classes "
                f"({', '.join(predictions.classes) or 'none: this is regression'})."
            )
    default = dict.fromkeys(predictions.classes, DEFAULT_THRESHOLD) if predictions.kind == "multi-label" else {}
    return {**default, **given}


def _matched(first: Predictions, second: Predictions) -> Predictions:
    """``second`` in the order of ``first``."""
    if (first.kind, first.classes) != (second.kind, second.classes):
        described = [f"{each.kind} of {', '.join(each.classes) or 'no classes'}" for each in (first, second)]
        raise DataError(f"the predictions are of different things: {described[0]}, and {described[1]}.")
    place = {id: i for i, id in enumerate(second.ids)}
    differing = sorted({*first.ids} ^ {*second.ids})
    if not differing:
        second = second.take(np.array([place[id] for id in first.ids]))
        same = (first.labels == second.labels) | (~first.known & ~second.known)
        differing = [id for id, row in zip(first.ids, same, strict=True) if not row.all()]
        what = "with another label in each"
    else:
        what = "in one only"
    if differing:
        raise DataError(
            f"the predictions are not of the same images: {len(differing)} are {what}, such as "
            f"{', '.join(differing[:5])}."
        )
    return second


def _grouped(predictions: Predictions) -> list[str]:
    """The group of each image, its own where it has none; none at all if no group is known."""
    if not any(predictions.groups):
        return []
    return [group or f"\0{id}" for group, id in zip(predictions.groups, predictions.ids, strict=True)]


def _group_count(predictions: Predictions) -> int | None:
    return len({*_grouped(predictions)}) or None


def _class_counts(predictions: Predictions) -> tuple[dict[str, int], dict[str, int]]:
    found = {name: predictions.of_class(i)[1] for i, name in enumerate(predictions.classes)}
    positives = {name: int(positive.sum()) for name, positive in found.items()}
    return positives, {name: len(found[name]) - count for name, count in positives.items()}


def _estimate(value: float, resampled: NDArray[np.float64]) -> Estimate:
    bounds = interval(resampled)
    return Estimate(float(value), bounds["low"], bounds["high"]) if value == value else Estimate(*[math.nan] * 3)


def _logits(predictions: Predictions) -> NDArray[np.float64]:
    if predictions.kind == "regression":
        raise ConfigurationError("a temperature is for probabilities: these predictions are of regression.")
    clipped = predictions.scores.clip(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return np.log(clipped) if predictions.kind == "single-label" else np.asarray(logit(clipped))


# Metrics of R resamples, from weights (R, N)


def _measure(
    predictions: Predictions,
    thresholds: Mapping[str, float],
    specificity: float,
    weights: NDArray[np.float64],
    per_class: bool = True,
) -> Values:
    """Every metric of labelled predictions."""
    if predictions.kind == "regression":
        return {("", metric): value for metric, value in _regression(predictions, weights).items()}
    decided = decide(predictions, thresholds)
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
    cost = (np.arange(count)[:, None] - np.arange(count)) ** 2
    by_chance = np.einsum("ri,ij,rj->r", true, cost, predicted) / total
    squared = ((scores - (labels[:, None] == np.arange(count))) ** 2).sum(1)
    return {
        "accuracy": right.sum(1) / total,
        "balanced_accuracy": mean_of_known(list(_ratio(right, true).T)),
        "f1": mean_of_known(list(np.where(true > 0, _ratio(2 * right, true + predicted), np.nan).T)),
        "kappa": 1 - _ratio((confusion * cost).sum((1, 2)), by_chance),
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


# Notes


def _sample_notes(labelled: Predictions, unlabelled: int) -> list[str]:
    notes = [f"{unlabelled:,} images without a label are left out."] if unlabelled else []
    alone = sum(not group for group in labelled.groups) if any(labelled.groups) else None
    if alone is None:
        notes.append("No groups (such as patients) are known: the intervals assume that the images are independent.")
    elif alone:
        notes.append(f"{alone:,} images have no group: each counts as its own.")
    units = _group_count(labelled) or len(labelled.ids)
    if units < FEW:
        notes.append(f"Only {units} {'images' if alone is None else 'groups'} are resampled: the intervals say little.")
    return notes


def _class_notes(
    positives: Mapping[str, int], negatives: Mapping[str, int], estimates: Mapping[tuple[str, str], Estimate]
) -> list[str]:
    notes = []
    absent = [name for name in positives if not positives[name]]
    alone = [name for name in positives if positives[name] and not negatives[name]]
    few = [f"{name} ({count})" for name, count in positives.items() if 0 < count < FEW]
    inverted = [
        f"{name} ({number(estimate.value)})"
        for (name, metric), estimate in estimates.items()
        if name and metric == "auc" and estimate.value < 0.5
    ]
    if absent:
        notes.append(f"Classes without an image, left out of the macro means: {', '.join(absent)}.")
    if alone:
        notes.append(f"Classes that every image has, without an AUC: {', '.join(alone)}.")
    if few:
        notes.append(f"Classes with fewer than {FEW} images, whose numbers and intervals say little: {', '.join(few)}.")
    if inverted:
        notes.append(
            f"AUC below 0.5: {', '.join(inverted)}. The ranking is worse than chance: labels or class names may be "
            "inverted."
        )
    correlation = estimates.get(("", "pearson"))
    if correlation is not None and correlation.value < 0:
        notes.append(f"The correlation is {number(correlation.value)}, below 0: the labels may be inverted.")
    return notes


def _threshold_notes(predictions: Predictions, given: Mapping[str, float] | None) -> list[str]:
    missing = [name for name in predictions.classes if given and name not in given]
    rule = "where most probable" if predictions.kind == "single-label" else f"from {DEFAULT_THRESHOLD} on"
    return [f"Classes without a threshold of their own, decided for {rule}: {', '.join(missing)}."] if missing else []


def _calibration_notes(error: Estimate | None) -> list[str]:
    if error is None or not error.value < error.low:
        return []
    return ["Resampling adds noise to the bins of the calibration error: its interval lies above its value."]


def without_nan(value: Any) -> Any:
    """Plain dicts, lists and numbers for JSON, which has no NaN: None there."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
