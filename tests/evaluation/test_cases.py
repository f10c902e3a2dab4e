"""Cases of several images: probabilities and labels against their definitions, AUC against scikit-learn, files."""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from commands import fails, run
from fpt_lightning.errors import ConfigurationError, DataError
from fpt_lightning.evaluation.cases import RULES, Rule, by_case, choose_rule, evaluate_cases
from fpt_lightning.evaluation.decisions import fit_thresholds
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.scores import evaluate
from fpt_lightning.methods.tasks import TASKS, make_task

NAN = float("nan")
CASES = ("e2", "e1", "e2", "e1", "", "e1")
OF = {"e1": [1, 3, 5], "e2": [0, 2], "f4": [4]}  # positions of each case's images


def six(kind: Any, labels: Any, scores: Any, classes: tuple[str, ...] = (), **more: Any) -> Predictions:
    ids = tuple(f"f{i}" for i in range(6))
    return Predictions(kind, ids, np.array(labels), np.array(scores), classes, cases=CASES, **more)


def binary(count: int = 240, seed: int = 0) -> Predictions:
    """Four images a case, of which one shows what an ill case has; each patient has two cases."""
    rng = np.random.default_rng(seed)
    ill = rng.random(count // 4) < 0.5
    shown = (ill[:, None] & (np.arange(4) == rng.integers(0, 4, (count // 4, 1)))).ravel()
    scores = (rng.beta(2, 5, count) + shown * rng.beta(3, 3, count)).clip(0, 1)
    return Predictions(
        "single-label",
        tuple(f"{i:03d}.png" for i in range(count)),
        np.repeat(ill, 4).astype(int),
        np.stack([1 - scores, scores], 1),
        ("healthy", "ill"),
        tuple(f"p{i // 8}" for i in range(count)),
        cases=tuple(f"exam {i // 4:02d}" for i in range(count)),
    )


PROBABILITIES = np.random.default_rng(0).random(6)


@pytest.mark.parametrize(
    ("rule", "joined"),
    [("mean", np.mean), ("maximum", np.max), ("noisy-or", lambda own: 1 - np.prod(1 - own))],
)
def test_probabilities_of_two_classes_and_of_labels_are_joined(rule: Rule, joined: Any) -> None:
    expected = [joined(PROBABILITIES[rows]) for rows in OF.values()]
    two = by_case(six("single-label", [0] * 6, np.stack([1 - PROBABILITIES, PROBABILITIES], 1), ("no", "yes")), rule)
    assert (two.ids, two.unit, two.cases) == (tuple(OF), "case", ())
    np.testing.assert_allclose(two.scores, np.stack([1 - np.array(expected), expected], 1))
    several = by_case(six("multi-label", np.zeros((6, 1)), PROBABILITIES[:, None], ("a",)), rule)
    np.testing.assert_allclose(several.scores[:, 0], expected)


@pytest.mark.parametrize("rule", RULES)
def test_grades_are_joined_from_each_grade_on(rule: Rule) -> None:
    scores = np.random.default_rng(0).dirichlet(np.ones(4), 6)
    found = by_case(six("single-label", [0, 1, 2, 3, 0, 1], scores, tuple("0123"), ordered=True), rule)
    for case, rows in enumerate(OF.values()):
        at_least = scores[rows][:, ::-1].cumsum(1)[:, ::-1]
        if rule == "noisy-or":  # the largest of independent grades
            outcomes = np.array(np.meshgrid(*[range(4)] * len(rows), indexing="ij")).reshape(len(rows), -1)
            chance = np.prod([scores[row][outcome] for row, outcome in zip(rows, outcomes, strict=True)], axis=0)
            expected = np.bincount(outcomes.max(0), chance, 4)
        elif rule == "maximum":
            expected = -np.diff([*at_least.max(0), 0])
        else:
            expected = scores[rows].mean(0)
        np.testing.assert_allclose(found.scores[case], expected, atol=1e-12)
    assert found.labels.tolist() == [3, 2, 0]


@pytest.mark.parametrize("rule", RULES)
def test_classes_without_an_order_sum_to_one(rule: Rule) -> None:
    scores = np.random.default_rng(0).dirichlet(np.ones(3), 6)
    predictions = six("single-label", [1, 0, 1, 0, 2, 0], scores, tuple("abc"))
    found = by_case(predictions, rule)
    assert found.labels.tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.scores.sum(1), 1)
    np.testing.assert_allclose(found.scores[2], scores[4])
    if rule == "maximum":
        np.testing.assert_allclose(found.scores[1], scores[[0, 2]].max(0) / scores[[0, 2]].max(0).sum())
    with pytest.raises(DataError, match=r"1 cases have images of several labels: e2\. Which one counts"):
        by_case(replace(predictions, labels=np.array([1, 0, 2, 0, 2, 0])), rule)


def test_numbers_have_their_mean() -> None:
    numbers = six("regression", [4.0, 1, 4, 1, NAN, 1], [1.0, 2, 3, 4, 5, 6])
    found = by_case(numbers, "mean")
    np.testing.assert_array_equal(found.labels, [1, 4, NAN])
    np.testing.assert_allclose(found.scores, [4, 2, 5])
    with pytest.raises(ConfigurationError, match="mean alone of regression"):
        by_case(numbers, "maximum")
    with pytest.raises(DataError, match="1 cases have images of several labels: e1"):
        by_case(replace(numbers, labels=np.arange(6.0).clip(4)), "mean")


def test_a_case_has_the_labels_that_any_image_has() -> None:
    labels = [[1, 0, NAN], [0, 0, 0], [0, NAN, 0], [NAN, 0, 0], [NAN, 1, 0], [1, 0, 0]]
    found = by_case(six("multi-label", labels, np.full((6, 3), 0.5), tuple("abc")), "mean")
    np.testing.assert_array_equal(found.labels, [[1, 0, 0], [1, NAN, NAN], [NAN, 1, 0]])
    unknown = by_case(six("single-label", [1, 0, -1, 1, -1, 0], np.full((6, 2), 0.5), ("no", "yes")), "mean")
    assert unknown.labels.tolist() == [1, -1, -1]


def test_groups_are_those_of_the_cases() -> None:
    assert by_case(binary(), "mean").groups[:4] == ("p0", "p0", "p1", "p1")
    assert by_case(replace(binary(), groups=binary().cases), "mean").groups == ()
    notes = evaluate(by_case(replace(binary(), groups=binary().cases), "mean"), resamples=2).notes
    assert any(note.startswith("No groups other than the cases themselves are known") for note in notes)
    assert by_case(replace(binary(), groups=()), "mean").groups == ()
    torn = replace(binary(), groups=("other", *binary().groups[1:]))
    with pytest.raises(DataError, match="1 cases have images of several groups: exam 00"):
        by_case(torn, "mean")
    with pytest.raises(DataError, match=r"names of images that have no case: 000\.png"):
        by_case(replace(binary(), cases=("", *["000.png"] * 239)), "mean")
    with pytest.raises(ConfigurationError, match="the rule of cases is 'median': choose mean, maximum, noisy-or"):
        by_case(binary(), "median")  # type: ignore[arg-type]


def test_images_of_a_case_are_resampled_together_where_no_group_is_known() -> None:
    predictions = replace(binary(), groups=())
    assert predictions.units == predictions.cases
    assert evaluate(predictions, resamples=2).groups == 60
    grouped = replace(predictions, groups=predictions.cases)
    assert evaluate(predictions, resamples=20).overall == evaluate(grouped, resamples=20).overall


@pytest.mark.parametrize("rule", RULES)
def test_the_auc_of_cases_equals_scikit_learn(rule: Rule) -> None:
    predictions = binary()
    by_exam = predictions.scores[:, 1].reshape(60, 4)
    joined = {"mean": by_exam.mean(1), "maximum": by_exam.max(1), "noisy-or": 1 - (1 - by_exam).prod(1)}[rule]
    found = evaluate_cases(predictions, rule, resamples=20, chosen=False)
    assert found.overall["auc"].value == pytest.approx(roc_auc_score(predictions.labels[::4], joined))
    assert (found.images, found.groups, found.positives["ill"]) == (60, 30, predictions.labels[::4].sum())
    assert found.basis() == "60 cases of 30 groups; 95% intervals from 20 bootstrap resamples of groups."


def test_the_rule_is_chosen_by_the_metric_that_the_best_epoch_is_chosen_by() -> None:
    predictions = binary()
    aucs = {rule: evaluate_cases(predictions, rule, resamples=1, chosen=False).overall["auc"].value for rule in RULES}
    best = choose_rule(predictions)
    assert aucs[best] == max(aucs.values()) > min(aucs.values())
    notes = evaluate_cases(predictions, best, resamples=1, chosen=True).notes
    assert "had the best AUC of validation cases" in notes[0]
    assert choose_rule(replace(predictions, labels=np.zeros(240, int))) == "mean"  # no AUC
    assert choose_rule(replace(predictions, labels=np.full(240, -1))) == "mean"
    assert choose_rule(replace(predictions, scores=np.full((240, 2), 0.5))) == "mean"  # all equal
    grades = replace(predictions, ordered=True)
    kappas = {rule: evaluate(by_case(grades, rule), resamples=1).overall["quadratic_kappa"].value for rule in RULES}
    assert kappas[choose_rule(grades)] == max(kappas.values()) > min(kappas.values())
    monitored = {make_task(name, 1 if name == "regression" else 2).MONITOR[0] for name in TASKS}
    assert monitored == {"auc", "quadratic_kappa", "mae"}


def test_cases_of_several_classes_are_counted() -> None:
    mixed = replace(binary(), labels=np.arange(240) % 8 // 7)
    notes = evaluate_cases(mixed, "mean", resamples=2, chosen=False).notes
    assert "30 cases have images of several classes: the highest counts, of healthy, ill the last." in notes
    assert not any("image" in note for note in evaluate_cases(binary(), "mean", resamples=2, chosen=False).notes[1:])


# Files


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for predictions in (binary(), by_case(binary(), "mean"), replace(by_case(binary(), "mean"), groups=())):
        predictions.write(tmp_path / "p.csv")
        read = Predictions.read(tmp_path / "p.csv")
        for name in ("ids", "groups", "cases", "unit", "classes"):
            assert getattr(read, name) == getattr(predictions, name)
        np.testing.assert_array_equal(read.scores, predictions.scores)
    replace(binary(), cases=("",) * 240).write(tmp_path / "none.csv")
    assert Predictions.read(tmp_path / "none.csv").cases == ()
    assert (tmp_path / "p.csv").read_text().startswith("case,label,most_probable,prob_healthy,prob_ill\nexam 00,")


def test_evaluate_gives_images_and_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test, validation = binary(), binary(160, seed=1)
    test.write(tmp_path / "p.csv")
    validation.write(tmp_path / "v.csv")
    given = ("evaluate", tmp_path / "p.csv", "--resamples=50")
    run(*given, "--validation", tmp_path / "v.csv", "--out", tmp_path / "both")
    rule = choose_rule(validation)
    thresholds = fit_thresholds(by_case(validation, rule))
    expected = evaluate_cases(test, rule, thresholds, resamples=50, chosen=True)
    found = json.loads((tmp_path / "both/evaluation.json").read_text())
    assert found["cases"] == json.loads(json.dumps(expected.to_dict()))
    assert (found["images"], found["cases"]["images"]) == (240, 60)
    assert expected.table() in capsys.readouterr().out
    page = (tmp_path / "both/report.html").read_text()
    assert "<h2>Cases</h2>" in page
    assert all(escape(note) in page for note in expected.notes)

    by_case(test, rule).write(tmp_path / "cases.csv")
    by_case(validation, rule).write(tmp_path / "v_cases.csv")
    alone = ("--validation", tmp_path / "v_cases.csv", "--out", tmp_path / "alone", "--resamples=50")
    run("evaluate", tmp_path / "cases.csv", *alone)
    again = json.loads((tmp_path / "alone/evaluation.json").read_text())
    assert again["overall"] == found["cases"]["overall"]
    assert again["per_class"] == found["cases"]["per_class"]

    run(*given, "--case_rule", "noisy-or", "--out", tmp_path / "noisy")
    noisy = json.loads((tmp_path / "noisy/evaluation.json").read_text())["cases"]
    plain = evaluate(by_case(test, "noisy-or"), resamples=50).to_dict()
    assert noisy["overall"] == json.loads(json.dumps(plain))["overall"]
    assert "case_rule is 'mean', but" in fails(capsys, "evaluate", tmp_path / "cases.csv", "--case_rule", "mean")
    message = fails(capsys, "evaluate", tmp_path / "cases.csv", "--validation", tmp_path / "v.csv")
    assert "healthy, ill, but" in message
    assert "healthy, ill by case: give those of the same model." in message
