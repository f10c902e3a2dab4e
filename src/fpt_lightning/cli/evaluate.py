"""The command ``evaluate``: any predictions file to scores and a report, without a model."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np

import fpt_lightning
from fpt_lightning.data.tables import fields_of
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.evaluation import scores
from fpt_lightning.evaluation.cases import RULES, Rule, by_case, choose_rule, evaluate_cases
from fpt_lightning.evaluation.conformal import DEFAULT_COVERAGE, fit_nonconformity, prediction_sets, shortage
from fpt_lightning.evaluation.decisions import fit_thresholds
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.report import write_report
from fpt_lightning.evaluation.subgroups import evaluate_subgroups
from fpt_lightning.files import keep_beside, write_json


def evaluate(
    predictions: str,
    out: str | None = None,
    validation: str | None = None,
    thresholds: dict[str, float] | None = None,
    calibrate: bool = False,
    title: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
    specificity: float = 0.9,
    case_rule: Rule | None = None,
    by: list[str] | None = None,
    manifest: str | None = None,
    image_column: str = "image",
    coverage: float | None = None,
) -> None:
    """Score a predictions file: a table, ``evaluation.json`` and ``report.html``.

    Args:
        predictions: the CSV file.
        out: folder of the results; by default ``evaluate`` beside the predictions, as a run has files of these names,
            and what an earlier evaluation left there is kept as ``evaluate-1``.
        validation: predictions of validation images, on which thresholds are fitted (Youden's index), and from which
            prediction sets come.
        thresholds: by class, in place of fitted ones.
        calibrate: whether a temperature and biases are fitted on the validation images too, and applied.
        title: of the report; the name of the predictions file by default.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        specificity: at which a sensitivity is given.
        case_rule: how the prediction of a case comes of its images', where the file has cases; by default the rule of
            the best AUC (of grades, kappa) on validation cases, or without them the mean.
        by: columns of ``manifest``, such as sex or site, by whose values the images are scored in subgroups too.
        manifest: CSV file that lists the images of the predictions.
        image_column: its column of image paths, which are those of the predictions.
        coverage: of the prediction sets that are reported, from ``validation``; by default 0.9, where it gives them.

    Raises:
        ConfigurationError: ``calibrate`` or ``coverage`` without ``validation``, ``case_rule`` without cases, ``by``
            without ``manifest`` or the reverse, validation images of other classes or too few for the coverage, or a
            number out of its range.
        DataError: a file that cannot be used as it is.
    """
    found, fitting, sets = Predictions.read(predictions), None, None
    about, validation_auc = {"predictions": predictions}, None
    if manifest is not None:
        about["manifest"] = manifest
    if case_rule is not None and not found.cases:
        raise ConfigurationError(
            f"case_rule is {case_rule!r}, but {predictions} has no column of cases beside the path."
        )
    if calibrate and validation is None:
        raise ConfigurationError("calibrate is true, but there are no validation images to fit on: give --validation.")
    if coverage is not None and validation is None:
        raise ConfigurationError(
            f"coverage is {coverage}, but there are no validation images that sets come from: give --validation."
        )
    if (manifest is None) != (not by):
        raise ConfigurationError(
            f"by is {by} and manifest {manifest}: give columns, such as --by sex, and the --manifest that has them."
        )
    columns = {} if not by or manifest is None else fields_of(Path(manifest), image_column, found.ids, by)
    if validation is not None:
        fitting = Predictions.read(validation)
        if (fitting.kind, fitting.classes, fitting.unit) != (found.kind, found.classes, found.unit):
            of = [
                f"{each.kind} of {', '.join(each.classes)}{' by case' * (each.unit == 'case')}"
                for each in (fitting, found)
            ]
            raise ConfigurationError(
                f"validation is {validation}, {of[0]}, but {predictions} is {of[1]}: give those of the same model."
            )
        about["fitted on"] = validation
        if calibrate:
            from fpt_lightning.evaluation.calibration import (
                calibrated,
                fit_calibration,
            )  # SciPy takes half a second

            calibration = fit_calibration(fitting)
            found, fitting = (calibrated(each, calibration) for each in (found, fitting))
            about["calibration"] = str(calibration)
        if found.kind != "regression":
            thresholds = fit_thresholds(fitting) | (thresholds or {})
            validation_auc = scores.evaluate(fitting, resamples=1).overall["auc"].value
        nonconformity, asked = fit_nonconformity(fitting), coverage or DEFAULT_COVERAGE
        if coverage is not None or not shortage(nonconformity, asked):
            sets = prediction_sets(found, nonconformity, asked)
    settings: dict[str, Any] = {"resamples": resamples, "seed": seed, "specificity": specificity}
    evaluation = scores.evaluate(found, thresholds, **settings, sets=sets, validation_auc=validation_auc)
    cases = _evaluated_cases(found, fitting, case_rule, settings) if found.cases else None
    breakdowns = evaluate_subgroups(found, columns, thresholds, **settings)
    folder = Path(predictions).parent / "evaluate" if out is None else Path(out)
    if out is None and (kept := keep_beside(folder)) is not None:
        print(f"The earlier evaluation is kept in {kept}.")
    content = evaluation.to_dict() | ({"cases": cases[1].to_dict()} if cases else {})
    if breakdowns:
        content["subgroups"] = {each.column: each.to_dict() for each in breakdowns}
    write_json(folder / "evaluation.json", content)
    about |= {"fpt-lightning": fpt_lightning.__version__, "NumPy": np.__version__, "Python": platform.python_version()}
    write_report(
        folder / "report.html",
        found,
        evaluation,
        title=title or Path(predictions).name,
        cases=cases,
        breakdowns=breakdowns,
        about=about,
    )
    tables = [each.table() for each in (evaluation, *(cases[1:] if cases else ()), *breakdowns)]
    print("\n\n".join([*tables, f"The report is {folder / 'report.html'}."]))


def _evaluated_cases(
    found: Predictions, fitting: Predictions | None, rule: Rule | None, settings: dict[str, Any]
) -> tuple[Predictions, scores.Evaluation]:
    """Cases and their evaluation, by a rule that is given or chosen, and thresholds fitted, on validation cases."""
    chosen, thresholds = False, None
    if fitting is not None and fitting.cases:
        chosen = rule is None
        rule = rule or choose_rule(fitting)
        thresholds = fit_thresholds(by_case(fitting, rule))
    rule = rule or RULES[0]
    return by_case(found, rule), evaluate_cases(found, rule, thresholds, chosen=chosen, **settings)
