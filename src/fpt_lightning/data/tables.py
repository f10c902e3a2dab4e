"""A table of labels in the forms that people have them: encodings, separators, names of images, kinds of labels."""

from __future__ import annotations

import codecs
import csv
import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from fpt_lightning.data.folders import SPLIT_NAMES, find_images
from fpt_lightning.data.image_files import ImageFiles
from fpt_lightning.data.manifest import Kind, Sample
from fpt_lightning.data.xlsx import SHEETS, read_sheet
from fpt_lightning.errors import DataError, a_few
from fpt_lightning.files import Row, parse_rows, read_bytes

UNCERTAIN = -1.0  # as CheXpert and MIMIC-CXR write it
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
MISSING = ("", "nan", "na", "n/a", "#n/a", "none", "null")
"""What stands for no value, in small letters."""
_TRUTH = {"true": 1.0, "false": 0.0}
_NO_FINDING = "no finding"  # as NIH and CheXpert write it


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    Attributes:
        path: of the file.
        rows: one an image, or several.
        notes: what people should know of how it was read.
    """

    path: Path
    rows: Sequence[Row]
    notes: list[str]

    def where(self, row: Row) -> str:
        return f"{self.path}, line {row.line}"

    def require(self, column: str) -> str:
        """The column.

        Raises:
            DataError: there is none of that name.
        """
        if column not in self.rows[0]:
            raise DataError(f"the manifest {self.path} has no column {column!r}; it has {', '.join(self.rows[0])}.")
        return column

    def column(self, asked: str | None, default: str) -> str | None:
        """The column asked for, or the one of a usual name if there is one."""
        if asked is None:
            return default if default in self.rows[0] else None
        return self.require(asked)


def read_table(path: Path, image_column: str) -> Table:
    """Read a table of whatever encoding and separator, or the first sheet of a spreadsheet.

    UTF-8, UTF-16, or else Windows-1252 (which holds Latin-1); the separator is the one that gives the header the column
    of images.

    Raises:
        DataError: no table (``fpt_lightning.files.parse_rows``, ``fpt_lightning.data.xlsx.read_sheet``), or a separator
            that cannot be told.
    """
    if path.suffix.lower() in SHEETS:
        rows, others = read_sheet(path, "manifest")
        unread = [f"of the manifest {path} the first sheet is read, not {a_few(others)}."] if others else []
        return Table(path, rows, unread)
    text, notes = decoded(read_bytes(path, "manifest"), path)
    head = text.splitlines()[:1]
    heads = {separator: next(csv.reader(head, delimiter=separator), []) for separator in _SEPARATORS}
    fitting = [separator for separator, names in heads.items() if image_column in names]
    if len(fitting) > 1 and len({len(heads[separator]) for separator in fitting}) > 1:
        seen = " and ".join(_SEPARATORS[separator] for separator in fitting)
        raise DataError(f"the header of the manifest {path} has {seen}: quote names that hold a separator.")
    separator = fitting[0] if fitting else max(heads, key=lambda separator: len(heads[separator]))
    if separator != ",":
        notes.append(f"the manifest {path} is separated by {_SEPARATORS[separator]}.")
    return Table(path, parse_rows(text, path, "manifest", separator), notes)


def decoded(content: bytes, path: Path) -> tuple[str, list[str]]:
    """The text of a table, with what people should know of its encoding: UTF-8, UTF-16, or else Windows-1252.

    Raises:
        DataError: it is none of these.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16"), []
    for order, zeros in (("le", content[1:200:2]), ("be", content[:200:2])):
        if len(zeros) > 1 and not zeros.strip(b"\0"):
            return content.decode(f"utf-16-{order}"), []
    try:
        return content.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        pass
    try:
        return content.decode("cp1252"), [f"the manifest {path} is not UTF-8, and was read as Windows-1252."]
    except UnicodeDecodeError as error:
        raise DataError(f"the manifest {path} is no text in UTF-8, UTF-16 or Windows-1252: {error}.") from error


# Images, splits and groups


def unlabelled_samples(
    root: Path,
    table: Table,
    image_column: str,
    split_column: str | None,
    group_column: str | None,
    case_column: str | None,
    split_lists: Mapping[str, str] | None,
) -> tuple[list[Sample], ImageFiles]:
    """A sample a row, in the order of the rows, without labels; and what was seen of the files.

    Raises:
        DataError: an image that is not there or not below the root, a split that is none, or a case of several groups.
    """
    table.require(image_column)
    split_column, group_column = table.column(split_column, "split"), table.column(group_column, "group")
    ids, files = _found(root, table, [_sample_id(row[image_column].strip(), root, table, row) for row in table.rows])
    splits = [_split(row, split_column, table) if split_column else "" for row in table.rows]
    if split_lists:
        splits = _listed(root, table, ids, split_lists)
    groups = [row[group_column].strip() if group_column else "" for row in table.rows]
    case_column = None if case_column is None else table.require(case_column)
    cases = [case_name(row[case_column]) if case_column else "" for row in table.rows]
    groups_of: defaultdict[str, set[str]] = defaultdict(set)
    for case, group in zip(cases, groups, strict=True):
        groups_of[case].add(group)
    if torn := sorted(case for case, own in groups_of.items() if case and len(own) > 1):
        raise DataError(
            f"{len(torn)} cases (column {case_column!r}) of the manifest {table.path} have images of several groups: "
            f"{a_few(torn)}. Give each case a name of its own, and its images one patient."
        )
    rows = zip(ids, splits, groups, cases, strict=True)
    samples = [Sample(id, split=split, group=group or case, case=case) for id, split, group, case in rows]
    return samples, files


def case_name(field: str) -> str:
    """The case that a field names; empty where it names none."""
    text = field.strip()
    return "" if text.lower() in MISSING else text


def _split(row: Row, column: str, table: Table) -> str:
    split = SPLIT_NAMES.get(row[column].strip().lower())
    if split is None:
        raise DataError(f"{table.where(row)}: the split is {row[column]!r}, not train, val or test.")
    return split


def _sample_id(text: str, root: Path, table: Table, row: Row) -> str:
    """The path below the root, with forward slashes."""
    if os.path.isabs(text):
        for base in (os.path.abspath(root), os.path.realpath(root)):
            if text.startswith(base.rstrip(os.sep) + os.sep):
                text = os.path.relpath(text, base)
    path = text.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or path.startswith("/") or ".." in parts:
        raise DataError(f"{table.where(row)}: the image {text!r} is not a path below the data root {root}.")
    return "/".join(parts)


def _found(root: Path, table: Table, ids: Sequence[str]) -> tuple[list[str], ImageFiles]:
    """The ids as the files are called, as some tables leave suffixes or folders out; and what was seen of the files.

    Raises:
        DataError: images that are not there, or that several files may be.
    """
    files = ImageFiles.look(root, list(dict.fromkeys(ids)))
    missing = [files.ids[position] for position in np.flatnonzero(~files.present)]
    if not missing:
        return list(ids), files
    called: defaultdict[str, list[str]] = defaultdict(list)
    for id in find_images(root, root).images:
        for name in {*_short_names(id)}:
            called[name].append(id)
    several = [id for id in missing if len(called[id]) > 1]
    if several:
        raise DataError(
            f"{table.path}: {len(several)} images may each be one of several files, such as {several[0]}: "
            f"{a_few(sorted(called[several[0]]))}. Give their paths below {root}."
        )
    lost = [id for id in missing if not called[id]]
    if lost:
        hint = ""
        if any(os.path.isfile(root / unicodedata.normalize(form, id)) for id in lost for form in ("NFC", "NFD")):
            hint = " Some do in another Unicode form (NFC or NFD) of their names: rewrite the manifest in the files'."
        raise DataError(
            f"{len(lost)} of {len(set(ids))} images of the manifest {table.path} do not exist below {root}: "
            f"{a_few(lost)}.{hint}"
        )
    found = {id: called[id][0] for id in missing}
    first = missing[0]
    table.notes.append(f"{len(found):,} images are found by their names: {first} is {found[first]}, for one.")
    return [found.get(id, id) for id in ids], files


def _short_names(id: str) -> tuple[str, ...]:
    """What tables may call a file, without its suffix or its folder."""
    path = PurePosixPath(id)
    return path.with_suffix("").as_posix(), path.name, path.stem


def fields_of(path: Path, image_column: str, ids: Sequence[str], columns: Sequence[str]) -> dict[str, list[str]]:
    """What a table says of some images, whose folder need not be there.

    Args:
        path: of the file.
        image_column: column of image paths; absolute ones, and names without suffix or folder, are found too.
        ids: paths of N images below the data root.
        columns: asked for.

    Returns:
        By column, N fields.

    Raises:
        DataError: no such table or column, images that it does not list, a row that may be of several, or rows of one
            image that contradict each other.
    """
    table, known = read_table(path, image_column), {*ids}
    for column in (image_column, *columns):
        table.require(column)
    rows: defaultdict[str, list[Row]] = defaultdict(list)
    for row in table.rows:
        rows[_within(row[image_column].strip(), known)].append(row)
    called = [next((name for name in (id, *_short_names(id)) if name in rows), None) for id in ids]
    lost = [id for id, name in zip(ids, called, strict=True) if name is None]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(ids)} images are not in the column {image_column!r} of the manifest {path}: "
            f"{a_few(lost)}. Give the manifest that lists them, or its column of paths."
        )
    shared = [name for name, count in Counter(called).items() if count > 1 and name is not None]
    if shared:
        raise DataError(f"{path}: {a_few(shared)} may each be one of several images: give their paths.")
    return {column: [_agreed(rows[name], column, table) for name in called if name is not None] for column in columns}


def _within(text: str, ids: Collection[str]) -> str:
    """A path with forward slashes; of an absolute one the end that is an id."""
    parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".")]
    ends = ("/".join(parts[start:]) for start in range(len(parts)) if os.path.isabs(text))
    return next((end for end in ends if end in ids), "/".join(parts))


def _agreed(rows: Sequence[Row], column: str, table: Table) -> str:
    fields = list(dict.fromkeys(row[column].strip() for row in rows))
    if len(fields) > 1:
        raise DataError(f"{table.where(rows[-1])}: the image has several values of {column!r}: {a_few(fields)}.")
    return fields[0]


def _listed(root: Path, table: Table, ids: Sequence[str], lists: Mapping[str, str]) -> list[str]:
    """The split of each image, by files that list those of each, one a line."""
    splits: dict[str, str] = {}
    for name, file in lists.items():
        split = SPLIT_NAMES.get(name.lower())
        if split is None:
            raise DataError(f"data.split_lists names {name!r}, which is not train, val or test.")
        path = root / Path(file).expanduser()
        lines = [line.strip() for line in decoded(read_bytes(path, "list of images"), path)[0].splitlines()]
        for id in (line for line in lines if line):
            if splits.setdefault(id, split) != split:
                raise DataError(f"the image {id} is in the lists of {splits[id]} and of {split} (data.split_lists).")
    own = [splits.get(id) or splits.get(PurePosixPath(id).name) or splits.get(PurePosixPath(id).stem) for id in ids]
    without = [id for id, split in zip(ids, own, strict=True) if split is None]
    if without:
        raise DataError(f"{len(without)} images are in none of the lists of data.split_lists: {a_few(without)}.")
    return [split or "" for split in own]


# Labels


def class_labels(table: Table, columns: Sequence[str], classes: Sequence[str] | None) -> list[str]:
    """The class of each row: of a column of names, or of columns of which one is true (one-hot).

    Raises:
        DataError: rows without a class, or with several, by their lines.
    """
    for column in columns:
        table.require(column)
    if len(columns) > 1:
        truth = [[column for column in columns if _number(row, column, table) == 1] for row in table.rows]
        wrong = [str(row.line) for row, true in zip(table.rows, truth, strict=True) if len(true) != 1]
        if wrong:
            raise DataError(
                f"{table.path}: not one of {', '.join(columns)} is true in each row, as a single label needs; in "
                f"line {a_few(wrong)} none or several are. Several labels an image are the task 'multilabel'."
            )
        return [names[0] for names in truth]
    labels = [row[columns[0]].strip() for row in table.rows]
    missing = [
        f"{row.line} ({label or 'nothing'})"
        for row, label in zip(table.rows, labels, strict=True)
        if label.lower() in MISSING and label not in (classes or ())
    ]
    if missing:
        raise DataError(
            f"{table.path}, line {a_few(missing)}: the label (column {columns[0]!r}) is empty or stands for a missing "
            "one. Take these rows out, or name it in data.classes if it is a class."
        )
    return labels


def number_targets(
    samples: Sequence[Sample], table: Table, columns: Sequence[str], kind: Kind
) -> tuple[list[Sample], tuple[str, ...]]:
    """The samples with the numbers of a regression, or the truth of several labels, a column each.

    Raises:
        DataError: what is none of them, by line.
    """
    for column in columns:
        table.require(column)
    read = _value if kind == "regression" else _number
    targets = [tuple(read(row, column, table) for column in columns) for row in table.rows]
    return [replace(s, targets=t) for s, t in zip(samples, targets, strict=True)], tuple(columns)


def named_targets(
    samples: Sequence[Sample], table: Table, column: str, separator: str, classes: Sequence[str] | None
) -> tuple[list[Sample], tuple[str, ...]]:
    """The samples with the labels whose names one field holds, such as ``Mass|Nodule``; all others are false.

    ``No Finding`` is none of them, and neither is an empty field.

    Raises:
        DataError: names beside the classes that are asked for.
    """
    table.require(column)
    fields = [[name.strip() for name in row[column].split(separator)] for row in table.rows]
    present = [{name for name in names if name and name.lower() != _NO_FINDING} for names in fields]
    found = sorted(set().union(*present))
    names = tuple(found if classes is None else classes)
    if not set(found) <= set(names) or len(set(names)) != len(names):
        raise DataError(f"data.classes is {list(names)}, but the labels are {found}: name each of them once.")
    labelled = [
        replace(sample, targets=tuple(float(name in own) for name in names))
        for sample, own in zip(samples, present, strict=True)
    ]
    return labelled, names


def merged(samples: Sequence[Sample], table: Table, several: bool, union: bool = False) -> list[Sample]:
    """One sample an image.

    Args:
        samples: a row each.
        table: they are of.
        several: whether an image may have several rows, as one a finding: those of several labels.
        union: whether a label is true where any row has it; else rows that contradict each other are refused.

    Raises:
        DataError: an image twice, or rows of one that contradict each other, by name.
    """
    own: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        own[sample.id].append(sample)
    twice = [id for id, rows in own.items() if len(rows) > 1]
    if twice and not several:
        raise DataError(f"the manifest {table.path} lists {len(twice)} images more than once: {a_few(twice)}.")
    if twice:
        table.notes.append(f"{len(twice):,} images have several rows, which are merged: {a_few(twice, 3)}.")
    return [_one(rows, table, union) for rows in own.values()]


def _one(rows: Sequence[Sample], table: Table, union: bool) -> Sample:
    first = rows[0]
    if len(rows) == 1:
        return first
    if any((row.split, row.group, row.case) != (first.split, first.group, first.case) for row in rows):
        raise DataError(f"{table.path}: the rows of the image {first.id} have several splits, groups or cases.")
    targets = []
    for values in zip(*(row.targets for row in rows), strict=True):
        known = {value for value in values if math.isfinite(value)}
        if len(known) > 1 and not union:
            raise DataError(f"{table.path}: the rows of the image {first.id} contradict each other in their labels.")
        targets.append(max(known) if known else values[0])
    return replace(first, targets=tuple(targets))


def _number(row: Row, column: str, table: Table) -> float:
    """The truth of a label: 1, 0, -1 (uncertain); infinite where the field is empty, NaN where unknown in any case."""
    number = truth_of(row[column])
    if number is None:
        raise DataError(
            f"{table.where(row)}: the label (column {column!r}) is {row[column].strip()!r}, not 1, 0, -1 (uncertain), "
            "True, False or nothing."
        )
    return number


@lru_cache(maxsize=1024)  # a table of many labels has millions of fields, and few that differ
def truth_of(field: str) -> float | None:
    """1, 0 or -1 (uncertain) of a label; infinite where the field is empty, NaN where it says so, None of all else."""
    text = field.strip().lower()
    if text == "nan":
        return math.nan
    if text in MISSING:
        return math.inf
    number = _TRUTH.get(text, as_number(text))
    return number if number in (1.0, 0.0, UNCERTAIN) else None


def _value(row: Row, column: str, table: Table) -> float:
    """The number of a regression."""
    number = as_number(row[column].strip())
    if not math.isfinite(number):
        raise DataError(f"{table.where(row)}: the label (column {column!r}) is {row[column].strip()!r}, not a number.")
    return number


def as_number(text: str) -> float:
    """The number that a text is, or NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan
