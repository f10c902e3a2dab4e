"""Linear probes of the pooled features, each image's answer from a probe that saw no image of its group."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

PENALTY = 0.1
"""Of the squared weights of standardised features, beside the mean loss of an image."""
_STEPS, _ENOUGH = 100, 1e-6  # at most, and the relative gain of a step that ends them
_Floats = NDArray[np.float64]


def out_of_fold(
    features: NDArray[np.float32], classes: NDArray[np.int64], count: int, folds: NDArray[np.int64]
) -> _Floats:
    """Probabilities of a logistic regression that was fitted to the other folds.

    Args:
        features: (N, C).
        classes: (N,), from 0.
        count: K, how many classes.
        folds: (N,).

    Returns:
        (N, K); a class that the other folds lack has next to none, and all have as much where there is no other fold.
    """
    found = np.full((len(features), count), 1 / count)
    for fold in np.unique(folds) if np.ptp(folds) else ():
        fit, held = folds != fold, folds == fold
        known, unknown = _standardised(features, fit)
        found[held] = np.exp(log_softmax(unknown @ _logistic(known, classes[fit], count), axis=1))
    return found


def out_of_fold_numbers(features: NDArray[np.float32], numbers: _Floats, folds: NDArray[np.int64]) -> _Floats:
    """Numbers (N,) by a ridge regression that was fitted to the other folds, or their mean where there is none."""
    found = np.full(len(features), numbers.mean())
    for fold in np.unique(folds) if np.ptp(folds) else ():
        fit, held = folds != fold, folds == fold
        known, unknown = (each.astype(np.float64) for each in _standardised(features, fit))
        penalty = PENALTY * len(known) * np.eye(known.shape[1])
        penalty[-1, -1] = 0
        found[held] = unknown @ np.linalg.solve(known.T @ known + penalty, known.T @ numbers[fit])
    return found


def _standardised(
    features: NDArray[np.float32], fit: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Images that are fitted, and the others, by mean and deviation of the first, with a constant behind."""
    mean, deviation = features[fit].mean(0), np.maximum(features[fit].std(0), 1e-6)
    known, unknown = (
        np.pad((features[rows] - mean) / deviation, ((0, 0), (0, 1)), constant_values=1) for rows in (fit, ~fit)
    )
    return known, unknown


def _logistic(features: NDArray[np.float32], classes: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """Weights (C + 1, K) of the smallest mean loss and penalty."""
    rows, penalty = np.arange(len(features)), np.full((features.shape[1], 1), PENALTY)
    penalty[-1] = 0

    def loss(flat: _Floats) -> tuple[float, _Floats]:
        weights = flat.reshape(-1, count)
        logs = log_softmax(features @ weights.astype(np.float32), axis=1)
        errors = np.exp(logs)
        errors[rows, classes] -= 1
        gradient = (features.T @ errors).astype(np.float64) / len(features) + penalty * weights
        value = -float(logs[rows, classes].mean(dtype=np.float64)) + float((penalty * weights**2).sum()) / 2
        return value, gradient.ravel()

    start = np.zeros(features.shape[1] * count)
    fitted = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS, "ftol": _ENOUGH}).x
    return np.asarray(fitted.reshape(-1, count), np.float32)
