"""What a folder or a table of images seems to hold, before anybody has said what is what."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any, NamedTuple

from fpt_lightning.data.folders import IMAGE_SUFFIXES, SPLIT_NAMES, class_folders, walk
from fpt_lightning.data.images import DICOM_SUFFIXES, bright_box, check_extras, read_image
from fpt_lightning.data.manifest import Kind, Manifest
from fpt_lightning.data.pages import file_and_page, named_page
from fpt_lightning.data.sources import list_images, read_manifest
from fpt_lightning.data.tables import MISSING, Table, as_number, case_name, read_table, truth_of
from fpt_lightning.data.xlsx import SHEETS
from fpt_lightning.errors import DataError, ImageError, OverlapError, a_few

OPENED = 32
"""Images that are opened, evenly spread over all."""

_TABLES = (".csv", ".tsv", *SHEETS)
_MOST_CLASSES = 100
_FEW = 20  # different numbers that may be classes
_LABELS = (
    *("label", "labels", "class", "classes", "diagnosis", "diagnoses", "dx", "finding", "findings", "grade", "grades"),
    *("level", "stage", "severity", "target", "category", "disease", "pathology", "outcome"),
)
"""Words in the names of columns of labels, the surest first."""
_NO_LABELS = {"sex", "gender", "age", "view", "eye", "side", "laterality", "year", "date", "fold", "site", "device"}
_GROUPS = ("patient", "subject", "participant", "person", "case", "lesion", "study")
"""How columns of groups are called, the widest group first."""
_CASES = {
    *("case", "exam", "examination", "study", "visit", "accession", "encounter", "eye", "breast", "lesion", "series"),
    *("studyid", "caseid", "examid", "lesionid"),
}
"""Words in the names of columns of cases."""
_FEWEST_CASES, _MOST_IMAGES = 8, 20  # of all, and of a case on average: fewer or more are sides or classes
_IDS = {"id", "ids", "no", "nr", "number", "name", "code", "uid", "key", "identifier"}
_SPLITS = {"split", "splits", "set", "subset", "partition", "usage", "dataset", "phase"}
_GRADES = {"grade", "grades", "level", "stage", "severity", "birads", "kl", "density", "retinopathy"}
_RANKS = (
    {"no", "none", "normal", "healthy", "absent", "negative", "nodr"},
    {"minimal", "doubtful", "questionable"},
    {"mild", "low"},
    {"moderate", "medium", "mid"},
    {"severe", "high", "marked"},
    {"proliferative", "proliferate", "pdr"},
)
"""Words of grades, from low to high."""
_TOPICS: dict[str, set[str]] = {
    "fundus photographs": {
        *("fundus", "retina", "retinal", "retinopathy", "maculopathy", "npdr", "pdr", "dr", "glaucoma", "aptos"),
        *("messidor", "eyepacs", "idrid", "odir", "op"),
    },
    "OCT scans": {"oct", "cnv", "dme", "drusen", "opt"},
    "chest X-rays": {
        *("chest", "cxr", "xray", "thorax", "pneumonia", "covid", "tuberculosis", "effusion", "pneumothorax"),
        *("cardiomegaly", "atelectasis", "consolidation"),
    },
    "pathology": {"histology", "pathology", "histopathology", "slides", "wsi", "sm"},
    "mammograms": {"mammo", "mammogram", "mammograms", "mammography", "birads", "breast", "ddsm", "cmmd", "mg"},
    "skin photographs": {"skin", "melanoma", "nevus", "dermoscopy", "isic", "mel", "bkl", "xc"},
}
"""What images may be of, by words in names of folders, files, columns and classes, and by DICOM's Modality."""


class Columns(NamedTuple):
    """What the columns of a table seem to be.

    Attributes:
        image: of image paths.
        labels: one column of names or numbers, or several of which each is true or false.
        kind: of the labels.
        separator: of several names in one field.
        group: of patients or the like.
        case: of exams, eyes or the like, each of one group, of which some have several images.
        split: of train, val and test.
        others: that may be labels too.
    """

    image: str
    labels: tuple[str, ...]
    kind: Kind
    separator: str | None
    group: str | None
    case: str | None
    split: str | None
    others: tuple[str, ...]


class Look(NamedTuple):
    """What one image is like: (height, width) of it and of what is left without its dark border, in pixels."""

    size: tuple[int, int]
    bright: tuple[int, int]
    grey: bool
    bits: int


@dataclass(frozen=True)
class Pictures:
    """What the images are like.

    Attributes:
        suffixes: how many files have each.
        looks: of those that were opened.
        broken: of these, those that cannot be read, and why.
        headers: of the DICOM files, by id; empty of others.
    """

    suffixes: Mapping[str, int]
    looks: Sequence[Look]
    broken: Mapping[str, str]
    headers: Mapping[str, Mapping[str, str]]

    @cached_property
    def size(self) -> tuple[int, int]:
        """Median (height, width)."""
        return _median([look.size for look in self.looks])

    @cached_property
    def bright(self) -> tuple[int, int]:
        """Median (height, width) without the dark border."""
        return _median([look.bright for look in self.looks])

    @property
    def deep(self) -> bool:
        """Whether there are 16-bit pictures that are no DICOM."""
        return not self.headers and any(look.bits == 16 for look in self.looks)

    @property
    def aspect(self) -> float:
        """Median of long side / short side, without the dark border."""
        return median(max(look.bright) / min(look.bright) for look in self.looks)

    @property
    def border(self) -> float:
        """Median share of an image's area that is dark border."""
        return median(1 - look.bright[0] * look.bright[1] / (look.size[0] * look.size[1]) for look in self.looks)

    def of_header(self, keyword: str) -> Counter[str]:
        """What the DICOM files say, and how many of them."""
        return Counter(header[keyword] for header in self.headers.values() if header.get(keyword))


@dataclass(frozen=True)
class Inspection:
    """What a data set seems to be.

    Attributes:
        root: folder of the images.
        table: of the labels; None where folders are the classes.
        labels: the table's columns of labels; none where folders are the classes.
        reading: arguments of ``fpt_lightning.datamodules.base.ManifestDataModule`` that are not the default.
        manifest: as these read it.
        grades: whether classes are grades from low to high; they are in this order.
        given: whether training and test images are.
        pictures: what the images are like.
        topic: what they are of, such as ``fundus photographs``; empty where nothing says it.
        patients: by image, of folders of DICOM files whose headers say that several images are of one.
        unnamed: images that the table does not name.
        undecided: what people have to decide.
    """

    root: Path
    table: Path | None
    labels: tuple[str, ...]
    reading: Mapping[str, Any]
    manifest: Manifest
    grades: bool
    given: bool
    pictures: Pictures
    topic: str
    patients: Mapping[str, str]
    unnamed: int
    undecided: tuple[str, ...]


def inspect_data(path: Path) -> Inspection:
    """Look at a folder of images, or at a table in their folder, and guess what is what.

    A table goes before folders: it may name patients. Of a folder, those in it and one level below are looked at.

    Args:
        path: of the folder or the table.

    Raises:
        DataError: nothing is there, no image, no labels, one class, or what ``read_manifest`` refuses.
        ImageError: none of the images that are opened can be read.
    """
    if not path.exists():
        raise DataError(
            f"there is no folder and no table {path}: give the folder of the images, or a CSV or XLSX file in it."
        )
    root = path if path.is_dir() else path.parent
    ids = [sample.id for sample in list_images(root).samples]
    undecided: list[str] = []
    table = _find_table(root, ids, undecided) if path.is_dir() else _named_table(path, ids)
    columns = None if table is None else _recognised(table, _names(ids, root))
    if table is not None and columns is not None:
        undecided += _open_questions(table, columns)
    order, doubt = _order(*_class_names(root, table, columns))
    undecided += doubt
    reading = _reading(root, table, columns, order)
    kind: Kind = "single-label" if columns is None else columns.kind
    manifest, overlap = _read(root, kind, reading)
    if overlap:
        reading["allow_overlap"] = True
        undecided.append(overlap)
    pictures = look_at(manifest)
    patients = _patients(manifest, pictures) if columns is None else {}
    if not patients and not any(sample.group for sample in manifest.samples):
        undecided.append(
            "which images are of one patient: without a column of patients in a CSV file (data.group_column), those of "
            "one may be in training and test, and test figures too good."
        )
    named = () if columns is None else (*columns.labels, *columns.others)
    said = (*pictures.of_header("Modality"), *pictures.of_header("BodyPartExamined"))
    return Inspection(
        root=root,
        table=None if table is None else table.path,
        labels=() if columns is None else columns.labels,
        reading=reading,
        manifest=manifest,
        grades=order is not None,
        given=class_folders(root)[1] if columns is None else columns.split is not None,
        pictures=pictures,
        topic=_topic([root.name, *named, *manifest.classes, *said]),
        patients=patients,
        unnamed=len({*ids} - {sample.id for sample in manifest.samples}),
        undecided=tuple(undecided),
    )


def look_at(manifest: Manifest) -> Pictures:
    """Open some of the images, and the headers of all that are DICOM.

    Raises:
        ImageError: none of them can be read.
    """
    paths = {sample.id: manifest.path(sample) for sample in manifest.samples}
    check_extras(paths.values())
    ids = list(paths)
    opened = [ids[i * len(ids) // OPENED] for i in range(OPENED)] if len(ids) > OPENED else ids
    dicom = [id for id in ids if _may_be_dicom(id)]
    with ThreadPoolExecutor() as pool:
        found = dict(zip(opened, pool.map(_look, [paths[each] for each in opened]), strict=True))
        headers = dict(zip(dicom, pool.map(_header, [paths[each] for each in dicom]), strict=True))
    broken = {id: look for id, look in found.items() if isinstance(look, str)}
    looks = [look for look in found.values() if not isinstance(look, str)]
    if not looks:
        raise ImageError(
            f"none of the {len(opened)} images that were opened can be read:\n  {a_few([*broken.values()])}"
        )
    return Pictures(Counter(PurePosixPath(named_page(id)[0]).suffix.lower() for id in ids), looks, broken, headers)


def _look(path: Path) -> Look | str:
    try:
        image = read_image(path, [])
    except ImageError as error:
        return str(error)
    height, width = image.shape[:2]
    rows, columns = bright_box(image)
    grey = bool((image[..., :1] == image[..., 1:]).all())
    return Look((height, width), (rows.stop - rows.start, columns.stop - columns.start), grey, 8 * image.dtype.itemsize)


def _may_be_dicom(id: str) -> bool:
    suffix = PurePosixPath(named_page(id)[0]).suffix.lower()
    return suffix in DICOM_SUFFIXES or suffix not in IMAGE_SUFFIXES


def _header(path: Path) -> dict[str, str]:
    from fpt_lightning.data.dicom import described

    return described(file_and_page(path)[0])


def _median(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return round(median(height for height, _ in sizes)), round(median(width for _, width in sizes))


# Tables


def _named_table(path: Path, ids: Sequence[str]) -> Table:
    """The table that was asked for.

    Raises:
        DataError: no column names the images, or none looks like labels.
    """
    table, names = _parsed(path), _names(ids, path.parent)
    if _image_column(table, names) is None:
        raise DataError(
            f"no column of {path} ({a_few(list(table.rows[0]))}) names the images below {path.parent}: put the table "
            "into the folder that its paths start from."
        )
    if _recognised(table, names) is None:
        raise DataError(
            f"no column of {path} ({a_few(list(table.rows[0]))}) looks like labels, which are names or numbers that "
            "several images share, or 1 and 0: call it 'label'."
        )
    return table


def _find_table(root: Path, ids: Sequence[str], undecided: list[str]) -> Table | None:
    """The table with labels that names most images; None where there is none."""
    near = [path for path, hidden in walk(root) if not hidden and len(path.relative_to(root).parts) <= 2]
    names, fitting = _names(ids, root), list[tuple[int, Table]]()
    for path in sorted(near, key=lambda path: (len(path.parts), path)):
        if path.suffix.lower() not in _TABLES:
            continue
        try:
            table = _parsed(path)
        except DataError as error:
            undecided.append(f"{path.name} is not read: {error}")
            continue
        column = _image_column(table, names)
        if column is not None and _recognised(table, names) is not None:
            fitting.append((sum(_is_named(row[column], names) for row in table.rows), table))
    if not fitting:
        return None
    _, best = max(fitting, key=lambda pair: pair[0])
    if others := [table.path.name for _, table in fitting if table is not best]:
        undecided.append(f"{best.path.name} has the labels; {a_few(others)} may have them too: name the table as DATA.")
    return best


def _parsed(path: Path) -> Table:
    return read_table(path, "\n")  # whose separator is the one that gives most columns


class _Names(NamedTuple):
    """What images may be called in a table: by their paths, with or without folder and suffix."""

    root: str
    known: set[str]


def _names(ids: Sequence[str], root: Path) -> _Names:
    paths = [PurePosixPath(id) for id in ids]
    known = {name for path in paths for name in (str(path), path.name, path.stem, str(path.with_suffix("")))}
    return _Names(os.path.abspath(root), known)


def _is_named(text: str, names: _Names) -> bool:
    text = named_page(text.strip())[0]
    if os.path.isabs(text):
        text = os.path.relpath(text, names.root)
    return text.replace("\\", "/").removeprefix("./") in names.known


def _image_column(table: Table, names: _Names) -> str | None:
    """The column that names the images in most rows; None where none does in half of them."""
    counts = {column: sum(_is_named(row[column], names) for row in table.rows) for column in table.rows[0]}
    best = max(counts, key=lambda column: counts[column], default="")
    return best if counts and 2 * counts[best] >= len(table.rows) else None


def _recognised(table: Table, names: _Names) -> Columns | None:
    """What the columns seem to be; None where none has labels."""
    image = _image_column(table, names)
    if image is None:
        return None
    group, split = _group_column(table, image), _split_column(table)
    case = _case_column(table, image, group)
    places = (group, case, split)
    values = {
        column: [row[column].strip() for row in table.rows]
        for column in table.rows[0]
        if column not in (image, group, case, split)
    }
    truths = [column for column, own in values.items() if _are_truths(own) and not _words(column) & _NO_LABELS]
    named = sorted((rank, column) for column in values if (rank := _label_rank(column)) is not None)
    classes = [column for column, own in values.items() if _are_classes(own) and not _words(column) & _NO_LABELS]
    numbers = [column for column, own in values.items() if all(as_number(value) == as_number(value) for value in own)]
    for _, column in named:
        others = tuple(other for other in dict.fromkeys([*(c for _, c in named), *classes]) if other != column)
        if separator := _separator(values[column]):
            return Columns(image, (column,), "multi-label", separator, *places, others)
        if _are_classes(values[column]):
            return Columns(image, (column,), "single-label", None, *places, others)
        if column in numbers:
            return Columns(image, (column,), "regression", None, *places, others)
    if len(truths) > 1:
        one = all(sum(truth_of(values[column][i]) == 1 for column in truths) == 1 for i in range(len(table.rows)))
        kind: Kind = "single-label" if one else "multi-label"
        others = tuple(column for column in classes if column not in truths)
        return Columns(image, tuple(truths), kind, None, *places, others)
    if classes:
        return Columns(image, (classes[0],), "single-label", None, *places, tuple(classes[1:]))
    if len(numbers) == 1:
        return Columns(image, (numbers[0],), "regression", None, *places, ())
    return None


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower()))


def _label_rank(column: str) -> tuple[bool, int] | None:
    """How sure a column's name is one of labels, the surest first; None where it is none."""
    words = _words(column)
    found = [rank for rank, word in enumerate(_LABELS) if word in words]
    return (column.lower() not in _LABELS, found[0]) if found and not words & _NO_LABELS else None


def _group_column(table: Table, image: str) -> str | None:
    for group in _GROUPS:
        for column in table.rows[0]:
            words = {word for word in _words(column) if word not in (group, f"{group}s", f"{group}id")}
            if column != image and words <= _IDS and len(words) < len(_words(column)):
                return column
    return None


def _case_column(table: Table, image: str, group: str | None) -> str | None:
    for column in table.rows[0]:
        if column == image or not _words(column) & _CASES:
            continue
        cases = [(case_name(row[column]), row[group].strip() if group else "") for row in table.rows]
        images = Counter(case for case, _ in cases if case)
        torn = len({pair for pair in cases if pair[0]}) > len(images)
        if not torn and _FEWEST_CASES <= len(images) < images.total() <= _MOST_IMAGES * len(images):
            return column
    return None


def _split_column(table: Table) -> str | None:
    for column in table.rows[0]:
        found = {SPLIT_NAMES.get(row[column].strip().lower()) for row in table.rows}
        if _words(column) & _SPLITS and {"train", "test"} <= found <= {"train", "val", "test"}:
            return column
    return None


def _are_truths(values: Sequence[str]) -> bool:
    found = {truth_of(value) for value in values}
    return None not in found and {0.0, 1.0} <= found


def _are_classes(values: Sequence[str]) -> bool:
    """Whether they are names, or few numbers, that three images share on average."""
    found = {value for value in values if value.lower() not in MISSING}
    if not 1 < len(found) <= min(_MOST_CLASSES, len(values) // 3):
        return False
    return len(found) <= _FEW or any(as_number(value) != as_number(value) for value in found)


def _separator(values: Sequence[str]) -> str | None:
    """What separates several names in a field, which are those of others."""
    for separator in "|;":
        parts = {part.strip() for value in values for part in value.split(separator)}
        if any(separator in value for value in values) and len(parts) <= min(_MOST_CLASSES, len(values) // 2):
            return separator
    return None


def _open_questions(table: Table, columns: Columns) -> list[str]:
    told = []
    if columns.others:
        told.append(f"columns that may be labels too: {', '.join(columns.others)} (data.label_column).")
    if columns.kind == "multi-label" and columns.separator is None:
        fields = [row[column].strip() for row in table.rows for column in columns.labels]
        empty, uncertain = sum(f.lower() in MISSING for f in fields), sum(truth_of(f) == -1 for f in fields)
        if empty:
            told.append(f"{empty:,} labels are empty and ignored: data.missing_labels zeros reads them as absent.")
        if uncertain:
            told.append(f"{uncertain:,} labels are -1 (uncertain) and ignored in training (data.uncertain_labels).")
    return told


# Classes, patients, topic


def _reading(root: Path, table: Table | None, columns: Columns | None, classes: Sequence[str] | None) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    if table is not None and columns is not None:
        asked["manifest"] = table.path.relative_to(root).as_posix()
        asked["image_column"] = columns.image
        asked["label_column"] = columns.labels[0] if len(columns.labels) == 1 else list(columns.labels)
        named = {
            "label_separator": columns.separator,
            "group_column": columns.group,
            "case_column": columns.case,
            "split_column": columns.split,
        }
        asked |= {name: value for name, value in named.items() if value is not None}
    return asked if classes is None else {**asked, "classes": list(classes)}


def _read(root: Path, kind: Kind, reading: Mapping[str, Any]) -> tuple[Manifest, str]:
    """The data set, and which groups or files are in several of its splits."""
    asked = {name: value for name, value in reading.items() if name != "manifest"}
    try:
        return read_manifest(root, reading.get("manifest"), kind=kind, **asked), ""
    except OverlapError as error:
        overlap = str(error).partition(": mend")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of that very overlap
        manifest = read_manifest(root, reading.get("manifest"), kind=kind, allow_overlap=True, **asked)
    return manifest, f"{overlap}: test figures are too good. Take the copies out, and data.allow_overlap too."


def _class_names(root: Path, table: Table | None, columns: Columns | None) -> tuple[set[str], str]:
    """Names of the classes where an image has one label, and of the column or folder that has them."""
    if table is None or columns is None:
        return class_folders(root)[0], root.name
    if columns.kind != "single-label" or len(columns.labels) > 1:
        return set(), ""
    return {row[columns.labels[0]].strip() for row in table.rows}, columns.labels[0]


def _order(names: Collection[str], source: str) -> tuple[list[str] | None, list[str]]:
    """Class names as grades from low to high, None where they are not; and the question where that stays open.

    Args:
        names: of the classes.
        source: name of the column or folder that has them.
    """
    if len(names) < 3:
        return None, []
    if all(name.isdecimal() for name in names):
        numbered = sorted(names, key=int)
        first = int(numbered[0])
        if [int(name) for name in numbered] != list(range(first, first + len(names))):
            return None, []
        if _words(source) & _GRADES:
            return numbered, []
        return None, [f"whether {numbered[0]} to {numbered[-1]} are grades from low to high (model.task: ordinal)."]
    ranked = [(rank, name) for name in names for rank, words in enumerate(_RANKS) if _words(name) & words]
    if not len(names) == len(ranked) == len({name for _, name in ranked}) == len({rank for rank, _ in ranked}):
        return None, []
    return [name for _, name in sorted(ranked)], []


def _patients(manifest: Manifest, pictures: Pictures) -> dict[str, str]:
    """By image, as headers have them; empty where they name one a file, or one for most."""
    found = {id: header.get("PatientID", "") for id, header in pictures.headers.items()}
    images = Counter(patient for patient in found.values() if patient)
    if len(images) < 3 or len(images) == images.total() or 2 * max(images.values()) > len(manifest.samples):
        return {}
    return found


def _topic(names: Sequence[str]) -> str:
    """What most of the words are of; of equal ones the first, and empty where none is known."""
    words = Counter(word for name in names for word in _words(name))
    counts = {topic: sum(words[word] for word in own) for topic, own in _TOPICS.items()}
    best = max(counts, key=lambda topic: counts[topic])
    return best if counts[best] else ""
