"""Which images there are, with their labels and splits: from folders or from a CSV file."""

from __future__ import annotations

import csv
import io
import os
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NoReturn

from fpt_lightning.errors import ConfigurationError, DataError
from fpt_lightning.pages import file_and_page

SPLITS = ("train", "val", "test")
FRACTIONS = (0.7, 0.1, 0.2)  # the paper's random partition (section 4.1)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom")
UNLABELLED = -1

_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        id: its path relative to the data root, with forward slashes, and ``#12`` behind it where it is page or frame 12
            of that file; the key of its features.
        label: index of its class, or ``UNLABELLED``.
        split: ``train``, ``val`` or ``test``; empty where there is none.
        group: what must stay on one side of a split, such as a patient; empty where unknown.
    """

    id: str
    label: int = UNLABELLED
    split: str = ""
    group: str = ""


@dataclass(frozen=True)
class Manifest:
    """All images of a data set.

    Attributes:
        root: the folder that sample ids are relative to.
        samples: in ascending order of their ids.
        classes: names, in the order of the label indices; from the whole data set.
    """

    root: Path
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]

    def split(self, name: str) -> tuple[Sample, ...]:
        """The samples of one split, in ascending order of their ids."""
        return tuple(sample for sample in self.samples if sample.split == name)

    def path(self, sample: Sample) -> Path:
        return self.root / sample.id

    def class_counts(self, split: str) -> list[int]:
        """Images of each class in a split."""
        counts = Counter(sample.label for sample in self.split(split))
        return [counts[label] for label in range(len(self.classes))]

    def summary(self) -> str:
        """A table of images by split and class, for people."""
        width = max(map(len, (*self.classes, "class")))
        rows = [f"{'class':<{width}}" + "".join(f"{split:>8}" for split in SPLITS)]
        counts = {split: self.class_counts(split) for split in SPLITS}
        for label, name in enumerate(self.classes):
            rows.append(f"{name:<{width}}" + "".join(f"{counts[split][label]:>8}" for split in SPLITS))
        return "\n".join(rows)


def read_manifest(
    root: str | Path,
    table: str | Path | None = None,
    *,
    image_column: str = "image",
    label_column: str = "label",
    split_column: str | None = None,
    group_column: str | None = None,
    classes: Sequence[str] | None = None,
    split_seed: int = 0,
) -> Manifest:
    """Read a labelled data set.

    Without ``table`` the folders say it: ``root/{train,val,test}/{class}/image``, or ``root/{class}/image``, which is
    split 70/10/20 at random, stratified by class. A ``table`` is a CSV file with one row an image; without a split
    column its images are split in the same way, groups kept whole.

    Args:
        root: folder of the images.
        table: CSV file, absolute or relative to ``root``.
        image_column: column of image paths, relative to ``root``.
        label_column: column of class names.
        split_column: column of ``train``, ``val``, ``test``; the column ``split``, if there is one, by default.
        group_column: column of groups, such as patients; the column ``group``, if there is one, by default.
        classes: class names in the order wanted (grades from low to high, say); sorted by default.
        split_seed: seed of a random split.

    Raises:
        DataError: anything missing, empty, duplicated or inconsistent, by name.
    """
    folder = _data_root(root)
    if table is None:
        labelled = _from_folders(folder)
    else:
        labelled = _from_table(folder, table, image_column, label_column, split_column, group_column)
    names = _class_names((label for _, label in labelled), classes)
    index = {name: i for i, name in enumerate(names)}
    samples = sorted((replace(s, label=index[label]) for s, label in labelled), key=lambda s: s.id)
    if not samples[0].split:
        samples = random_split(samples, split_seed)
    manifest = Manifest(folder, tuple(samples), names)
    _check_splits(manifest)
    return manifest


def list_images(root: str | Path) -> Manifest:
    """Every image below a folder, unlabelled, for prediction.

    Raises:
        DataError: no such folder, or no image in it.
    """
    folder = _data_root(root)
    ids = sorted(_image_ids(folder, folder))
    if not ids:
        raise DataError(f"there is no image below {folder} (file names ending in {', '.join(IMAGE_SUFFIXES)}).")
    return Manifest(folder, tuple(Sample(id) for id in ids), ())


def _data_root(root: str | Path) -> Path:
    folder = Path(os.path.expanduser(root))
    if not os.path.isdir(folder):
        raise DataError(f"the data root {str(root)!r} is not a folder.")
    return folder


def _image_ids(folder: Path, root: Path) -> list[str]:
    found = []
    for directory, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        _check_links(Path(directory), folders)
        relative = Path(directory).relative_to(root)
        found += [
            (relative / name).as_posix()
            for name in files
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return found


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}.") from error


def _check_links(directory: Path, folders: Iterable[str]) -> None:
    above = {os.path.realpath(path) for path in (directory, *directory.parents)}
    for path in (directory / name for name in folders):
        if path.is_symlink() and os.path.realpath(path) in above:
            raise DataError(f"{path} is a link to a folder that it lies in: remove it.")


def _from_folders(root: Path) -> list[tuple[Sample, str]]:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    splits = {p: _SPLIT_FOLDERS[p.name.lower()] for p in folders if p.name.lower() in _SPLIT_FOLDERS}
    if not splits:
        return _from_classes(root, root, "")
    missing = [split for split in SPLITS if split not in splits.values()]
    others = [p.name for p in folders if p not in splits]
    if missing or others or len(splits) != len(SPLITS):
        raise DataError(
            f"the data root {root} holds {', '.join(p.name for p in folders)}: give the folders train, val and test "
            "and no other, or only class folders (which are then split 70/10/20), or a CSV manifest (data.manifest)."
        )
    return [labelled for folder, split in splits.items() for labelled in _from_classes(folder, root, split)]


def _from_classes(folder: Path, root: Path, split: str) -> list[tuple[Sample, str]]:
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {p.name: _image_ids(p, root) for p in classes}
    empty = [name for name, ids in found.items() if not ids]
    if empty or not classes:
        raise DataError(
            f"{folder} must hold one folder of images a class; "
            + (f"without an image: {', '.join(empty)}." if empty else "it holds no folder.")
        )
    return [(Sample(id, split=split), name) for name, ids in found.items() for id in ids]


def _from_table(
    root: Path,
    table: str | Path,
    image_column: str,
    label_column: str,
    split_column: str | None,
    group_column: str | None,
) -> list[tuple[Sample, str]]:
    path = root / Path(table).expanduser()
    rows = _read_rows(path)
    header = rows[0][1]
    split_column = _column(header, path, split_column, "split")
    group_column = _column(header, path, group_column, "group")
    for column in (image_column, label_column):
        if column not in header:
            raise DataError(f"the manifest {path} has no column {column!r}; it has {', '.join(header)}.")
    labelled = []
    for number, row in rows:
        split = _SPLIT_FOLDERS.get(row[split_column].strip().lower(), "") if split_column else ""
        if split_column and not split:
            raise DataError(f"{path}, line {number}: the split is {row[split_column]!r}, not train, val or test.")
        label = row[label_column].strip()
        if not label:
            raise DataError(f"{path}, line {number}: the label (column {label_column!r}) is empty.")
        id = _sample_id(row[image_column].strip(), path, number)
        labelled.append((Sample(id, split=split, group=row[group_column].strip() if group_column else ""), label))
    _check_files(root, path, [sample.id for sample, _ in labelled])
    return labelled


def _read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Rows by column, each with the number of its (last) line."""
    if not os.path.isfile(path):
        raise DataError(f"the manifest {path} does not exist.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise csv.Error("it holds NUL characters")  # UTF-16 without a mark at its start, or not text at all
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise DataError(f"the manifest {path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the manifest {path} is not a CSV file in UTF-8: {error}.") from error
    if not rows:
        raise DataError(f"the manifest {path} holds no row below its header.")
    if twice := [name for name, count in Counter(reader.fieldnames).items() if count > 1]:
        raise DataError(f"the manifest {path} has several columns named {_some(twice)}.")
    for number, row in rows:
        if None in row or None in row.values():  # more fields, or fewer
            raise DataError(f"{path}, line {number}: the number of fields differs from the header's.")
    return rows


def _column(header: Iterable[str], path: Path, asked: str | None, default: str) -> str | None:
    if asked is None:
        return default if default in header else None
    if asked not in header:
        raise DataError(f"the manifest {path} has no column {asked!r}; it has {', '.join(header)}.")
    return asked


def _sample_id(text: str, path: Path, number: int) -> str:
    id = PurePosixPath(text.replace("\\", "/"))
    if not id.parts or id.is_absolute() or ".." in id.parts:
        raise DataError(f"{path}, line {number}: the image {text!r} is not a path below the data root.")
    return id.as_posix()


def _check_files(root: Path, path: Path, ids: list[str]) -> None:
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"the manifest {path} lists {len(twice)} images more than once: {_some(twice)}.")
    missing = [id for id in ids if not os.path.isfile(file_and_page(root / id)[0])]
    if missing:
        hint = ""
        if any(os.path.isfile(root / unicodedata.normalize(form, id)) for id in missing for form in ("NFC", "NFD")):
            hint = " Some do in another Unicode form (NFC or NFD) of their names: rewrite the manifest in the files'."
        raise DataError(
            f"{len(missing)} of {len(ids)} images of the manifest {path} do not exist below {root}: "
            f"{_some(missing)}.{hint}"
        )


def _class_names(labels: Iterable[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    found = set(labels)
    if asked is not None:
        if len(asked) < 2 or len(set(asked)) != len(asked) or not found <= set(asked):
            raise DataError(
                f"data.classes is {list(asked)}, but the labels are {sorted(found)}: name each of them once."
            )
        return tuple(asked)
    if len(found) < 2:
        raise DataError(f"the data set has one class only, {sorted(found)[0]!r}: a classifier needs at least two.")
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(found):
        spellings[unicodedata.normalize("NFC", name).casefold()].append(name)
    if alike := [name for names in spellings.values() if len(names) > 1 for name in names]:
        raise DataError(
            f"classes differ in upper and lower case or Unicode form alone: {_some(alike)}. Unify the labels, or name "
            "every class in data.classes."
        )
    numeric = all(name.isdecimal() for name in found)
    return tuple(sorted(found, key=lambda name: (int(name), name)) if numeric else sorted(found))


def random_split(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Split 70/10/20 at random, stratified by class; a group stays whole.

    Groups are dealt, large ones first, to the split that lacks most images of the group's classes.
    """
    groups: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.group or f"\0{sample.id}"].append(sample)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda name: len(groups[name]), reverse=True)
    totals = Counter(sample.label for sample in samples)
    lacking = {label: [total * fraction for fraction in FRACTIONS] for label, total in totals.items()}
    split_of = {}
    for name in order:
        counts = Counter(sample.label for sample in groups[name])
        chosen = max(range(len(SPLITS)), key=lambda i: sum(lacking[label][i] * n for label, n in counts.items()))
        for label, n in counts.items():
            lacking[label][chosen] -= n
        split_of[name] = SPLITS[chosen]
    return [replace(sample, split=split_of[sample.group or f"\0{sample.id}"]) for sample in samples]


def _check_splits(manifest: Manifest) -> None:
    empty = [split for split in SPLITS if not manifest.split(split)]
    if empty:
        raise DataError(
            f"the data set {manifest.root} ({len(manifest.samples)} images) leaves the split {', '.join(empty)} empty: "
            "give it more images, or a CSV manifest with a split column."
        )
    splits: defaultdict[str, set[str]] = defaultdict(set)
    for sample in manifest.samples:
        if sample.group:
            splits[sample.group].add(sample.split)
    crossing = sorted(group for group, used in splits.items() if len(used) > 1)
    if crossing:
        raise DataError(f"{len(crossing)} groups have images in more than one split: {_some(crossing)}.")


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_classes(argument: str, expected: int, manifest: Manifest) -> None:
    """Hold a number of classes against a data set.

    Raises:
        ConfigurationError: they differ.
    """
    if expected != len(manifest.classes):
        raise ConfigurationError(
            f"{argument} is {expected}, but the data set {manifest.root} has {len(manifest.classes)} classes "
            f"({_some(manifest.classes)}): set {argument} to {len(manifest.classes)}."
        )
