"""COVID: chest X-rays of COVID-19, viral pneumonia and neither (Siddhartha 2021, "COVID CXR Image Dataset (Research)").

::

    COVID_IEEE/{covid,normal,virus}/*       JPEG, PNG, JFIF and others

The label is the folder's. Every file is taken for an image, whatever its suffix, and those that do not open are left
out. There is no official split, and patients are not published; as the images are from earlier collections, identical
files matter here.

Sources: https://www.kaggle.com/datasets/sid321axn/covid-cxr-image-dataset-research; folders, formats and counts as
several public scripts and descriptions have them, not from the archive itself; the licence is not verified.
"""

from __future__ import annotations

from fpt_lightning.datasets.pieces import Pieces, Wanted
from fpt_lightning.datasets.recipe import Found, Layout, Recipe, files

URL = "https://www.kaggle.com/datasets/sid321axn/covid-cxr-image-dataset-research"
CLASSES = ("covid", "normal", "virus")


def _read(found: Found, pieces: Pieces) -> None:
    for label, name in enumerate(CLASSES):
        for path in files(pieces[f"{name}/"]):
            found.add(path, label)


RECIPE = Recipe(
    name="covid",
    title="COVID",
    classes=CLASSES,
    images=1_823,
    modality="chest X-ray",
    licence="unverified; see the page",
    url=URL,
    source=URL,
    layouts=(Layout(Wanted(dict.fromkeys((f"{name}/" for name in CLASSES), URL)), _read),),
)
