"""What the recipes share: finding the pieces of an archive, reading tables, joining their rows with files."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from fpt_lightning.data.folders import IMAGE_SUFFIXES, walk
from fpt_lightning.data.manifest import Sample
from fpt_lightning.errors import DataError

DR_GRADES = ("no DR", "mild NPDR", "moderate NPDR", "severe NPDR", "PDR")
"""Grades 0 to 4 of diabetic retinopathy (international clinical scale)."""

_DEPTH = 2  # folders that unpacking may have put around a piece
_SHOWN = 8  # entries of a folder that an error names

T = TypeVar("T")


@dataclass
class Found:
    """What a recipe found below a folder.

    Attributes:
        root: the folder that ids are relative to.
        samples: labelled images, with the official split and the group where there are any.
        left_out: by id of an image, or by what a table calls it, the reason; reasons are counted up to a colon.
    """

    root: Path
    samples: list[Sample] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, path: Path, label: int, split: str = "", group: str = "") -> None:
        self.samples.append(Sample(self._id(path), label, split=split, group=group))

    def leave_out(self, path: Path, reason: str) -> None:
        self.left_out[self._id(path)] = reason

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


Read = Callable[[Found, Mapping[str, Path]], None]


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
        pieces: where to get each file and folder (with a slash at its end) that must be there, by its path.
        read: fills ``Found``, given where each piece is.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    images: int
    modality: str
    licence: str
    url: str
    source: str
    pieces: Mapping[str, str]
    read: Read

    def samples(self, root: Path) -> Found:
        """The data set below a folder, up to two folders deeper; the case of names does not count.

        Raises:
            DataError: a piece is missing, there more than once or not readable; a table is not as published.
        """
        if not root.is_dir():
            raise DataError(f"the folder {root} of {self.title} does not exist: get it from {self.url}.")
        found = Found(root)
        try:
            self.read(found, self._locate(root))
        except OSError as error:
            raise DataError(f"{self.title}: {error.filename} cannot be read: {error.strerror}.") from error
        return found

    def _locate(self, root: Path) -> dict[str, Path]:
        levels = [[root]]
        for _ in range(_DEPTH):
            levels.append([child for folder in levels[-1] for child in _folders(folder)])
        matches = {piece: _shallowest(levels, piece) for piece in self.pieces}
        missing = [piece for piece, paths in matches.items() if not paths]
        if missing:
            entries = sorted(path.name for path in root.iterdir())
            raise DataError(
                f"{self.title}: {root}, or a folder up to {_DEPTH} levels below it, must hold "
                f"{', '.join(missing)}; {root} holds {', '.join(entries[:_SHOWN]) or 'nothing'}"
                f"{' and more' if len(entries) > _SHOWN else ''}. "
                f"Get what is missing from {', '.join(sorted({self.pieces[piece] for piece in missing}))}."
            )
        for piece, paths in matches.items():
            if len(paths) > 1:
                raise DataError(
                    f"{self.title}: {piece} is below {root} more than once, as {', '.join(map(str, paths))}: give the "
                    "folder of one, or remove the others."
                )
        return {piece: paths[0] for piece, paths in matches.items()}


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(e.path) for e in entries if e.is_dir() and not e.name.startswith((".", "__MACOSX")))


def _shallowest(levels: Sequence[Sequence[Path]], piece: str) -> list[Path]:
    for folders in levels:
        paths = list(folders)
        for part in PurePosixPath(piece.lower()).parts:
            paths = [entry for path in paths if path.is_dir() for entry in path.iterdir() if entry.name.lower() == part]
        paths = sorted(path for path in paths if path.is_dir() == piece.endswith("/"))
        if paths:
            return paths
    return []


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


def read_table(path: Path, columns: Sequence[str], delimiter: str = ",", header: bool = True) -> list[list[str]]:
    """The fields of a text table in UTF-8, with or without BOM; blank lines and blanks around fields are dropped.

    Args:
        path: of the table.
        columns: wanted, in this order; without a header, all that there are.
        delimiter: between fields.
        header: whether the first line names the columns, in any case.

    Raises:
        DataError: not such a table; a column or a field is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [
                (reader.line_num, [text.strip() for text in line])
                for reader in [csv.reader(file, delimiter=delimiter, skipinitialspace=True)]
                for line in reader
                if any(text.strip() for text in line)
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the table {path} is not text in UTF-8: {error}.") from error
    positions = list(range(len(columns)))
    if header:
        names = [name.lower() for name in lines.pop(0)[1]] if lines else []
        missing = [column for column in columns if column.lower() not in names]
        if missing:
            raise DataError(
                f"the table {path} has no column {', '.join(missing)}, but {', '.join(names) or 'nothing'}: "
                "is it an altered copy? Get the owners' file."
            )
        positions = [names.index(column.lower()) for column in columns]
    for number, fields in lines:
        if len(fields) <= max(positions):
            raise DataError(f"{path}, line {number}: {len(fields)} fields, but {', '.join(columns)} are needed.")
    return [[fields[position] for position in positions] for _, fields in lines]


def label_of(text: str, labels: Mapping[str, int], table: Path, image: str) -> int:
    """The label that a field of a table stands for.

    Raises:
        DataError: it stands for none.
    """
    if text not in labels:
        raise DataError(f"{table}: the label of {image} is {text!r}, not one of {', '.join(labels)}.")
    return labels[text]
