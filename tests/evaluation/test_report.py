"""The report stands alone and says what was evaluated; the commands write it."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fpt_lightning.cli.compare import compare
from fpt_lightning.cli.evaluate import evaluate as evaluate_file
from fpt_lightning.errors import ConfigurationError, DataError
from fpt_lightning.evaluation.estimates import Estimate, number
from fpt_lightning.evaluation.figures import draw_decision, draw_forest
from fpt_lightning.evaluation.gallery import largest_errors
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.report import MOST_PANELS, SplitSummary, write_report
from fpt_lightning.evaluation.scores import Evaluation, evaluate

NASTY = ("<script>alert(1)</script>", 'Größe & "Grad"', "基底細胞癌")


class Page(HTMLParser):
    """What a browser would see of a page; complains of tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.text += data + " "


def single_label(classes: tuple[str, ...] = NASTY, count: int = 90) -> Predictions:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(classes), count)
    scores = rng.random((count, len(classes)))
    scores[range(count), labels] += 1
    ids, groups = tuple(map(str, range(count))), tuple(f"p{i // 2}" for i in range(count))
    return Predictions("single-label", ids, labels, scores / scores.sum(1, keepdims=True), classes, groups)


def multi_label(classes: int, count: int = 120) -> Predictions:
    rng = np.random.default_rng(0)
    labels = (rng.random((count, classes)) < 0.4).astype(float)
    scores = (rng.random((count, classes)) + labels) / 2
    labels[rng.random(labels.shape) < 0.1] = np.nan
    labels[:, 0] = 0
    names = tuple(f"finding {i}" for i in range(classes))
    return Predictions("multi-label", tuple(map(str, range(count))), labels, scores, names)


def numbers(count: int = 1000) -> Predictions:
    rng = np.random.default_rng(0)
    true = rng.normal(50, 10, count)
    return Predictions("regression", tuple(map(str, range(count))), true, true + rng.normal(1, 5, count))


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("history") / "metrics.csv"
    lines = ["epoch,step,train_loss_step,train_loss_epoch,val_loss,val_auc"]
    lines += [f"{e},{e},,,0.5,0.8\n{e},{e},,0.4,," for e in range(3)]
    path.write_text("\n".join(lines))
    return path


def written(path: Path, predictions: Predictions, history: Path) -> tuple[Page, Evaluation]:
    evaluation = evaluate(predictions, resamples=50)
    classes = dict.fromkeys(predictions.classes, 30)
    write_report(
        path,
        predictions,
        evaluation,
        title="Réport <of> & a run",
        data={"train": SplitSummary(700, classes, 321), "test": SplitSummary(90, classes)},
        history=history,
        memory={"training <live>": 736.25},
        configuration="model: <FPT+> & more",
        about={"fpt-lightning": "0.1.0", "<torch>": "2.9"},
    )
    assert [each.name for each in path.parent.iterdir() if each.name.startswith(path.name)] == [path.name]
    return Page(path), evaluation


KINDS = {
    "two": single_label(("benign", "malignant")),
    "three": single_label(),
    "several": multi_label(4),
    "regression": numbers(),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, history: Path) -> Callable[[str], tuple[Page, Evaluation]]:
    """The report of one of ``KINDS``, written once."""
    folder = tmp_path_factory.mktemp("reports")
    return cache(lambda name: written(folder / f"{name}.html", KINDS[name], history))


@pytest.mark.parametrize("name", KINDS)
def test_a_report_stands_alone(name: str, report: Callable[[str], tuple[Page, Evaluation]]) -> None:
    page, _ = report(name)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "image"} & {*page.tags}
    assert not {"src", "srcset", "xlink:href", "onload", "onclick"} & {name for name, _ in page.attributes}
    assert all(value.startswith("#") and value[1:] in page.ids for name, value in page.attributes if name == "href")
    assert set(re.findall(r"url\(#([^)]*)\)", page.source)) <= {*page.ids}
    assert len(page.ids) == len({*page.ids})
    assert not re.search(r"https?:|@import|url\((?!#)|NaN|\bnan\b", page.source)


@pytest.mark.parametrize("name", KINDS)
def test_a_report_says_what_was_evaluated(name: str, report: Callable[[str], tuple[Page, Evaluation]]) -> None:
    predictions = KINDS[name]
    page, evaluation = report(name)
    curves = ["Classes", "ROC curves", "Precision-recall", "Calibration", "Decision curves"]
    of_kind = {
        "single-label": [*curves, "Confusion matrix"],
        "multi-label": curves,
        "regression": ["Agreement"],
    }[evaluation.kind]
    noted = ["Notes"] if evaluation.notes else []
    ends = ["Training", "Peak memory", "Configuration", "About"]
    assert page.headings == ["Results", *noted, "Data", *of_kind, *ends]
    for estimate in [
        *evaluation.overall.values(),
        *(e for each in evaluation.per_class.values() for e in each.values()),
    ]:
        if estimate.value == estimate.value:
            assert all(number(value) in page.text for value in (estimate.value, estimate.low, estimate.high))
    assert all(text in page.text for text in (*evaluation.notes, *predictions.classes, evaluation.basis()))
    for text in ("700", "321", "736.2 MiB", "training <live>", "model: <FPT+> & more", "<torch>", "2.9"):
        assert text in page.text
    assert "Réport <of> & a run" in page.text
    assert "not a medical device" in page.text


def test_a_report_has_what_reviewers_ask_for(tmp_path: Path, history: Path) -> None:
    predictions = single_label()
    wrong = np.r_[(predictions.labels[:3] + 1) % 3, predictions.labels[3:]]
    predictions = replace(predictions, ids=tuple(f"{id}<&>.png" for id in predictions.ids), labels=wrong)
    errors = largest_errors(predictions, 2)
    picture = b"a JPEG file"
    write_report(
        tmp_path / "report.html",
        predictions,
        evaluate(predictions, resamples=10),
        title="a run",
        methods="It was trained with <care>.",
        data={"test": SplitSummary(90, dict.fromkeys(predictions.classes, 30))},
        apart=["None of 45 groups & cases."],
        pictures={predictions.ids[i]: picture for i in errors},
        history=history,
        epoch=1,
    )
    page = Page(tmp_path / "report.html")
    assert page.headings[:3] == ["Results", "Methods", "Data"]
    for text in ("It was trained with <care>.", "None of 45 groups & cases.", "validation 0.800", "Dashed: epoch 2"):
        assert text in page.text
    sources = [value for name, value in page.attributes if name == "src"]
    assert sources == [f"data:image/jpeg;base64,{b64encode(picture).decode()}"] * 2
    shown = page.text.split("Most confident errors")[1]
    for i in errors:
        label, top = predictions.labels[i], predictions.scores[i].argmax()
        assert label != top
        assert predictions.ids[i] in shown
        assert f"label: {predictions.classes[label]}" in shown
        assert f"predicted: {predictions.classes[top]} ({number(predictions.scores[i, top])})" in shown


def test_the_most_confident_errors_come_first() -> None:
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.4, 0.6]])
    single = Predictions("single-label", tuple("abcd"), np.array([0, 0, 0, 1]), scores, ("no", "yes"))
    assert largest_errors(single, 12) == [2, 1]
    assert largest_errors(single, 1) == [2]
    labels = np.array([[1, 0], [1, 0], [np.nan, 0], [1, 1]])
    several = Predictions("multi-label", tuple("abcd"), labels, scores, ("x", "y"))
    assert largest_errors(several, 12) == [2, 1, 3]
    regression = Predictions("regression", tuple("abc"), np.array([1.0, 2, 3]), np.array([1.0, 4, 2.5]))
    assert largest_errors(regression, 12) == [1, 2]


@pytest.mark.parametrize("name", KINDS)
def test_cases_have_curves_of_their_own(name: str, tmp_path: Path, history: Path) -> None:
    cases = replace(KINDS[name], unit="case", groups=())
    evaluations = [evaluate(each, resamples=10) for each in (KINDS[name], cases)]
    write_report(tmp_path / "report.html", KINDS[name], evaluations[0], title="a run", cases=(cases, evaluations[1]))
    headings = Page(tmp_path / "report.html").headings
    of_cases = ["Classes of cases", "ROC curves of cases", "Calibration of cases"]
    own = headings[headings.index("Cases") + 1 :]
    assert own == (["Agreement of cases"] if name == "regression" else of_cases)


def test_class_names_are_escaped(report: Callable[[str], tuple[Page, Evaluation]]) -> None:
    page, _ = report("three")
    assert "<script>" not in page.source
    assert page.source.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6


def test_the_confusion_matrix_counts_the_images(report: Callable[[str], tuple[Page, Evaluation]]) -> None:
    predictions = KINDS["three"]
    page, _ = report("three")
    counts = [int(text) for text in re.findall(r'<td class="cell"[^>]*>(\d+)<small>', page.source)]
    pairs = [*zip(predictions.labels, predictions.scores.argmax(1), strict=True)]
    assert counts == [pairs.count((i, j)) for i in range(3) for j in range(3)]


def test_many_classes_have_a_table_but_not_all_a_curve(tmp_path: Path, history: Path) -> None:
    page, _ = written(tmp_path / "report.html", multi_label(MOST_PANELS + 3), history)
    assert page.tags.count("figure") == 4 * MOST_PANELS + 2
    assert f"The {MOST_PANELS} classes with the most images are drawn." in page.text
    assert f"finding {MOST_PANELS + 2}" in page.text
    assert len(page.source.encode()) < 1.2e6


@pytest.mark.parametrize(
    "predictions",
    [
        Predictions("single-label", ("1",), np.array([0]), np.array([[0.5, 0.5]]), ("a", "b")),
        Predictions("regression", ("1",), np.array([1.0]), np.array([1.0])),
        Predictions("multi-label", ("1", "2"), np.array([[np.nan], [1.0]]), np.array([[0.5], [0.5]]), ("a",)),
    ],
    ids=lambda each: each.kind,
)
def test_one_image_makes_a_report_with_nothing_else(predictions: Predictions, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", predictions, evaluate(predictions, resamples=10), title="tiny")
    page = Page(tmp_path / "report.html")
    assert not {"Data", "Training", "Peak memory", "Configuration", "About", "ROC curves"} & {*page.headings}


@pytest.mark.parametrize(("name", "titles"), [("two", ("malignant",)), ("three", NASTY)])
def test_decision_curves_are_of_each_class_or_of_the_second_of_two(
    name: str, titles: tuple[str, ...], report: Callable[[str], tuple[Page, Evaluation]]
) -> None:
    page, _ = report(name)
    section = page.source.split("<h2>Decision curves</h2>")[1].split("</section>")[0]
    assert re.findall("<figcaption><b>(.*?)</b>", section) == [escape(title) for title in titles]
    assert section.count('aria-label="decision curve"') == len(titles)
    assert page.attributes.count(("aria-label", "decision curve")) == len(titles)


def test_classes_without_curves_are_named(report: Callable[[str], tuple[Page, Evaluation]]) -> None:
    page, _ = report("several")
    assert page.attributes.count(("aria-label", "decision curve")) == 3
    assert "No curves of finding 0: none or all of the images have the class." in page.text
    assert "No curves of" not in report("three")[0].text


def test_a_decision_curve_is_cut_off_below_and_not_above() -> None:
    positive = np.arange(1000) < 20
    right, wrong = (draw_decision(positive, each.astype(float)) for each in (positive, ~positive))
    for drawn in (right, wrong):
        ticks = [float(text) for text in re.findall("<text[^>]*>([^<a-z]*)</text>", drawn.replace("\u2212", "-"))]
        assert 0.01 <= max(tick for tick in ticks if tick < 0.5) <= 0.021
        assert min(ticks) >= -0.005


def test_a_report_is_the_same_each_time(
    tmp_path: Path, history: Path, report: Callable[[str], tuple[Page, Evaluation]]
) -> None:
    again, _ = written(tmp_path / "report.html", single_label(), history)
    assert again.source == report("three")[0].source


def test_a_missing_history_leaves_no_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the history .* does not exist"):
        written(tmp_path / "report.html", single_label(), tmp_path / "none.csv")
    assert not (tmp_path / "report.html").exists()


def test_names_of_subgroups_are_whole() -> None:
    names = ["hospital of a town with a long name, department of ophthalmology", "b"]
    drawn = draw_forest(dict.fromkeys(names, Estimate(0.5, 0.4, 0.6)), Estimate(0.5, 0.4, 0.6))
    texts = re.findall("<text[^>]*>([^<]*)</text>|<tspan[^>]*>([^<]*)</tspan>", drawn)
    shown = " ".join(text for pair in texts for text in pair if text)
    assert all(word in shown for name in names for word in name.split())
    assert "..." not in shown


def test_labels_of_an_axis_keep_their_digits() -> None:
    drawn = draw_forest({"one": Estimate(0.88, 0.871, 0.889)}, Estimate(0.88, 0.876, 0.884))
    texts = re.findall("<text[^>]*>([^<]*)</text>", drawn)
    assert {"one", "0.875", "0.885"} <= {*texts}
    assert not re.search(r"\d\.\d{3}", re.sub(">[^<]*<", "><", drawn))


# The commands


def test_evaluate_writes_beside_the_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = single_label()
    predictions.write(tmp_path / "p.csv")
    evaluate_file(str(tmp_path / "p.csv"), resamples=20)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["evaluation.json", "p.csv", "report.html"]
    found = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text(encoding="utf-8"))
    evaluation = evaluate(Predictions.read(tmp_path / "p.csv"), resamples=20)
    assert found == json.loads(json.dumps(evaluation.to_dict()))
    assert evaluation.table() in capsys.readouterr().out
    assert "p.csv" in Page(tmp_path / "evaluate" / "report.html").text
    evaluate_file(str(tmp_path / "p.csv"), resamples=10)
    assert json.loads((tmp_path / "evaluate-1" / "evaluation.json").read_text(encoding="utf-8")) == found


def test_evaluate_fits_on_validation_images(tmp_path: Path) -> None:
    single_label().write(tmp_path / "p.csv")
    single_label(count=60).write(tmp_path / "v.csv")
    settings = {"predictions": str(tmp_path / "p.csv"), "validation": str(tmp_path / "v.csv"), "resamples": 20}
    changed: dict[str, dict[str, object]] = {"set": {"thresholds": {NASTY[0]: 0.25}}, "cool": {"calibrate": True}}
    for folder, changes in {"plain": {}, **changed, "sets": {"coverage": 0.7}}.items():
        evaluate_file(**settings, **changes, out=str(tmp_path / folder))  # type: ignore[arg-type]
    plain, given, cool = (
        json.loads((tmp_path / folder / "evaluation.json").read_text(encoding="utf-8"))
        for folder in ("plain", "set", "cool")
    )
    assert set(plain["thresholds"]) == {*NASTY}
    assert not any("validation AUC" in note for note in plain["notes"])
    assert given["thresholds"] == plain["thresholds"] | {NASTY[0]: 0.25}
    assert cool["overall"]["calibration_error"]["value"] < plain["overall"]["calibration_error"]["value"]
    assert cool["overall"]["accuracy"] == plain["overall"]["accuracy"]
    assert "temperature" in Page(tmp_path / "cool" / "report.html").text
    assert (plain["coverage"]["asked"], plain["coverage"]["units"], plain["coverage"]["images"]) == (0.9, 30, 60)
    told = Page(tmp_path / "sets" / "report.html")
    assert "Prediction sets" in told.headings
    assert "Made for a coverage of 70%, from 60 validation images of 30 groups." in told.text
    with pytest.raises(ConfigurationError, match=r"a coverage of 0\.99 needs 99 labelled"):
        evaluate_file(**settings, coverage=0.99)  # type: ignore[arg-type]


def test_evaluate_holds_the_auc_against_that_of_validation_images(tmp_path: Path) -> None:
    perfect = single_label(("no", "yes"))
    perfect.write(tmp_path / "v.csv")
    scores = np.random.default_rng(1).dirichlet((1, 1), len(perfect.ids))
    replace(perfect, scores=scores).write(tmp_path / "p.csv")
    evaluate_file(str(tmp_path / "p.csv"), validation=str(tmp_path / "v.csv"), resamples=100)
    notes = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text(encoding="utf-8"))["notes"]
    assert any(note.startswith("The validation AUC, ") and "is above the interval" in note for note in notes)


def test_evaluate_refuses_what_cannot_be_fitted(tmp_path: Path) -> None:
    single_label().write(tmp_path / "p.csv")
    multi_label(2).write(tmp_path / "v.csv")
    with pytest.raises(ConfigurationError, match="give --validation"):
        evaluate_file(str(tmp_path / "p.csv"), calibrate=True)
    with pytest.raises(ConfigurationError, match=r"coverage is 0\.9, but there are no validation images"):
        evaluate_file(str(tmp_path / "p.csv"), coverage=0.9)
    with pytest.raises(ConfigurationError, match=r"multi-label of finding 0, finding 1, but .*p\.csv is single-label"):
        evaluate_file(str(tmp_path / "p.csv"), validation=str(tmp_path / "v.csv"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "v.csv"]


def test_compare_prints_the_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.csv", "b.csv"):
        single_label().write(tmp_path / name)
    compare(str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), resamples=20)
    printed = capsys.readouterr().out
    assert "b.csv" in printed
    assert re.search(r"AUC +0\.\d{3} +0\.\d{3} +\+0\.000 +\[\+0\.000, \+0\.000\] +1\.0000", printed)
