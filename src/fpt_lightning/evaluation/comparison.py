"""Two models on the same images: differences by a paired bootstrap."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.errors import DataError
from fpt_lightning.evaluation.decisions import checked_thresholds
from fpt_lightning.evaluation.estimates import label, number
from fpt_lightning.evaluation.measures import Values, measure
from fpt_lightning.evaluation.predictions import Predictions, Unit
from fpt_lightning.evaluation.resampling import (
    check_numbers,
    interval,
    require_labelled,
    resampled_values,
    resampled_weights,
)
from fpt_lightning.files import align, without_nan


@dataclass(frozen=True)
class Difference:
    """A metric of two sets of predictions: the second's minus the first's, its 95% interval and two-sided p.

    Interval and p are NaN where there are none, as of the calibration error.
    """

    first: float
    second: float
    value: float
    low: float
    high: float
    p: float

    @property
    def told_apart(self) -> bool:
        """Whether the interval, where there is one, leaves 0 out."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        bounds = f" [{number(self.low, '+')}, {number(self.high, '+')}]" if self.low == self.low else ""
        return f"{number(self.value, '+')}{bounds}"


@dataclass(frozen=True)
class Comparison:
    """Two sets of predictions of the same images.

    Attributes:
        unit: what is counted; of ``case``, the images are cases.
        images: how many have a label.
        groups: how many groups they are of; None where none is known.
        resamples: of the paired bootstrap.
        specificity: at which a sensitivity is given.
        differences: by metric.
    """

    unit: Unit
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
            bounded = d.low == d.low
            bounds = [f"[{number(d.low, '+')}, {number(d.high, '+')}]", f"{d.p:.4f}"] if bounded else ["-", "-"]
            values = [number(d.first), number(d.second), number(d.value, "+"), *bounds]
            rows.append([label(metric, self.specificity), *values])
        unit = f"{self.unit}s" if self.groups is None else f"groups ({self.groups:,})"
        return (
            f"{self.images:,} {self.unit}s; second minus first; {self.resamples:,} paired bootstrap resamples of "
            f"{unit}.\n\n{align(rows)}"
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
    check_numbers(resamples, specificity)
    second = matched(first, second)
    pair, thresholds = (require_labelled(first), require_labelled(second)), checked_thresholds(first, {})

    def both(weights: NDArray[np.float64]) -> list[Values]:
        return [measure(each, thresholds, specificity, weights, per_class=False) for each in pair]

    before, after = both(np.ones((1, len(pair[0].ids))))
    drawn = (both(weights) for weights in resampled_weights(pair[0], resamples, seed))
    chunks = [{key: there[key] - here[key] for key in here} for here, there in drawn]
    differences = {}
    for key in before:
        values = float(before[key][0]), float(after[key][0])
        differences[key[1]] = Difference(*values, values[1] - values[0], **interval(resampled_values(chunks, key)))
    return Comparison(first.unit, len(pair[0].ids), pair[0].group_count, resamples, specificity, differences)


def matched(first: Predictions, second: Predictions) -> Predictions:
    """``second`` in the order of ``first``.

    Raises:
        DataError: other images, classes or labels.
    """
    if (first.kind, first.classes, first.ordered) != (second.kind, second.classes, second.ordered):
        described = [
            f"{each.kind} of {'the grades ' * each.ordered}{', '.join(each.classes) or 'no classes'}"
            for each in (first, second)
        ]
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
