"""Text files and tables: read with their damage named, written whole or not at all, aligned for people."""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.errors import DataError, OutputError, a_few, in_one_line


class Row(dict[str, str]):
    """A row of a table by column.

    Attributes:
        line: of the file, counted from 1; the last one of a row of several lines.
    """

    __slots__ = ("line",)

    def __init__(self, cells: dict[str, str], line: int) -> None:
        super().__init__(cells)
        self.line = line


PARTIAL = ".partial"
"""What the name of a file ends in until all of it is there."""

_AT_ONCE, _CHUNK = 16, 256  # threads, and files that each asks for in turn
_FORMULA = re.compile("'*[=+@\t\r-]")
"""How cells begin that spreadsheets run, or that are guarded from it (OWASP, CSV injection)."""


def read_rows(path: Path, kind: str) -> list[Row]:
    """The rows of a CSV file.

    Args:
        path: of the file, in UTF-8.
        kind: what it is called in errors, such as ``manifest``.

    Raises:
        DataError: no such file, no CSV, no row, a column twice, or a row with more or fewer fields than the header.
    """
    try:
        text = read_bytes(path, kind).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"the {kind} {path} is not a CSV file in UTF-8: {error}.") from error
    return parse_rows(text, path, kind)


def read_bytes(path: Path, kind: str) -> bytes:
    """All of a file.

    Raises:
        DataError: no such file, or one that cannot be read.
    """
    if not os.path.isfile(path):
        raise DataError(f"the {kind} {path} does not exist.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the {kind} {path} cannot be read: {error.strerror}.") from error


def parse_rows(text: str, path: Path, kind: str, separator: str = ",") -> list[Row]:
    """The rows of a table; columns without a name, such as pandas' index, are left out.

    Args:
        text: of the table.
        path: of its file, for errors.
        kind: what it is called in errors.
        separator: of fields.

    Raises:
        DataError: as ``read_rows``.
    """
    try:
        if "\0" in text:
            raise csv.Error("it holds NUL characters")  # not text at all
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
        names = next(reader, [])
        lines = [(fields, reader.line_num) for fields in reader if fields]
    except csv.Error as error:
        raise DataError(f"the {kind} {path} is not a CSV file in UTF-8: {error}.") from error
    for fields, line in lines:
        if len(fields) != len(names):
            raise DataError(f"{path}, line {line}: the number of fields differs from the header's.")
    return named_rows(names, lines, path, kind)


def named_rows(names: Sequence[str], lines: Sequence[tuple[Sequence[str], int]], path: Path, kind: str) -> list[Row]:
    """Rows by the names of their columns.

    Args:
        names: of the columns; those without one are left out.
        lines: as many fields, and the line of the file.
        path: of the file, for errors.
        kind: what it is called in errors.

    Raises:
        DataError: no row, or a column twice.
    """
    if not lines:
        raise DataError(f"the {kind} {path} holds no row below its header.")
    if twice := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise DataError(f"the {kind} {path} has several columns named {', '.join(twice)}.")
    columns = [(i, _unguarded(name)) for i, name in enumerate(names) if name]
    return [Row({name: _unguarded(fields[i]) for i, name in columns}, line) for fields, line in lines]


def file_states(paths: Sequence[str]) -> NDArray[np.int64]:
    """Size in bytes and time of the last change in ns of files, (paths, 2); a size of -1 where there is no file.

    Several are asked for at once, as storage that is far away takes a millisecond for each.
    """
    chunks = (paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = [state for part in pool.map(lambda some: [_state(path) for path in some], chunks) for state in part]
    return np.array(found, np.int64).reshape(-1, 2)


def _state(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the second of names that no file can have
        return -1, 0
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (-1, 0)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_rows(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, its header first; what a spreadsheet would run as a formula is written as text."""
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        cells = [_guarded(cell) for cell in row]
        lone = any(isinstance(cell, str) and "\r" in cell for cell in cells)  # which Python before 3.13 does not quote
        (quoted if lone else plain).writerow(cells)
    write_text(path, text.getvalue())


def _guarded(cell: Any) -> Any:
    """Text that a spreadsheet would run as a formula, behind an apostrophe; ``read_rows`` takes it off."""
    if not isinstance(cell, str) or not _FORMULA.match(cell):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def _unguarded(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell[1:]) else cell


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A partial name to write a file under, which becomes its own once all of it is there; its folder is made.

    Whatever stops the writer leaves what was under the name before, and nothing partial.

    Raises:
        OutputError: in place of an ``OSError``.
    """
    partial = path.with_name(f"{path.name}{PARTIAL}")
    make_folder(path.parent)
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}. What was there before is kept: make room, or give a "
            "place that can be written."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        OutputError: it is a file, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {folder} cannot be made: {error.strerror}. Give another place.") from error


def keep_beside(path: Path) -> Path | None:
    """Give a file or folder that something new will replace a free name beside its own: ``best`` becomes ``best-1``.

    Returns:
        That name; None where nothing is there.
    """
    if not path.exists():
        return None
    kept = next(name for i in count(1) if not (name := path.with_name(f"{path.stem}-{i}{path.suffix}")).exists())
    path.rename(kept)
    return kept


def take_lock(file: IO[bytes], shared: bool = False) -> bool:
    """Take the operating system's lock of an open file, or change the one that is held, until it is closed or a crash.

    Args:
        file: open for writing.
        shared: whether others may share the lock.

    Returns:
        Whether it was free. A file system without locks only warns.
    """
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        warnings.warn(f"{file.name} cannot be locked ({error.strerror}): write there from one process.", stacklevel=3)
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def without_nan(value: Any) -> Any:
    """Plain dicts, lists and numbers for JSON, which has no NaN: None there."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def screen_width() -> int:
    """Columns of the terminal; 80 where there is none and COLUMNS does not say."""
    return shutil.get_terminal_size().columns


def align(rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Rows of cells as lines of columns, the first on the left, the others on the right.

    Args:
        rows: of equal length.
        width: of the lines; a wider table is parted into several below each other, each with the first column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    fitting, used = 1, widths[0]
    while fitting < len(widths) and (width is None or fitting == 1 or used + 2 + widths[fitting] <= width):
        used, fitting = used + 2 + widths[fitting], fitting + 1
    if fitting < len(widths):
        parted = [row[:fitting] for row in rows], [[row[0], *row[fitting:]] for row in rows]
        return "\n\n".join(align(part, width) for part in parted)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def write_pickle(path: Path, content: Any) -> None:
    """Write tensors and plain values, as ``load_pickle`` reads them, whole or not at all."""
    import torch

    with whole_file(path) as partial, partial.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # PyTorch's own of a full disk
            raise OSError(in_one_line(error)) from error
        os.fsync(file.fileno())


def load_pickle(path: str | Path) -> Any:
    """Tensors and plain values of a file of ``torch.save``; no code is run.

    ``argparse.Namespace``, which research code saves its arguments in, is read as the plain data that it is.

    Raises:
        ValueError: what it cannot be read for, in one line; objects that could run code are named.
    """
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text says how to switch safety off
        raise ValueError(f"it holds {_unsafe(path)}, which could run code") from error
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(in_one_line(error)) from error


def _unsafe(path: str | Path) -> str:
    """Names of the Python objects in a pickle that are neither tensors nor plain values."""
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a pickle that torch.save did not write
        names = []
    return a_few(sorted(names)) or "Python objects"
