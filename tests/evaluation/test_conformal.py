"""Prediction sets hold the truth as often as is asked for: by hand, and by simulation, of patients too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from fpt_lightning.errors import ConfigurationError, DataError
from fpt_lightning.evaluation.conformal import (
    Sets,
    assess,
    fit_nonconformity,
    prediction_sets,
    quantiles,
    shortage,
)
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.scores import evaluate


def single(labels: Any, scores: Any, classes: str = "abc", **settings: Any) -> Predictions:
    labels = np.array(labels)
    ids = tuple(f"{i}.png" for i in range(len(labels)))
    return Predictions("single-label", ids, labels, np.array(scores, float), tuple(classes), **settings)


def numbers(true: NDArray[Any], found: NDArray[Any], groups: tuple[str, ...] = ()) -> Predictions:
    return Predictions("regression", tuple(map(str, range(len(true)))), true, found, groups=groups)


VALIDATION = single(
    [0, 0, 0, 1, 1, 2, 2, -1],
    [
        [0.7, 0.2, 0.1],  # the most probable: 0
        [0.4, 0.5, 0.1],  # 1 - 0.4
        [0.8, 0.1, 0.1],
        [0.3, 0.6, 0.1],
        [0.55, 0.3, 0.15],  # 0.7
        [0.5, 0.3, 0.2],  # 0.8
        [0.1, 0.2, 0.7],
        [0.1, 0.2, 0.7],  # without a label
    ],
)


def test_an_example_by_hand() -> None:
    found = fit_nonconformity(VALIDATION)
    assert found[""][0] == pytest.approx([0, 0, 0, 0, 0.6, 0.7, 0.8])
    assert found[""][1] == [1.0] * 7
    # the ceil(8 * 0.5) = 4th, ceil(8 * 0.7) = 6th and ceil(8 * 0.875) = 7th smallest of 7
    assert [quantiles(found, c)[""] for c in (0.5, 0.7, 0.875)] == pytest.approx([0, 0.7, 0.8])
    new = single([1, 2, 0], [[0.6, 0.3, 0.1], [0.35, 0.35, 0.3], [0.1, 0.1, 0.8]])
    sets = prediction_sets(new, found, 0.7)
    assert sets.columns(new) == {"set": ["a|b", "a|b|c", "c"], "abstains": [1, 1, 0]}
    assert (sets.images, sets.units) == (7, 7)
    assert prediction_sets(new, found, 0.5).columns(new)["set"] == ["a", "a|b", "c"]  # two are equally probable
    coverage = assess(new, sets, resamples=50)
    assert (coverage.covered.value, coverage.single.value, coverage.size.value) == pytest.approx((2 / 3, 1 / 3, 2))
    interval = binomtest(2, 3).proportion_ci(method="exact")
    assert (coverage.covered.low, coverage.covered.high) == pytest.approx((interval.low, interval.high))
    assert {name: each.value for name, each in coverage.per_class.items()} == {"a": 0, "b": 1, "c": 1}
    assert coverage.size.low < 2 < coverage.size.high


def test_ranks_are_exact_where_rounding_would_miss_them() -> None:
    scores = {"": [np.linspace(0, 1, 99).tolist(), [1.0] * 99]}
    assert 0.07 * 100 > 7
    assert quantiles(scores, 0.07)[""] == scores[""][0][6]  # the 7th
    thirds = {"": [np.linspace(0, 1, 30).tolist(), [1 / 3] * 30]}  # of ten patients: the rank 9.9 is in the last one
    assert quantiles(thirds, 0.9)[""] == thirds[""][0][29]
    assert quantiles(thirds, 8 / 11)[""] == thirds[""][0][23]


def test_sets_of_grades_are_intervals() -> None:
    scores = [[0.3, 0.1, 0.4, 0.15, 0.05], [0.05, 0.3, 0.25, 0.35, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]]
    grades = single([0, 1, 4], scores, "01234", ordered=True)
    # grade 0 alone has 0.3; 1 or less, below the most probable 3, have 0.35; of equal ones the first is most probable
    assert fit_nonconformity(grades)[""][0] == pytest.approx([0.65, 0.7, 0.8])
    sets = prediction_sets(grades, {"": [[0.7] * 9 + [0.8], [1.0] * 10]}, 0.8)
    assert sets.columns(grades)["set"] == ["0|1|2", "1|2|3", "0|1|2|3"]
    rng = np.random.default_rng(0)
    drawn = single(np.zeros(500, int), rng.dirichlet([0.5] * 5, 500), "01234", ordered=True)
    for coverage in (0.5, 0.8):
        members = prediction_sets(drawn, fit_nonconformity(drawn), coverage).members.astype(int)
        assert set(np.abs(np.diff(members, axis=1, prepend=0, append=0)).sum(1)) == {2}  # it begins once, ends once


def test_several_labels_are_each_present_absent_or_open() -> None:
    scores = np.array([[0.9, 0.4], [0.2, 0.55], [0.7, 0.1], [0.4, 0.5]])
    labels = np.array([[1, 1], [0, 0], [0, np.nan], [np.nan, 1]])
    found = Predictions("multi-label", ("1", "2", "3", "4"), labels, scores, ("x", "y"))
    fitted = fit_nonconformity(found)
    assert fitted["x"][0] == pytest.approx([0, 0, 0.7])
    assert fitted["y"][0] == pytest.approx([0, 0.55, 0.6])
    sets = prediction_sets(found, fitted, 0.75)
    assert sets.columns(found) == {"set_x": ["1", "0", "0|1", "0|1"], "set_y": ["0|1", "0|1", "0", "0|1"]}
    coverage = assess(found, sets, resamples=20)
    assert coverage.covered.value == 1
    assert coverage.covered.low == pytest.approx(0.025 ** (1 / 4))  # all of four
    assert coverage.size.value == pytest.approx((1.5 + 1.5 + 2 + 2) / 4)
    assert prediction_sets(found, fitted, 0.5).columns(found)["set_x"] == ["1", "0", "1", "0"]
    short = dict(fitted, y=[[], []])
    assert "needs 3 labelled validation patients" in shortage(short, 0.75)
    assert shortage(short, 0.75).endswith("there are y 0")


def test_a_number_has_an_interval() -> None:
    validation = numbers(np.arange(9.0), np.arange(9.0) + np.array([0, 1, -2, 3, -4, 5, 6, -7, 8]))
    new = numbers(np.array([3.0, 20.0]), np.array([1.0, 2.0]))
    sets = prediction_sets(new, fit_nonconformity(validation), 0.8)
    assert sets.columns(new) == {"low": [-6, -5], "high": [8, 9]}
    coverage = assess(new, sets, resamples=20)
    assert (coverage.covered.value, coverage.size.value, coverage.per_class) == (0.5, 14, {})
    assert math.isnan(coverage.single.value)
    assert "they are 14.000 [14.000, 14.000] wide" in str(coverage)


@pytest.mark.parametrize(("count", "coverage"), [(9, 0.9), (30, 0.5), (30, 0.8), (100, 0.9), (100, 0.95), (100, 0.99)])
def test_coverage_of_exchangeable_images(coverage: float, count: int) -> None:
    """Between what is asked for and 1 / (n + 1) more, as nothing is tied."""
    rng, covered = np.random.default_rng([count, int(100 * coverage)]), list[float]()
    for _ in range(400):
        noise = rng.standard_t(3, count + 200)
        validation = numbers(np.zeros(count), noise[:count])
        test = numbers(np.zeros(200), noise[count:])
        low, high = prediction_sets(test, fit_nonconformity(validation), coverage).members.T
        covered.append(float(((low <= 0) & (high >= 0)).mean()))
    error = 4 * np.std(covered) / math.sqrt(len(covered))
    assert coverage - error <= np.mean(covered) <= coverage + 1 / (count + 1) + error


def patients(rng: np.random.Generator, count: int) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Errors of images: hard patients have one image, easy ones eight, and each an error of its own."""
    hard = rng.random(count) < 0.5
    images = np.where(hard, 1, 8)
    of = np.repeat(np.arange(count), images)
    own = rng.normal(0, np.where(hard, 3, 0.5))
    return own[of] + rng.normal(0, 0.3, len(of)), tuple(f"p{i}" for i in of)


def test_coverage_of_patients_with_several_images() -> None:
    """A random image of a new patient is covered as often as asked for; images taken for independent ones are not."""
    rng, covered = np.random.default_rng(0), {"by patient": list[float](), "by image": list[float]()}
    for _ in range(80):
        errors, groups = patients(rng, 60)
        drawn, owners = patients(rng, 60)
        test = numbers(np.zeros(len(drawn)), drawn, owners)
        for name, known in (("by patient", groups), ("by image", ())):
            fitted = fit_nonconformity(numbers(np.zeros(len(errors)), errors, known))
            covered[name].append(assess(test, prediction_sets(test, fitted, 0.9), resamples=1).covered.value)
    error = 4 * np.std(covered["by patient"]) / math.sqrt(80)
    assert 0.9 - error <= np.mean(covered["by patient"]) <= 0.9 + 1 / 61 + error
    assert np.mean(covered["by image"]) < 0.75


def test_coverage_of_sets_of_classes() -> None:
    """At least as asked for; the model may be so good that the most probable class alone covers more."""
    rng = np.random.default_rng(1)
    for coverage, sharpness in ((0.8, 1.0), (0.9, 1.0), (0.9, 6.0)):
        covered, sizes = list[float](), list[float]()
        for _ in range(150):
            labels = rng.integers(0, 3, 260)
            logits = rng.normal(0, 1, (260, 3)) + sharpness * np.eye(3)[labels]
            scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            validation, test = single(labels[:60], scores[:60]), single(labels[60:], scores[60:])
            members = prediction_sets(test, fit_nonconformity(validation), coverage).members
            covered.append(float(members[np.arange(200), test.labels].mean()))
            sizes.append(float(members.sum(1).mean()))
        error = 4 * np.std(covered) / math.sqrt(150)
        assert np.mean(covered) >= coverage - error
        if sharpness == 1.0:
            assert np.mean(covered) <= coverage + 1 / 61 + error
            assert np.mean(sizes) > 1.2
        else:
            assert np.mean(sizes) == 1


def test_an_epoch_that_was_chosen_on_the_same_images_covers_less() -> None:
    """Of 20 that differ by noise of their own, by the AUC of 60 images; what the documentation says of it."""
    rng, covered = np.random.default_rng(0), {"the first": list[float](), "the best": list[float]()}
    for _ in range(80):
        labels = rng.integers(0, 2, 360)
        signal = 2.4 * (labels - 0.5) + rng.normal(0, 1.2, 360)
        ill = 1 / (1 + np.exp(-(signal + rng.normal(0, 0.7, (20, 360)))))
        (positive,), (negative,) = np.nonzero(labels[:60] == 1), np.nonzero(labels[:60] == 0)
        aucs = (ill[:, positive, None] > ill[:, None, negative]).mean((1, 2))
        for name, epoch in (("the first", ill[0]), ("the best", ill[int(np.argmax(aucs))])):
            scores = np.column_stack([1 - epoch, epoch])
            validation, test = (single(labels[part], scores[part], "ab") for part in (slice(60), slice(60, None)))
            members = prediction_sets(test, fit_nonconformity(validation), 0.9).members
            covered[name].append(float(members[np.arange(300), test.labels].mean()))
    assert np.mean(covered["the first"]) == pytest.approx(0.905, abs=0.015)
    assert np.mean(covered["the best"]) == pytest.approx(0.865, abs=0.015)


@pytest.mark.parametrize(
    ("coverage", "units", "enough"), [(0.9, 9, True), (0.9, 8, False), (0.95, 19, True), (0.95, 18, False), (0.5, 1, 1)]
)
def test_how_many_validation_images_a_coverage_needs(coverage: float, units: int, enough: bool) -> None:
    groups = tuple(f"p{i // 2}" for i in range(2 * units))
    for known, count in (((), units), (groups, 2 * units)):
        fitted = fit_nonconformity(numbers(np.zeros(count), np.ones(count), known))
        why = shortage(fitted, coverage)
        assert (not why) == enough
        if why:
            assert f"needs {units + 1} labelled validation patients" in why
            assert why.endswith(f"there are {units}")


@pytest.mark.parametrize("coverage", [0, 1, 90, -0.1, math.nan])
def test_a_coverage_that_is_no_share(coverage: float) -> None:
    with pytest.raises(ConfigurationError, match=r"coverage is .*: give a share between 0 and 1"):
        prediction_sets(VALIDATION, fit_nonconformity(VALIDATION), coverage)


def test_without_a_label_there_are_no_sets() -> None:
    with pytest.raises(DataError, match="label"):
        fit_nonconformity(single([-1], [[0.5, 0.3, 0.2]]))
    with pytest.raises(ConfigurationError, match="no validation image has a label"):
        prediction_sets(VALIDATION, {}, 0.5)


def test_an_evaluation_tells_of_sets_in_a_sentence() -> None:
    sets = prediction_sets(VALIDATION, fit_nonconformity(VALIDATION), 0.75)
    evaluation = evaluate(VALIDATION, sets=sets, resamples=20)
    assert evaluation.coverage == assess(VALIDATION, sets, resamples=20)
    told = " ".join(evaluation.table().split())
    assert (
        "Prediction sets for a coverage of 75%, from 7 validation images: 0.857 [0.421, 0.996] hold the truth" in told
    )
    assert "Coverage by class, for which nothing is promised: a 1.000, b 1.000, c 0.500." in told
    assert evaluation.to_dict()["coverage"]["covered"]["value"] == pytest.approx(6 / 7)
    assert evaluate(VALIDATION, resamples=5).to_dict()["coverage"] is None


@pytest.mark.parametrize("kind", ["single-label", "multi-label", "regression"])
def test_files_have_sets_beside_what_they_are_evaluated_by(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = {
        "single-label": VALIDATION,
        "multi-label": Predictions("multi-label", ("1", "2"), np.ones((2, 2)), rng.random((2, 2)), ("x", "y")),
        "regression": numbers(rng.random(4), rng.random(4)),
    }[kind]
    sets = prediction_sets(found, fit_nonconformity(found), 0.5)
    assert isinstance(sets, Sets)
    found.write(tmp_path / "p.csv", sets.columns(found))
    again = Predictions.read(tmp_path / "p.csv")
    np.testing.assert_array_equal(again.scores, found.scores)
    np.testing.assert_array_equal(again.labels, found.labels)
    header = (tmp_path / "p.csv").read_text().splitlines()[0]
    assert header.endswith(",".join(sets.columns(found)))
