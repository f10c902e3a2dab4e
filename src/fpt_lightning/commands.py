"""Commands on predictions or on a store alone: no model and no data set is read."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np

import fpt_lightning
from fpt_lightning import evaluation as scoring
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.files import write_json
from fpt_lightning.predictions import Predictions
from fpt_lightning.report import write_report
from fpt_lightning.store import LEFT_OUT, REPAIR, FeatureStore


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
) -> None:
    """Score a predictions file: a table, ``evaluation.json`` and ``report.html``.

    Args:
        predictions: the CSV file.
        out: folder of the results; that of the predictions by default.
        validation: predictions of validation images, on which thresholds are fitted (Youden's index).
        thresholds: by class, in place of fitted ones.
        calibrate: whether a temperature is fitted on the validation images too, and applied.
        title: of the report; the name of the predictions file by default.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        specificity: at which a sensitivity is given.

    Raises:
        ConfigurationError: ``calibrate`` without ``validation``, validation images of other classes, or a number out of
            its range.
        DataError: a file that cannot be used as it is.
    """
    found = Predictions.read(predictions)
    about = {"predictions": predictions}
    if calibrate and validation is None:
        raise ConfigurationError("calibrate is true, but there are no validation images to fit on: give --validation.")
    if validation is not None:
        fitting = Predictions.read(validation)
        if (fitting.kind, fitting.classes) != (found.kind, found.classes):
            raise ConfigurationError(
                f"validation is {validation}, {fitting.kind} of {', '.join(fitting.classes)}, but {predictions} is "
                f"{found.kind} of {', '.join(found.classes)}: give predictions of the same model."
            )
        about["fitted on"] = validation
        if calibrate:
            temperature = scoring.fit_temperature(fitting)
            found, fitting = (scoring.with_temperature(each, temperature) for each in (found, fitting))
            about["temperature"] = f"{temperature:.4g}"
        thresholds = scoring.fit_thresholds(fitting) | (thresholds or {})
    evaluation = scoring.evaluate(found, thresholds, resamples=resamples, seed=seed, specificity=specificity)
    folder = Path(predictions).parent if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", evaluation.to_dict())
    about |= {"fpt-lightning": fpt_lightning.__version__, "NumPy": np.__version__, "Python": platform.python_version()}
    write_report(folder / "report.html", found, evaluation, title=title or Path(predictions).name, about=about)
    print(f"{evaluation.table()}\n\nThe report is {folder / 'report.html'}.")


def compare(first: str, second: str, resamples: int = 2000, seed: int = 0) -> None:
    """Compare two predictions files of the same images by a paired bootstrap, and print the differences.

    Args:
        first: the CSV file of the reference.
        second: the CSV file that is held against it.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: a file that cannot be used as it is, or files of other images, classes or labels.
    """
    both = Predictions.read(first), Predictions.read(second)
    print(f"first: {first}\nsecond: {second}\n{scoring.compare(*both, resamples=resamples, seed=seed).table()}")


def store_info(url: str) -> None:
    """Say what a feature store holds; its data are not read (see ``verify``).

    Args:
        url: the store's path or fsspec URL.

    Raises:
        StoreError: there is none, or it is of another format, or its metadata are damaged.
    """
    store = FeatureStore.open(url, tolerant=True)
    left_out = store.left_out(store.ids)
    states = {
        "samples": f"{len(store.ids):,}",
        "rows": f"{len(store.records):,}, of which {store.done.sum():,} are complete, "
        f"{(store.records[:, 0] == LEFT_OUT).sum():,} left out as their images could not be read, "
        f"{len(store.lost_records):,} of damaged records",
        "bytes a row": f"{store.bytes_per_row:,}",
        "complete bytes": f"{store.done.sum() * store.bytes_per_row:,}",
        **{f"array {name}": f"{size} {dtype}" for name, (size, dtype) in store.sample_arrays.items()},
    }
    about = {**store.specification.to_dict(), **states, **{f"made with {k}": v for k, v in store.made_with.items()}}
    width = max(map(len, about))
    print("\n".join([f"the feature store {url}", *(f"{name:<{width}}  {value}" for name, value in about.items())]))
    if left_out:
        print("left out: " + ", ".join(left_out))


def store_verify(url: str) -> None:
    """Read all of a feature store and list what is damaged, by sample and array; the exit status is then 1.

    Args:
        url: the store's path or fsspec URL.

    Raises:
        StoreError: there is none, or it is of another format, or its metadata are damaged.
    """
    store = FeatureStore.open(url, tolerant=True)
    damage = store.verify()
    for row, array, reason in damage:
        print(f"{store.name(row)}: {array}: {reason}")
    if not store.extended:
        print("the arrays have more or fewer rows than the samples: an extension was stopped")
    if not damage and store.extended:
        print(f"the feature store {url} is sound: {store.done.sum():,} rows were read.")
        return
    samples = len({store.source(row)[0] for row, *_ in damage})
    print(f"{samples} of {len(store.ids)} samples of {url} are damaged: compute them again with `{REPAIR}`.")
    raise SystemExit(1)
