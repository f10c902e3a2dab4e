"""What a reader of an evaluation must know beside its numbers."""

from __future__ import annotations

from collections.abc import Mapping

from fpt_lightning.evaluation.decisions import DEFAULT_THRESHOLD
from fpt_lightning.evaluation.estimates import Estimate, number
from fpt_lightning.evaluation.predictions import Predictions

FEW = 10


def collect_notes(
    predictions: Predictions,
    labelled: Predictions,
    thresholds: Mapping[str, float] | None,
    positives: Mapping[str, int],
    negatives: Mapping[str, int],
    estimates: Mapping[tuple[str, str], Estimate],
) -> list[str]:
    """All notes on an evaluation, a sentence or two each.

    Args:
        predictions: what was to be evaluated.
        labelled: those of it that have a label.
        thresholds: as given, by class.
        positives: by class, how many images it has.
        negatives: by class, how many images it does not have.
        estimates: by class (empty of all) and metric.
    """
    return [
        *_sample_notes(labelled, len(predictions.ids) - len(labelled.ids)),
        *_class_notes(positives, negatives, estimates),
        *_threshold_notes(predictions, thresholds),
        *_calibration_notes(estimates.get(("", "calibration_error"))),
    ]


def _sample_notes(labelled: Predictions, unlabelled: int) -> list[str]:
    notes = [f"{unlabelled:,} images without a label are left out."] if unlabelled else []
    alone = sum(not group for group in labelled.groups) if any(labelled.groups) else None
    if alone is None:
        notes.append("No groups (such as patients) are known: the intervals assume that the images are independent.")
    elif alone:
        notes.append(f"{alone:,} images have no group: each counts as its own.")
    units = labelled.group_count or len(labelled.ids)
    if units < FEW:
        notes.append(f"Only {units} {'images' if alone is None else 'groups'} are resampled: the intervals say little.")
    return notes


def _class_notes(
    positives: Mapping[str, int], negatives: Mapping[str, int], estimates: Mapping[tuple[str, str], Estimate]
) -> list[str]:
    notes = []
    unknown = [name for name in positives if not positives[name] and not negatives[name]]
    absent = [name for name in positives if not positives[name] and name not in unknown]
    alone = [name for name in positives if positives[name] and not negatives[name]]
    few = [f"{name} ({count})" for name, count in positives.items() if 0 < count < FEW]
    inverted = [
        f"{name} ({number(estimate.value)})"
        for (name, metric), estimate in estimates.items()
        if name and metric == "auc" and estimate.value < 0.5
    ]
    if unknown:
        notes.append(f"Labels of which nothing is known, left out of the macro means: {', '.join(unknown)}.")
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
