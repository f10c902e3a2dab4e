"""Folds and seeds as one: pooled, averaged, decided for by thresholds of the other folds, and their spread."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, recall_score, roc_auc_score

from fpt_lightning.errors import DataError
from fpt_lightning.evaluation.cases import by_case
from fpt_lightning.evaluation.conformal import assess, fit_nonconformity, prediction_sets
from fpt_lightning.evaluation.decisions import fit_thresholds
from fpt_lightning.evaluation.folds import Spread, averaged, cross_validated, pooled
from fpt_lightning.evaluation.predictions import Predictions

FOLDS, SEEDS = (1, 2, 3), (0, 4)


def binary(fold: int, seed: int, count: int = 40, same: bool = False) -> Predictions:
    """Two classes whose scores have another scale in each fold; images of the fold, or the same in all."""
    number = 0 if same else fold
    ids = tuple(f"p{i % 7}-{number}-{(i * 7) % count:02d}" for i in range(count))  # in no order
    labels = np.random.default_rng(number).integers(0, 2, count)
    noise = np.random.default_rng([fold, seed, 9]).normal(0, 1, count)
    ill = 1 / (1 + np.exp(-(labels + noise + fold - 2)))
    groups = tuple(f"{number}-{i % 7}" for i in range(count))
    return Predictions("single-label", ids, labels, np.column_stack([1 - ill, ill]), ("well", "ill"), groups)


def runs(same: bool = False) -> dict[tuple[int, int], Predictions]:
    return {(fold, seed): binary(fold, seed, same=same) for fold in FOLDS for seed in SEEDS}


def auc(predictions: Predictions) -> float:
    return float(roc_auc_score(predictions.labels, predictions.scores[:, 1]))


def test_images_of_all_folds_are_pooled_and_seeds_averaged() -> None:
    given = runs()
    found = cross_validated(given, resamples=20)
    assert found.held_out
    assert list(found.predictions.ids) == sorted(id for fold in FOLDS for id in given[fold, 0].ids)
    seeds = [pooled([given[fold, seed] for fold in FOLDS]) for seed in SEEDS]
    np.testing.assert_allclose(found.predictions.scores, np.mean([each.scores for each in seeds], 0))
    assert found.evaluation.overall["auc"].value == pytest.approx(auc(found.predictions))
    assert found.evaluation.groups == 21
    assert found.seeds["auc"].values == pytest.approx([auc(each) for each in seeds])
    of_folds = [np.mean([auc(given[fold, seed]) for seed in SEEDS]) for fold in FOLDS]
    assert found.folds["auc"].values == pytest.approx(of_folds)
    assert found.folds["auc"].sd == pytest.approx(np.std(of_folds, ddof=1))
    told = found.to_dict()["metrics"]["auc"]
    assert (told["folds"]["mean"], told["folds"]["high"]) == pytest.approx((np.mean(of_folds), max(of_folds)))
    assert max(map(len, found.table().splitlines())) <= 80
    assert "(3 folds, mean of 2 seeds)" in found.evaluation.notes[0]


def test_decisions_for_a_fold_know_nothing_of_its_own_labels() -> None:
    given = runs()
    found = cross_validated(given, resamples=20)
    parts = [averaged([given[fold, seed] for seed in SEEDS]) for fold in FOLDS]
    true, decided = list[int](), list[bool]()
    for i, part in enumerate(parts):
        by = fit_thresholds(pooled(parts[:i] + parts[i + 1 :]))
        true += part.labels.tolist()
        decided += (part.scores[:, 1] >= by["ill"]).tolist()
    ill = found.evaluation.per_class["ill"]
    assert ill["sensitivity"].value == pytest.approx(recall_score(true, decided))
    assert ill["specificity"].value == pytest.approx(recall_score(true, decided, pos_label=0))
    assert found.evaluation.thresholds == fit_thresholds(found.predictions)
    by_all = found.predictions.scores[:, 1] >= found.evaluation.thresholds["ill"]
    assert recall_score(found.predictions.labels, by_all) != pytest.approx(ill["sensitivity"].value)


def test_sets_for_a_fold_know_nothing_of_its_own_labels() -> None:
    given = runs()
    found = cross_validated(given, resamples=20)
    parts = [averaged([given[fold, seed] for seed in SEEDS]) for fold in FOLDS]
    held = list[float]()
    for i, part in enumerate(parts):
        others = fit_nonconformity(pooled(parts[:i] + parts[i + 1 :]))
        held.append(assess(part, prediction_sets(part, others, 0.9), resamples=1).covered.value)
    coverage = found.evaluation.coverage
    assert coverage is not None
    assert coverage.covered.value == pytest.approx(np.mean(held))  # seven groups of as many images in each
    assert (coverage.images, coverage.units) == (80, 14)
    assert found.nonconformity == fit_nonconformity(found.predictions)
    few = {key: each.take(np.arange(4)) for key, each in given.items()}
    assert cross_validated(few, resamples=5).evaluation.coverage is None


def test_folds_that_test_the_same_images_are_averaged() -> None:
    given = runs(same=True)
    first = given[FOLDS[0], SEEDS[0]]
    validation = replace(first.take(np.arange(2)), labels=np.array([0, 1]), scores=np.array([[0.7, 0.3], [0.5, 0.5]]))
    found = cross_validated(given, validation, resamples=20)
    assert not found.held_out
    np.testing.assert_allclose(found.predictions.scores, np.mean([each.scores for each in given.values()], 0))
    sensitivity = recall_score(found.predictions.labels, found.predictions.scores[:, 1] >= 0.4)
    assert found.evaluation.per_class["ill"]["sensitivity"].value == pytest.approx(sensitivity)
    assert found.evaluation.thresholds["ill"] == pytest.approx(0.4)
    assert "All folds test the same images" in found.evaluation.notes[0]


@pytest.mark.parametrize("same", [False, True])
def test_cases_are_of_all_folds_by_the_rule_of_most_runs(same: bool) -> None:
    """Decided for by thresholds that were fitted to the other folds' cases, or to validation cases."""
    given = {
        key: replace(each, cases=tuple(f"{group}-{i // 14}" for i, group in enumerate(each.groups)))
        for key, each in runs(same).items()
    }
    validation = given[FOLDS[0], SEEDS[0]] if same else None
    found = cross_validated(given, validation, case_rules=["mean", "maximum", "maximum"], resamples=20)
    assert found.cases is not None
    expected = by_case(found.predictions, "maximum")
    assert (found.cases.rule, found.cases.predictions.ids) == ("maximum", expected.ids)
    np.testing.assert_array_equal(found.cases.predictions.scores, expected.scores)
    np.testing.assert_array_equal(found.cases.predictions.labels, expected.labels)
    evaluation = found.cases.evaluation
    assert (evaluation.unit, evaluation.images) == ("case", len(expected.ids))
    assert "which 2 of 3 runs chose on their validation cases" in evaluation.notes[0]
    parts = [averaged([given[fold, seed] for seed in SEEDS]) for fold in FOLDS]
    cases = [by_case(part, "maximum") for part in parts]
    if same:
        assert validation is not None
        by = [fit_thresholds(by_case(validation, "maximum"))]
        cases = [expected]
    else:
        by = [fit_thresholds(pooled(cases[:i] + cases[i + 1 :])) for i in range(len(cases))]
    true = [label for each in cases for label in each.labels]
    decided = [score >= own["ill"] for each, own in zip(cases, by, strict=True) for score in each.scores[:, 1]]
    assert evaluation.per_class["ill"]["sensitivity"].value == pytest.approx(recall_score(true, decided))
    assert cross_validated(given, validation, resamples=5).cases is None


def test_numbers_have_no_thresholds() -> None:
    rng = np.random.default_rng(0)
    given = {
        (fold, 0): Predictions("regression", (f"{fold}a", f"{fold}b", f"{fold}c"), rng.normal(size=3), np.zeros(3))
        for fold in FOLDS
    }
    found = cross_validated(given, resamples=20)
    assert found.evaluation.overall["mae"].value == pytest.approx(
        mean_absolute_error(found.predictions.labels, found.predictions.scores)
    )
    assert found.evaluation.thresholds == {}
    assert "seeds" not in found.table()


def test_several_labels_of_which_some_are_unknown() -> None:
    rng = np.random.default_rng(0)
    given = {}
    for fold in FOLDS:
        labels = rng.integers(0, 2, (30, 2)).astype(float)
        labels[rng.random(labels.shape) < 0.2] = math.nan
        labels[3:, 0] = np.where(np.isnan(labels[3:]).all(1), 1, labels[3:, 0])
        labels[:3] = math.nan
        ids = tuple(f"{fold}-{i:02d}" for i in range(30))
        given[fold, 0] = Predictions("multi-label", ids, labels, rng.random((30, 2)), ("x", "y"))
    found = cross_validated(given, resamples=20)
    assert found.evaluation.unlabelled == 9
    assert set(found.evaluation.thresholds) == {"x", "y"}
    assert max(map(len, found.table().splitlines())) <= 80


def test_folds_that_do_not_belong_together() -> None:
    first, second = binary(1, 0), binary(2, 0)
    with pytest.raises(DataError, match="40 images are predicted by several folds: p0-1-00"):
        pooled([first, first])
    other = Predictions("single-label", second.ids, second.labels, second.scores, ("a", "b"))
    with pytest.raises(DataError, match=r"the folds predict different things: single-label of well, ill, and .* a, b"):
        pooled([first, other])
    without = Predictions("single-label", second.ids, second.labels, second.scores, second.classes)
    assert pooled([first, without]).groups.count("") == 40


def test_the_spread_of_what_is_known() -> None:
    assert Spread((0.5, math.nan, 0.7)).mean == pytest.approx(0.6)
    assert math.isnan(Spread((0.5, math.nan)).sd)
    assert math.isnan(Spread((math.nan,)).low)
    assert Spread((0.5, math.nan)).to_dict()["high"] == 0.5
