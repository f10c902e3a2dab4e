"""Subgroups: values against scikit-learn, intervals against their formula, and what too little stands behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import recall_score, roc_auc_score

from commands import fails, run
from fpt_lightning.errors import DataError
from fpt_lightning.evaluation.comparison import Difference
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.report import write_report
from fpt_lightning.evaluation.scores import evaluate
from fpt_lightning.evaluation.subgroups import FEW, UNKNOWN, Breakdown, SubgroupEstimate, evaluate_subgroups

SEX = np.array(["F", "M"])[np.arange(120) % 3 // 2]  # 80 and 40


def binary(count: int = 120) -> Predictions:
    rng = np.random.default_rng(0)
    positive = rng.random(count) < 0.4
    scores = rng.beta(1 + positive, 2 - positive)
    ids = tuple(f"{i:03d}.png" for i in range(count))
    return Predictions("single-label", ids, positive.astype(int), np.stack([1 - scores, scores], 1), ("no", "yes"))


def numbers(errors: np.ndarray, groups: tuple[str, ...] = ()) -> Predictions:
    ids = tuple(f"{i:03d}.png" for i in range(len(errors)))
    return Predictions(
        "regression", ids, np.arange(len(errors), dtype=float), np.arange(len(errors)) + errors, (), groups
    )


def by(predictions: Predictions, values: object, resamples: int = 50) -> Breakdown:
    (breakdown,) = evaluate_subgroups(predictions, {"c": list(np.asarray(values, dtype=str))}, resamples=resamples)
    return breakdown


def minus_rest(estimate: SubgroupEstimate) -> Difference:
    assert estimate.minus_rest is not None
    return estimate.minus_rest


def test_metrics_of_a_subgroup_and_of_the_rest_equal_scikit_learn() -> None:
    predictions = binary()
    found = by(predictions, SEX).subgroups
    assert list(found) == ["F", "M"]
    for name, each in found.items():
        own, rest = name == SEX, name != SEX
        positive, scores = predictions.labels == 1, predictions.scores[:, 1]
        auc, sensitivity = each.overall["auc"], each.per_class["yes"]["sensitivity"]
        expected = [roc_auc_score(positive[rows], scores[rows]) for rows in (own, rest)]
        difference = minus_rest(auc)
        assert (difference.second, difference.first) == pytest.approx(tuple(expected))
        assert (auc.value, difference.value) == pytest.approx((expected[0], expected[0] - expected[1]))
        assert sensitivity.value == pytest.approx(recall_score(positive[own], scores[own] > 0.5))
        assert (each.images, each.positives["yes"]) == (own.sum(), (positive & own).sum())
        assert auc.low < auc.value < auc.high
        assert each.overall["calibration_error"].minus_rest is None


def test_the_whole_s_thresholds_decide() -> None:
    predictions = binary()
    (breakdown,) = evaluate_subgroups(predictions, {"c": list(SEX)}, {"yes": 0.25}, resamples=2)
    for name, each in breakdown.subgroups.items():
        rows = name == SEX
        expected = recall_score(predictions.labels[rows], predictions.scores[rows, 1] >= 0.25)
        assert each.per_class["yes"]["sensitivity"].value == pytest.approx(expected)


def test_intervals_of_a_mean_and_of_its_difference_are_those_of_its_formula() -> None:
    errors = np.random.default_rng(0).gamma(2, 1, 600)
    here = np.arange(600) % 4 == 0
    own = by(numbers(errors), here, 2000).subgroups["True"].overall["mae"]
    of_mean = [np.std(errors[rows]) / np.sqrt(rows.sum()) for rows in (here, ~here)]
    assert (own.high - own.low) / 2 == pytest.approx(1.96 * of_mean[0], rel=0.06)
    difference = minus_rest(own)
    assert difference.value == pytest.approx(errors[here].mean() - errors[~here].mean())
    assert (difference.high - difference.low) / 2 == pytest.approx(1.96 * np.hypot(*of_mean), rel=0.06)


def test_a_group_in_two_subgroups_is_drawn_with_both_of_its_images() -> None:
    errors, eyes = np.repeat(np.random.default_rng(0).gamma(2, 1, 40), 2), np.arange(80) % 2
    groups = tuple(f"p{i // 2}" for i in range(80))
    paired, apart = (by(numbers(errors, each), eyes).subgroups["0"].overall["mae"] for each in (groups, ()))
    assert paired.low < paired.high
    assert (minus_rest(paired).low, minus_rest(paired).high) == pytest.approx((0, 0))
    assert minus_rest(apart).low < -0.1 < 0.1 < minus_rest(apart).high
    assert by(numbers(errors, groups), eyes).subgroups["0"].groups == 40


def test_too_few_images_or_groups_have_no_metric() -> None:
    few = ["rare" if i < FEW - 1 else "common" for i in range(60)]
    found = by(numbers(np.arange(60.0)), few)
    rare, common = found.subgroups["rare"], found.subgroups["common"]
    assert np.isnan([rare.overall["mae"].value, rare.overall["mae"].low]).all()
    assert common.overall["mae"].value == pytest.approx(np.arange(FEW - 1, 60).mean())
    assert np.isnan([minus_rest(each.overall["mae"]).value for each in (rare, common)]).all()
    assert any("fewer than 10 images, of which no metric is given: rare (9)" in note for note in found.notes)
    one_patient = by(numbers(np.arange(60.0), tuple(f"p{max(0, i - 20)}" for i in range(60))), np.arange(60) < 25)
    assert np.isnan(one_patient.subgroups["True"].overall["mae"].value)
    assert any("fewer than 10 groups, of which no metric is given: True (5)" in note for note in one_patient.notes)


def test_metrics_that_rest_on_a_class_need_enough_images_of_it() -> None:
    predictions = binary()
    positive = np.flatnonzero(predictions.labels == 1)
    values = np.where(np.isin(np.arange(120), positive[FEW - 1 :]), "many", "few")  # 9 positives and all negatives
    found = by(predictions, values)
    few = found.subgroups["few"]
    assert few.positives["yes"] == FEW - 1
    for metric in ("auc", "average_precision", "sensitivity", "sensitivity_at_specificity"):
        assert np.isnan(few.per_class["yes"][metric].value)
    for metric in ("auc", "average_precision", "balanced_accuracy", "f1"):
        assert np.isnan(few.overall[metric].value)
    assert few.per_class["yes"]["specificity"].value == pytest.approx(
        recall_score(predictions.labels == 0, predictions.scores[:, 1] <= 0.5)
    )
    assert few.overall["accuracy"].low < few.overall["accuracy"].high
    assert any("yes in few (9 with it, " in note for note in found.notes)
    assert "-" in found.table().splitlines()[4]


def test_classes_that_no_image_has_do_not_count() -> None:
    predictions = binary()
    wider = np.column_stack([predictions.scores, np.zeros(120)])
    found = by(replace(predictions, scores=wider, classes=("no", "yes", "never")), SEX)
    assert found.subgroups["F"].overall["auc"].value == pytest.approx(
        by(predictions, SEX).subgroups["F"].overall["auc"].value
    )


def test_a_subgroup_of_all_images_has_no_rest() -> None:
    found = by(binary(), ["F"] * 120)
    assert found.notes == ["All images are in one subgroup: there is no rest to compare it with."]
    assert found.subgroups["F"].overall["auc"].value == pytest.approx(
        evaluate(binary(), resamples=2).overall["auc"].value
    )


def test_intervals_without_width_are_said() -> None:
    sure = replace(binary(), scores=np.eye(2)[binary().labels])
    assert any("Intervals without width, in F, M" in note for note in by(sure, SEX).notes)


def test_numbers_of_many_values_are_in_quartiles_with_their_bounds() -> None:
    ages = np.r_[np.random.default_rng(0).permutation(np.arange(20, 100)), ["", "NA"] * 8]
    found = by(numbers(np.arange(96.0)), ages).subgroups
    assert {name: each.images for name, each in found.items()} == {
        "20 to 39": 20,
        "above 39 to 59": 20,
        "above 59 to 79": 20,
        "above 79 to 99": 20,
        UNKNOWN: 16,
    }
    mostly_none = by(numbers(np.arange(100.0)), [0.0] * 60 + [i / 4 for i in range(1, 41)]).subgroups
    assert {name: each.images for name, each in mostly_none.items()} == {
        "0": 60,
        "above 0 to 3.75": 15,
        "above 3.75 to 10": 25,
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["10", "9", "nan", " 9 "], {"9": 2, "10": 1, UNKNOWN: 1}),
        (["none", "laser", "", "Null"], {"laser": 1, "none": 1, UNKNOWN: 2}),
        (["2", "None", "", "1"], {"1": 1, "2": 1, UNKNOWN: 2}),
        (["", "", "", ""], {UNKNOWN: 4}),
        (["1", "x", "unknown", ""], {"1": 1, "x": 1, UNKNOWN: 2}),
    ],
)
def test_values_are_subgroups_in_their_order(values: list[str], expected: dict[str, int]) -> None:
    found = by(numbers(np.arange(4.0)), values).subgroups
    assert [(name, each.images) for name, each in found.items()] == list(expected.items())


def test_unlabelled_images_are_left_out_with_their_values() -> None:
    predictions = binary()
    labels = np.where(SEX == "M", -1, predictions.labels)
    assert list(by(replace(predictions, labels=labels), SEX).subgroups) == ["F"]
    with pytest.raises(DataError, match="'c' has 3 values for 120 predictions"):
        by(predictions, ["a"] * 3)


def test_cases_are_called_cases() -> None:
    predictions = replace(binary(), unit="case", ids=tuple(f"exam {i}" for i in range(120)))
    found = by(predictions, ["few"] * 5 + ["many"] * 115)
    assert found.table().splitlines()[1].startswith("cases ")
    assert not any("image" in note for note in found.notes)


# The command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    binary().write(tmp_path / "p.csv")
    sites = ["<b>"] * 60 + ["north"] * 55 + ["south"] * 5
    rows = [f"{id},{sex},{site}" for id, sex, site in zip(binary().ids, SEX, sites, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,sex,site", *rows, "other.png,F,north"]))
    return tmp_path


def test_evaluate_by_columns_of_the_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("evaluate", folder / "p.csv", "--by", "sex", "--by=site", "--manifest", folder / "labels.csv", "--resamples=50")
    printed = capsys.readouterr().out
    breakdowns = evaluate_subgroups(binary(), {"sex": list(SEX)}, resamples=50)
    found = json.loads((folder / "evaluate/evaluation.json").read_text())
    assert list(found["subgroups"]) == ["sex", "site"]
    assert found["subgroups"]["sex"] == json.loads(json.dumps(breakdowns[0].to_dict()))
    assert found["subgroups"]["site"]["subgroups"]["south"]["overall"]["auc"]["value"] is None
    assert breakdowns[0].table() in printed
    assert "south (5)" in printed
    page = (folder / "evaluate/report.html").read_text()
    assert "<h2>By sex</h2>" in page
    assert "<b>" not in page.split("<h2>By site</h2>")[1].replace("<b>AUC</b>", "").split("<svg")[0]
    assert "&lt;b&gt;" in page


def test_what_is_not_given_is_not_drawn(tmp_path: Path) -> None:
    predictions = binary()
    values = ["a"] * 60 + ["b"] * 57 + ["rare"] * 3
    pages = []
    for shown in (values, ["few"] * 3 + ["rare"] * 117):
        breakdowns = evaluate_subgroups(predictions, {"site": shown}, resamples=20)
        write_report(
            tmp_path / "r.html", predictions, evaluate(predictions, resamples=20), title="t", breakdowns=breakdowns
        )
        pages.append((tmp_path / "r.html").read_text().split("<h2>By site</h2>")[1])
    drawn = pages[0].split("<table")[0]
    assert drawn.count("<figure>") == 4
    assert "rare" not in drawn.split("<svg", 1)[1]
    assert "rare" in pages[0].split("<table")[1]


def test_evaluate_by_what_there_is_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("evaluate", folder / "p.csv")
    assert "give columns, such as --by sex, and the --manifest" in fails(capsys, *given, "--by", "sex")
    assert "give columns, such as --by sex, and the --manifest" in fails(
        capsys, *given, "--manifest", folder / "labels.csv"
    )
    assert "no column 'age'; it has image, sex, site" in fails(
        capsys, *given, "--by", "age", "--manifest", folder / "labels.csv"
    )
    (folder / "short.csv").write_text("image,sex\n" + "".join(f"{id},F\n" for id in binary().ids[2:]))
    message = fails(capsys, *given, "--by", "sex", "--manifest", folder / "short.csv")
    assert "DataError: 2 of 120 images are not in the column 'image' of the manifest" in message
    assert "000.png, 001.png" in message
    assert not (folder / "evaluate").exists()
