"""Probabilities that come true: a temperature and a bias of each class, fitted to validation images.

Temperature scaling (Guo et al., ICML 2017) with biases (bias-corrected, Alexandari et al., ICML 2020). Of two classes
it is Platt's sigmoid (1999), whose targets it has too: an image counts as a little of the other classes, the more the
fewer there are of its own, so that few images do not make a model certain; and a bias is 0 until images say otherwise.
Not in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit, log_softmax, logit, softmax

from fpt_lightning.errors import ConfigurationError
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.resampling import require_labelled

SMALLEST_PROBABILITY = 1e-12
"""Of one class of several: logarithms are of probabilities from here on, which sets how far images may be apart."""
SMALLEST_OF_A_LABEL = 5e-7
"""Of one label, likewise: nearer to 0, and to 1, logits would be of rounding."""
_SLOPES = (0.05, 20.0)  # of a temperature from 20 to 0.05
_PRIOR = 0.3  # standard deviation of a bias before any image is seen; some 50 images weigh as much


@dataclass(frozen=True)
class Calibration:
    """Makes ``softmax(log p / T + b)`` of probabilities p; of several labels, ``sigmoid(logit p / T + b)`` of each.

    Attributes:
        temperature: T; above 1 where the model was too sure of itself.
        biases: b of each class, whose sum is 0 but of several labels; empty where there are none.

    Raises:
        ConfigurationError: a temperature that is not above 0.
    """

    temperature: float = 1.0
    biases: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigurationError(f"temperature is {self.temperature}: give a number above 0, such as 1.")

    def __str__(self) -> str:
        """Such as ``temperature 3.4, biases +0.21, -0.21``."""
        biases = f", biases {', '.join(f'{bias:+.3g}' for bias in self.biases)}" if self.biases else ""
        return f"temperature {self.temperature:.4g}{biases}"


def fit_calibration(predictions: Predictions, weights: Sequence[float] | None = None) -> Calibration:
    """What makes the log loss of labelled validation images smallest, by smoothed targets and a prior of the biases.

    An image of a class of which there are n is ``(n + 1) / (n + 2)`` of it, and the rest of the others; so is a label
    that is there, or not there, in n images. Biases are drawn to 0 by a normal prior.

    Args:
        predictions: of at least one labelled image.
        weights: of the classes' images, or of several labels' positive ones, as in training: the probabilities then
            remain those of images that are as frequent.

    Returns:
        The calibration, with a temperature from 0.05 to 20.

    Raises:
        ConfigurationError: regression.
        DataError: no labelled image.
    """
    labelled = require_labelled(predictions)
    logits, single = _logits(labelled), labelled.kind == "single-label"
    targets, counted = (_of_classes if single else _of_labels)(labelled, weights)

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scaled = parameters[0] * logits + parameters[1:]
        if single:
            losses, scores = -(targets * log_softmax(scaled, 1)), softmax(scaled, 1)
        else:
            losses, scores = -(targets * log_expit(scaled) + (1 - targets) * log_expit(-scaled)), expit(scaled)
        slopes, prior = counted * (scores - targets), parameters[1:] / _PRIOR**2
        total = (counted * losses).sum() + prior @ parameters[1:] / 2
        return float(total) / len(logits), np.array([(slopes * logits).sum(), *slopes.sum(0) + prior]) / len(logits)

    classes = logits.shape[1]
    bounds = [_SLOPES, *[(None, None)] * classes]
    slope, *biases = minimize(loss, np.r_[1.0, np.zeros(classes)], method="L-BFGS-B", jac=True, bounds=bounds).x
    return Calibration(1 / float(slope), tuple(map(float, biases)))


def calibrated(predictions: Predictions, calibration: Calibration) -> Predictions:
    """The predictions with calibrated probabilities.

    Raises:
        ConfigurationError: regression.
    """
    scaled = _logits(predictions) / calibration.temperature
    if calibration.biases:
        scaled += calibration.biases
    scores = softmax(scaled, axis=1) if predictions.kind == "single-label" else expit(scaled)
    return replace(predictions, scores=scores)


def _of_classes(predictions: Predictions, weights: Sequence[float] | None) -> tuple[NDArray[np.float64], ...]:
    """Targets (N, C), and what each image counts (N, 1), in the mean 1."""
    labels, classes = predictions.labels, len(predictions.classes)
    others = 1 / (np.bincount(labels, minlength=classes)[labels] + 2)
    targets = np.tile(others[:, None] / max(classes - 1, 1), classes)
    targets[np.arange(len(labels)), labels] = 1 - others
    counted = np.ones(len(labels)) if weights is None else np.asarray(weights, float)[labels]
    return targets, (counted / counted.mean())[:, None]


def _of_labels(predictions: Predictions, weights: Sequence[float] | None) -> tuple[NDArray[np.float64], ...]:
    """Targets (N, C), and what each counts (N, C): 0 where it is not known, in the mean of the others 1."""
    there, absent = predictions.labels == 1, predictions.labels == 0
    targets = np.where(there, (there.sum(0) + 1) / (there.sum(0) + 2), 1 / (absent.sum(0) + 2))
    counted = np.where(there, 1.0 if weights is None else np.asarray(weights, float), absent.astype(float))
    return targets, counted * predictions.known.sum() / counted.sum()


def _logits(predictions: Predictions) -> NDArray[np.float64]:
    if predictions.kind == "regression":
        raise ConfigurationError("calibration is of probabilities: these predictions are of regression.")
    if predictions.kind == "single-label":
        return np.asarray(np.log(predictions.scores.clip(min=SMALLEST_PROBABILITY)))
    return np.asarray(logit(predictions.scores.clip(SMALLEST_OF_A_LABEL, 1 - SMALLEST_OF_A_LABEL)))
