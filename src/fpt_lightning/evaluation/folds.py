"""A cross-validation: predictions of its folds and seeds as one, and how far their figures lie apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.errors import DataError, a_few
from fpt_lightning.evaluation.cases import RULES, Rule, by_case, case_notes
from fpt_lightning.evaluation.comparison import matched
from fpt_lightning.evaluation.conformal import (
    DEFAULT_COVERAGE,
    Nonconformity,
    Sets,
    fit_nonconformity,
    prediction_sets,
    shortage,
)
from fpt_lightning.evaluation.decisions import checked_thresholds, decide, fit_thresholds
from fpt_lightning.evaluation.estimates import label, number
from fpt_lightning.evaluation.measures import measure
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.resampling import require_labelled
from fpt_lightning.evaluation.scores import Evaluation, evaluate
from fpt_lightning.files import align, screen_width, without_nan


def pooled(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of different images as one, in ascending order of the images.

    Args:
        parts: of one kind, and of the same classes.

    Raises:
        DataError: of different things, or an image in several parts.
    """
    first = parts[0]
    for each in parts[1:]:
        if (each.kind, each.classes, each.ordered) != (first.kind, first.classes, first.ordered):
            raise DataError(
                f"the folds predict different things: {first.kind} of {', '.join(first.classes) or 'no classes'}, and "
                f"{each.kind} of {', '.join(each.classes) or 'no classes'}."
            )
    ids = [id for each in parts for id in each.ids]
    if twice := sorted(id for id, count in Counter(ids).items() if count > 1):
        raise DataError(f"{len(twice)} images are predicted by several folds: {a_few(twice)}.")
    groups, cases = (
        [name for each in parts for name in getattr(each, column) or [""] * len(each.ids)]
        for column in ("groups", "cases")
    )
    labels, scores = (np.concatenate([getattr(each, name) for each in parts]) for name in ("labels", "scores"))
    whole = replace(
        first,
        ids=tuple(ids),
        labels=labels,
        scores=scores,
        groups=tuple(groups) if any(groups) else (),
        cases=tuple(cases) if any(cases) else (),
    )
    return whole.take(_order(ids))


def averaged(several: Sequence[Predictions]) -> Predictions:
    """The mean scores of several models for the same images, in the order of the first.

    Raises:
        DataError: other images, classes or labels.
    """
    first, *others = several
    same = [first, *(matched(first, other) for other in others)]
    return replace(first, scores=np.mean([each.scores for each in same], axis=0))


@dataclass(frozen=True)
class Spread:
    """One metric of several models.

    Attributes:
        values: one a model, NaN where it has none.
    """

    values: tuple[float, ...]

    @property
    def _known(self) -> NDArray[np.float64]:
        return np.array([value for value in self.values if value == value])

    @property
    def mean(self) -> float:
        """Of those that are known; NaN where none is."""
        return float(self._known.mean()) if len(self._known) else float("nan")

    @property
    def sd(self) -> float:
        """Their sample standard deviation; NaN of fewer than two."""
        return float(self._known.std(ddof=1)) if len(self._known) > 1 else float("nan")

    @property
    def low(self) -> float:
        """The smallest; NaN where none is known."""
        return float(min(self._known, default=float("nan")))

    @property
    def high(self) -> float:
        """The largest; NaN where none is known."""
        return float(max(self._known, default=float("nan")))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"mean": self.mean, "sd": self.sd, "low": self.low, "high": self.high, "values": list(self.values)}


class Cases(NamedTuple):
    """The cases that a cross-validation's images are of.

    Attributes:
        rule: by which their scores come of the images'.
        predictions: of all folds and seeds as one.
        evaluation: of these.
    """

    rule: Rule
    predictions: Predictions
    evaluation: Evaluation


@dataclass(frozen=True)
class CrossValidation:
    """What the models of all folds and seeds are worth.

    Attributes:
        predictions: of all folds and seeds as one.
        by_seed: the same of each seed alone.
        evaluation: of ``predictions``.
        held_out: whether each fold tested images of its own (``are_held_out``).
        folds: by metric, of each fold, the mean over its seeds.
        seeds: by metric, of each seed's own predictions of all folds.
        nonconformity: from which the prediction sets of all models together come.
        cases: that the images are of; None where there are none.
    """

    predictions: Predictions
    by_seed: dict[int, Predictions]
    evaluation: Evaluation
    held_out: bool
    folds: dict[str, Spread]
    seeds: dict[str, Spread]
    nonconformity: Nonconformity
    cases: Cases | None = None

    @property
    def count(self) -> int:
        """Of the folds."""
        return len(next(iter(self.folds.values())).values)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None there."""
        metrics = {
            name: {**asdict(estimate), "folds": self.folds[name].to_dict(), "seeds": self.seeds[name].to_dict()}
            for name, estimate in self.evaluation.overall.items()
        }
        content = {
            "folds": self.count,
            "seeds": list(self.by_seed),
            "held_out": self.held_out,
            "thresholds": self.evaluation.thresholds,
            "metrics": metrics,
        }
        plain: dict[str, Any] = without_nan(content)
        return plain

    def table(self) -> str:
        """For people, as wide as the terminal: its caption, and a row a metric."""
        return f"{self.caption()}\n\n{align(self.rows(), screen_width())}"

    def caption(self) -> str:
        """What the columns of ``rows`` are."""
        of_seeds = f"; {len(self.by_seed)} seeds: sd" if len(self.by_seed) > 1 else ""
        return f"{self.count} folds: mean, standard deviation (sd), lowest, highest{of_seeds}."

    def rows(self) -> list[list[str]]:
        """Heads, and a row a metric, of all together, of the folds and, if there are several, of the seeds."""
        heads = ["together", "mean", "sd", "lowest", "highest", *(["seeds"] if len(self.by_seed) > 1 else [])]
        rows = [["", *heads]]
        for name, estimate in self.evaluation.overall.items():
            fold, seed = self.folds[name], self.seeds[name]
            values = [estimate.value, fold.mean, fold.sd, fold.low, fold.high, seed.sd][: len(heads)]
            rows.append([label(name, self.evaluation.specificity), *map(number, values)])
        return rows


def are_held_out(tests: Sequence[Predictions]) -> bool:
    """Whether folds tested images of their own, so that none was predicted by a model that saw it; else all the same.

    Args:
        tests: of each fold.
    """
    return len({frozenset(each.ids) for each in tests}) > 1


def cross_validated(
    runs: Mapping[tuple[int, int], Predictions],
    validation: Predictions | None = None,
    *,
    case_rules: Sequence[Rule] = (),
    resamples: int = 2000,
    seed: int = 0,
    specificity: float = 0.9,
) -> CrossValidation:
    """Score all folds and seeds as one, and each; and the cases that their images are of, where there are any.

    Scores of several seeds are averaged. Where each fold tested images of its own, those are pooled, and decided for by
    thresholds that are fitted to the other folds' (``fit_thresholds``); the thresholds that are shown are of all, and
    prediction sets likewise. Else the folds' scores are averaged too. Cases come of the images' scores by the rule that
    most runs chose, so that all are on one scale, and are decided for likewise.

    Args:
        runs: test predictions by fold and seed, of every fold with every seed.
        validation: predictions that thresholds and sets come from, where all folds tested the same images.
        case_rules: that the runs chose on their validation cases.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        specificity: at which a sensitivity is given.

    Raises:
        ConfigurationError: a number out of its range.
        DataError: predictions that do not belong together, or no labelled image.
    """
    folds, seeds = sorted({fold for fold, _ in runs}), sorted({each for _, each in runs})
    parts = [averaged([runs[fold, each] for each in seeds]) for fold in folds]
    held_out, fits = are_held_out(parts), parts[0].kind != "regression"
    settings: dict[str, Any] = {"resamples": resamples, "seed": seed, "specificity": specificity}
    joined = _Joined.of(parts, held_out, validation)
    by_seed = {each: joined.like([runs[fold, each] for fold in folds]) for each in seeds}
    if held_out:
        others = [fit_nonconformity(pooled([part for part in parts if part is not each])) for each in parts]
        sets, nonconformity = _sets(parts, others), fit_nonconformity(joined.whole)
    else:
        nonconformity = {} if validation is None else fit_nonconformity(validation)
        sets = _sets([joined.whole], [nonconformity])
    evaluation = joined.evaluated({**settings, "sets": sets})
    of_runs = [
        [_overall(runs[fold, each], own, specificity, None) for each in seeds]
        for fold, own in zip(folds, joined.by_fold, strict=True)
    ]
    of_seeds = [_overall(each.whole, each.thresholds, specificity, each.decided) for each in by_seed.values()]
    spread = {
        name: Spread(tuple(Spread(tuple(each[name] for each in fold)).mean for fold in of_runs))
        for name in evaluation.overall
    }
    notes = [_note(next(iter(spread)), specificity, spread, len(seeds), held_out, fits), *evaluation.notes]
    return CrossValidation(
        joined.whole,
        {each: own.whole for each, own in by_seed.items()},
        replace(evaluation, notes=notes),
        held_out,
        spread,
        {name: Spread(tuple(each[name] for each in of_seeds)) for name in evaluation.overall},
        nonconformity,
        _cases(parts, joined.whole, held_out, validation, case_rules, settings),
    )


def _sets(parts: Sequence[Predictions], fitted: Sequence[Nonconformity]) -> Sets | None:
    """The prediction sets of ``pooled`` parts, each by what was fitted for it; None where that is too little of one."""
    if any(shortage(each, DEFAULT_COVERAGE) for each in fitted):
        return None
    found = [prediction_sets(part, each, DEFAULT_COVERAGE) for part, each in zip(parts, fitted, strict=True)]
    fewest = min(found, key=lambda sets: sets.units)
    members = np.concatenate([sets.members for sets in found])
    return replace(fewest, members=members[_order([id for part in parts for id in part.ids])])


def _cases(
    parts: Sequence[Predictions],
    whole: Predictions,
    held_out: bool,
    validation: Predictions | None,
    rules: Sequence[Rule],
    settings: Mapping[str, Any],
) -> Cases | None:
    """The cases of the folds' images; None where there are none with a label."""
    if not whole.cases or not rules:
        return None
    rule = max(RULES, key=rules.count)
    if not by_case(whole, rule).known.any():
        return None
    of_parts = [by_case(part, rule) for part in (parts if held_out else [whole])]
    joined = _Joined.of(of_parts, held_out, None if validation is None else by_case(validation, rule))
    why = f"which {rules.count(rule)} of {len(rules)} runs chose on their validation cases"
    evaluation = joined.evaluated(settings)
    notes = [*case_notes(whole, rule, why), *evaluation.notes]
    return Cases(rule, joined.whole, replace(evaluation, notes=notes))


@dataclass(frozen=True)
class _Joined:
    """The folds' predictions as one, and how they are decided for.

    Attributes:
        whole: pooled where each fold tested images of its own, else averaged.
        thresholds: that are shown.
        by_fold: that decide each fold's predictions.
        decided: which classes each of the whole is decided for (N, C); None where ``thresholds`` decide all.
    """

    whole: Predictions
    thresholds: Mapping[str, float]
    by_fold: Sequence[Mapping[str, float]]
    decided: NDArray[np.bool_] | None

    @classmethod
    def of(cls, parts: Sequence[Predictions], held_out: bool, validation: Predictions | None) -> _Joined:
        """Of the folds' predictions; thresholds are fitted to the other folds', or to validation."""
        whole = pooled(parts) if held_out else averaged(parts)
        if whole.kind == "regression" or (not held_out and validation is None):
            return cls(whole, {}, [{} for _ in parts], None)
        if not held_out:
            assert validation is not None
            thresholds = fit_thresholds(validation)
            return cls(whole, thresholds, [thresholds for _ in parts], None)
        by_fold = [fit_thresholds(pooled([part for part in parts if part is not each])) for each in parts]
        return cls(whole, fit_thresholds(whole), by_fold, _decided(parts, by_fold))

    def like(self, parts: Sequence[Predictions]) -> _Joined:
        """Other predictions of the same folds, decided for by the same thresholds."""
        if self.decided is None:
            return replace(self, whole=pooled(parts) if are_held_out(parts) else averaged(parts))
        return replace(self, whole=pooled(parts), decided=_decided(parts, self.by_fold))

    def evaluated(self, settings: Mapping[str, Any]) -> Evaluation:
        return evaluate(self.whole, self.thresholds or None, decided=self.decided, **settings)


def _decided(parts: Sequence[Predictions], thresholds: Sequence[Mapping[str, float]]) -> NDArray[np.bool_]:
    """Which classes each image of ``pooled`` parts is decided for (N, C), by the thresholds of its part."""
    found = np.concatenate([decide(part, own) for part, own in zip(parts, thresholds, strict=True)])
    return found[_order([id for part in parts for id in part.ids])]


def _overall(
    predictions: Predictions, thresholds: Mapping[str, float], specificity: float, decided: NDArray[np.bool_] | None
) -> dict[str, float]:
    """Metrics of all classes together, without intervals."""
    labelled, rows = require_labelled(predictions), predictions.labelled_rows
    values = measure(
        labelled,
        checked_thresholds(predictions, thresholds),
        specificity,
        np.ones((1, len(rows))),
        per_class=False,
        decided=None if decided is None else decided[rows],
    )
    return {metric: float(value[0]) for (_, metric), value in values.items()}


def _order(ids: Sequence[str]) -> NDArray[np.int64]:
    """Ascending."""
    return np.argsort(np.array(ids, dtype=object))


def _note(name: str, specificity: float, spread: Mapping[str, Spread], seeds: int, held_out: bool, fits: bool) -> str:
    """What the predictions of a cross-validation are, with the spread of a metric over the folds."""
    of = spread[name]
    models = f"{len(of.values)} folds" + (f", mean of {seeds} seeds" if seeds > 1 else "")
    how = f"All folds test the same images: scores are the mean of all models ({models})."
    if held_out:
        how = (
            f"Each image was predicted by the fold that tests it ({models}). The folds' models differ in scale, which "
            "can lower what is ranked over all of them."
        )
        how += " Decisions are by thresholds that were fitted to the other folds; those shown are of all." * fits
        how += " Prediction sets come from the other folds too."
    return (
        f"{how} {label(name, specificity)} of the folds: mean {number(of.mean)}, standard deviation {number(of.sd)}, "
        f"{number(of.low)} to {number(of.high)}."
    )
