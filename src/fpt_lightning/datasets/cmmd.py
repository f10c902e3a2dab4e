"""CMMD: the Chinese Mammography Database (Cui et al. 2021, https://doi.org/10.7937/tcia.eqde-4b16).

::

    manifest-1616439774456/CMMD/D1-0001/07-18-2010-NA-NA-79377/1.000000-NA-70244/1-1.dcm
    CMMD_clinicaldata_revision.xlsx       ID1, LeftRight, Age, number, abnormality, classification, subtype

A row of the spreadsheet labels one breast, so images are joined by the PatientID and ImageLaterality of their DICOM
headers; file names and NBIA's ``metadata.csv``, whose columns are sometimes shifted, are not trusted. Images of
breasts without a row (1,458 of 5,202) are unlabelled, not normal, and left out. The group is the patient. There is no
official split. A download in several parts, each with a folder of its own, is read as one.

Corrections of some sides have been published (TOMPEI-CMMD); they are not applied.

Sources: https://www.cancerimagingarchive.net/collection/cmmd/; tree and columns as public readers have them, such as
https://github.com/BiomedSciAI/fuse-med-ml; headers from an audit, not held against the images themselves.
"""

from __future__ import annotations

from pathlib import Path

from fpt_lightning.data.xlsx import read_columns
from fpt_lightning.datasets.pieces import Pieces, Wanted
from fpt_lightning.datasets.recipe import Found, Layout, Recipe, files, label_of
from fpt_lightning.errors import DataError
from fpt_lightning.progress import track

URL = "https://www.cancerimagingarchive.net/collection/cmmd/"
_TABLE = "CMMD_clinicaldata_revision.xlsx"
_LABELS = {"Benign": 0, "Malignant": 1}


def _read(found: Found, pieces: Pieces) -> None:
    table = pieces[_TABLE]
    labels: dict[tuple[str, str], int] = {}
    for patient, side, diagnosis in read_columns(table, ("ID1", "LeftRight", "classification")):
        if labels.setdefault((patient, side), label := label_of(diagnosis, _LABELS, table, patient)) != label:
            raise DataError(f"{table}: the {side} breast of {patient} has two classifications.")
    seen = set()
    paths = [path for part in pieces.every("CMMD/") for path in files(part) if path.suffix.lower() in ("", ".dcm")]
    for path in track(paths, "DICOM headers", len(paths)):
        breast = _breast(path)
        if isinstance(breast, str):
            found.leave_out(path, breast, foreign=not path.suffix and "unreadable" in breast)  # such as LICENSE
        elif breast not in labels:
            found.leave_out(path, f"unlabelled (its breast has no row in {_TABLE})")
        else:
            found.add(path, labels[breast], group=breast[0])
        seen.add(breast)
    for patient, side in labels.keys() - seen:
        found.left_out[f"{patient} {side}"] = f"a row in {_TABLE}, but no image"


def _breast(path: Path) -> tuple[str, str] | str:
    """(patient, L or R) of the header, or why there is none."""
    try:
        import pydicom
    except ModuleNotFoundError as error:
        raise DataError("CMMD is DICOM: pip install 'fpt-lightning[dicom]' to prepare it.") from error
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID", "ImageLaterality"])
        breast = str(header.get("PatientID", "")).strip(), str(header.get("ImageLaterality", "")).strip()
    except Exception as error:  # pydicom raises errors of many kinds on damaged headers
        return f"unreadable DICOM header: {type(error).__name__}"
    return breast if all(breast) else "no PatientID or ImageLaterality in its header"


RECIPE = Recipe(
    name="cmmd",
    title="CMMD",
    classes=("benign", "malignant"),
    images=5_202,
    modality="digital mammogram",
    licence="CC BY 4.0",
    url=URL,
    source="https://github.com/BiomedSciAI/fuse-med-ml",
    layouts=(Layout(Wanted({"CMMD/": URL, _TABLE: URL}, apart=True, several=("CMMD/",)), _read),),
)
