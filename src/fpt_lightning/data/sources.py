"""Where a manifest comes from: class folders, a CSV file, or any folder of images."""

from __future__ import annotations

import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal, NoReturn

from fpt_lightning.data.manifest import Kind, Manifest, Sample, numbers_of
from fpt_lightning.data.pages import file_and_page
from fpt_lightning.data.splits import check_splits, draw_validation, fold_split, random_split
from fpt_lightning.errors import DataError, a_few
from fpt_lightning.files import Row, read_rows

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom")
Fill = Literal["ignore", "zeros", "ones"]
_FILLS: Mapping[str, float] = {"ignore": math.nan, "zeros": 0.0, "ones": 1.0}
_UNCERTAIN = -1.0  # as CheXpert and MIMIC-CXR write it
_SPLIT_NAMES = {
    name: split
    for split, names in {
        "train": ("train", "training"),
        "val": ("val", "valid", "validation", "dev", "development"),
        "test": ("test", "testing"),
    }.items()
    for name in names
}
"""What splits are called, in lower case."""


def read_manifest(
    root: str | Path,
    table: str | Path | None = None,
    *,
    image_column: str = "image",
    label_column: str | Sequence[str] = "label",
    split_column: str | None = None,
    group_column: str | None = None,
    classes: Sequence[str] | None = None,
    kind: Kind = "single-label",
    missing_labels: Fill = "ignore",
    uncertain_labels: Fill = "ignore",
    split_seed: int = 0,
    fold: int | None = None,
    folds: int = 5,
    external: bool = False,
    allow_overlap: bool = False,
) -> Manifest:
    """Read a labelled data set.

    Without ``table`` the folders say it: ``root/{train,val,test}/{class}/image``, or ``root/{class}/image``, which is
    split 70/10/20 at random, stratified by class. A ``table`` is a CSV file with one row an image; without a split
    column its images are split in the same way, groups kept whole. Where there are training and test images alone, an
    eighth of the training images is drawn for validation.

    With ``fold``, cross-validation: where splits are given, the test images stay, and the fold of the others validates;
    otherwise the fold is the test split, and the next one validates. Folds are stratified and keep groups whole.

    Args:
        root: folder of the images.
        table: CSV file, absolute or relative to ``root``.
        image_column: column of image paths, relative to ``root``.
        label_column: column of class names or numbers; the columns of 1, 0, -1 or nothing of a multi-label data set.
        split_column: column of ``train``, ``val``, ``test``; the column ``split``, if there is one, by default.
        group_column: column of groups, such as patients; the column ``group``, if there is one, by default.
        classes: class names in the order wanted (grades from low to high, say); sorted by default.
        kind: of the labels.
        missing_labels: what an empty field of a multi-label data set stands for.
        uncertain_labels: what -1 stands for in its training images; in others it is ignored.
        split_seed: seed of a random split.
        fold: which fold, from 1; None without cross-validation.
        folds: how many.
        external: whether all images are test images of a model trained elsewhere; splits are not read.
        allow_overlap: whether groups, or identical files, may be in several splits, with a warning.

    Raises:
        DataError: anything missing, empty, duplicated or inconsistent, by name.
        ConfigurationError: a fold that there is not.
    """
    folder = _data_root(root)
    if table is None:
        samples, names = _with_classes(_from_folders(folder, kind), classes)
    else:
        path = folder / Path(table).expanduser()
        rows = read_rows(path, "manifest")
        samples = _from_table(folder, path, rows, image_column, None if external else split_column, group_column)
        columns = [label_column] if isinstance(label_column, str) else list(label_column)
        samples, names = _labelled(samples, rows, path, columns, kind, classes)
    samples, notes = sorted(samples, key=lambda sample: sample.id), list[str]()
    drawn = not external and not samples[0].split
    if external:
        samples = [replace(sample, split="test") for sample in samples]
    elif fold is not None:
        samples = fold_split(samples, fold, folds, split_seed, kind)
    elif drawn:
        samples = random_split(samples, split_seed, kind)
    elif {sample.split for sample in samples} == {"train", "test"}:
        samples, drawn = draw_validation(samples, split_seed, kind), True
        count = sum(sample.split == "val" for sample in samples)
        notes.append(f"there are no validation images: {count:,} of the training images are drawn, whole groups.")
    if kind == "multi-label":
        samples = [_filled(sample, missing_labels, uncertain_labels) for sample in samples]
    manifest = Manifest(folder, tuple(samples), names, kind, not external and (drawn or fold is not None), tuple(notes))
    if not external:
        if kind == "single-label" and len(names) < 2:
            raise DataError(f"the data set has one class only, {names[0]!r}: a classifier needs at least two.")
        check_splits(manifest, allow_overlap)
    return manifest


def list_images(root: str | Path, kind: Kind = "single-label", targets: int = 1) -> Manifest:
    """Every image below a folder, unlabelled, for prediction.

    Args:
        root: the folder.
        kind: of the labels that there are not.
        targets: how many an image would have, if several labels or a number.

    Raises:
        DataError: no such folder, or no image in it.
    """
    folder = _data_root(root)
    ids = sorted(_image_ids(folder, folder))
    if not ids:
        raise DataError(f"there is no image below {folder} (file names ending in {', '.join(IMAGE_SUFFIXES)}).")
    unknown = () if kind == "single-label" else (math.nan,) * targets
    return Manifest(folder, tuple(Sample(id, targets=unknown) for id in ids), (), kind)


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


def _from_folders(root: Path, kind: Kind) -> list[tuple[Sample, str]]:
    if kind != "single-label":
        raise DataError(f"a {kind} data set needs a CSV manifest (data.manifest): folders name one class an image.")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    splits = {p: _SPLIT_NAMES[p.name.lower()] for p in folders if p.name.lower() in _SPLIT_NAMES}
    if not splits:
        return _from_classes(root, root, "")
    others = [p.name for p in folders if p not in splits]
    if others or not {"train", "test"} <= set(splits.values()) or len(splits) != len(set(splits.values())):
        raise DataError(
            f"the data root {root} holds {', '.join(p.name for p in folders)}: give the folders train, val and test "
            "(or train and test) and no other, or only class folders (which are then split 70/10/20), or a CSV "
            "manifest (data.manifest)."
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
    path: Path,
    rows: Sequence[Row],
    image_column: str,
    split_column: str | None,
    group_column: str | None,
) -> list[Sample]:
    """The rows' samples, still without labels."""
    _require_column(rows, path, image_column)
    split_column = _column(rows, path, split_column, "split")
    group_column = _column(rows, path, group_column, "group")
    samples = []
    for row in rows:
        split = _SPLIT_NAMES.get(row[split_column].strip().lower(), "") if split_column else ""
        if split_column and not split:
            raise DataError(f"{path}, line {row.line}: the split is {row[split_column]!r}, not train, val or test.")
        id = _sample_id(row[image_column].strip(), path, row.line)
        samples.append(Sample(id, split=split, group=row[group_column].strip() if group_column else ""))
    _check_files(root, path, [sample.id for sample in samples])
    return samples


def _labelled(
    samples: Sequence[Sample],
    rows: Sequence[Row],
    path: Path,
    columns: Sequence[str],
    kind: Kind,
    classes: Sequence[str] | None,
) -> tuple[list[Sample], tuple[str, ...]]:
    """The samples with the labels of their rows, and the names of the classes."""
    for column in columns:
        _require_column(rows, path, column)
    if kind != "multi-label" and len(columns) != 1:
        raise DataError(f"data.label_column names {len(columns)} columns, which is for the task 'multilabel'.")
    if kind == "single-label":
        labels = [row[columns[0]].strip() for row in rows]
        for row, label in zip(rows, labels, strict=True):
            if not label:
                raise DataError(f"{path}, line {row.line}: the label (column {columns[0]!r}) is empty.")
        return _with_classes(list(zip(samples, labels, strict=True)), classes)
    if classes is not None:
        raise DataError(f"data.classes is {list(classes)}: the classes of a {kind} data set are its label columns.")
    allowed = (1.0, 0.0, _UNCERTAIN) if kind == "multi-label" else None
    targets = [
        tuple(
            _number(row[column].strip(), allowed, f"{path}, line {row.line}: the label (column {column!r})")
            for column in columns
        )
        for row in rows
    ]
    return [replace(s, targets=t) for s, t in zip(samples, targets, strict=True)], tuple(columns)


def _number(text: str, allowed: Sequence[float] | None, where: str) -> float:
    """A label; an infinite one stands for an empty field, NaN for one that is unknown in any case."""
    if not text and allowed is not None:
        return math.inf
    try:
        number = float(text)
    except ValueError:
        number = math.inf
    if allowed is None and math.isfinite(number):
        return number
    if allowed is not None and (number in allowed or math.isnan(number)):
        return number
    expected = "a number" if allowed is None else "1, 0, -1 (uncertain) or nothing"
    raise DataError(f"{where} is {text!r}, not {expected}.")


def _filled(sample: Sample, missing: Fill, uncertain: Fill) -> Sample:
    """The sample with what its empty and uncertain labels stand for."""
    stands = {math.inf: _FILLS[missing], _UNCERTAIN: _FILLS[uncertain if sample.split == "train" else "ignore"]}
    return replace(sample, targets=tuple(stands.get(target, target) for target in sample.targets))


def _require_column(rows: Sequence[Row], path: Path, column: str) -> None:
    if column not in rows[0]:
        raise DataError(f"the manifest {path} has no column {column!r}; it has {', '.join(rows[0])}.")


def _column(rows: Sequence[Row], path: Path, asked: str | None, default: str) -> str | None:
    if asked is None:
        return default if default in rows[0] else None
    _require_column(rows, path, asked)
    return asked


def _sample_id(text: str, path: Path, line: int) -> str:
    id = PurePosixPath(text.replace("\\", "/"))
    if not id.parts or id.is_absolute() or ".." in id.parts:
        raise DataError(f"{path}, line {line}: the image {text!r} is not a path below the data root.")
    return id.as_posix()


def _check_files(root: Path, path: Path, ids: list[str]) -> None:
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"the manifest {path} lists {len(twice)} images more than once: {a_few(twice)}.")
    missing = [id for id in ids if not os.path.isfile(file_and_page(root / id)[0])]
    if missing:
        hint = ""
        if any(os.path.isfile(root / unicodedata.normalize(form, id)) for id in missing for form in ("NFC", "NFD")):
            hint = " Some do in another Unicode form (NFC or NFD) of their names: rewrite the manifest in the files'."
        raise DataError(
            f"{len(missing)} of {len(ids)} images of the manifest {path} do not exist below {root}: "
            f"{a_few(missing)}.{hint}"
        )


def _with_classes(
    labelled: Sequence[tuple[Sample, str]], classes: Sequence[str] | None
) -> tuple[list[Sample], tuple[str, ...]]:
    names = _class_names((label for _, label in labelled), classes)
    index = {name: i for i, name in enumerate(names)}
    return [replace(sample, label=index[label]) for sample, label in labelled], names


def _class_names(labels: Iterable[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    found = set(labels)
    if asked is not None:
        if len(set(asked)) != len(asked) or not found <= set(asked):
            raise DataError(
                f"data.classes is {list(asked)}, but the labels are {sorted(found)}: name each of them once."
            )
        return tuple(asked)
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(found):
        spellings[unicodedata.normalize("NFC", name).casefold()].append(name)
    if alike := [name for names in spellings.values() if len(names) > 1 for name in names]:
        raise DataError(
            f"classes differ in upper and lower case or Unicode form alone: {a_few(alike)}. Unify the labels, or name "
            "every class in data.classes."
        )
    if numbers_of(found) is None:
        return tuple(sorted(found))
    return tuple(sorted(found, key=lambda name: (float(name), name)))
