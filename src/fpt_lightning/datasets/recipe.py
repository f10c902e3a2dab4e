"""What the recipes share: layouts of archives, reading tables, joining their rows with files."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fpt_lightning.data.folders import IMAGE_SUFFIXES, walk
from fpt_lightning.data.manifest import Sample
from fpt_lightning.data.tables import decoded
from fpt_lightning.datasets.pieces import MissingPiecesError, Pieces, Wanted
from fpt_lightning.errors import DataError

DR_GRADES = ("no DR", "mild NPDR", "moderate NPDR", "severe NPDR", "PDR")
"""Grades 0 to 4 of diabetic retinopathy (international clinical scale)."""

_SEPARATORS = (",", ";", "\t", " ")  # in the order in which they are tried
_MASK = re.compile(r"(.*[_. -])?(mask|segmentation)[_ -]?\d*([_. -].*)?", re.IGNORECASE)

T = TypeVar("T")


@dataclass
class Found:
    """What a recipe found below a folder.

    Attributes:
        root: the folder that ids are relative to.
        samples: labelled images, with the official split and the group where there are any.
        left_out: by id of an image, or by what a table calls it, the reason; reasons are counted up to a colon.
        foreign: those ids in it that are no images of this data set, and so do not count among its images.
    """

    root: Path
    samples: list[Sample] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    foreign: set[str] = field(default_factory=set)

    def add(self, path: Path, label: int, split: str = "", group: str = "") -> None:
        self.samples.append(Sample(self._id(path), label, split=split, group=group))

    def leave_out(self, path: Path, reason: str, foreign: bool = False) -> None:
        self.left_out[self._id(path)] = reason
        if foreign:
            self.foreign.add(self._id(path))

    def join(self, folder: Path, rows: Iterable[tuple[str, T]], table: Path) -> Iterator[tuple[Path, T]]:
        """The images below a folder with their rows; an image without a row and a row without an image are left out.

        Args:
            folder: of the images.
            rows: (file name, row); neither case nor suffix of the name count.
            table: that the rows are from.

        Raises:
            DataError: two images or two rows have one name.
        """
        files = _by_name(((path.name, path) for path in images(folder)), folder)
        named = _by_name(((name, (name, row)) for name, row in rows), table)
        for key in sorted(files.keys() | named.keys()):
            if key not in named:
                self.leave_out(files[key], f"no row in {table.name}")
            elif key not in files:
                self.leave_out(folder / named[key][0], f"a row in {table.name}, but no file")
            else:
                yield files[key], named[key][1]

    def _id(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


Read = Callable[[Found, Pieces], None]


@dataclass(frozen=True)
class Layout:
    """One form in which a data set is distributed.

    Attributes:
        wanted: its pieces.
        read: fills ``Found``, given where each piece is.
        splits: the official ones, none of which may be empty; none where the split is drawn.
        loss: what people should know that this form lacks.
    """

    wanted: Wanted
    read: Read
    splits: tuple[str, ...] = ()
    loss: str = ""


@dataclass(frozen=True)
class Recipe:
    """How to read one data set as its owners distribute it.

    Attributes:
        name: on the command line.
        title: for people.
        classes: in the order of the label indices.
        images: the published number, ungradable and unlabelled ones included.
        modality: of the images.
        licence: a note, not advice; the owners' terms hold.
        url: of the owners' page.
        source: URL of what describes or reads the layout; the docstring of the recipe's module says more.
        layouts: the owners' form first, then those of copies.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    images: int
    modality: str
    licence: str
    url: str
    source: str
    layouts: tuple[Layout, ...]

    def samples(self, root: Path) -> tuple[Found, Layout]:
        """The data set below a folder, and the layout that it has.

        Raises:
            DataError: a piece is missing, there more than once or not readable; a table is not as published.
        """
        if not root.is_dir():
            raise DataError(f"the folder {root} of {self.title} does not exist: get it from {self.url}.")
        found = Found(root)
        try:
            layout, pieces = self._located(root)
            layout.read(found, pieces)
        except OSError as error:
            raise DataError(f"{self.title}: {error.filename} cannot be read: {error.strerror}.") from error
        return found, layout

    def _located(self, root: Path) -> tuple[Layout, Pieces]:
        """The first layout whose pieces are there; else the error of the one that lacks the least."""
        missing: list[MissingPiecesError] = []
        for layout in self.layouts:
            try:
                return layout, layout.wanted.locate(root, self.title)
            except MissingPiecesError as error:
                missing.append(error)
        raise DataError(str(min(missing, key=lambda error: error.share)))


def _by_name(pairs: Iterable[tuple[str, T]], where: Path) -> dict[str, T]:
    named: dict[str, T] = {}
    for name, value in pairs:
        key = name.lower()
        key = next((key.removesuffix(suffix) for suffix in IMAGE_SUFFIXES if key.endswith(suffix)), key)
        if key in named:
            raise DataError(f"{where} has {name!r} more than once: keep one.")
        named[key] = value
    return named


def files(folder: Path) -> list[Path]:
    """Every file below a folder in ascending order, links followed, hidden ones left out."""
    return sorted(path for path, hidden in walk(folder) if not hidden)


def images(folder: Path) -> list[Path]:
    """Every file below a folder that its suffix, in any case, calls an image, in ascending order."""
    return [path for path in files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def is_mask(path: Path) -> bool:
    """Whether a file's name calls it a mask: outlines of lesions or organs, which lie beside some sets' images."""
    return _MASK.fullmatch(path.stem) is not None


def read_table(path: Path, columns: Sequence[str], header: bool = True) -> list[list[str]]:
    """The fields of a text table, separated by commas, semicolons, tabs or, without a header, blanks.

    In UTF-8, UTF-16 or Windows-1252; blank lines and blanks around fields are dropped.

    Args:
        path: of the table.
        columns: wanted, in this order, each one name or several with ``|`` between them; without a header, all that
            there are.
        header: whether the first line names the columns, in any case.

    Raises:
        DataError: not such a table; a column or a field is missing.
    """
    text, _ = decoded(path.read_bytes(), path)
    if "\0" in text:
        raise DataError(f"the table {path} is no text.")
    tables = [_split(text, separator) for separator in (_SEPARATORS[:3] if header else _SEPARATORS)]
    if not header:
        lines = next((lines for lines in tables if all(len(fields) >= len(columns) for _, fields in lines)), tables[0])
        return [_picked(fields, range(len(columns)), columns, path, number) for number, fields in lines]
    heads = [_positions(lines, columns) for lines in tables]
    fitting = next((i for i, positions in enumerate(heads) if None not in positions), None)
    if fitting is None:
        widest = max(range(len(tables)), key=lambda i: len(tables[i][0][1]) if tables[i] else 0)
        missing = [c.replace("|", " or ") for c, at in zip(columns, heads[widest], strict=True) if at is None]
        names = ", ".join(tables[widest][0][1]) if tables[widest] else "nothing"
        raise DataError(
            f"the table {path} has no column {', '.join(missing)}, but {names}: is it an altered copy? Get the owners' "
            "file."
        )
    positions = [at for at in heads[fitting] if at is not None]
    return [_picked(fields, positions, columns, path, number) for number, fields in tables[fitting][1:]]


def _split(text: str, separator: str) -> list[tuple[int, list[str]]]:
    """Line numbers and fields of the lines that are not blank."""
    reader = csv.reader(text.splitlines(), delimiter=separator, skipinitialspace=True)
    lines = [(reader.line_num, [field.strip() for field in line]) for line in reader]
    return [(number, fields) for number, fields in lines if any(fields)]


def _positions(lines: Sequence[tuple[int, list[str]]], columns: Sequence[str]) -> list[int | None]:
    """Of the columns in the header."""
    names = [name.lower() for name in lines[0][1]] if lines else []
    return [
        next((names.index(name) for name in column.lower().split("|") if name in names), None) for column in columns
    ]


def _picked(
    fields: Sequence[str], positions: Sequence[int], columns: Sequence[str], path: Path, number: int
) -> list[str]:
    if len(fields) <= max(positions):
        raise DataError(f"{path}, line {number}: {len(fields)} fields, but {', '.join(columns)} are needed.")
    return [fields[position] for position in positions]


def label_of(text: str, labels: Mapping[str, int], table: Path, image: str) -> int:
    """The label that a field of a table stands for.

    Raises:
        DataError: it stands for none.
    """
    if text not in labels:
        raise DataError(f"{table}: the label of {image} is {text!r}, not one of {', '.join(labels)}.")
    return labels[text]
