"""DDR: fundus photographs with grades of diabetic retinopathy (Li et al. 2019, Information Sciences 501).

The archive is in parts, to be joined before unpacking (``cat DDR-dataset.zip.* > DDR-dataset.zip``)::

    DR_grading/{train,valid,test}/007-0004-000.jpg
    DR_grading/{train,valid,test}.txt                   007-0004-000.jpg 0

Lines are ``name grade`` without a header. The split is the official one. Grade 5 is ungradable (1,151 images) and left
out, which leaves 12,522, the largest data set of the paper (section 4.1). 9,598 patients are published, but not which
images are whose, so groups are unknown, and so is whether the official splits share patients.

A copy on Kaggle has the gradable images in one folder with one table, and not the official split::

    DR_grading/DR_grading/007-0004-000.jpg
    DR_grading.csv                                      id_code,diagnosis

Sources: the owners' repository https://github.com/nkicsl/DDR-dataset (archive, number of images); the tree and the
files of grades from several public readers of them, such as
https://github.com/lucasmsobrinho/dr-pytorch-training-pipelines; not held against the archive itself. The copy is
https://www.kaggle.com/datasets/mariaherrerot/ddrdataset.
"""

from __future__ import annotations

from pathlib import Path

from fpt_lightning.datasets.pieces import Pieces, Wanted
from fpt_lightning.datasets.recipe import DR_GRADES, Found, Layout, Recipe, label_of, read_table

URL = "https://github.com/nkicsl/DDR-dataset"
COPY_URL = "https://www.kaggle.com/datasets/mariaherrerot/ddrdataset"
_SPLITS = {"train": "train", "valid": "val", "test": "test"}
_GRADES = {str(grade): grade for grade in range(6)}
_UNGRADABLE = 5


def _read(found: Found, pieces: Pieces) -> None:
    for folder, split in _SPLITS.items():
        table = pieces[f"DR_grading/{folder}.txt"]
        rows = read_table(table, ("image", "grade"), header=False)
        _add(found, pieces[f"DR_grading/{folder}/"], rows, table, split)


def _read_copy(found: Found, pieces: Pieces) -> None:
    table = pieces["DR_grading.csv"]
    _add(found, pieces["DR_grading/"], read_table(table, ("id_code", "diagnosis")), table)


def _add(found: Found, folder: Path, rows: list[list[str]], table: Path, split: str = "") -> None:
    grades = [(image, label_of(grade, _GRADES, table, image)) for image, grade in rows]
    for path, grade in found.join(folder, grades, table):
        if grade == _UNGRADABLE:
            found.leave_out(path, "ungradable (grade 5)")
        else:
            found.add(path, grade, split)


RECIPE = Recipe(
    name="ddr",
    title="DDR",
    classes=DR_GRADES,
    images=13_673,
    modality="fundus photograph",
    licence="MIT (repository); images unstated",
    url=URL,
    source="https://github.com/lucasmsobrinho/dr-pytorch-training-pipelines",
    layouts=(
        Layout(
            Wanted(dict.fromkeys((f"DR_grading/{name}{end}" for name in _SPLITS for end in ("/", ".txt")), URL)),
            _read,
            splits=tuple(_SPLITS.values()),
        ),
        Layout(
            Wanted(dict.fromkeys(("DR_grading/", "DR_grading.csv"), COPY_URL)),
            _read_copy,
            loss="this copy has neither the official split nor the ungradable images: a split is drawn",
        ),
    ),
)
