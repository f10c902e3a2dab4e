"""Probabilities that come true: a temperature, fitted to validation images (Guo et al., ICML 2017)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, log_softmax, logit, softmax

from fpt_lightning.errors import ConfigurationError
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.resampling import require_labelled

SMALLEST_PROBABILITY = 5e-7
"""Logits are of probabilities from here on: nearer to 0 they would be of rounding."""
_TEMPERATURES = (0.05, 20.0)


def fit_temperature(predictions: Predictions) -> float:
    """The temperature that makes the log loss of labelled validation images smallest (Guo et al., ICML 2017).

    Returns:
        T from 0.05 to 20; above 1 where the model was too sure of itself.

    Raises:
        ConfigurationError: regression.
        DataError: no labelled image.
    """
    labelled = require_labelled(predictions)
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


def _logits(predictions: Predictions) -> NDArray[np.float64]:
    if predictions.kind == "regression":
        raise ConfigurationError("a temperature is for probabilities: these predictions are of regression.")
    clipped = predictions.scores.clip(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return np.log(clipped) if predictions.kind == "single-label" else np.asarray(logit(clipped))
