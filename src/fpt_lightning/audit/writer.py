"""The audit of a store: what it reads, and the folder that it leaves."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fpt_lightning
from fpt_lightning.audit.duplicates import Copies
from fpt_lightning.audit.findings import Audit, MapKind, check_map, crossed, find, label_of
from fpt_lightning.audit.page import write_audit_page
from fpt_lightning.audit.shortcuts import SPLIT
from fpt_lightning.data.filed import filed
from fpt_lightning.data.tables import fields_of
from fpt_lightning.datamodules.preloaded import PreloadedFeatureDataModule
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.files import keep_beside, write_rows
from fpt_lightning.store.store import FeatureStore

PAGE = "audit.html"
"""Written last: a folder with it holds a finished audit."""
_TABLES = ("duplicates.csv", "labels.csv", "outliers.csv", "shortcuts.csv", "images.csv")


def audit_store(
    data: PreloadedFeatureDataModule,
    model: Any,
    folder: Path,
    by: Sequence[str] = (),
    map: MapKind = "pca",
) -> Audit:
    """Audit a data set from its store, and write tables and a page.

    Args:
        data: whose images and store; images are looked at for their headers alone.
        model: whose encoder made the store, and whose task the labels are of.
        folder: of the results; an earlier audit there is kept beside it, as ``audit-1``.
        by: columns of the manifest that are attributes too, such as site or sex.
        map: how images are placed.

    Raises:
        ConfigurationError: a model without a store, a folder that holds something else, columns without a
            manifest, or a map whose package is not installed.
        StoreError: no store, or one that is incomplete.
        DataError: a data set that cannot be used, or columns that it does not have.
    """
    if not data.uses_store(model):
        raise ConfigurationError(
            f"{type(model).__name__} reads no feature store, which an audit is of: give a method on stored features, "
            "such as StoredLinearProbingModule."
        )
    if by and data.table is None:
        raise ConfigurationError(f"by is {list(by)}, but there is no data.manifest that could have such columns.")
    check_map(map)
    check_folder(folder)
    data.model, data.in_memory = model, False  # a small part of the store is read
    data.setup("test")
    manifest, store = data.labelled, data.store
    assert store is not None
    ids = [sample.id for sample in manifest.samples]
    attributes = {SPLIT: [sample.split for sample in manifest.samples]}
    if manifest.files is not None:
        attributes |= filed(manifest.files, ids)
    if by and data.table is not None:
        table = manifest.root / Path(data.table).expanduser()
        attributes |= fields_of(table, data.reading["image_column"], ids, by)
    pooled = np.array(store.read([store.rows[id] for id in ids], "pooled"))
    ordered = bool(getattr(getattr(model, "task", None), "ORDERED", False))
    copies = _copies(store, ids)
    audit = find(manifest, pooled, copies, attributes, ordered, map)
    if (folder / PAGE).is_file() and (kept := keep_beside(folder.absolute())) is not None:
        print(f"The earlier audit is kept in {kept}.")
    _write_tables(audit, folder)
    write_audit_page(folder / PAGE, audit, copies, f"Audit of {manifest.root.name}", _about(store))
    return audit


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but an audit.

    Raises:
        ConfigurationError: naming it.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"out is {folder}, which is a file: give a folder.")
    other = sorted({path.name for path in folder.glob("*")} - {PAGE, *_TABLES})
    if other:
        raise ConfigurationError(f"out is {folder}, which holds {other[0]}, no part of an audit: give another folder.")


def _copies(store: FeatureStore, ids: Sequence[str]) -> Copies:
    def read(rows: Sequence[int]) -> NDArray[np.uint8]:
        return store.read([store.rows[ids[row]] for row in rows], "images")

    return read


def _about(store: FeatureStore) -> dict[str, str]:
    spec = store.specification
    height, width = spec.resolution
    return {
        "encoder": spec.encoder,
        "resolution": f"{height} x {width}",
        "fpt-lightning": fpt_lightning.__version__,
        "NumPy": np.__version__,
        "Python": platform.python_version(),
    }


def _write_tables(audit: Audit, folder: Path) -> None:
    manifest, samples = audit.manifest, audit.samples

    def known(row: int) -> list[str]:
        sample = samples[row]
        return [sample.id, sample.split, sample.group, label_of(manifest, sample)]

    heads = ["path", "split", "group", "label"]
    both = [f"{name}_{i}" for i in (1, 2) for name in heads]
    pairs = [
        [
            *known(pair.first),
            *known(pair.second),
            *_rounded(pair.cosine, pair.match),
            int(pair.mirrored),
            " ".join(crossed(samples, pair)),
        ]
        for pair in audit.pairs
    ]
    doubts = [
        [*known(doubt.row)[:3], doubt.name, doubt.given, doubt.suggested, *_rounded(*doubt.probe, *doubt.nearest)]
        for doubt in audit.doubts
    ]
    told = [
        [
            each.attribute,
            "attribute from features" if each.from_features else "label from attribute",
            each.told,
            each.rest,
            each.images,
            *_rounded(each.auc.value, each.auc.low, each.auc.high),
            int(each.rings),
        ]
        for each in audit.told
    ]
    images = [[*known(row), *_rounded(*audit.places[row], audit.loneliness[row])] for row in range(len(samples))]
    lonely = [[*known(row), *_rounded(audit.loneliness[row])] for row in audit.outliers]
    scores = ["probe_given", "probe_suggested", "nearest_given", "nearest_suggested"]
    contents: list[tuple[list[str], list[list[Any]]]] = [
        ([*both, "cosine", "detail", "mirrored", "crosses"], pairs),
        ([*heads[:3], "name", "label", "suggested", *scores], doubts),
        ([*heads, "deviation"], lonely),
        (["attribute", "question", "told", "from", "images", "auc", "low", "high", "rings"], told),
        ([*heads, "x", "y", "deviation"], images),
    ]
    for name, (columns, rows) in zip(_TABLES, contents, strict=True):
        write_rows(folder / name, [columns, *rows])


def _rounded(*values: float) -> list[str]:
    """For tables; what is not known is empty."""
    return ["" if value != value else f"{value:.4f}" for value in values]
