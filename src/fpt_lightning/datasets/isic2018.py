"""ISIC2018, task 3: dermoscopy of seven kinds of skin lesion (HAM10000; Tschandl et al. 2018, Codella et al. 2019).

Seven downloads, each unpacked into a folder of its name (or all into one)::

    ISIC2018_Task3_{Training,Validation,Test}_Input/ISIC_0024306.jpg
    ISIC2018_Task3_{Training,Validation,Test}_GroundTruth.csv     image,MEL,NV,BCC,AKIEC,BKL,DF,VASC      one is 1.0
    ISIC2018_Task3_Training_LesionGroupings.csv                   image,lesion_id,diagnosis_confirm_type

``HAM10000_metadata`` (lesion_id,image_id,...), of the same images' own publication, serves in place of the last.

Columns are read by name. The split is the official one (10,015 / 193 / 1,512; one DF in the validation split). The
group is the lesion, which is published for the training images only. The test image ISIC_0035068 is synthetic and
left out, as the organisers' scorer leaves it out. Two pairs of training images are reported to be identical.

Sources: https://challenge.isic-archive.com/data/#2018 and https://github.com/ImageMarkup/isic-challenge-scoring; that
the test labels are public now, and the identical pairs, from public copies and audits, not from the archive itself.
"""

from __future__ import annotations

from pathlib import Path

from fpt_lightning.datasets.pieces import Pieces, Wanted
from fpt_lightning.datasets.recipe import Found, Layout, Recipe, read_table
from fpt_lightning.errors import DataError

URL = "https://challenge.isic-archive.com/data/#2018"
CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
_SPLITS = {"Training": "train", "Validation": "val", "Test": "test"}
_LESIONS = "ISIC2018_Task3_Training_LesionGroupings.csv|HAM10000_metadata.csv|HAM10000_metadata.tab|HAM10000_metadata"
_SYNTHETIC = "ISIC_0035068"


def _read(found: Found, pieces: Pieces) -> None:
    lesions = dict(read_table(pieces[_LESIONS], ("image|image_id", "lesion_id")))
    for part, split in _SPLITS.items():
        table = pieces[f"ISIC2018_Task3_{part}_GroundTruth.csv"]
        rows = [(image, (image, values)) for image, *values in read_table(table, ("image", *CLASSES))]
        for path, (image, values) in found.join(pieces[f"ISIC2018_Task3_{part}_Input/"], rows, table):
            if image == _SYNTHETIC:
                found.leave_out(path, "synthetic: not scored by the organisers")
            elif split == "train" and image not in lesions:
                found.leave_out(path, f"no row in {pieces[_LESIONS].name}")
            else:
                found.add(path, _label(values, table, image), split, lesions[image] if split == "train" else "")


def _label(values: list[str], table: Path, image: str) -> int:
    hot = [label for label, value in enumerate(values) if value in ("1", "1.0")]
    if len(hot) != 1:
        raise DataError(f"{table}: {image} has {len(hot)} classes, not one: {', '.join(values)}.")
    return hot[0]


RECIPE = Recipe(
    name="isic2018",
    title="ISIC2018 task 3",
    classes=CLASSES,
    images=11_720,
    modality="dermoscopy",
    licence="CC BY-NC 4.0",
    url=URL,
    source="https://github.com/ImageMarkup/isic-challenge-scoring",
    layouts=(
        Layout(
            Wanted(
                dict.fromkeys(
                    (
                        *(f"ISIC2018_Task3_{part}_{end}" for part in _SPLITS for end in ("Input/", "GroundTruth.csv")),
                        _LESIONS,
                    ),
                    URL,
                ),
                apart=True,
            ),
            _read,
            splits=tuple(_SPLITS.values()),
        ),
    ),
)
