"""From a data set as distributed to ``manifest.csv`` and ``left_out.csv``; the commands ``fpt-lightning datasets``."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fpt_lightning.data.folders import IMAGE_SUFFIXES
from fpt_lightning.data.images import read_image
from fpt_lightning.data.manifest import Manifest, Sample
from fpt_lightning.data.sources import read_manifest
from fpt_lightning.data.splits import draw_validation, random_split
from fpt_lightning.datasets import DATASETS, Found, Layout, Recipe
from fpt_lightning.errors import ConfigurationError, DataError, ImageError
from fpt_lightning.files import file_digest, write_rows
from fpt_lightning.progress import track

LEFT_OUT = "left_out.csv"


def list_datasets() -> None:
    """Print the data sets with a recipe: name, classes, published images, modality, licence note, owners' page."""
    print(f"{'name':<11}{'classes':>7}{'images':>8}  {'modality':<19}licence")
    for recipe in DATASETS.values():
        print(
            f"{recipe.name:<11}{len(recipe.classes):>7}{recipe.images:>8,}  {recipe.modality:<19}{recipe.licence}\n"
            f"{'':<11}{recipe.url}"
        )


def prepare(name: str, root: Path, manifest: Path | None = None, seed: int = 0) -> Manifest:
    """Write the manifest of a data set as its owners distribute it, and the list of what is left out, with reasons.

    Left out are what the recipe leaves out (ungradable and unlabelled images, say), images that cannot be read, and
    copies: of identical files the first by path stays, and none if their classes differ. An official split is kept;
    where it has no validation images, an eighth of the training images is drawn; where there is none, 70/10/20 is.
    Drawing is by seed, stratified by class, and keeps groups (patients, lesions, cases) whole.

    Args:
        name: of the data set; see ``fpt-lightning datasets list``.
        root: folder of the unpacked archives.
        manifest: CSV file to write (image, label, split, group), ROOT/manifest.csv by default; left_out.csv (image,
            reason) is written beside it, also where there is no manifest as a class or a split is left empty.
        seed: of what is drawn.

    Returns:
        The manifest as read again.

    Raises:
        ConfigurationError: no such data set, or nothing can be written there.
        DataError: a piece of the data set is missing or not as published; no image is usable; a split is empty.
    """
    if name not in DATASETS:
        raise ConfigurationError(f"there is no data set {name!r}: choose one of {', '.join(DATASETS)}.")
    recipe, root = DATASETS[name], root.expanduser()
    path = (root / "manifest.csv" if manifest is None else manifest.expanduser()).absolute()
    found, layout = recipe.samples(root)
    if not os.access(path.parent, os.W_OK):
        raise ConfigurationError(f"nothing can be written in the folder {path.parent}: give another --manifest.")
    samples = _drop_copies(found, _drop_unreadable(found))
    write_rows(path.with_name(LEFT_OUT), [("image", "reason"), *sorted(found.left_out.items())])
    _check_whole(recipe, layout, found, samples, path.with_name(LEFT_OUT))
    if not layout.splits:
        samples = random_split(samples, seed)
    elif "val" not in layout.splits:
        samples = draw_validation(samples, seed)
    checked = _write(Manifest(root, tuple(samples), recipe.classes), path)
    print(_report(recipe, layout, checked, found, path))
    return checked


def _check_whole(recipe: Recipe, layout: Layout, found: Found, samples: Sequence[Sample], listed: Path) -> None:
    """Refuse a data set of which a class or a split is left without an image."""
    reasons = f"{_reasons(found.left_out)}; one by one in {listed}" if found.left_out else "there are none"
    if not samples:
        raise DataError(f"no image of {recipe.title} in {found.root} is usable: {reasons}.")
    classes = {recipe.classes[sample.label] for sample in samples}
    for what, lost in (
        ("split", [split for split in layout.splits if split not in {sample.split for sample in samples}]),
        ("class", [name for name in recipe.classes if name not in classes]),
    ):
        if lost:
            raise DataError(
                f"{recipe.title} in {found.root} leaves the {what} {', '.join(lost)} without a usable image: {reasons}."
            )


def _drop_unreadable(found: Found) -> dict[str, list[Sample]]:
    """The images that open, in ascending order of their ids, by digest of the file."""
    samples = sorted(found.samples, key=lambda sample: sample.id)
    alike: defaultdict[str, list[Sample]] = defaultdict(list)
    with ThreadPoolExecutor() as pool:
        problems = pool.map(_problem, [found.root / sample.id for sample in samples])
        for sample, problem in zip(samples, track(problems, "reading every image", len(samples)), strict=True):
            if problem:
                path, reason = found.root / sample.id, problem.replace(f"{found.root}{os.sep}", "")
                found.leave_out(path, f"unreadable: {reason}", foreign=path.suffix.lower() not in IMAGE_SUFFIXES)
            else:
                alike[file_digest(found.root / sample.id)].append(sample)
    return alike


def _problem(path: Path) -> str:
    try:
        read_image(path)
    except ImageError as error:
        return str(error)
    return ""


def _drop_copies(found: Found, alike: Mapping[str, Sequence[Sample]]) -> list[Sample]:
    kept = []
    for first, *copies in alike.values():
        other = next((copy for copy in copies if copy.label != first.label), None)
        if other is None:
            kept.append(first)
            found.left_out |= {copy.id: f"copy: the same file as {first.id}" for copy in copies}
        else:
            pair = f"{first.id} and {other.id}"
            reason = f"contradicting copies: among the same files with different classes, such as {pair}"
            found.left_out |= {copy.id: reason for copy in (first, *copies)}
    return kept


def _write(manifest: Manifest, path: Path) -> Manifest:
    """The manifest, once it has been read again without a complaint; else none."""
    unchecked = path.with_name(f"{path.name}.unchecked")
    try:
        manifest.write(unchecked)
        checked = read_manifest(manifest.root, unchecked, classes=manifest.classes)
        os.replace(unchecked, path)
    finally:
        unchecked.unlink(missing_ok=True)
    return checked


def _report(recipe: Recipe, layout: Layout, manifest: Manifest, found: Found, path: Path) -> str:
    usable = len(manifest.samples)
    here = usable + sum((manifest.root / id).is_file() for id in found.left_out.keys() - found.foreign)
    lines = [
        f"{recipe.title}: {here:,} images here, {recipe.images:,} published ({here - recipe.images:+,}).",
        f"{usable:,} are usable, and in {path}:",
        manifest.summary(),
    ]
    if layout.loss:
        lines.append(f"Note: {layout.loss}.")
    if found.left_out:
        lines.append(f"Left out, one by one in {path.with_name(LEFT_OUT)}: {_reasons(found.left_out)}.")
    return "\n".join(lines)


def _reasons(left_out: Mapping[str, str]) -> str:
    """How often each reason, up to its colon, occurs."""
    counts = Counter(reason.split(":")[0] for reason in left_out.values())
    return "; ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
