"""Images that a model is most wrong about, as pictures in a report."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.evaluation.estimates import number
from fpt_lightning.evaluation.predictions import Predictions

_LISTED = 4  # classes with the highest probabilities


def largest_errors(labelled: Predictions, count: int) -> list[int]:
    """Rows of labelled images that are predicted wrongly, the most confident first.

    - Single-label: of another class than the most probable one, by its probability.
    - Multi-label: with a label more than 0.5 from its probability, by the largest difference.
    - Regression: any, by the difference.

    Args:
        labelled: predictions of which all have a label.
        count: of rows at most.
    """
    if labelled.kind == "single-label":
        errors = np.where(labelled.scores.argmax(1) != labelled.labels, labelled.scores.max(1), 0)
    elif labelled.kind == "multi-label":
        errors = _distances(labelled).max(1)
    else:
        errors = abs(labelled.scores - labelled.labels)
    order = np.argsort(-errors, kind="stable")[:count]
    return [int(row) for row in order if errors[row] > 0]


def gallery(labelled: Predictions, pictures: Mapping[str, bytes]) -> str:
    """HTML of pictures, each with the image's name, its label and what is predicted.

    Args:
        labelled: predictions of which all have a label.
        pictures: JPEG files by id, in order.
    """
    rows = {id: row for row, id in enumerate(labelled.ids)}
    figures = [
        f'<figure><img alt="" src="data:image/jpeg;base64,{base64.b64encode(picture).decode()}"><figcaption>'
        f"<b>{escape(id)}</b>{''.join(f'<span>{escape(line)}</span>' for line in _told(labelled, rows[id]))}"
        "</figcaption></figure>"
        for id, picture in pictures.items()
    ]
    return f'<div class="panels gallery">{"".join(figures)}</div>'


def _told(labelled: Predictions, row: int) -> list[str]:
    """The label of an image and what is predicted, a line each."""
    label: Any = labelled.labels[row]
    scores = labelled.scores[row]
    if labelled.kind == "regression":
        return [f"label: {number(label)}", f"predicted: {number(scores)}"]
    if labelled.kind == "single-label":
        order = np.argsort(-scores, kind="stable")
        listed = [int(i) for i in order if i in order[:_LISTED] or i == label]
        predicted = ", ".join(f"{labelled.classes[i]} ({number(scores[i])})" for i in listed)
        return [f"label: {labelled.classes[label]}", f"predicted: {predicted}"]
    distances = _distances(labelled)[row]
    wrong = [int(i) for i in np.argsort(-distances, kind="stable") if distances[i]]
    return [
        f"{labelled.classes[i]}: {'present' if label[i] else 'absent'}, predicted ({number(scores[i])})" for i in wrong
    ]


def _distances(labelled: Predictions) -> NDArray[np.float64]:
    """Of several labels, how far each (N, C) is from its probability; 0 where no more than 0.5, or unknown."""
    distances = np.nan_to_num(abs(labelled.scores - labelled.labels))
    return np.where(distances > 0.5, distances, 0.0)
