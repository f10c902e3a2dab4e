"""Scores against scikit-learn, intervals against a simulation."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import ndtr, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from fpt_lightning.errors import ConfigurationError, DataError
from fpt_lightning.evaluation.calibration import Calibration, calibrated, fit_calibration
from fpt_lightning.evaluation.comparison import compare
from fpt_lightning.evaluation.decisions import fit_thresholds
from fpt_lightning.evaluation.measures import measure, net_benefit
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.resampling import interval, resample, resampled_weights
from fpt_lightning.evaluation.scores import evaluate

NAN = float("nan")


def single(labels: Any, scores: Any, groups: tuple[str, ...] = ()) -> Predictions:
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=float)
    ids = tuple(f"{i:05d}.png" for i in range(len(labels)))
    return Predictions("single-label", ids, labels, scores, tuple("abcdefgh"[: scores.shape[1]]), groups)


def binary(positive: Any, scores: Any, groups: tuple[str, ...] = ()) -> Predictions:
    scores = np.asarray(scores, dtype=float)
    return single(np.asarray(positive, dtype=int), np.stack([1 - scores, scores], 1), groups)


def drawn(classes: int, count: int = 80, ties: bool = False, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[range(count), labels] += 1
    scores = softmax(logits, axis=1)
    return single(labels, (scores * 4).round() / 4 if ties else scores)


def several(count: int = 90, seed: int = 0) -> Predictions:
    """Three labels an image, a fifth of them unknown."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (count, 3)).astype(float)
    scores = (rng.random((count, 3)) + 0.4 * labels) / 1.4
    labels[rng.random(labels.shape) < 0.2] = NAN
    return Predictions("multi-label", tuple(map(str, range(count))), labels, scores, ("a", "b", "c"))


def values(predictions: Predictions, **settings: Any) -> dict[str, float]:
    """The overall values, and those of classes under ``class/metric``."""
    evaluation = evaluate(predictions, resamples=2, **settings)
    found = {name: estimate.value for name, estimate in evaluation.overall.items()}
    return found | {f"{c}/{m}": e.value for c, each in evaluation.per_class.items() for m, e in each.items()}


def reference_of_class(positive: NDArray[Any], scores: NDArray[Any], decided: NDArray[Any]) -> dict[str, float]:
    false_alarms, hits, _ = sk.roc_curve(positive, scores, drop_intermediate=False)
    return {
        "auc": sk.roc_auc_score(positive, scores),
        "average_precision": sk.average_precision_score(positive, scores),
        "sensitivity": sk.recall_score(positive, decided),
        "specificity": sk.recall_score(~positive, ~decided),
        "sensitivity_at_specificity": hits[false_alarms <= 0.1 + 1e-12].max(),
    }


def reference_calibration(scores: NDArray[Any], true: NDArray[Any]) -> float:
    """ECE bin by bin, as its definition reads."""
    error = 0.0
    for i in range(15):
        upper = scores <= 1 if i == 14 else scores < (i + 1) / 15
        inside = (scores >= i / 15) & upper
        if inside.any():
            error += inside.mean() * abs(scores[inside].mean() - true[inside].mean())
    return error


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_single_label_metrics_equal_scikit_learn(classes: int, ties: bool) -> None:
    predictions = drawn(classes, ties=ties)
    true, scores, top = predictions.labels, predictions.scores, predictions.scores.argmax(1)
    one_hot = np.eye(classes)[true]
    expected = {
        "auc": np.mean([sk.roc_auc_score(one_hot[:, c], scores[:, c]) for c in range(classes)]),
        "average_precision": np.mean([sk.average_precision_score(one_hot[:, c], scores[:, c]) for c in range(classes)]),
        "accuracy": sk.accuracy_score(true, top),
        "balanced_accuracy": sk.balanced_accuracy_score(true, top),
        "f1": sk.f1_score(true, top, average="macro"),
        "kappa": sk.cohen_kappa_score(true, top),
        "brier": ((scores - one_hot) ** 2).sum(1).mean(),
        "calibration_error": reference_calibration(scores.max(1), top == true),
    }
    for index, name in enumerate(predictions.classes):
        each = reference_of_class(true == index, scores[:, index], top == index)
        expected |= {f"{name}/{metric}": value for metric, value in each.items()}
    assert values(predictions) == pytest.approx(expected, abs=1e-12)

    del expected["kappa"]
    expected["quadratic_kappa"] = sk.cohen_kappa_score(true, top, weights="quadratic")
    grades = replace(predictions, ordered=True)
    assert values(grades) == pytest.approx(expected, abs=1e-12)
    assert "Cohen's kappa" in evaluate(predictions, resamples=2).table()
    assert "quadratic kappa" in evaluate(grades, resamples=2).table()


def test_multi_label_metrics_equal_scikit_learn_where_the_label_is_known() -> None:
    predictions = several()
    expected: dict[str, float] = {}
    for index, name in enumerate(predictions.classes):
        known = ~np.isnan(predictions.labels[:, index])
        positive, scores = predictions.labels[known, index] == 1, predictions.scores[known, index]
        each = reference_of_class(positive, scores, scores >= 0.5)
        each["brier"] = sk.brier_score_loss(positive, scores)
        each["calibration_error"] = reference_calibration(scores, positive)
        expected |= {f"{name}/{metric}": value for metric, value in each.items()}
    found = values(predictions)
    assert {name: value for name, value in found.items() if "/" in name} == pytest.approx(expected, abs=1e-12)
    for metric in ("auc", "average_precision", "sensitivity", "specificity", "brier", "calibration_error"):
        assert found[metric] == pytest.approx(np.mean([expected[f"{name}/{metric}"] for name in "abc"]), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_regression_metrics_equal_scikit_learn_and_scipy(ties: bool) -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(50, 10, 70)
    found = true + rng.normal(0, 5, 70)
    if ties:
        true, found = true.round(-1), found.round(-1)
    predictions = Predictions("regression", tuple(map(str, range(70))), true, found)
    assert values(predictions) == pytest.approx(
        {
            "mae": sk.mean_absolute_error(true, found),
            "rmse": sk.root_mean_squared_error(true, found),
            "r2": sk.r2_score(true, found),
            "pearson": pearsonr(true, found).statistic,
            "spearman": spearmanr(true, found).statistic,
        },
        abs=1e-12,
    )


def test_resamples_are_scored_as_the_repeated_cases_would_be() -> None:
    rng = np.random.default_rng(0)
    for predictions in (
        drawn(3, ties=True),
        several(),
        Predictions("regression", ("1", "2", "3", "4"), *rng.random((2, 4))),
    ):
        estimates = evaluate(predictions, resamples=1, seed=5)
        (weights,) = resample(predictions.ids, 1, 5)
        rows = np.repeat(np.arange(len(predictions.ids)), weights)
        again = replace(predictions.take(rows), ids=tuple(map(str, range(len(rows)))))
        low = {name: estimate.low for name, estimate in estimates.overall.items() if name != "calibration_error"}
        assert low == pytest.approx({name: v for name, v in values(again).items() if name in low}, abs=1e-12)


def test_perfect_inverted_and_constant_scores() -> None:
    positive = np.arange(40) % 2
    perfect, inverted, constant = (
        values(binary(positive, scores)) for scores in (positive, 1 - positive, np.full(40, 0.25))
    )
    assert perfect["auc"] == perfect["accuracy"] == perfect["kappa"] == perfect["b/sensitivity_at_specificity"] == 1
    assert perfect["brier"] == perfect["calibration_error"] == 0
    assert inverted["auc"] == inverted["accuracy"] == inverted["b/sensitivity_at_specificity"] == 0
    assert (inverted["kappa"], inverted["brier"], inverted["calibration_error"]) == (-1, 2, 1)
    assert constant["auc"] == 0.5
    assert constant["b/average_precision"] == sk.average_precision_score(positive, np.full(40, 0.25)) == 0.5
    assert constant["calibration_error"] == 0.25


def test_net_benefit_weighs_wrong_decisions_by_the_odds_of_the_threshold() -> None:
    positive, scores = np.array([1, 1, 0, 0, 0], bool), np.array([0.9, 0.5, 0.5, 0.2, 0.1])
    found = net_benefit(positive, scores, np.array([0.2, 0.5, 0.8, 0.95]))
    assert found == pytest.approx([(2 - 2 / 4) / 5, (2 - 1) / 5, 1 / 5, 0])


def test_net_benefit_of_deciding_for_all_for_none_and_rightly() -> None:
    positive, thresholds = np.arange(10) < 3, np.arange(1, 100) / 100
    of_all, of_none, right = (
        net_benefit(positive, each, thresholds) for each in (np.ones(10), np.zeros(10), positive.astype(float))
    )
    assert of_all == pytest.approx(0.3 - 0.7 * thresholds / (1 - thresholds))
    assert of_all[29] == pytest.approx(0)  # at the prevalence
    assert not of_none.any()
    assert right == pytest.approx(np.full(99, 0.3))


def test_an_absent_class_is_left_out_and_said() -> None:
    predictions = drawn(4)
    predictions = predictions.take(np.flatnonzero(predictions.labels != 2))
    found, top = values(predictions), predictions.scores.argmax(1)
    assert (top == 2).any()
    assert found["auc"] == pytest.approx(np.mean([found[f"{name}/auc"] for name in "abd"]))
    assert found["f1"] == pytest.approx(sk.f1_score(predictions.labels, top, average="macro", labels=[0, 1, 3]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(predictions.labels, top))
    assert all(np.isnan(found[f"c/{metric}"]) for metric in ("auc", "average_precision", "sensitivity"))
    evaluation = evaluate(predictions, resamples=20)
    assert "Classes without an image, left out of the macro means: c." in evaluation.notes
    assert evaluation.positives["c"] == 0


def test_one_image_has_no_auc_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation = evaluate(single([1], [[0.2, 0.8]]), resamples=10)
        regression = evaluate(Predictions("regression", ("1",), np.ones(1), np.zeros(1)), resamples=10)
    assert np.isnan(evaluation.overall["auc"].value)
    assert evaluation.overall["accuracy"].value == 1
    assert "Classes that every image has, without an AUC: b." in evaluation.notes
    assert np.isnan(regression.overall["pearson"].value)
    assert regression.overall["mae"].value == 1


def test_an_auc_below_a_half_is_pointed_out() -> None:
    good = drawn(3)
    inverted = good.scores.copy()
    inverted[:, 1] = 1 - inverted[:, 1]
    labels = np.eye(3)[good.labels]
    notes = evaluate(Predictions("multi-label", good.ids, labels, inverted, good.classes), resamples=200).notes
    (note,) = (note for note in notes if note.startswith("AUC below 0.5"))
    assert "b (0." in note
    assert "a (" not in note
    assert "inverted" in note
    assert not any("AUC" in note for note in evaluate(good, resamples=200).notes)


def test_chance_is_not_called_worse_than_chance() -> None:
    """Half of all models that know nothing have an AUC below 0.5, and a correlation below 0."""
    rng = np.random.default_rng(3)
    called = unclear = below = 0
    for _ in range(60):
        evaluation = evaluate(binary(np.arange(60) % 2, rng.random(60)), resamples=200)
        below += evaluation.overall["auc"].value < 0.5
        called += any("worse than chance" in note for note in evaluation.notes)
        unclear += any("do not tell the ranking from chance" in note for note in evaluation.notes)
    assert 20 < below < 40
    assert called <= 4
    assert unclear >= 52
    numbers = Predictions("regression", tuple(map(str, range(40))), *rng.normal(size=(2, 40)))
    numbers = replace(numbers, scores=0.1 * numbers.labels - numbers.scores)
    evaluation = evaluate(numbers, resamples=200)
    assert evaluation.overall["pearson"].value < 0 < evaluation.overall["pearson"].high
    assert not any("correlation" in note for note in evaluation.notes)


def test_other_notes() -> None:
    predictions = drawn(3)
    labels = predictions.labels.copy()
    labels[:7] = -1
    assert evaluate(replace(predictions, labels=labels), resamples=200).notes == [
        "7 images without a label are left out.",
        "No groups (such as patients) are known: the intervals assume that the images are independent.",
    ]
    groups = tuple("" if i < 4 else str(i // 2) for i in range(80))
    evaluation = evaluate(replace(predictions, groups=groups), resamples=200)
    assert evaluation.notes == ["4 images have no group: each counts as its own."]
    assert evaluation.groups == 38 + 4
    pairs = replace(predictions, groups=tuple("pq"[i % 2] for i in range(80)))
    assert evaluate(pairs, resamples=200).notes == ["Only 2 groups are resampled: the intervals say little."]
    rare = binary(np.arange(40) < 3, np.linspace(1, 0, 40))
    assert any("fewer than 10 images" in note and "b (3)" in note for note in evaluate(rare, resamples=200).notes)
    falling = Predictions("regression", ("1", "2", "3"), np.arange(3.0), -np.arange(3.0))
    said = "The correlation is -1.000 [-1.000, -1.000], below 0: the labels may be inverted."
    assert said in evaluate(falling, resamples=200).notes


def test_thresholds_decide() -> None:
    predictions = drawn(3)
    evaluation = evaluate(predictions, {"b": 0.2}, resamples=2)
    decided = predictions.scores[:, 1] >= 0.2
    assert evaluation.per_class["b"]["sensitivity"].value == sk.recall_score(predictions.labels == 1, decided)
    assert evaluation.per_class["a"] == evaluate(predictions, resamples=2).per_class["a"]
    assert evaluation.thresholds == {"b": 0.2}
    assert "Classes without a threshold of their own, decided for where most probable: a, c." in evaluation.notes
    assert evaluate(several(), {"b": 0.2}, resamples=2).thresholds == {"a": 0.5, "b": 0.2, "c": 0.5}


@pytest.mark.parametrize("thresholds", [{"z": 0.5}, {"a": 1.5}, {"a": NAN}])
def test_a_threshold_of_no_class_or_of_no_probability(thresholds: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=r"the threshold of '[az]' is"):
        evaluate(drawn(3), thresholds)


def test_nothing_to_score() -> None:
    with pytest.raises(DataError, match="none of the 2 predictions has a label"):
        evaluate(single([-1, -1], [[0.5, 0.5]] * 2))
    with pytest.raises(ConfigurationError, match="resamples is 0"):
        evaluate(drawn(2), resamples=0)
    with pytest.raises(ConfigurationError, match=r"specificity 90"):
        evaluate(drawn(2), specificity=90)


def test_the_same_seed_gives_the_same_numbers_however_they_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate(drawn(3), resamples=50, seed=3)
    monkeypatch.setattr("fpt_lightning.evaluation.resampling._CHUNK", 500)
    assert evaluate(drawn(3), resamples=50, seed=3) == first
    assert evaluate(drawn(3), resamples=50, seed=4) != first


def test_for_machines_and_for_people() -> None:
    predictions = drawn(3)
    evaluation = evaluate(predictions.take(np.flatnonzero(predictions.labels != 2)), resamples=20)
    there = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert there["overall"]["auc"]["value"] == evaluation.overall["auc"].value
    assert there["per_class"]["c"]["auc"] == {"value": None, "low": None, "high": None}
    table = evaluation.table()
    auc = evaluation.overall["auc"]
    assert f"{auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}]" in table
    assert "sensitivity at specificity 0.9" in table
    assert all(note in " ".join(table.split()) for note in evaluation.notes)


# Thresholds and calibration


@pytest.mark.parametrize("criterion", ["youden", "f1"])
def test_fitted_thresholds_are_the_best(criterion: Literal["youden", "f1"]) -> None:
    predictions = several()
    for index, (name, threshold) in enumerate(fit_thresholds(predictions, criterion).items()):
        _, positive, scores = predictions.of_class(index)

        def quality(at: float, positive: Any = positive, scores: Any = scores) -> float:
            if criterion == "f1":
                return float(sk.f1_score(positive, scores >= at))
            return float(sk.balanced_accuracy_score(positive, scores >= at))

        assert name == predictions.classes[index]
        assert quality(threshold) == pytest.approx(max(quality(score) for score in scores))


def test_a_threshold_lies_midway_and_absent_classes_have_none() -> None:
    assert fit_thresholds(binary([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]))["b"] == pytest.approx(0.4)
    assert fit_thresholds(single([0, 1, 0], [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1]])).keys() == {"a", "b"}
    with pytest.raises(ConfigurationError, match="choose youden or f1"):
        fit_thresholds(drawn(2), "best")  # type: ignore[arg-type]


def test_the_calibration_that_was_put_in_is_found() -> None:
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(4000, 3))
    labels = (rng.random((4000, 1)) > softmax(logits, axis=1).cumsum(1)).sum(1)
    biases = np.array([0.8, -0.5, -0.3])
    sure = single(labels, softmax(2.5 * (logits - biases), axis=1))
    found = fit_calibration(sure)
    assert found.temperature == pytest.approx(2.5, rel=0.06)
    assert found.biases == pytest.approx(biases, abs=0.1)
    cooled = calibrated(sure, found)
    assert sk.log_loss(labels, cooled.scores) < sk.log_loss(labels, sure.scores)
    assert sk.accuracy_score(labels, cooled.scores.argmax(1)) > sk.accuracy_score(labels, sure.scores.argmax(1)) + 0.02
    assert evaluate(cooled, resamples=2).overall["calibration_error"].value < 0.03
    chance = 1 / (1 + np.exp(-logits))
    known = np.where(rng.random(chance.shape) < 0.1, NAN, rng.random(chance.shape) < chance)
    raw = 1 / (1 + np.exp(-(logits - biases) / 2))
    several_labels = Predictions("multi-label", sure.ids, known, raw, sure.classes)
    found = fit_calibration(several_labels)
    assert found.temperature == pytest.approx(0.5, rel=0.06)
    assert found.biases == pytest.approx(biases, abs=0.12)
    exact = calibrated(several_labels, Calibration(0.5, tuple(biases)))
    np.testing.assert_allclose(exact.scores, chance, atol=1e-5)


def test_of_two_classes_it_is_the_sigmoid_of_platt_with_a_prior() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(2, size=60)
    logits = 4 * rng.normal(size=60) + labels - 2
    raw = binary(labels.tolist(), (1 / (1 + np.exp(-logits))).tolist())
    count = np.bincount(labels)[labels]
    targets = np.where(labels == 1, (count + 1) / (count + 2), 1 / (count + 2))
    twice, both = np.tile(logits, 2)[:, None], np.repeat([1, 0], 60)  # each image as a positive and as a negative one
    scale = np.array([1e3, 0.3 * 2**0.5])  # a free slope; a prior of the difference of two biases
    platt = LogisticRegression(C=1, fit_intercept=False, tol=1e-8).fit(
        np.hstack([twice, np.ones_like(twice)]) * scale, both, sample_weight=np.r_[targets, 1 - targets]
    )
    expected = platt.predict_proba(np.stack([logits, np.ones(60)], 1) * scale)
    np.testing.assert_allclose(calibrated(raw, fit_calibration(raw)).scores, expected, atol=2e-3)


def test_few_images_do_not_make_a_model_certain() -> None:
    separated = single([0, 0, 1, 1], [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]])
    found = calibrated(separated, fit_calibration(separated)).scores
    assert found[0, 0] < 0.9
    of_one_class = single([0, 0, 0], [[0.5, 0.3, 0.2]] * 3)  # of the others there is no image
    biases = fit_calibration(of_one_class).biases
    assert np.abs(biases).max() < 3
    assert sum(biases) == pytest.approx(0, abs=1e-6)


def test_weights_keep_what_they_made_frequent() -> None:
    rng = np.random.default_rng(0)
    labels = (np.arange(400) % 10 == 0).astype(int)  # one in ten
    logits = 2 * rng.normal(size=400) + 4 * labels - 2  # of a model that takes both for as frequent
    balanced = binary(labels.tolist(), (1 / (1 + np.exp(-logits))).tolist())
    true, kept = fit_calibration(balanced), fit_calibration(balanced, [1, 9])
    assert calibrated(balanced, true).scores[:, 1].mean() == pytest.approx(0.1, abs=0.03)
    assert kept.biases[1] - kept.biases[0] == pytest.approx(0, abs=0.5)
    assert true.biases[1] - true.biases[0] < -1.5
    several_labels = replace(balanced, kind="multi-label", labels=np.eye(2)[labels])
    assert fit_calibration(several_labels, [1, 9]).biases[1] > fit_calibration(several_labels).biases[1] + 1.2


def test_certainty_is_calibrated_too() -> None:
    wrong = single([0, 1, 1], [[1, 0], [1, 0], [0, 1]])
    assert 0.05 <= fit_calibration(wrong).temperature <= 20
    assert np.isfinite(calibrated(wrong, Calibration(3.0)).scores).all()
    regression = Predictions("regression", ("1",), np.ones(1), np.ones(1))
    for call in (lambda: calibrated(regression, Calibration()), lambda: fit_calibration(regression)):
        with pytest.raises(ConfigurationError, match="calibration is of probabilities"):
            call()
    with pytest.raises(ConfigurationError, match="temperature is 0"):
        Calibration(0)


# Comparisons


def test_a_comparison_is_paired() -> None:
    weak, strong = drawn(3, 300, seed=1), drawn(3, 300, seed=1)
    better = strong.scores.copy()
    better[np.arange(100), strong.labels[:100]] += 1
    strong = replace(strong, scores=better / better.sum(1, keepdims=True))
    order = np.random.default_rng(0).permutation(300)
    compared = compare(weak, strong.take(order), resamples=300)
    for metric, difference in compared.differences.items():
        assert difference.first == values(weak)[metric]
        assert difference.second == values(strong)[metric]
    auc = compared.differences["auc"]
    assert 0 < auc.low < auc.value == auc.second - auc.first < auc.high
    assert auc.p == 1 / 301
    alone = evaluate(strong, resamples=300).overall["auc"]
    assert auc.high - auc.low < alone.high - alone.low  # what both have in common cancels
    same = compare(weak, weak, resamples=50).differences["auc"]
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert "second minus first; 300 paired bootstrap resamples of images" in compared.table()
    json.dumps(compared.to_dict(), allow_nan=False)


def test_every_kind_is_compared() -> None:
    table = compare(several(), several(), resamples=5, specificity=0.8).table()
    assert "sensitivity at specificity 0.8  " in table
    numbers = Predictions("regression", ("1", "2", "3"), np.arange(3.0), np.array([0.0, 1.0, 1.0]))
    assert "mean absolute error" in compare(numbers, numbers, resamples=5).table()
    with pytest.raises(ConfigurationError, match="resamples is 0"):
        compare(numbers, numbers, resamples=0)


def test_other_images_labels_or_classes_are_not_compared() -> None:
    predictions = drawn(3, 20)
    other = replace(predictions, ids=(*predictions.ids[:-1], "other.png"))
    with pytest.raises(DataError, match=r"2 are in one only, such as 00019\.png, other\.png"):
        compare(predictions, other)
    labels = predictions.labels.copy()
    labels[3] = (labels[3] + 1) % 3
    with pytest.raises(DataError, match=r"1 are with another label in each, such as 00003\.png"):
        compare(predictions, replace(predictions, labels=labels))
    with pytest.raises(DataError, match=r"single-label of a, b, c, and single-label of a, b"):
        compare(predictions, drawn(2, 20))
    with pytest.raises(DataError, match=r"single-label of a, b, c, and single-label of the grades a, b, c\."):
        compare(drawn(3), replace(drawn(3), ordered=True))


# The bootstrap


def test_interval() -> None:
    assert interval(np.zeros(100)) == {"low": 0.0, "high": 0.0, "p": 1.0}
    better = interval(np.random.default_rng(0).normal(0.1, 0.01, 999))
    assert better["p"] == 1 / 1000
    assert 0.07 < better["low"] < better["high"] < 0.13
    assert interval(np.array([-1.0, 1.0, 1.0, np.nan]))["p"] == pytest.approx(2 / 3)
    assert np.isnan(interval(np.array([np.nan]))["p"])


def test_groups_are_drawn_whole() -> None:
    weights = resample(["p", "q", "p", "r"], 50)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()


def covered(simulations: int, images: int, patients: int, grouped: bool) -> float:
    """How often the interval holds the true AUC of scores whose noise is half the patient's own."""
    rng, shift, hits = np.random.default_rng(0), 1.0, 0
    patient = np.arange(images) % patients
    for _ in range(simulations):
        ill = np.arange(patients) % 2
        noise = (rng.normal(size=patients)[patient] + rng.normal(size=images)) / np.sqrt(2)
        scores = 1 / (1 + np.exp(-(shift * ill[patient] + noise)))
        groups = tuple(map(str, patient)) if grouped else ()
        auc = evaluate(binary(ill[patient], scores, groups), resamples=300).per_class["b"]["auc"]
        hits += auc.low <= ndtr(shift / np.sqrt(2)) <= auc.high
    return hits / simulations


def test_intervals_cover_the_true_auc() -> None:
    assert 0.89 < covered(200, images=80, patients=80, grouped=False) < 0.99


def test_intervals_cover_with_correlated_images_if_patients_are_resampled() -> None:
    assert 0.89 < covered(300, images=400, patients=50, grouped=True) < 0.99
    assert covered(100, images=400, patients=50, grouped=False) < 0.75


@pytest.mark.slow
def test_coverage_is_close_to_95_percent() -> None:
    for patients in (100, 200):  # of 200 images
        assert 0.92 < covered(3000, images=200, patients=patients, grouped=True) < 0.97


def test_resamples_cannot_bound_a_calibration_error() -> None:
    """Of probabilities that come true it is 0, which chance alone never gives, in the images or in a resample."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        likely = rng.uniform(0.5, 1, 200)
        predictions = binary(rng.random(200) < likely, likely)
        evaluation = evaluate(predictions, resamples=50)
        error, brier = (evaluation.overall[name] for name in ("calibration_error", "brier"))
        (resampled,) = (
            measure(predictions, {}, 0.9, weights, per_class=False)["", "calibration_error"]
            for weights in resampled_weights(predictions, 50, 0)
        )
        assert np.percentile(resampled, 2.5) > 0.02  # what an interval would begin at
        assert error.value > 0.02
        assert np.isnan([error.low, error.high]).all()
        assert brier.low < brier.value < brier.high
    assert re.search(rf"calibration error +{error.value:.3f} *\n", evaluation.table())
    comparison = compare(predictions, replace(predictions, scores=predictions.scores[:, ::-1].copy()), resamples=20)
    difference = comparison.differences["calibration_error"]
    assert difference.value > 0
    assert np.isnan([difference.low, difference.high, difference.p]).all()
    assert re.search(r"calibration error +0\.\d+ +0\.\d+ +\+0\.\d+ +- +-", comparison.table())


@pytest.mark.parametrize("predictions", [drawn(3), several()], ids=lambda each: each.kind)
def test_every_interval_contains_its_value(predictions: Predictions) -> None:
    evaluation = evaluate(predictions, resamples=200)
    for values in (evaluation.overall, *evaluation.per_class.values()):
        for name, estimate in values.items():
            assert name == "calibration_error" or estimate.low <= estimate.value <= estimate.high


def test_a_validation_auc_outside_the_interval_is_pointed_out() -> None:
    predictions = drawn(3)
    auc = evaluate(predictions, resamples=200).overall["auc"]

    def said(validation: float | None) -> list[str]:
        notes = evaluate(predictions, resamples=200, validation_auc=validation).notes
        return [note for note in notes if "validation AUC" in note]

    assert said(None) == said(auc.value) == said(auc.high - 1e-6) == said(NAN) == []
    (above,), (below,) = said(auc.high + 0.01), said(auc.low - 0.01)
    assert f"is above the interval of the test AUC, {auc}: the epoch was chosen" in above
    assert "is below the interval" in below


def test_decisions_that_differ_from_the_most_probable_class_are_explained() -> None:
    predictions = binary([0, 0, 1, 1], [0.1, 0.3, 0.4, 0.9])
    (note,) = (n for n in evaluate(predictions, {"a": 0.65, "b": 0.35}, resamples=5).notes if "most probable" in n)
    assert note.startswith("1 of 4 images are decided otherwise than for their most probable class")
    for thresholds in ({"a": 0.5, "b": 0.5}, None):
        assert not any("most probable" in note for note in evaluate(predictions, thresholds, resamples=5).notes)
