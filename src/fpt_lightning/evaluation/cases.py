"""Several images are one case, such as an exam or an eye: its prediction and its label, from those of its images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.data.manifest import UNLABELLED
from fpt_lightning.errors import ConfigurationError, DataError, a_few
from fpt_lightning.evaluation.estimates import label
from fpt_lightning.evaluation.measures import measure
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.scores import Evaluation, evaluate

Rule = Literal["mean", "maximum", "noisy-or"]
RULES: tuple[Rule, ...] = get_args(Rule)
"""How the probabilities of a case come of its images'."""

_SAID: Mapping[Rule, str] = {
    "mean": "the mean of its images'",
    "maximum": "the largest of its images'",
    "noisy-or": "noisy-or: that at least one image is positive, as if they were independent",
}


def by_case(predictions: Predictions, rule: Rule) -> Predictions:
    """Predictions of cases, from those of their images; an image without a case is one by itself.

    - Several labels: the probabilities of each label are combined. A case has every label that an image of it has.
    - Grades, and two classes, of which the second is the finding: the probabilities of each grade or a higher one are
      combined. A case has the highest label of its images.
    - Three or more classes without an order: the probabilities of each class are combined, and divided by their sum.
      All images of a case have one label.
    - A number: the mean. All images of a case have one label.

    Where the label of an image is unknown, that of its case is too; of several labels, those that no other image has.

    Args:
        predictions: of images.
        rule: how probabilities are combined.

    Returns:
        Of the cases in ascending order of their names, with their groups if these are more than the cases themselves.

    Raises:
        ConfigurationError: a rule that there is not, or that numbers do not have.
        DataError: cases of several groups or labels, or with the name of an image that has no case.
    """
    if rule not in RULES or (predictions.kind == "regression" and rule != "mean"):
        raise ConfigurationError(f"the rule of cases is {rule!r}: choose {', '.join(RULES)}; mean alone of regression.")
    own = predictions.cases or ("",) * len(predictions.ids)
    names = [case or id for case, id in zip(own, predictions.ids, strict=True)]
    if clash := sorted({*own} & {id for case, id in zip(own, predictions.ids, strict=True) if not case}):
        raise DataError(f"cases have the names of images that have no case: {a_few(clash)}. Give them others.")
    cases, of = np.unique(names, return_inverse=True)
    groups = _groups(predictions, names)
    return replace(
        predictions,
        unit="case",
        ids=tuple(map(str, cases)),
        labels=_labels(predictions, cases, of),
        scores=_combined(predictions, of, rule),
        groups=tuple(groups[name] for name in cases if groups),
        cases=(),
    )


def choose_rule(validation: Predictions) -> Rule:
    """The rule with the best AUC of labelled validation cases; of grades, the best quadratic-weighted kappa.

    Of equal ones the first of ``RULES`` is chosen: the mean, where no case has a label or the metric has no value.

    Raises:
        DataError: see ``by_case``.
    """
    if validation.kind == "regression" or not validation.known.any():
        return "mean"

    def quality(rule: Rule) -> float:
        labelled = by_case(validation, rule).labelled()
        if not labelled.ids:
            return -math.inf
        weights = np.ones((1, len(labelled.ids)))
        value = float(measure(labelled, {}, 0.5, weights, per_class=False)["", _chosen_by(validation)][0])
        return -math.inf if math.isnan(value) else value

    return max(RULES, key=quality)


def evaluate_cases(
    predictions: Predictions,
    rule: Rule,
    thresholds: Mapping[str, float] | None = None,
    *,
    chosen: bool,
    **settings: Any,
) -> Evaluation:
    """Score the cases of predictions, as ``fpt_lightning.evaluation.scores.evaluate`` scores images.

    Args:
        predictions: of images.
        rule: of ``by_case``.
        thresholds: by class, fitted to validation cases.
        chosen: whether ``choose_rule`` chose the rule, which a note says.
        **settings: of ``evaluate``.

    Raises:
        ConfigurationError: see ``evaluate``.
        DataError: see ``by_case`` and ``evaluate``.
    """
    evaluation = evaluate(by_case(predictions, rule), thresholds, **settings)
    why = f"which had the best {label(_chosen_by(predictions), 0)} of validation cases" if chosen else ""
    return replace(evaluation, notes=[*case_notes(predictions, rule, why), *evaluation.notes])


def case_notes(predictions: Predictions, rule: Rule, why: str) -> list[str]:
    """How the cases of predictions of images come of these.

    Args:
        predictions: of images.
        rule: of ``by_case``.
        why: it is this one; empty where nobody chose it.
    """
    what = "number" if predictions.kind == "regression" else "probability"
    notes = [f"The {what} of a case is {_SAID[rule]}{f', {why}' if why else ''}."]
    if mixed := _mixed(predictions):
        listed = ", ".join(predictions.classes)
        notes.append(f"{mixed:,} cases have images of several classes: the highest counts, of {listed} the last.")
    return notes


def _chosen_by(predictions: Predictions) -> str:
    return "quadratic_kappa" if predictions.ordered else "auc"


def _is_ranked(predictions: Predictions) -> bool:
    """Whether the label of a case is the highest of its images: of grades, and of two classes."""
    return predictions.kind == "single-label" and (predictions.ordered or len(predictions.classes) == 2)


def _mixed(predictions: Predictions) -> int:
    """How many cases have the highest of several labels."""
    if not _is_ranked(predictions):
        return 0
    pairs = {(case, label) for case, label in zip(predictions.cases, predictions.labels.tolist(), strict=False) if case}
    return sum(count > 1 for count in Counter(case for case, label in pairs if label != UNLABELLED).values())


def _groups(predictions: Predictions, names: Sequence[str]) -> dict[str, str]:
    """The group of each case where any is more than the case itself."""
    groups = dict(zip(names, predictions.groups, strict=False))
    torn = sorted({name for name, group in zip(names, predictions.groups, strict=False) if groups[name] != group})
    if torn:
        raise DataError(f"{len(torn)} cases have images of several groups: {a_few(torn)}. Give each a name of its own.")
    return groups if any(group not in ("", name) for name, group in groups.items()) else {}


def _labels(predictions: Predictions, cases: NDArray[np.str_], of: NDArray[np.int64]) -> NDArray[Any]:
    lowest, highest = _extremes(predictions.labels, of)
    if predictions.kind == "multi-label":
        return np.where(_extremes(np.nan_to_num(predictions.labels), of)[1] == 1, 1.0, highest)
    known = lowest != UNLABELLED if predictions.kind == "single-label" else ~np.isnan(lowest)
    unlike = cases[known & (lowest < highest)]
    if len(unlike) and not _is_ranked(predictions):
        raise DataError(
            f"{len(unlike)} cases have images of several labels: {a_few(list(unlike))}. Which one counts is known of "
            "grades (the column grade), of two classes and of several labels an image alone."
        )
    return np.where(known, highest, UNLABELLED) if predictions.kind == "single-label" else highest


def _extremes(labels: NDArray[Any], of: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The lowest and the highest label of each case's images; NaN where any is."""
    lowest = np.empty((of.max() + 1, *labels.shape[1:]), labels.dtype)
    lowest[of] = labels  # of one of them
    highest = lowest.copy()
    with np.errstate(invalid="ignore"):  # NaN
        np.minimum.at(lowest, of, labels)
        np.maximum.at(highest, of, labels)
    return lowest, highest


def _combined(predictions: Predictions, of: NDArray[np.int64], rule: Rule) -> NDArray[np.float64]:
    scores = predictions.scores
    if rule == "mean":
        counts, total = np.bincount(of), np.zeros((of.max() + 1, *scores.shape[1:]))
        np.add.at(total, of, scores)
        return total / counts.reshape(-1, *[1] * (scores.ndim - 1))
    if _is_ranked(predictions):
        at_least = _joined(scores[:, :0:-1].cumsum(1)[:, ::-1].clip(0, 1), of, rule)  # each class but the first
        at_least = np.pad(at_least, ((0, 0), (1, 1)), constant_values=((0, 0), (1, 0)))
        return (at_least[:, :-1] - at_least[:, 1:]).clip(0)
    joined = _joined(scores, of, rule)
    return joined if predictions.kind == "multi-label" else joined / joined.sum(1, keepdims=True)


def _joined(scores: NDArray[np.float64], of: NDArray[np.int64], rule: Rule) -> NDArray[np.float64]:
    """Probabilities of cases from those of their images, column by column."""
    joined = np.zeros((of.max() + 1, scores.shape[1]))
    if rule == "maximum":
        np.maximum.at(joined, of, scores)
        return joined
    with np.errstate(divide="ignore"):  # of a probability of 1
        np.add.at(joined, of, np.log1p(-scores))
    return -np.expm1(joined)
