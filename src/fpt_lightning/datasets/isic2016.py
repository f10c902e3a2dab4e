"""ISIC2016, task 3: dermoscopy of benign and malignant skin lesions (Gutman et al. 2016; files named ISBI2016, part 3).

::

    ISBI2016_ISIC_Part3_{Training,Test}_Data/ISIC_0000000.jpg
    ISBI2016_ISIC_Part3_Training_GroundTruth.csv            ISIC_0000000,benign
    ISBI2016_ISIC_Part3_Test_GroundTruth.csv                ISIC_0000003,0.0

No table has a header; one has words, the other 0.0 and 1.0 (copies also have 0 and 1). The split is the official one
(900 / 379), which has no validation images: they are drawn from the training images. The paper does not say how it
had its own. Lesions and patients are not published.

Sources: https://challenge.isic-archive.com/data/#2016, whose files are below
https://isic-challenge-data.s3.amazonaws.com/2016/; the form of the tables from public readers and copies of them, not
from the archive itself; the licence as a third party quotes that page.
"""

from __future__ import annotations

from fpt_lightning.datasets.pieces import Pieces, Wanted
from fpt_lightning.datasets.recipe import Found, Layout, Recipe, label_of, read_table

URL = "https://challenge.isic-archive.com/data/#2016"
_SPLITS = {"Training": "train", "Test": "test"}
_LABELS = {"benign": 0, "malignant": 1, "0.0": 0, "1.0": 1, "0": 0, "1": 1}


def _read(found: Found, pieces: Pieces) -> None:
    for part, split in _SPLITS.items():
        table = pieces[f"ISBI2016_ISIC_Part3_{part}_GroundTruth.csv"]
        rows = read_table(table, ("image", "label"), header=False)
        labels = [(image, label_of(label, _LABELS, table, image)) for image, label in rows]
        for path, label in found.join(pieces[f"ISBI2016_ISIC_Part3_{part}_Data/"], labels, table):
            found.add(path, label, split)


RECIPE = Recipe(
    name="isic2016",
    title="ISIC2016 task 3",
    classes=("benign", "malignant"),
    images=1_279,
    modality="dermoscopy",
    licence="CC0",
    url=URL,
    source="https://isic-challenge-data.s3.amazonaws.com/2016/",
    layouts=(
        Layout(
            Wanted(
                dict.fromkeys(
                    (f"ISBI2016_ISIC_Part3_{part}_{end}" for part in _SPLITS for end in ("Data/", "GroundTruth.csv")),
                    URL,
                ),
                apart=True,
            ),
            _read,
            splits=tuple(_SPLITS.values()),
        ),
    ),
)
