"""Predictions come back from CSV as they went, and damage is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fpt_lightning.errors import DataError
from fpt_lightning.evaluation.predictions import Predictions

NAN = float("nan")
SINGLE = Predictions(
    "single-label",
    ("x,1.png", 'y"2.png', "z.png"),
    np.array([0, 1, -1]),
    np.array([[0.7, 0.3], [0.6, 0.4], [0.1, 0.9]]),
    ("no", "yes, it is"),
)
MULTI = Predictions(
    "multi-label",
    ("1.png", "2.png"),
    np.array([[0, 1, NAN], [1, NAN, NAN]]),
    np.array([[0.25, 0.5, 1.0], [0.125, 0.75, 0.0]]),
    ("a", "b", "Größe"),
    ("p1", ""),
)
GRADES = replace(SINGLE, classes=("0", "1"), scores=np.random.default_rng(0).dirichlet((1, 1), 3), ordered=True)
NUMBERS = Predictions(
    "regression", ("1.png", "2.png"), np.array([41.5, NAN]), np.array([40.25, -3.0]), groups=("p", "p")
)


def test_a_single_label_file(tmp_path: Path) -> None:
    SINGLE.write(tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text() == (
        'path,label,most_probable,prob_no,"prob_yes, it is"\n'
        '"x,1.png",no,no,0.7,0.3\n'
        '"y""2.png","yes, it is",no,0.6,0.4\n'
        'z.png,,"yes, it is",0.1,0.9\n'
    )
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


@pytest.mark.parametrize(
    "written",
    [
        *(SINGLE, MULTI, NUMBERS, GRADES),
        replace(SINGLE, labels=np.full(3, -1)),
        replace(MULTI, labels=MULTI.labels * NAN),
        replace(NUMBERS, labels=NUMBERS.labels * NAN),
    ],
    ids=lambda each: f"{each.kind}{'-graded' * each.ordered}{'' if each.known.any() else '-unlabelled'}",
)
def test_what_is_written_is_read(written: Predictions, tmp_path: Path) -> None:
    written.write(tmp_path / "p.csv")
    read = Predictions.read(tmp_path / "p.csv")
    for name in ("kind", "ids", "classes", "groups", "ordered"):
        assert getattr(read, name) == getattr(written, name)
    np.testing.assert_array_equal(read.labels, written.labels)
    np.testing.assert_array_equal(read.scores, written.scores)
    assert read.labels.dtype == (np.int64 if read.kind == "single-label" else np.float64)


def test_headers_of_the_other_kinds(tmp_path: Path) -> None:
    MULTI.write(tmp_path / "m.csv")
    NUMBERS.write(tmp_path / "n.csv")
    assert (tmp_path / "m.csv").read_text().splitlines()[:2] == [
        "path,group,label_a,label_b,label_Größe,prob_a,prob_b,prob_Größe",
        "1.png,p1,0,1,,0.25,0.5,1",
    ]
    assert (tmp_path / "n.csv").read_text().splitlines() == [
        "path,group,label,prediction",
        "1.png,p,41.5,40.25",
        "2.png,p,,-3",
    ]


def test_a_file_without_labels_has_no_column_of_them(tmp_path: Path) -> None:
    replace(SINGLE, labels=np.full(3, -1)).write(tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text().startswith('path,most_probable,prob_no,"prob_yes, it is"\n')
    replace(MULTI, labels=MULTI.labels * NAN).write(tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_text().startswith("path,group,prob_a,prob_b,prob_Größe\n")


def test_columns_may_be_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prob_b,label,prob_a,group,path\n0.9,b,0.1,q,1.png\n")
    read = Predictions.read(tmp_path / "p.csv")
    assert read.classes == ("b", "a")
    assert read.labels.tolist() == [0]
    assert read.groups == ("q",)


HEAD = "path,label,prob_a,prob_b\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "holds no row"),
        (HEAD, "holds no row below its header"),
        ("path,label,prob_a,prob_b,prob_a\n1,a,0,1,0\n", "several columns named prob_a"),
        ("label,prob_a,prob_b\na,0,1\n", "has the columns label, prob_a, prob_b: it needs path"),
        ("path,label\n1,a\n", "it needs path"),
        ("path\n1\n", "it needs path"),
        ("path,label,prob_a\n1,a,1\n", "two or more"),
        ("path,label_a,label_b,prob_a\n1,0,1,0.5\n", "it needs path"),
        ("path,label,prob_a,prob_b,age\n1,a,0,1,50\n", "it needs path"),
        (HEAD + "1,a,0.5\n", "line 2: the number of fields"),
        (HEAD + "1,a,0.5,0.5\n2,c,0.5,0.5\n", r"line 3: label is 'c', which is not one of the classes a, b, or empty"),
        (HEAD + "1,a,0.5,0.5\n1,b,0.5,0.5\n", "the image '1' is there more than once"),
        (HEAD + ",a,0.5,0.5\n", "line 2: the path is empty"),
        (HEAD + "1,a,1.5,-0.5\n", r"line 2: prob_a is '1\.5', which is not a probability from 0 to 1"),
        (HEAD + "1,a,nan,0.5\n", "line 2: prob_a is 'nan', which is not a finite number"),
        (HEAD + "1,a,high,0.5\n", "line 2: prob_a is 'high', which is not a number"),
        (HEAD + "1,a,,0.5\n", "line 2: prob_a is '', which is not a number"),
        (HEAD + "1,a,0.5,0.5\n2,b,0.5,0.4\n", r"line 3: the probabilities sum to 0\.9, not to 1"),
        (
            "path,label,most_probable,prob_a,prob_b\n1,a,b,0.6,0.4\n",
            r"line 2: most_probable is 'b', which is not the cl",
        ),
        ("path,label,grade,prob_a,prob_b\n1,a,a,0.6,0.4\n", "it needs path"),
        ("path,label_a,prob_a\n1,0.5,0.5\n", r"line 2: label_a is '0\.5', which is not 0, 1 or empty"),
        ("path,label,prediction\n1,2,x\n", "line 2: prediction is 'x', which is not a number"),
        ("path,label,prediction\n1,inf,2\n", "line 2: label is 'inf', which is not a finite number"),
        (b"\xff\xfe\x00", "not a CSV file in UTF-8"),
    ],
)
def test_damage_is_named(text: str | bytes, error: str, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=error) as raised:
        Predictions.read(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the predictions file .*none\.csv does not exist"):
        Predictions.read(tmp_path / "none.csv")


def test_rounded_probabilities_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("path,label,prob_a,prob_b,prob_c\n1,a,0.33,0.33,0.33\n")
    assert Predictions.read(tmp_path / "p.csv").scores.sum() == pytest.approx(0.99)


def test_arrays_that_do_not_belong_together() -> None:
    with pytest.raises(DataError, match=r"single-label predictions of 1 images and 2 classes"):
        Predictions("single-label", ("1",), np.array([0]), np.array([0.5]), ("a", "b"))
    with pytest.raises(DataError, match="a group and a case an image or none"):
        Predictions("regression", ("1", "2"), np.zeros(2), np.zeros(2), groups=("p",))


def test_labelled_rows() -> None:
    assert SINGLE.labelled().ids == SINGLE.ids[:2]
    assert MULTI.labelled().groups == ("p1", "")
    assert NUMBERS.labelled().ids == ("1.png",)
    known, positive, scores = MULTI.of_class(1)
    assert (known.tolist(), positive.tolist(), scores.tolist()) == ([True, False], [True], [0.5])
