"""Shortcuts: whether the label can be told from how an image was filed, and that from its features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.audit.probe import out_of_fold
from fpt_lightning.data.manifest import Kind, Sample, numbers_of
from fpt_lightning.data.tables import MISSING
from fpt_lightning.evaluation.estimates import Estimate
from fpt_lightning.evaluation.notes import FEW
from fpt_lightning.evaluation.resampling import bounded, counted_auc, resampled_counts, weights_of
from fpt_lightning.evaluation.subgroups import MOST_VALUES, parts_of

RINGS = 0.8
"""An AUC whose whole interval is above it is pointed out."""
SPLIT = "split"
"""The attribute that must not be told from the features."""
OTHERS = "all others"
"""Values that are not among the ten most frequent, or of fewer than ten groups, together."""
_RESAMPLES, _SEED = 500, 0

_Floats = NDArray[np.float64]
_Marks = NDArray[np.bool_]


class Question(NamedTuple):
    """What a label may be asked: whether an image has a class, or a number above the median.

    Attributes:
        name: of the class.
        rest: what it is told from.
        known: (N,), images whose answer is known.
        positive: (N,), those whose answer is yes.
    """

    name: str
    rest: str
    known: _Marks
    positive: _Marks


class Told(NamedTuple):
    """How well something is told.

    Attributes:
        attribute: of the images' files or table.
        from_features: whether the attribute is told from the features, within classes; else the label from the
            attribute alone.
        told: the value of the attribute, or the class.
        rest: what it is told from.
        images: how many have it.
        auc: with the 95% interval of a bootstrap of groups.
    """

    attribute: str
    from_features: bool
    told: str
    rest: str
    images: int
    auc: Estimate

    @property
    def rings(self) -> bool:
        """Whether a model may learn it in place of what it should: the label is told, or the split."""
        return self.auc.low > RINGS and (self.attribute == SPLIT or not self.from_features)

    def sentence(self) -> str:
        """For people."""
        if self.from_features:
            return f"The features tell {self.attribute} {self.told} from {self.rest} with an AUC of {self.auc}."
        return f"{self.attribute.capitalize()} alone tells {self.told} from {self.rest} with an AUC of {self.auc}."


def questions(samples: Sequence[Sample], kind: Kind, classes: Sequence[str]) -> list[Question]:
    """What the labels answer: each class against the rest (of two the second), or above the median."""
    if kind == "single-label":
        labels = np.array([sample.label for sample in samples])
        two = len(classes) == 2
        known = labels >= 0
        return [
            Question(name, classes[0] if two else "the rest", known, labels == index)
            for index, name in enumerate(classes)
            if index or not two
        ]
    targets = np.array([sample.targets for sample in samples])
    known = ~np.isnan(targets)
    if kind == "multi-label":
        return [Question(n, "the rest", known[:, i], targets[:, i] == 1) for i, n in enumerate(classes)]
    median = float(np.nanmedian(targets))
    return [Question(f"{classes[0]} above {median:g}", "the rest", known[:, 0], targets[:, 0] > median)]


def find_shortcuts(
    attributes: Mapping[str, Sequence[str]],
    asked: Sequence[Question],
    pooled: NDArray[np.float32],
    groups: NDArray[np.int64],
    folds: NDArray[np.int64],
) -> list[Told]:
    """How well each attribute tells the label, and how well the features tell the attribute within classes.

    The label is told by how frequent it is, in the other folds, among the images of the same value. The attribute is
    told by a linear probe of the features, and only images of the same labels are compared, as a label that goes with
    the attribute would tell it by itself. Both compare images of one fold. An AUC needs ten groups on either side.

    Args:
        attributes: by name, the value of each of N images as text, as of ``fpt_lightning.evaluation.subgroups``. Those
            of which all images have one value are left out.
        asked: of the labels.
        pooled: (N, C), features.
        groups: (N,), numbers of groups.
        folds: (N,), in which groups are whole.

    Returns:
        Those that have an AUC, in the order of the attributes.
    """
    answers = np.stack([folds, *(q.known.astype(np.int64) + q.positive for q in asked)], 1)
    _, alike = np.unique(answers, axis=0, return_inverse=True)
    found = []
    for name, texts in attributes.items():
        parts = _pooled_parts(texts, groups)
        if len(parts) < 2:
            continue
        value = np.argmax(np.stack([*parts.values()]), 0)
        for question in asked:
            scores = _frequencies(value, len(parts), question, folds)
            auc = _auc(scores, question.positive, question.known, folds, groups)
            count = int((question.positive & question.known).sum())
            found.append(Told(name, False, question.name, question.rest, count, auc))
        probabilities = out_of_fold(pooled, value, len(parts), folds)
        names = list(parts)
        for index in [int(np.bincount(value).argmin())] if len(parts) == 2 else range(len(parts)):
            rest = names[1 - index] if len(parts) == 2 else "the rest"
            everything = np.ones(len(value), bool)
            auc = _auc(probabilities[:, index], value == index, everything, alike.reshape(-1), groups)
            found.append(Told(name, True, names[index], rest, int((value == index).sum()), auc))
    return [each for each in found if each.auc.value == each.auc.value]


def _pooled_parts(texts: Sequence[str], groups: NDArray[np.int64]) -> dict[str, _Marks]:
    """Images (N,) of each value, rare ones together."""
    if numbers_of(text for text in texts if text.lower() not in MISSING) is None:
        frequent = {name for name, _ in Counter(texts).most_common(MOST_VALUES)}
        texts = [text if text in frequent or text.lower() in MISSING else OTHERS for text in texts]
    parts = parts_of(texts)
    large = {name: rows for name, rows in parts.items() if len(np.unique(groups[rows])) >= FEW and name != OTHERS}
    rest = ~np.any([*large.values()], 0) if large else np.ones(len(texts), bool)
    return large | ({OTHERS: rest} if rest.any() else {})


def _frequencies(value: NDArray[np.int64], count: int, question: Question, folds: NDArray[np.int64]) -> _Floats:
    """Share (N,) of yes among the images of the same value in the other folds; of none, nearly that of all."""
    found = np.empty(len(value))
    for fold in np.unique(folds):
        fit = (folds != fold) & question.known
        images = np.bincount(value[fit], minlength=count)
        positives = np.bincount(value[fit & question.positive], minlength=count)
        share = question.positive[fit].mean() if fit.any() else 0.0
        found[folds == fold] = ((positives + share) / (images + 1))[value[folds == fold]]
    return found


def _auc(
    scores: _Floats, positive: _Marks, known: _Marks, strata: NDArray[np.int64], groups: NDArray[np.int64]
) -> Estimate:
    """AUC of pairs within a stratum; NaN where too few groups stand behind it."""
    rows = [
        own
        for stratum in np.unique(strata[known])
        if 0 < positive[own := np.flatnonzero(known & (strata == stratum))].sum() < len(own)
    ]
    compared = np.concatenate([np.empty(0, np.int64), *rows])
    sides = (compared[positive[compared] == side] for side in (True, False))
    if min(len(np.unique(groups[side])) for side in sides) < FEW:
        return bounded(np.nan, np.empty(0))

    def measured(weights: _Floats) -> _Floats:
        won, pairs = np.zeros(len(weights)), np.zeros(len(weights))
        for own in rows:
            counts = resampled_counts(scores[own], positive[own], weights[:, own])
            of_both = counts[0].sum(1) * counts[1].sum(1)
            won += np.nan_to_num(counted_auc(*counts)) * of_both
            pairs += of_both
        return np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan)

    drawn = [measured(weights) for weights in weights_of(groups, _RESAMPLES, _SEED)]
    return bounded(float(measured(np.ones((1, len(scores))))[0]), np.concatenate(drawn))
