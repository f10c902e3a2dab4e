"""An evaluation as one HTML file that stands alone: no network, no script, figures within."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from fpt_lightning.evaluation.conformal import Coverage
from fpt_lightning.evaluation.estimates import Estimate, label, number
from fpt_lightning.evaluation.figures import (
    SCATTERED,
    draw_bland_altman,
    draw_decision,
    draw_forest,
    draw_history,
    draw_precision_recall,
    draw_reliability,
    draw_roc,
    draw_scatter,
    limits_of_agreement,
)
from fpt_lightning.evaluation.gallery import gallery
from fpt_lightning.evaluation.measures import confusion_matrix
from fpt_lightning.evaluation.page import capital, note_box, panel, section, table, write_page
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.resampling import resampled_weights
from fpt_lightning.evaluation.scores import Evaluation
from fpt_lightning.evaluation.subgroups import Breakdown, SubgroupEstimate
from fpt_lightning.files import Row, read_rows

BAND_RESAMPLES = 500
MOST_PANELS = 24
"""How many classes have curves drawn, those with the most images first."""

# Columns of a history that are drawn: losses, and the first of the others that is there.
_HISTORY = {
    "train_loss_epoch": "training",
    "val_loss": "validation",
    "val_quadratic_kappa": "validation quadratic kappa",
    "val_auc": "validation AUC",
    "val_mae": "validation mean absolute error",
    "val_accuracy": "validation accuracy",
}


_CURVES = _ROC, _RECALL, _CALIBRATION, _BENEFIT = "ROC curves", "Precision-recall", "Calibration", "Decision curves"

_FOREST = ("auc", "balanced_accuracy", "sensitivity", "specificity", "mae", "spearman")
"""Overall metrics of subgroups that are drawn."""


@dataclass(frozen=True)
class SplitSummary:
    """What a split holds.

    Attributes:
        images: how many.
        classes: how many of each class.
        groups: how many groups, such as patients; None where unknown.
    """

    images: int
    classes: Mapping[str, int]
    groups: int | None = None


def write_report(
    path: str | Path,
    predictions: Predictions,
    evaluation: Evaluation,
    *,
    title: str,
    methods: str | None = None,
    folds: tuple[str, Sequence[Sequence[str]]] | None = None,
    cases: tuple[Predictions, Evaluation] | None = None,
    breakdowns: Sequence[Breakdown] = (),
    data: Mapping[str, SplitSummary] | None = None,
    apart: Sequence[str] = (),
    pictures: Mapping[str, bytes] | None = None,
    history: str | Path | None = None,
    epoch: int | None = None,
    memory: Mapping[str, float] | None = None,
    configuration: str | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write the report of an evaluation, whole or not at all.

    Args:
        path: of the HTML file.
        predictions: what was evaluated.
        evaluation: of them.
        title: of the report.
        methods: a paragraph on how the model was trained and tested, as papers have it.
        folds: of a cross-validation, what the columns of a table are, and the table, its heads first.
        cases: predictions of the cases that the images are of, and their evaluation.
        breakdowns: of the predictions into subgroups.
        data: by split.
        apart: sentences on patients and files in several splits.
        pictures: JPEG files of images that are predicted wrongly, by id
            (``fpt_lightning.evaluation.gallery.largest_errors``).
        history: Lightning's ``metrics.csv`` of the training.
        epoch: of the history, from 0, that is evaluated: it is marked, and its validation stands beside the test.
        memory: peaks in MiB, by name.
        configuration: of the run, as text.
        about: versions, file names and whatever else identifies the run, by name.

    Raises:
        DataError: a history that cannot be read.
    """
    labelled = predictions.labelled()
    epochs = [] if history is None else read_rows(Path(history), "history")
    sections = [
        _headline(evaluation, "Results", validation=_validation(epochs, epoch)),
        _notes(evaluation.notes),
        section("Methods", f'<p class="prose">{escape(methods)}</p>') if methods else "",
        _folds(*folds) if folds else "",
        _data(data, apart) if data else "",
        _agreement(labelled) if evaluation.kind == "regression" else _classification(labelled, evaluation),
        _sets(evaluation.coverage) if evaluation.coverage else "",
        _gallery(labelled, pictures) if pictures else "",
        _cases(*cases) if cases else "",
        *(_subgroups(breakdown, evaluation) for breakdown in breakdowns),
        _training(epochs, epoch),
        _memory(memory) if memory else "",
        _configuration(configuration) if configuration else "",
        _about(about) if about else "",
    ]
    write_page(Path(path), title, evaluation.basis(), sections)


# Sections


def _headline(
    evaluation: Evaluation, title: str, about: str = "", validation: Mapping[str, float] | None = None
) -> str:
    beside = {name: f"<small>validation {number(value)}</small>" for name, value in (validation or {}).items()}
    tiles = [
        f"<div><dt>{escape(capital(label(metric, evaluation.specificity)))}</dt><dd><b>{number(estimate.value)}</b>"
        f"<small>{_bounds(estimate)}</small>{beside.get(metric, '')}</dd></div>"
        for metric, estimate in evaluation.overall.items()
    ]
    averaged = {
        "single-label": "AUC, average precision, balanced accuracy and F1 are means over the classes.",
        "multi-label": "Each is the mean over the classes.",
        "regression": "Errors are in the unit of the label.",
    }[evaluation.kind]
    columns = len(tiles) if len(tiles) < 7 else 4
    listed = f'<dl class="tiles" style="--columns:{columns}">{"".join(tiles)}</dl>'
    below = "Below them that of the validation images at the epoch that is tested. " if validation else ""
    return section(title, listed, f"{about}Value and 95% interval. {below}{averaged}")


def _validation(history: Sequence[Row], epoch: int | None) -> dict[str, float]:
    """Metrics of the validation images at an epoch, by name."""
    values = [each for row in history if row["epoch"] == str(epoch) for each in row.items()]
    return {name.removeprefix("val_"): float(value) for name, value in values if name.startswith("val_") and value}


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<section class="notes"><h2>Notes</h2><ul>{items}</ul></section>' if notes else ""


def _folds(caption: str, rows: Sequence[Sequence[str]]) -> str:
    heads, *cells = rows
    shown = [[escape(capital(cell)) for cell in row] for row in cells]
    return section("Folds", table(heads, shown, "narrow"), caption)


def _data(data: Mapping[str, SplitSummary], apart: Sequence[str]) -> str:
    classes = list(dict.fromkeys(name for split in data.values() for name in split.classes))
    rows = [["Images", *(f"{split.images:,}" for split in data.values())]]
    if any(split.groups is not None for split in data.values()):
        groups = ("-" if split.groups is None else f"{split.groups:,}" for split in data.values())
        rows.append(["Groups, such as patients", *groups])
    rows += [[name, *(_share(split.classes.get(name, 0), split.images) for split in data.values())] for name in classes]
    listed = f'<ul class="prose">{"".join(f"<li>{escape(each)}</li>" for each in apart)}</ul>' if apart else ""
    return section("Data", table(["", *data], [[escape(cell) for cell in row] for row in rows], "narrow") + listed)


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.0f}%)" if total else "0"


def _classification(labelled: Predictions, evaluation: Evaluation) -> str:
    confusion = _confusion(labelled) if evaluation.kind == "single-label" else ""
    return _class_table(evaluation, "Classes") + _curves(labelled, evaluation, _CURVES) + confusion


def _class_table(evaluation: Evaluation, title: str) -> str:
    metrics = list(next(iter(evaluation.per_class.values())))
    heads = [
        "Class",
        f"{evaluation.unit.capitalize()}s",
        *(capital(label(metric, evaluation.specificity)) for metric in metrics),
    ]
    explanation = "Each class against the rest. Sensitivity and specificity are those of the decision for the class: "
    explanation += "from its threshold on." if evaluation.thresholds else "where it is the most probable."
    rows = []
    for name, values in evaluation.per_class.items():
        images = evaluation.positives[name] + evaluation.negatives[name]
        counted = f"{evaluation.positives[name]:,}<small>of {images:,}</small>"
        rows.append([escape(name), counted, *(_cell(values[metric]) for metric in metrics)])
    if evaluation.thresholds:
        heads.insert(2, "Threshold")
        for row, name in zip(rows, evaluation.per_class, strict=True):
            row.insert(2, number(evaluation.thresholds[name]) if name in evaluation.thresholds else "most probable")
    return section(title, table(heads, rows), explanation)


def _curves(labelled: Predictions, evaluation: Evaluation, wanted: Sequence[str], of: str = "") -> str:
    """Sections of curves by their titles, to which is added what they are of."""
    shown, without = _shown(labelled, evaluation)
    roc, recall, calibration, benefit = [], [], [], []
    if evaluation.kind == "single-label":
        top = labelled.scores.argmax(1)
        svg = draw_reliability(labelled.scores.max(1), top == labelled.labels)
        calibration.append(panel("Most probable class", _named(evaluation.overall, "calibration_error"), svg))
    for name in shown:
        known, positive, scores = labelled.of_class(labelled.classes.index(name))
        values = evaluation.per_class[name]
        weights = (each[:, known] for each in resampled_weights(labelled, BAND_RESAMPLES, 0))
        decision = values["sensitivity"].value, values["specificity"].value
        roc.append(panel(name, _named(values, "auc"), draw_roc(positive, scores, weights, decision)))
        recall.append(panel(name, _named(values, "average_precision"), draw_precision_recall(positive, scores)))
        calibration.append(panel(name, _named(values, "calibration_error"), draw_reliability(scores, positive)))
        benefit.append(panel(name, "", draw_decision(positive, scores)))
    fewer = f" The {MOST_PANELS} classes with the most images are drawn." if len(labelled.classes) > MOST_PANELS else ""
    missing = (
        f" No curves of {', '.join(without)}: none or all of the {evaluation.unit}s have the class." if without else ""
    )
    groups = [
        (_ROC, f"Shaded: 95% of {BAND_RESAMPLES} resamples. Dot: the decision.{fewer}{missing}", roc),
        (_RECALL, f"Dashed: the share of {evaluation.unit}s that have the class.", recall),
        (
            _CALIBRATION,
            f"Diagonal: probabilities that come true. Bars: {evaluation.unit}s in each bin. The calibration error has "
            "no interval: chance alone makes it larger than 0.",
            calibration,
        ),
        (
            _BENEFIT,
            f"Net benefit of acting from a probability on: the share of {evaluation.unit}s that rightly get an action, "
            "less that of those that wrongly get it, weighed by the odds of that probability. The model (solid) helps "
            "where it is above acting on all (dashed) and on none (0), if its probabilities are calibrated.",
            benefit,
        ),
    ]
    sections = [
        section(f"{title}{of}", f'<div class="panels">{"".join(panels)}</div>', explanation)
        for title, explanation, panels in groups
        if panels and title in wanted
    ]
    if len(shown) == 1 and len(sections) == len(_CURVES):
        sections = [f'<div class="row">{"".join(sections[:3])}</div>', sections[3]]
    return "".join(sections)


def _shown(labelled: Predictions, evaluation: Evaluation) -> tuple[list[str], list[str]]:
    """Classes that have curves, and those that can have none, as no image or every one has them.

    Of two that exclude each other the second alone, as the first one's would be its mirror.
    """
    names = (
        labelled.classes[1:] if evaluation.kind == "single-label" and len(labelled.classes) == 2 else labelled.classes
    )
    scored = [name for name in names if evaluation.positives[name] and evaluation.negatives[name]]
    most = sorted(scored, key=lambda name: -evaluation.positives[name])[:MOST_PANELS]
    return [name for name in scored if name in most], [name for name in names if name not in scored]


def _named(values: Mapping[str, Estimate], metric: str) -> str:
    return f"{label(metric, 0)} {number(values[metric].value)}" if metric in values else ""


def _confusion(labelled: Predictions) -> str:
    counts = confusion_matrix(labelled)
    rows = []
    for name, row in zip(labelled.classes, counts, strict=True):
        shares = row / max(1, row.sum())
        cells = [
            f'<td class="cell" style="--share:{share:.3f}">{count:,}<small>{100 * share:.0f}%</small></td>'
            for count, share in zip(row, shares, strict=True)
        ]
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}<td>{row.sum():,}</td></tr>')
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in labelled.classes)
    table = (
        '<div class="scroll"><table class="confusion"><thead><tr><th>true \\ predicted</th>'
        f'{heads}<th scope="col">all</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    return section(
        "Confusion matrix",
        table,
        "Images by true class (rows) and most probable class, whatever thresholds say; shares of each row.",
    )


def _sets(found: Coverage) -> str:
    rows = [["Sets that hold the truth", _cell(found.covered)]]
    if found.per_class:
        rows += [["Sets of one class", _cell(found.single)], ["Classes in a set", _cell(found.size)]]
        rows += [[f"Of {escape(name)}: hold the truth", _cell(each)] for name, each in found.per_class.items()]
    else:
        rows.append(["Width of an interval", _cell(found.size)])
    explanation = (
        f"Made {found.basis}. Promised is a mean over patients like those of validation, for no class by itself; "
        "each patient weighs the same here."
    )
    return section("Prediction sets", table([], rows, "narrow"), explanation)


def _gallery(labelled: Predictions, pictures: Mapping[str, bytes]) -> str:
    what = {
        "single-label": "Images of another class than the most probable one, those with the highest probability first.",
        "multi-label": "Images with a label far from its probability, the furthest first.",
        "regression": "Images whose number is furthest from the predicted one, the furthest first.",
    }[labelled.kind]
    return section("Most confident errors", gallery(labelled, pictures), what)


def _cases(predictions: Predictions, evaluation: Evaluation) -> str:
    """The headline, notes, classes and main curves of cases."""
    labelled, of = predictions.labelled(), " of cases"
    parts = [_headline(evaluation, "Cases", f"{evaluation.basis()} "), note_box(evaluation.notes)]
    if evaluation.kind == "regression":
        parts.append(_agreement(labelled, of))
    else:
        parts += [
            _class_table(evaluation, f"Classes{of}"),
            _curves(labelled, evaluation, (_ROC, _CALIBRATION), of),
        ]
    return "".join(parts)


def _subgroups(breakdown: Breakdown, evaluation: Evaluation) -> str:
    panels = [_forest(breakdown, evaluation, name, metric) for name, metric in _drawn_metrics(evaluation)]
    classes = "".join(f"<h3>{escape(name)}</h3>{_subgroup_table(breakdown, name)}" for name in evaluation.per_class)
    content = [
        note_box(breakdown.notes),
        f'<div class="panels wide">{"".join(panels)}</div>',
        _subgroup_table(breakdown),
        f"<details><summary>Show each class</summary>{classes}</details>" if classes else "",
    ]
    explanation = (
        f"Line and band: all {breakdown.unit}s. In the table the value with its 95% interval, and below it the "
        f"difference to all other {breakdown.unit}s with its own: of many such intervals one in twenty leaves out 0 by "
        "chance alone."
    )
    if evaluation.kind != "regression":
        explanation += (
            " Average precision, accuracy, F1, kappa and Brier score also change with how common a class is in a "
            "subgroup; AUC, sensitivity and specificity do not."
        )
    return section(f"By {breakdown.column}", "".join(content), explanation)


def _drawn_metrics(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Those of subgroups, by class (empty of all); of two classes that exclude each other the second's."""
    two = evaluation.kind == "single-label" and len(evaluation.per_class) == 2
    of_class = [(list(evaluation.per_class)[1], metric) for metric in ("sensitivity", "specificity")] if two else []
    return [*(("", metric) for metric in _FOREST if metric in evaluation.overall), *of_class]


def _forest(breakdown: Breakdown, evaluation: Evaluation, name: str, metric: str) -> str:
    """A panel of the subgroups that have a value; none where none has."""
    whole = (evaluation.per_class[name] if name else evaluation.overall)[metric]
    found = {key: each.of(name)[metric] for key, each in breakdown.subgroups.items()}
    given = {key: estimate for key, estimate in found.items() if estimate.value == estimate.value}
    if not given:
        return ""
    title = capital(label(metric, breakdown.specificity)) + (f", {name}" if name else "")
    return panel(title, f"all {breakdown.unit}s {whole}", draw_forest(given, whole))


def _subgroup_table(breakdown: Breakdown, name: str = "") -> str:
    """The overall metrics, or those of a class."""
    rows, metrics = [], list[str]()
    for key, each in breakdown.subgroups.items():
        metrics = list(each.of(name))
        groups = "" if each.groups is None else f"<small>of {each.groups:,} groups</small>"
        counted = f"{each.positives[name]:,}<small>of {each.images:,}</small>" if name else f"{each.images:,}{groups}"
        rows.append([escape(key), counted, *(_beside_rest(each.of(name)[metric]) for metric in metrics)])
    heads = [
        breakdown.column,
        f"{breakdown.unit.capitalize()}s",
        *(capital(label(metric, breakdown.specificity)) for metric in metrics),
    ]
    return table(heads, rows)


def _beside_rest(estimate: SubgroupEstimate) -> str:
    difference = estimate.minus_rest
    if difference is None or difference.value != difference.value:
        return _cell(estimate)
    bounds = (
        f"{number(difference.low, '+')} to {number(difference.high, '+')}" if difference.low == difference.low else ""
    )
    return f'{_cell(estimate)}<div class="rest">{number(difference.value, "+")}<small>{bounds}</small></div>'


def _agreement(labelled: Predictions, of: str = "") -> str:
    true, found = labelled.labels, labelled.scores
    low, high = limits_of_agreement(true, found)
    bias = f"bias {number(float((found - true).mean()), '+')}, limits {number(low, '+')} to {number(high, '+')}"
    panels = [
        panel("Predicted against true", "line: equal", draw_scatter(true, found)),
        panel("Bland-Altman", bias, draw_bland_altman(true, found)),
    ]
    explanation = "Dashed: 95% limits of agreement, the mean difference and 1.96 standard deviations to either side."
    if len(true) > SCATTERED:
        explanation += f" {SCATTERED} of {len(true):,} {labelled.unit}s are drawn, chosen at random."
    return section(f"Agreement{of}", f'<div class="panels wide">{"".join(panels)}</div>', explanation)


def _training(history: Sequence[Row], epoch: int | None) -> str:
    found = {
        name: [(float(row["epoch"]) + 1, float(row[name])) for row in history if row.get(name) and row.get("epoch")]
        for name in _HISTORY
    }
    drawn = [name for name in _HISTORY if found[name]]
    losses = [name for name in drawn if name.endswith(("loss", "loss_epoch"))]
    monitor = [name for name in drawn if name not in losses][:1]
    panels = []
    for names in (losses, monitor):
        if names:
            what = "loss" if names is losses else _HISTORY[names[0]]
            marked = None if epoch is None else epoch + 1
            svg = draw_history(what, [(_HISTORY[name], found[name]) for name in names], marked)
            panels.append(panel(capital(what), "", svg))
    explanation = "" if epoch is None else f"Dashed: epoch {epoch + 1}, after which the model is that of this report."
    return section("Training", f'<div class="panels wide">{"".join(panels)}</div>', explanation) if panels else ""


def _memory(memory: Mapping[str, float]) -> str:
    rows = [[escape(name), f"{value:,.1f} MiB"] for name, value in memory.items()]
    return section("Peak memory", table([], rows, "narrow"))


def _configuration(text: str) -> str:
    return section("Configuration", f"<details><summary>Show</summary><pre>{escape(text)}</pre></details>")


def _about(about: Mapping[str, str]) -> str:
    return section("About", table([], [[escape(name), escape(value)] for name, value in about.items()], "narrow text"))


# Pieces


def _cell(estimate: Estimate) -> str:
    return f"{number(estimate.value)}<small>{_bounds(estimate)}</small>"


def _bounds(estimate: Estimate) -> str:
    """A range in words of numbers: an en dash between them, or `to` where one is negative."""
    if estimate.low != estimate.low:
        return ""
    between = " to " if estimate.low < 0 else "\u2013"
    return f"{number(estimate.low)}{between}{number(estimate.high)}"
