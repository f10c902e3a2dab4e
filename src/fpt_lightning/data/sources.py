"""Where a manifest comes from: class folders, a table, or any folder of images."""

from __future__ import annotations

import math
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fpt_lightning.data import tables
from fpt_lightning.data.folders import IMAGE_SUFFIXES, find_images, labelled_folders
from fpt_lightning.data.image_files import ImageFiles
from fpt_lightning.data.manifest import SPLITS, Kind, Manifest, Sample, numbers_of
from fpt_lightning.data.splits import Digests, check_splits, draw_validation, fold_split, random_split
from fpt_lightning.data.tables import UNCERTAIN, Table, read_table
from fpt_lightning.errors import DataError, a_few

Fill = Literal["ignore", "zeros", "ones"]
_FILLS: Mapping[str, float] = {"ignore": math.nan, "zeros": 0.0, "ones": 1.0}


def read_manifest(
    root: str | Path,
    table: str | Path | None = None,
    *,
    image_column: str = "image",
    label_column: str | Sequence[str] = "label",
    label_separator: str | None = None,
    split_column: str | None = None,
    split_lists: Mapping[str, str] | None = None,
    group_column: str | None = None,
    case_column: str | None = None,
    classes: Sequence[str] | None = None,
    kind: Kind = "single-label",
    missing_labels: Fill = "ignore",
    uncertain_labels: Fill = "ignore",
    split_seed: int = 0,
    fold: int | None = None,
    folds: int = 5,
    external: bool = False,
    allow_overlap: bool = False,
    digests: Digests | None = None,
    overlaps: Path | None = None,
) -> Manifest:
    """Read a labelled data set.

    Without ``table`` the folders say it: ``root/{train,val,test}/{class}/image``, or ``root/{class}/image``, which is
    split 70/10/20 at random, stratified by class. A ``table`` has one row an image; without a split column its images
    are split in the same way, groups kept whole. Where there are training and test images alone, an eighth of the
    training images is drawn for validation.

    With ``fold``, cross-validation: where splits are given, the test images stay, and the fold of the others validates;
    otherwise the fold is the test split, and the next one validates. Folds are stratified and keep groups whole.
    ``Manifest.measured`` then has all splits that change from fold to fold, and never test images that are given.

    Args:
        root: folder of the images.
        table: CSV file, or XLSX file whose first sheet is read; absolute or relative to ``root``.
        image_column: column of image paths, relative to ``root``.
        label_column: column of class names or numbers; the columns of 1, 0, -1 or nothing of a multi-label data set;
            of a single-label one also columns of which one is true in each row.
        label_separator: of the names of a multi-label data set, where one column holds them: ``|`` of ``Mass|Nodule``.
        split_column: column of ``train``, ``val``, ``test``; the column ``split``, if there is one, by default.
        split_lists: in its place, files that list the images of each split, one a line: ``{train: a.txt}`` and so on.
        group_column: column of groups, such as patients; the column ``group``, if there is one, by default.
        case_column: column of cases, such as exams, whose images are evaluated as one too; a case is of one group, and
            is the group of its images where they have no other.
        classes: class names in the order wanted (grades from low to high, say); sorted by default.
        kind: of the labels.
        missing_labels: what an empty field of a multi-label data set stands for.
        uncertain_labels: what -1 stands for in its training images; in others it is ignored.
        split_seed: seed of a random split.
        fold: which fold, from 1; None without cross-validation.
        folds: how many.
        external: whether all images are test images of a model trained elsewhere; splits are not read.
        allow_overlap: whether groups, or identical files, may be in several splits, with a warning.
        digests: what is known of the files' content, so that files of one size need not be read to tell them apart.
        overlaps: CSV file in which all groups and identical files in several splits are listed, of which the error or
            warning names a few (``fpt_lightning.data.splits.check_splits``).

    Raises:
        DataError: anything missing, empty, duplicated or inconsistent, by name.
        ConfigurationError: a fold that there is not.
    """
    folder = _data_root(root)
    _check_case_column(case_column, table)
    if table is None:
        labelled, notes = labelled_folders(folder, kind)
        samples, names = _with_classes(labelled, classes)
        files = ImageFiles.look(folder, [sample.id for sample in samples])
    else:
        rows = read_table(folder / Path(table).expanduser(), image_column)
        splits = (None, None) if external else (split_column, split_lists)
        samples, files = tables.unlabelled_samples(
            folder, rows, image_column, splits[0], group_column, case_column, splits[1]
        )
        columns = [label_column] if isinstance(label_column, str) else list(label_column)
        samples, names = _labelled(samples, rows, columns, kind, classes, label_separator)
        notes = rows.notes
    samples = sorted(samples, key=lambda sample: sample.id)
    drawn = not external and not samples[0].split
    measured: tuple[str, ...] = ("train",)
    unfolded: tuple[str, ...] = ()
    origin = "as given with the data set"
    at_random = f"drawn at random with seed {split_seed}, stratified, groups whole"
    if external:
        origin = "all are test images, of a model that was trained on others"
        samples = [replace(sample, split="test") for sample in samples]
    elif fold is not None:
        unfolded = tuple(sample.id for sample in _split(samples, split_seed, kind) if sample.split == "train")
        samples = fold_split(samples, fold, folds, split_seed, kind)
        measured = SPLITS if drawn else ("train", "val")
        origin = f"fold {fold} of {folds}{'' if drawn else ' of what is not for test'}, {at_random}"
    else:
        given, samples = samples, _split(samples, split_seed, kind)
        origin = f"70% training, 10% validation and 20% test images, {at_random}" if drawn else origin
        if not drawn and samples is not given:
            drawn, count = True, sum(sample.split == "val" for sample in samples)
            origin = f"test images as given with the data set, an eighth of the others for validation, {at_random}"
            notes.append(f"there are no validation images: {count:,} of the training images are drawn, whole groups.")
    if kind == "multi-label":
        samples = [_filled(sample, missing_labels, uncertain_labels) for sample in samples]
    random = not external and (drawn or fold is not None)
    files = files.of([sample.id for sample in samples])
    manifest = Manifest(folder, tuple(samples), names, kind, random, tuple(notes), files, measured, unfolded, origin)
    if not external:
        if kind == "single-label" and len(names) < 2:
            raise DataError(f"the data set has one class only, {names[0]!r}: a classifier needs at least two.")
        manifest = replace(manifest, overlaps=check_splits(manifest, allow_overlap, digests, overlaps))
    return manifest


def _split(samples: list[Sample], seed: int, kind: Kind) -> list[Sample]:
    """The splits without folds: those that are given, themselves; what lacks is drawn."""
    if not samples[0].split:
        return random_split(samples, seed, kind)
    drawn = {sample.split for sample in samples} == {"train", "test"}
    return draw_validation(samples, seed, kind) if drawn else samples


def list_images(
    root: str | Path,
    kind: Kind = "single-label",
    targets: int = 1,
    table: str | Path | None = None,
    image_column: str = "image",
    case_column: str | None = None,
) -> Manifest:
    """Every image below a folder, unlabelled, for prediction.

    Args:
        root: the folder.
        kind: of the labels that there are not.
        targets: how many an image would have, if several labels or a number.
        table: CSV file of the images' cases, absolute or relative to ``root``; not read without ``case_column``.
        image_column: its column of image paths.
        case_column: its column of cases.

    Raises:
        DataError: no such folder, no image in it, or images whose case the table does not say.
    """
    folder = _data_root(root)
    found = find_images(folder, folder)
    ids = sorted(found.images)
    if not ids:
        raise DataError(f"there is no image below {folder} (file names ending in {', '.join(IMAGE_SUFFIXES)}).")
    unknown = () if kind == "single-label" else (math.nan,) * targets
    cases = [""] * len(ids)
    _check_case_column(case_column, table)
    if case_column is not None and table is not None:
        path = folder / Path(table).expanduser()
        cases = [
            tables.case_name(field) for field in tables.fields_of(path, image_column, ids, [case_column])[case_column]
        ]
    samples = tuple(Sample(id, targets=unknown, group=case, case=case) for id, case in zip(ids, cases, strict=True))
    return Manifest(folder, samples, (), kind, notes=tuple(found.notes()))


def _check_case_column(case_column: str | None, table: str | Path | None) -> None:
    if case_column is not None and table is None:
        raise DataError(f"data.case_column is {case_column!r}, a column of a table: give it as data.manifest, or null.")


def _data_root(root: str | Path) -> Path:
    folder = Path(os.path.expanduser(root))
    if not os.path.isdir(folder):
        raise DataError(f"the data root {str(root)!r} is not a folder.")
    return folder


def _labelled(
    samples: Sequence[Sample],
    table: Table,
    columns: Sequence[str],
    kind: Kind,
    classes: Sequence[str] | None,
    separator: str | None,
) -> tuple[list[Sample], tuple[str, ...]]:
    """A sample an image with its labels, and the names of the classes."""
    if separator is not None and (kind != "multi-label" or len(columns) != 1):
        raise DataError(f"data.label_separator is {separator!r}, which is for one column of the task 'multilabel'.")
    if kind == "single-label":
        tables.merged(samples, table, several=False)
        named = tables.class_labels(table, columns, classes)
        asked = columns if classes is None and len(columns) > 1 else classes
        return _with_classes(list(zip(samples, named, strict=True)), asked)
    if separator is not None:
        found, names = tables.named_targets(samples, table, columns[0], separator, classes)
        return tables.merged(found, table, several=True, union=True), names
    if kind == "regression" and len(columns) != 1:
        raise DataError(f"data.label_column names {len(columns)} columns, which is for the task 'multilabel'.")
    if classes is not None:
        raise DataError(f"data.classes is {list(classes)}: the classes of a {kind} data set are its label columns.")
    found, names = tables.number_targets(samples, table, columns, kind)
    return tables.merged(found, table, several=kind == "multi-label"), names


def _filled(sample: Sample, missing: Fill, uncertain: Fill) -> Sample:
    """The sample with what its empty and uncertain labels stand for."""
    stands = {math.inf: _FILLS[missing], UNCERTAIN: _FILLS[uncertain if sample.split == "train" else "ignore"]}
    return replace(sample, targets=tuple(stands.get(target, target) for target in sample.targets))


def _with_classes(
    labelled: Sequence[tuple[Sample, str]], classes: Sequence[str] | None
) -> tuple[list[Sample], tuple[str, ...]]:
    names = _class_names((label for _, label in labelled), classes)
    index = {name: i for i, name in enumerate(names)}
    return [replace(sample, label=index[label]) for sample, label in labelled], names


def _class_names(labels: Iterable[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    found = set(labels)
    if several := sorted(name for name in found.union(asked or ()) if "|" in name):
        raise DataError(
            f"{len(several)} classes have a | in their names, which stands between several: {a_few(several)}. Where an "
            "image has several labels, give model.task 'multilabel' and data.label_separator '|'; else rename them."
        )
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
