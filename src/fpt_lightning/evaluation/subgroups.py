"""How predictions do in subgroups, such as of sex or site: each one's metrics, and how far they are from the rest's."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.data.manifest import numbers_of
from fpt_lightning.data.tables import MISSING
from fpt_lightning.errors import DataError, a_few
from fpt_lightning.evaluation.comparison import Difference
from fpt_lightning.evaluation.decisions import checked_thresholds
from fpt_lightning.evaluation.estimates import Estimate, label
from fpt_lightning.evaluation.measures import Values, measure
from fpt_lightning.evaluation.notes import FEW
from fpt_lightning.evaluation.predictions import Predictions, Unit
from fpt_lightning.evaluation.resampling import (
    WITHOUT_INTERVAL,
    bounded,
    check_numbers,
    interval,
    require_labelled,
    resampled_values,
    resampled_weights,
)
from fpt_lightning.files import align, screen_width, without_nan

UNKNOWN = "unknown"
"""The subgroup of the images whose value is missing."""
MOST_VALUES = 10
"""Numbers of more different values are in quartiles."""

_BOTH = (True, True)
_RESTS_ON = {
    "auc": _BOTH,
    "average_precision": _BOTH,
    "sensitivity_at_specificity": _BOTH,
    "sensitivity": (True, False),
    "balanced_accuracy": (True, False),
    "f1": (True, False),
    "specificity": (False, True),
}
"""Whether a metric rests on the images with a class, and on those without; others rest on all images alike."""


@dataclass(frozen=True)
class SubgroupEstimate(Estimate):
    """A metric of a subgroup; NaN where too little stands behind it.

    Attributes:
        minus_rest: the subgroup's (second) minus that of all other images (first), NaN where either has none; None of
            the calibration error, which chance makes larger where images are few.
    """

    minus_rest: Difference | None


@dataclass(frozen=True)
class Subgroup:
    """The images of one value of a column.

    Attributes:
        images: how many have a label.
        groups: how many groups they are of; None where none is known.
        positives: by class, how many images it has.
        negatives: by class, how many images it does not have.
        overall: by metric.
        per_class: by class and metric.
    """

    images: int
    groups: int | None
    positives: dict[str, int]
    negatives: dict[str, int]
    overall: dict[str, SubgroupEstimate]
    per_class: dict[str, dict[str, SubgroupEstimate]]

    def of(self, name: str) -> dict[str, SubgroupEstimate]:
        """By metric, of a class; the overall ones of an empty name."""
        return self.per_class[name] if name else self.overall


@dataclass(frozen=True)
class Breakdown:
    """The subgroups of a column.

    Attributes:
        column: its name.
        unit: what is counted; of ``case``, the images of the subgroups are cases.
        specificity: at which a sensitivity is given.
        subgroups: by value, numbers in their order, ``UNKNOWN`` last.
        notes: what a reader must know.
    """

    column: str
    unit: Unit
    specificity: float
    subgroups: dict[str, Subgroup]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None there."""
        plain: dict[str, Any] = without_nan(asdict(self))
        return plain

    def table(self) -> str:
        """For people, as wide as the terminal: subgroups side by side, each metric over its difference to the rest."""
        own, width = list(self.subgroups.values()), screen_width()
        rows = [[self.column, *self.subgroups], [f"{self.unit}s", *(f"{each.images:,}" for each in own)]]
        if own[0].groups is not None:
            rows.append(["groups", *(f"{each.groups:,}" for each in own)])
        for name in own[0].positives:
            rows.append([f"{self.unit}s of {name}", *(f"{each.positives[name]:,}" for each in own)])
        for name in ("", *own[0].per_class):
            for metric in own[0].of(name):
                estimates = [each.of(name)[metric] for each in own]
                of_class = f", {name}" if name else ""
                rows.append([label(metric, self.specificity) + of_class, *map(str, estimates)])
                if metric not in WITHOUT_INTERVAL:
                    rows.append(["  minus the rest", *(str(each.minus_rest) for each in estimates)])
        return "\n\n".join([align(rows, width), *(textwrap.fill(note, width) for note in self.notes)])


def evaluate_subgroups(
    predictions: Predictions,
    columns: Mapping[str, Sequence[str]],
    thresholds: Mapping[str, float] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    specificity: float = 0.9,
) -> list[Breakdown]:
    """Score the subgroups of predictions, each number with its 95% interval, and their differences to the rest.

    Whole groups of all images are resampled, so that a patient with images in two subgroups is drawn with both or with
    neither; the metrics are those of ``fpt_lightning.evaluation.scores.evaluate``. A number has a value where at least
    ``FEW`` groups (or images) stand behind it: of the subgroup, and of the images with and without each class that it
    rests on. Means over the classes rest on all that the predictions have images of, so that subgroups do not differ by
    the classes that they lack.

    Args:
        predictions: unlabelled ones are left out.
        columns: by name, the value of each image as text. Numbers of more than ``MOST_VALUES`` values are in quartiles;
            the images whose value is missing are the subgroup ``UNKNOWN``.
        thresholds: by class, as for the whole.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        specificity: to keep.

    Raises:
        ConfigurationError: a threshold of no class, or a number out of its range.
        DataError: no labelled image, or a column of another length.
    """
    check_numbers(resamples, specificity)
    used, labelled = checked_thresholds(predictions, thresholds or {}), require_labelled(predictions)
    bootstrap = _Bootstrap(labelled, used, resamples, seed, specificity)
    breakdowns = []
    for column, values in columns.items():
        if len(values) != len(predictions.ids):
            raise DataError(f"the column {column!r} has {len(values)} values for {len(predictions.ids)} predictions.")
        value_of = dict(zip(predictions.ids, values, strict=True))
        parts = parts_of([value_of[id] for id in labelled.ids])
        subgroups = {name: bootstrap.subgroup(rows) for name, rows in parts.items()}
        breakdowns.append(Breakdown(column, labelled.unit, specificity, subgroups, _notes(labelled, parts, subgroups)))
    return breakdowns


# Which images are of a subgroup


def parts_of(values: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """The images (N,) of each subgroup, by its name, in the order in which they are shown.

    Args:
        values: of a column, an image each (``evaluate_subgroups``).
    """
    texts = [value.strip() for value in values]
    numbers = numbers_of(text for text in texts if text.lower() not in MISSING) or []
    absent = {*MISSING} if numbers else {*MISSING} - {"none"}  # a value among words, as of therapies
    names = [UNKNOWN if text.lower() in absent else text for text in texts]
    order = sorted({*names} - {UNKNOWN}, key=float if numbers else str)
    if len({*numbers}) > MOST_VALUES:
        upper = np.unique(np.quantile(numbers, (0.25, 0.5, 0.75, 1), method="inverted_cdf"))
        order = _ranges(min(numbers), upper)
        names = [name if name == UNKNOWN else order[np.searchsorted(upper, float(name))] for name in names]
    found = {name: np.array([each == name for each in names]) for name in (*order, UNKNOWN)}
    return {name: rows for name, rows in found.items() if rows.any()}


def _ranges(lowest: float, upper: NDArray[np.float64]) -> list[str]:
    """Names of quartiles by their bounds; fewer than four where many numbers are equal."""
    least, *bounds = (f"{number:.15g}" for number in (lowest, *upper))
    first = least if least == bounds[0] else f"{least} to {bounds[0]}"
    return [first, *(f"above {low} to {high}" for low, high in pairwise(bounds))]


# What they are worth

_Resampled = tuple[float, NDArray[np.float64]]  # a value, and those of the resamples (R,)
_NOTHING: _Resampled = (math.nan, np.empty(0))


@dataclass(frozen=True)
class _Bootstrap:
    """Resamples of all labelled images, in which any of them are measured."""

    labelled: Predictions
    thresholds: Mapping[str, float]
    resamples: int
    seed: int
    specificity: float

    @cached_property
    def _keys(self) -> list[tuple[str, str]]:
        """Class (empty of all) and metric of all that is measured."""
        return list(self._measure(self.labelled, np.ones((1, len(self.labelled.ids)))))

    @cached_property
    def _scored(self) -> list[str]:
        """Classes that means rest on: some images have them, and some do not."""
        return [name for name, both in _units_by_class(self.labelled).items() if all(both)]

    def subgroup(self, rows: NDArray[np.bool_]) -> Subgroup:
        """Of the images that ``rows`` (N,) marks."""
        part = self.labelled.take(np.flatnonzero(rows))
        own, rest = self._values(rows), self._values(~rows)
        found = {key: _estimate(key[1], own.get(key, _NOTHING), rest.get(key, _NOTHING)) for key in self._keys}
        overall = {metric: estimate for (name, metric), estimate in found.items() if not name}
        per_class = {
            name: {metric: estimate for (of, metric), estimate in found.items() if of == name} for name in part.classes
        }
        return Subgroup(len(part.ids), part.group_count, *part.class_counts(), overall, per_class)

    def _values(self, rows: NDArray[np.bool_]) -> dict[tuple[str, str], _Resampled]:
        """By class (empty of all) and metric, where enough stands behind it."""
        part = self.labelled.take(np.flatnonzero(rows))
        if len({*part.units}) < FEW:
            return {}
        values, counts = self._measure(part, np.ones((1, len(part.ids)))), _units_by_class(part)
        drawn = resampled_weights(self.labelled, self.resamples, self.seed)
        chunks = [self._measure(part, weights[:, rows]) for weights in drawn]

        def is_backed(name: str, metric: str) -> bool:
            needed = _RESTS_ON.get(metric, (False, False))
            found = [counts[each] for each in ([name] if name else self._scored)]
            return all(count >= FEW for both in found for count, needs in zip(both, needed, strict=True) if needs)

        return {
            key: (float(value[0]), resampled_values(chunks, key)) for key, value in values.items() if is_backed(*key)
        }

    def _measure(self, images: Predictions, weights: NDArray[np.float64]) -> Values:
        with np.errstate(invalid="ignore"):  # a resample may hold none of the images: all is NaN there
            return measure(images, self.thresholds, self.specificity, weights)


def _estimate(metric: str, own: _Resampled, rest: _Resampled) -> SubgroupEstimate:
    minus_rest = None
    if metric not in WITHOUT_INTERVAL:
        resampled = own[1] - rest[1] if len(own[1]) == len(rest[1]) else _NOTHING[1]
        minus_rest = Difference(rest[0], own[0], own[0] - rest[0], **interval(resampled))
    return SubgroupEstimate(**vars(bounded(*own)), minus_rest=minus_rest)


def _units_by_class(images: Predictions) -> dict[str, tuple[int, int]]:
    """By class, how many groups (or images) have images of it, and how many have others."""
    units, found = np.array(images.units), {}
    for index, name in enumerate(images.classes):
        known, positive, _ = images.of_class(index)
        own = units[known]
        found[name] = len({*own[positive]}), len({*own[~positive]})
    return found


def _notes(
    labelled: Predictions, parts: Mapping[str, NDArray[np.bool_]], subgroups: Mapping[str, Subgroup]
) -> list[str]:
    unit = f"{labelled.unit}s" if labelled.group_count is None else "groups"
    small, scarce = [], []
    for name, rows in parts.items():
        part = labelled.take(np.flatnonzero(rows))
        count = len({*part.units})
        if count < FEW:
            small.append(f"{name} ({count})")
            continue
        for of, (positives, negatives) in _units_by_class(part).items():
            if min(positives, negatives) < FEW:
                scarce.append(f"{of} in {name} ({positives} with it, {negatives} without)")
    notes = []
    if len(parts) == 1:
        notes.append(f"All {labelled.unit}s are in one subgroup: there is no rest to compare it with.")
    if small:
        notes.append(f"Subgroups with fewer than {FEW} {unit}, of which no metric is given: {a_few(small)}.")
    if scarce:
        notes.append(
            f"Classes that fewer than {FEW} {unit} of a subgroup have, or do not have: {a_few(scarce)}. Metrics that "
            "rest on them, and means over the classes, are not given."
        )
    certain = [
        name
        for name, each in subgroups.items()
        if any(estimate.low == estimate.high for of in ("", *each.per_class) for estimate in each.of(of).values())
    ]
    if certain:
        notes.append(
            f"Intervals without width, in {a_few(certain)}: all of these are right, or all are wrong; of others "
            "some may not be."
        )
    return notes
