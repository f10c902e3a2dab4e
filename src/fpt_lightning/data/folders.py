"""Images below a folder, and the classes and splits that its folders name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from fpt_lightning.data.manifest import Kind, Sample
from fpt_lightning.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom")
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


def image_ids(folder: Path, root: Path) -> list[str]:
    """The paths, relative to a root, of all images below a folder.

    Raises:
        DataError: a folder that cannot be read, or links in a circle.
    """
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


def labelled_folders(root: Path, kind: Kind) -> list[tuple[Sample, str]]:
    """Images with the names of their classes, from ``{split}/{class}`` or ``{class}``.

    Raises:
        DataError: other folders, or a class without an image.
    """
    if kind != "single-label":
        raise DataError(f"a {kind} data set needs a CSV manifest (data.manifest): folders name one class an image.")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    splits = {p: SPLIT_NAMES[p.name.lower()] for p in folders if p.name.lower() in SPLIT_NAMES}
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
    found = {p.name: image_ids(p, root) for p in classes}
    empty = [name for name, ids in found.items() if not ids]
    if empty or not classes:
        raise DataError(
            f"{folder} must hold one folder of images a class; "
            + (f"without an image: {', '.join(empty)}." if empty else "it holds no folder.")
        )
    return [(Sample(id, split=split), name) for name, ids in found.items() for id in ids]
