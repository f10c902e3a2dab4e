"""What a model predicted for each image, beside what is true: in memory and as CSV."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.data.manifest import UNLABELLED, Kind
from fpt_lightning.errors import DataError
from fpt_lightning.files import Row, read_rows, write_rows

SUM_TOLERANCE = 0.02
"""How far the probabilities of an image may be from a sum of 1: half precision, or two decimals."""

Unit = Literal["image", "case"]
_ID: dict[Unit, str] = {"image": "path", "case": "case"}  # the column of the ids

_REMEDY = "it should be as `fpt-lightning test` writes it"


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of N images (or cases of several) for C classes, or of one number each.

    Attributes:
        kind: ``single-label`` (one class an image; grades too, in their order), ``multi-label`` or ``regression``.
        ids: N paths below the data root, or names of cases, each once.
        labels: (N,) int64 class indices, -1 where unknown; of multi-label (N, C) and of regression (N,) float64, NaN
            where unknown.
        scores: (N, C) float64 probabilities; of regression (N,) predicted values.
        classes: C names; none of regression.
        groups: N names of what belongs together, such as a patient, empty where unknown; or none at all.
        ordered: whether single-label classes are grades from low to high.
        cases: N names of what images are evaluated together as, such as an exam (``fpt_lightning.evaluation.cases``),
            empty where there is none; or none at all.
        unit: what the N are.

    Raises:
        DataError: numbers of ids, labels, scores, classes, groups and cases that do not belong together.
    """

    kind: Kind
    ids: tuple[str, ...]
    labels: NDArray[Any]
    scores: NDArray[np.float64]
    classes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    ordered: bool = False
    cases: tuple[str, ...] = ()
    unit: Unit = "image"

    def __post_init__(self) -> None:
        count = len(self.ids)
        table = (count, len(self.classes))
        labels, scores = {
            "single-label": ((count,), table),
            "multi-label": (table, table),
            "regression": ((count,), (count,)),
        }[self.kind]
        named = len(self.groups), len(self.cases)
        if self.labels.shape != labels or self.scores.shape != scores or not {*named} <= {0, count}:
            raise DataError(
                f"{self.kind} predictions of {count} images and {len(self.classes)} classes need labels {labels}, "
                f"scores {scores}, and a group and a case an image or none: they have {self.labels.shape}, "
                f"{self.scores.shape}, {named[0]} and {named[1]}."
            )

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which labels are known: (N,), of multi-label (N, C)."""
        known: NDArray[np.bool_] = self.labels != UNLABELLED if self.kind == "single-label" else ~np.isnan(self.labels)
        return known

    def labelled(self) -> Predictions:
        """Those with a known label: of multi-label, with any."""
        return self.take(self.labelled_rows)

    @property
    def labelled_rows(self) -> NDArray[np.int64]:
        """Rows of those with a known label, of multi-label with any, in ascending order."""
        return np.flatnonzero(self.known.reshape(len(self.ids), -1).any(1))

    @property
    def wholes(self) -> tuple[str, ...]:
        """The group of each image, or its case where it has none; nothing where no image has either."""
        none = ("",) * len(self.ids)
        named = tuple(group or case for group, case in zip(self.groups or none, self.cases or none, strict=True))
        return named if any(named) else ()

    @property
    def units(self) -> tuple[str, ...]:
        """What is resampled: the group (or case) of each image, the image where it has none; images where none has."""
        named = self.wholes
        return tuple(name or f"\0{id}" for name, id in zip(named, self.ids, strict=True)) if named else self.ids

    @property
    def group_count(self) -> int | None:
        """How many groups the images are of; None where no group is known."""
        return len({*self.units}) if self.wholes else None

    def take(self, rows: NDArray[np.int64]) -> Predictions:
        """Those of the rows, in their order."""
        ids, groups, cases = (tuple(each[i] for i in rows if each) for each in (self.ids, self.groups, self.cases))
        return replace(self, ids=ids, labels=self.labels[rows], scores=self.scores[rows], groups=groups, cases=cases)

    def of_class(self, index: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
        """One class against the rest: which images have its label known (N,); which of those K are positive; scores."""
        known = self.known if self.kind == "single-label" else self.known[:, index]
        labels = self.labels[known]
        positive = labels == index if self.kind == "single-label" else labels[:, index] == 1
        return known, positive, self.scores[known, index]

    def class_counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """By class, how many images have it and how many do not; those where it is unknown are neither."""
        found = {name: self.of_class(i)[1] for i, name in enumerate(self.classes)}
        positives = {name: int(positive.sum()) for name, positive in found.items()}
        return positives, {name: len(found[name]) - count for name, count in positives.items()}

    def write(self, path: str | Path, sets: Mapping[str, Sequence[Any]] | None = None) -> None:
        """Write as CSV, whole or not at all.

        The columns are ``path``, or ``case`` of cases; ``group`` and ``case`` if there are any; ``label``, or ``grade``
        of ordered classes; ``most_probable``, the class of the largest probability whatever thresholds say; and
        ``prob_{class}`` of each class. Multi-label has ``label_{class}`` (0 or 1) of each class in place of ``label``
        and no ``most_probable``, regression ``label`` and ``prediction``. What is unknown is empty, and there is no
        column of labels of which all are. Numbers have the digits that they need to be read as they were.

        Args:
            path: of the file.
            sets: columns of prediction sets, beside the others (``fpt_lightning.evaluation.conformal.Sets.columns``).
        """
        labels, scores = _columns(self.kind, self.classes, "grade" if self.ordered else "label")
        labels = labels if self.known.any() else []
        top = [self.classes[i] for i in self.scores.argmax(1)] if self.kind == "single-label" else []
        names = [_ID[self.unit], *["group"][: len(self.groups)], *["case"][: len(self.cases)]]
        beside = sets or {}
        rows = [[*names, *labels, *["most_probable"][: len(top)], *scores, *beside]]
        for i, id in enumerate(self.ids):
            label = self._written(self.labels[i])[: len(labels)]
            named = [id, *self.groups[i : i + 1], *self.cases[i : i + 1]]
            numbers = map(_shortest, np.atleast_1d(self.scores[i]))
            rows.append([*named, *label, *top[i : i + 1], *numbers, *(column[i] for column in beside.values())])
        write_rows(Path(path), rows)

    def _written(self, label: Any) -> list[str]:
        if self.kind == "single-label":
            return ["" if label == UNLABELLED else self.classes[label]]
        return ["" if math.isnan(value) else _shortest(value) for value in np.atleast_1d(label)]

    @classmethod
    def read(cls, path: str | Path) -> Predictions:
        """Read what ``write`` writes; the columns may be in any order, and those of sets are passed over.

        Raises:
            DataError: no such file, no such columns, an image twice, a label that is no class, or probabilities that
                are none, by line.
        """
        path = Path(path)
        rows = read_rows(path, "predictions file")
        table = _Table(path, rows)
        kind, classes, labels = _layout(path, list(rows[0]))
        unit: Unit = "image" if _ID["image"] in rows[0] else "case"
        ids = table.texts(_ID[unit])
        empty = [row.line for row in rows if not row[_ID[unit]]]
        twice = [id for id, count in Counter(ids).items() if count > 1]
        if empty or twice:
            where = (
                f"line {empty[0]}: the {_ID[unit]} is empty"
                if empty
                else f"the {unit} {twice[0]!r} is there more than once"
            )
            raise DataError(f"{path}, {where}; {_REMEDY}.")
        groups = table.texts("group") if "group" in rows[0] else ()
        cases = table.texts("case") if "case" in rows[0] and unit == "image" else ()
        named: dict[str, Any] = {"groups": groups, "cases": cases if any(cases) else (), "unit": unit}
        if kind == "regression":
            true = table.numbers("label", unknown=True) if labels else np.full(len(ids), np.nan)
            return cls(kind, ids, true, table.numbers("prediction"), **named)
        scores = np.column_stack([table.numbers(f"prob_{name}", within=(0, 1)) for name in classes])
        if kind == "multi-label":
            present = table.presences(labels) if labels else np.full(scores.shape, np.nan)
            return cls(kind, ids, present, scores, classes, **named)
        table.check_sums(scores)
        table.check_most_probable(classes, scores)
        indices = table.indices(labels[0], classes) if labels else np.full(len(ids), UNLABELLED)
        return cls(kind, ids, indices, scores, classes, ordered="grade" in labels, **named)


def set_columns(kind: Kind, classes: Sequence[str]) -> list[str]:
    """Of prediction sets, beside the predictions that they are of."""
    by_label = [f"set_{name}" for name in classes]
    return {"single-label": ["set", "abstains"], "multi-label": by_label, "regression": ["low", "high"]}[kind]


def _shortest(number: float) -> str:
    """The shortest text that is read as the same number."""
    return repr(float(number)).removesuffix(".0")


def _columns(kind: Kind, classes: Sequence[str], label: str) -> tuple[list[str], list[str]]:
    """Of the labels, and of the scores."""
    if kind == "regression":
        return ["label"], ["prediction"]
    labels = [label] if kind == "single-label" else [f"label_{name}" for name in classes]
    return labels, [f"prob_{name}" for name in classes]


_KINDS: tuple[tuple[Kind, str, int], ...] = (
    ("regression", "label", 0),
    ("single-label", "label", 2),
    ("single-label", "grade", 2),
    ("multi-label", "label", 1),
)
"""What a file may hold: the kind, the column of a single label, and the fewest classes."""


def _layout(path: Path, columns: Sequence[str]) -> tuple[Kind, tuple[str, ...], Sequence[str]]:
    """The kind of predictions that a file with these columns holds, the classes, and the columns of labels if any."""
    classes = tuple(name.removeprefix("prob_") for name in columns if name.startswith("prob_"))
    for kind, label, fewest in _KINDS:
        labels, scores = _columns(kind, classes, label)
        single = kind == "single-label"
        beside = [*(["most_probable"] if single else []), *set_columns(kind, classes)]
        own = {*columns} - {"path", "case", "group", *beside}
        named = not {"path", "case"}.isdisjoint(columns)
        unlabelled = own == {*scores} and (not single or "most_probable" in columns)
        if named and (own == {*labels, *scores} or unlabelled) and "" not in classes and len(classes) >= fewest:
            return kind, classes, [] if unlabelled else labels
    raise DataError(
        f"the predictions file {path} has the columns {', '.join(columns)}: it needs path (or case, of cases), "
        "group and case if known, and either label (or grade, of ordered classes), most_probable if wanted, and "
        "prob_CLASS of each class (two or more); label_CLASS and prob_CLASS of each class; or label and prediction."
    )


@dataclass(frozen=True)
class _Table:
    """The columns of a predictions file, checked."""

    path: Path
    rows: Sequence[Row]

    def texts(self, column: str) -> tuple[str, ...]:
        return tuple(row[column] for row in self.rows)

    def numbers(
        self, column: str, unknown: bool = False, within: tuple[float, float] = (-math.inf, math.inf)
    ) -> NDArray[np.float64]:
        """(N,), NaN where an ``unknown`` one is empty."""
        values = np.full(len(self.rows), np.nan)
        for i, text in enumerate(self.texts(column)):
            if unknown and not text:
                continue
            try:
                values[i] = float(text)
            except ValueError:
                self._refuse(i, column, "a number")
            if not math.isfinite(values[i]):
                self._refuse(i, column, "a finite number")
            if not within[0] <= values[i] <= within[1]:
                self._refuse(i, column, "a probability from 0 to 1")
        return values

    def indices(self, column: str, classes: Sequence[str]) -> NDArray[np.int64]:
        """(N,) class indices, -1 where unknown."""
        index = {name: i for i, name in enumerate(classes)} | {"": UNLABELLED}
        for i, name in enumerate(self.texts(column)):
            if name not in index:
                self._refuse(i, column, f"one of the classes {', '.join(classes)}, or empty")
        return np.array([index[name] for name in self.texts(column)], dtype=np.int64)

    def presences(self, columns: Sequence[str]) -> NDArray[np.float64]:
        """(N, C) of 0, 1 and NaN."""
        labels = np.column_stack([self.numbers(column, unknown=True) for column in columns])
        for i, j in np.argwhere(~np.isin(labels, (0, 1)) & ~np.isnan(labels)):
            self._refuse(int(i), columns[j], "0, 1 or empty")
        return labels

    def check_most_probable(self, classes: Sequence[str], scores: NDArray[np.float64]) -> None:
        for i, name in enumerate(self.texts("most_probable") if "most_probable" in self.rows[0] else ()):
            if name not in classes or scores[i, classes.index(name)] < scores[i].max():
                self._refuse(i, "most_probable", "the class of the largest probability")

    def check_sums(self, scores: NDArray[np.float64]) -> None:
        for row, total in zip(self.rows, scores.sum(1), strict=True):
            if abs(total - 1) > SUM_TOLERANCE:
                raise DataError(
                    f"{self.path}, line {row.line}: the probabilities sum to {total:.6g}, not to 1; {_REMEDY}."
                )

    def _refuse(self, i: int, column: str, needed: str) -> None:
        raise DataError(
            f"{self.path}, line {self.rows[i].line}: {column} is {self.rows[i][column]!r}, which is not {needed}."
        )
