"""What a reader of an evaluation must know beside its numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.evaluation.decisions import DEFAULT_THRESHOLD, decide
from fpt_lightning.evaluation.estimates import Estimate, number
from fpt_lightning.evaluation.predictions import Predictions, Unit

FEW = 10


def collect_notes(
    predictions: Predictions,
    labelled: Predictions,
    thresholds: Mapping[str, float] | None,
    decided: NDArray[np.bool_] | None,
    positives: Mapping[str, int],
    negatives: Mapping[str, int],
    estimates: Mapping[tuple[str, str], Estimate],
) -> list[str]:
    """All notes on an evaluation, a sentence or two each.

    Args:
        predictions: what was to be evaluated.
        labelled: those of it that have a label.
        thresholds: as given, by class.
        decided: which classes each labelled image is decided for (N, C); None of regression.
        positives: by class, how many images it has.
        negatives: by class, how many images it does not have.
        estimates: by class (empty of all) and metric.
    """
    return [
        *_sample_notes(labelled, len(predictions.ids) - len(labelled.ids)),
        *_class_notes(labelled.unit, positives, negatives, estimates),
        *([] if decided is None else _threshold_notes(labelled, thresholds, decided)),
    ]


def validation_notes(validation: float | None, test: Estimate | None) -> list[str]:
    """A note where the AUC of validation images lies outside the interval of that of the test images."""
    if validation is None or test is None or not (validation < test.low or validation > test.high):  # nor NaN
        return []
    why = (
        "the epoch was chosen by its validation, which flatters, or the test images are harder"
        if validation > test.high
        else "the test images may be easier, or the same patients as in training"
    )
    where = "above" if validation > test.high else "below"
    return [f"The validation AUC, {number(validation)}, is {where} the interval of the test AUC, {test}: {why}."]


def _sample_notes(labelled: Predictions, unlabelled: int) -> list[str]:
    many = f"{labelled.unit}s"
    notes = [f"{unlabelled:,} {many} without a label are left out."] if unlabelled else []
    alone = sum(not name for name in labelled.wholes) if labelled.wholes else None
    if alone is None:
        known = "groups (such as patients)" if labelled.unit == "image" else "groups other than the cases themselves"
        notes.append(f"No {known} are known: the intervals assume that the {many} are independent.")
    elif alone:
        notes.append(f"{alone:,} {many} have no group: each counts as its own.")
    units = labelled.group_count or len(labelled.ids)
    if units < FEW:
        notes.append(f"Only {units} {many if alone is None else 'groups'} are resampled: the intervals say little.")
    return notes


def _class_notes(
    unit: Unit,
    positives: Mapping[str, int],
    negatives: Mapping[str, int],
    estimates: Mapping[tuple[str, str], Estimate],
) -> list[str]:
    notes = []
    unknown = [name for name in positives if not positives[name] and not negatives[name]]
    absent = [name for name in positives if not positives[name] and name not in unknown]
    alone = [name for name in positives if positives[name] and not negatives[name]]
    few = [f"{name} ({count})" for name, count in positives.items() if 0 < count < FEW]
    aucs = {name: estimate for (name, metric), estimate in estimates.items() if name and metric == "auc"}
    inverted = [f"{name} ({estimate})" for name, estimate in aucs.items() if estimate.high < 0.5]
    unclear = [f"{name} ({estimate})" for name, estimate in aucs.items() if estimate.low <= 0.5 <= estimate.high]
    if unknown:
        notes.append(f"Labels of which nothing is known, left out of the macro means: {', '.join(unknown)}.")
    if absent:
        one = {"image": "an image", "case": "a case"}[unit]
        notes.append(f"Classes without {one}, left out of the macro means: {', '.join(absent)}.")
    if alone:
        notes.append(f"Classes that every {unit} has, without an AUC: {', '.join(alone)}.")
    if few:
        notes.append(
            f"Classes with fewer than {FEW} {unit}s, whose numbers and intervals say little: {', '.join(few)}."
        )
    if inverted:
        notes.append(
            f"AUC below 0.5: {', '.join(inverted)}. The ranking is worse than chance: labels or class names may be "
            "inverted."
        )
    if unclear:
        notes.append(f"These {unit}s do not tell the ranking from chance, an AUC of 0.5: {', '.join(unclear)}.")
    correlation = estimates.get(("", "pearson"))
    if correlation is not None and correlation.high < 0:
        notes.append(f"The correlation is {correlation}, below 0: the labels may be inverted.")
    return notes


def _threshold_notes(
    predictions: Predictions, given: Mapping[str, float] | None, decided: NDArray[np.bool_]
) -> list[str]:
    missing = [name for name in predictions.classes if given and name not in given]
    single = predictions.kind == "single-label"
    rule = "where most probable" if single else f"from {DEFAULT_THRESHOLD} on"
    notes = [f"Classes without a threshold of their own, decided for {rule}: {', '.join(missing)}."] if missing else []
    otherwise = int((decided != decide(predictions)).any(1).sum()) if single and given else 0
    if otherwise:
        notes.append(
            f"{otherwise:,} of {len(predictions.ids):,} {predictions.unit}s are decided otherwise than for their most "
            "probable class, as classes have thresholds: sensitivity and specificity are of the decisions; accuracy, "
            "F1, kappa and the confusion matrix are of the most probable class."
        )
    return notes
