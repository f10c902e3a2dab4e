"""Images below a folder, and the classes and splits that its folders name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from fpt_lightning.data.manifest import Kind, Sample
from fpt_lightning.errors import DataError, a_few

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".webp", ".jp2", ".j2k"),
    *(".pgm", ".ppm", ".pnm", ".dcm", ".dicom"),
)
"""Of files that ``fpt_lightning.data.images.read_image`` reads; DICOM files need none."""
SPLIT_NAMES = {
    name: split
    for split, names in {
        "train": ("train", "training"),
        "val": ("val", "valid", "validation", "dev", "development"),
        "test": ("test", "testing"),
    }.items()
    for name in names
}
"""What splits are called, in lower case."""


class Found(NamedTuple):
    """What is below a folder.

    Attributes:
        images: their paths relative to a root, with forward slashes.
        ignored: likewise, of hidden files and folders, and of files that are no images.
    """

    images: list[str]
    ignored: list[str]

    def notes(self) -> list[str]:
        """What people should know of it."""
        told = f"{len(self.ignored):,} files are ignored, being hidden or no images: {a_few(sorted(self.ignored), 3)}."
        return [told] if self.ignored else []


def find_images(folder: Path, root: Path) -> Found:
    """All images below a folder: by their suffix in any case, or by the letters DICM at byte 128.

    Raises:
        DataError: a folder that cannot be read, or links in a circle.
    """
    found = Found([], [])
    for path, hidden in walk(folder):
        name = path.relative_to(root).as_posix()
        (found.images if not hidden and _is_image(path) else found.ignored).append(name)
    return found


def walk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Every file below a folder, links followed, and whether it is hidden; hidden folders are not entered.

    Raises:
        DataError: a folder that cannot be read, or links in a circle.
    """
    for directory, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        yield from ((Path(directory, name), True) for name in folders if _is_hidden(name))
        folders[:] = [name for name in folders if not _is_hidden(name)]
        _check_links(Path(directory), folders)
        yield from ((Path(directory, name), _is_hidden(name)) for name in files)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # which archives made on a Mac hold


def _is_image(path: Path) -> bool:
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False  # a broken link, say, which is no image by its name either


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}.") from error


def _check_links(directory: Path, folders: Iterable[str]) -> None:
    above = {os.path.realpath(path) for path in (directory, *directory.parents)}
    for path in (directory / name for name in folders):
        if path.is_symlink() and os.path.realpath(path) in above:
            raise DataError(f"{path} is a link to a folder that it lies in: remove it.")


def labelled_folders(root: Path, kind: Kind) -> tuple[list[tuple[Sample, str]], list[str]]:
    """Images with the names of their classes, from ``{split}/{class}`` or ``{class}``, and notes on what is ignored.

    Raises:
        DataError: other folders, a class without an image, or folders which hold the same folders, so that either
            could be the classes.
    """
    if kind != "single-label":
        raise DataError(f"a {kind} data set needs a CSV manifest (data.manifest): folders name one class an image.")
    folders = _folders(root)
    splits = _splits(folders)
    ignored: list[str] = []
    if not splits:
        _check_one_level(root, folders)
        return _from_classes(root, root, "", ignored), Found([], ignored).notes()
    others = [p.name for p in folders if p not in splits]
    if others or not {"train", "test"} <= set(splits.values()) or len(splits) != len(set(splits.values())):
        raise DataError(
            f"the data root {root} holds {', '.join(p.name for p in folders)}: give the folders train, val and test "
            "(or train and test) and no other, or only class folders (which are then split 70/10/20), or a CSV "
            "manifest (data.manifest)."
        )
    labelled = [
        labelled for folder, split in splits.items() for labelled in _from_classes(folder, root, split, ignored)
    ]
    return labelled, Found([], ignored).notes()


def class_folders(root: Path) -> tuple[set[str], bool]:
    """Names of the folders that name classes, and whether they lie in folders that name splits."""
    folders = _folders(root)
    splits = _splits(folders)
    within = [path for split in splits for path in _folders(split)]
    return {path.name for path in (within if splits else folders)}, bool(splits)


def _splits(folders: Sequence[Path]) -> dict[Path, str]:
    """What the folders are called as splits: by their whole names, or all by a word, as ``chest_train``."""
    whole = {path: SPLIT_NAMES[path.name.lower()] for path in folders if path.name.lower() in SPLIT_NAMES}
    if whole:
        return whole
    words = {path: set(re.findall("[a-z]+", path.name.lower())) for path in folders}
    splits = {path: {SPLIT_NAMES[word] for word in own & SPLIT_NAMES.keys()} for path, own in words.items()}
    named = {path: each.pop() for path, each in splits.items() if len(each) == 1}
    if len(named) < len(folders) or sorted(named.values()) not in (["test", "train"], ["test", "train", "val"]):
        return {}
    return named


def _check_one_level(root: Path, folders: Sequence[Path]) -> None:
    """Refuse what may be two levels of classes: several folders, each of which holds the same ones."""
    below = [{path.name for path in _folders(folder)} for folder in folders]
    if len(below) > 1 and len(below[0]) > 1 and all(names == below[0] for names in below):
        raise DataError(
            f"each folder of the data root {root} ({a_few([p.name for p in folders], 3)}) holds the folders "
            f"{a_few(sorted(below[0]), 3)}: which are the classes? Call the upper ones train, val and test if they are "
            "splits; else name every image's class in a CSV manifest (data.manifest)."
        )


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name))


def _from_classes(folder: Path, root: Path, split: str, ignored: list[str]) -> list[tuple[Sample, str]]:
    found = {path.name: find_images(path, root) for path in _folders(folder)}
    beside = [path for path in folder.iterdir() if not path.is_dir() or _is_hidden(path.name)]
    ignored += [path.relative_to(root).as_posix() for path in beside]
    ignored += [name for one in found.values() for name in one.ignored]
    empty = [name for name, one in found.items() if not one.images]
    if empty or not found:
        raise DataError(
            f"{folder} must hold one folder of images a class; "
            + (f"without an image: {', '.join(empty)}." if empty else "it holds no folder.")
        )
    return [(Sample(id, split=split), name) for name, one in found.items() for id in one.images]
