"""What predictions are worth: metrics with their bootstrap intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.data.manifest import Kind
from fpt_lightning.evaluation.conformal import Coverage, Sets, assess
from fpt_lightning.evaluation.decisions import checked_thresholds, decide
from fpt_lightning.evaluation.estimates import Estimate, label, number
from fpt_lightning.evaluation.measures import Values, measure
from fpt_lightning.evaluation.notes import collect_notes, validation_notes
from fpt_lightning.evaluation.predictions import Predictions, Unit
from fpt_lightning.evaluation.resampling import (
    bounded,
    check_numbers,
    require_labelled,
    resampled_values,
    resampled_weights,
)
from fpt_lightning.files import align, screen_width, without_nan


@dataclass(frozen=True)
class Evaluation:
    """What predictions are worth.

    Attributes:
        kind: see ``Predictions``.
        unit: what is counted; of ``case``, the images below are cases.
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
        coverage: of prediction sets; None where there are none.
    """

    kind: Kind
    unit: Unit
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
    coverage: Coverage | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None there."""
        plain: dict[str, Any] = without_nan(asdict(self))
        return plain

    def basis(self) -> str:
        """What the numbers rest on, in a sentence."""
        sample = f"{self.images:,} {self.unit}s" + ("" if self.groups is None else f" of {self.groups:,} groups")
        unit = f"{self.unit}s" if self.groups is None else "groups"
        return f"{sample}; 95% intervals from {self.resamples:,} bootstrap resamples of {unit}."

    def table(self) -> str:
        """For people, as wide as the terminal: the metrics, the classes, the notes."""
        return "\n\n".join([textwrap.fill(self.basis(), screen_width()), align(self.overall_rows()), *self.details()])

    def overall_rows(self) -> list[list[str]]:
        """Each metric of all images with its value, as they are shown."""
        return [[label(name, self.specificity), str(value)] for name, value in self.overall.items()]

    def details(self) -> list[str]:
        """Paragraphs as wide as the terminal: the classes, the thresholds, the prediction sets, the notes."""
        parts, width = [], screen_width()
        if self.per_class:
            metrics = list(next(iter(self.per_class.values())))
            rows = [["class", "positives", *(label(metric, self.specificity) for metric in metrics)]]
            rows += [
                [name, f"{self.positives[name]:,}", *(str(values[metric]) for metric in metrics)]
                for name, values in self.per_class.items()
            ]
            parts.append(align(rows, width))
        if self.thresholds:
            listed = ", ".join(f"{name} {number(value)}" for name, value in self.thresholds.items())
            parts.append(textwrap.fill(f"Thresholds: {listed}.", width))
        if self.coverage is not None:
            parts.append(textwrap.fill(str(self.coverage), width))
        return [*parts, *(textwrap.fill(note, width) for note in self.notes)]


def evaluate(
    predictions: Predictions,
    thresholds: Mapping[str, float] | None = None,
    *,
    decided: NDArray[np.bool_] | None = None,
    sets: Sets | None = None,
    resamples: int = 2000,
    seed: int = 0,
    specificity: float = 0.9,
    validation_auc: float | None = None,
) -> Evaluation:
    """Score predictions, each number but the calibration error with its 95% percentile bootstrap interval.

    Whole groups are resampled where they are known; an image without one is its own group. A class that has no AUC,
    for want of an image of it or of any other, is left out of the macro means, and so in each resample.

    - Single-label: macro AUC and average precision (one-vs-rest); accuracy, balanced accuracy, macro F1 (of the classes
      that have an image) and kappa (Cohen's without weights; of ordered classes, quadratic-weighted) of the most
      probable class; Brier score, the sum over the classes of squared differences, from 0 to 2; calibration error of
      the top probability.
    - Multi-label: of each class where its label is known, and the mean over the classes; the Brier score is one class's
      squared difference, from 0 to 1, and the calibration error that of the class's probability.
    - Regression: mean absolute and root mean squared error, R², Pearson and Spearman correlation.

    Each class has AUC, average precision, sensitivity and specificity of the decision for it, and the largest
    sensitivity of all thresholds that keep ``specificity``. The calibration error is the expected one (ECE; Guo et al.,
    ICML 2017) over 15 bins of equal width; it has no interval, as chance alone makes it larger than 0.

    Args:
        predictions: unlabelled ones are left out.
        thresholds: by class, from which score on the class is decided for. A class that is not named is decided for
            where it is the most probable (single-label), or from 0.5 on (multi-label).
        decided: which classes each image is decided for (N, C), where not all are by the same thresholds, which are
            then those that are shown.
        sets: prediction sets, whose coverage and size are given too.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        specificity: to keep.
        validation_auc: macro AUC of the same model on its validation images, which is held against the interval here.

    Raises:
        ConfigurationError: a threshold of no class, or a number out of its range.
        DataError: no labelled image.
    """
    check_numbers(resamples, specificity)
    used = checked_thresholds(predictions, thresholds or {})
    labelled = require_labelled(predictions)
    if predictions.kind != "regression":
        decided = decide(predictions, used) if decided is None else decided
        decided = decided[predictions.labelled_rows]

    def measured(weights: NDArray[np.float64]) -> Values:
        return measure(labelled, used, specificity, weights, decided=decided)

    values = measured(np.ones((1, len(labelled.ids))))
    chunks = [measured(weights) for weights in resampled_weights(labelled, resamples, seed)]
    estimates = {key: bounded(value[0], resampled_values(chunks, key)) for key, value in values.items()}
    positives, negatives = labelled.class_counts()
    return Evaluation(
        kind=predictions.kind,
        unit=predictions.unit,
        images=len(labelled.ids),
        unlabelled=len(predictions.ids) - len(labelled.ids),
        groups=labelled.group_count,
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
            *collect_notes(predictions, labelled, thresholds, decided, positives, negatives, estimates),
            *validation_notes(validation_auc, estimates.get(("", "auc"))),
        ],
        coverage=None if sets is None else assess(predictions, sets, resamples=resamples, seed=seed),
    )
