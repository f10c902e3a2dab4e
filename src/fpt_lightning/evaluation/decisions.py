"""From probabilities to decisions, by thresholds that are fitted to validation images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.errors import ConfigurationError
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.resampling import require_labelled, resampled_counts

DEFAULT_THRESHOLD = 0.5


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
    labelled = require_labelled(predictions)
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
    used = checked_thresholds(predictions, thresholds or {})
    decided: NDArray[np.bool_] = predictions.scores.argmax(1)[:, None] == np.arange(len(predictions.classes))
    for index, name in enumerate(predictions.classes):
        if name in used:
            decided[:, index] = predictions.scores[:, index] >= used[name]
    return decided


def checked_thresholds(predictions: Predictions, given: Mapping[str, float]) -> dict[str, float]:
    """The thresholds that decide: those given, and 0.5 for the other classes of multi-label data.

    Raises:
        ConfigurationError: a threshold of no class, or that is no probability.
    """
    for name, value in given.items():
        if name not in predictions.classes or not 0 <= value <= 1:
            raise ConfigurationError(
                f"the threshold of {name!r} is {value}: give a probability from 0 to 1 for one of the classes "
                f"({', '.join(predictions.classes) or 'none: this is regression'})."
            )
    default = dict.fromkeys(predictions.classes, DEFAULT_THRESHOLD) if predictions.kind == "multi-label" else {}
    return {**default, **given}
