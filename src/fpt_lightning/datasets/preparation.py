"""From a data set as distributed to ``manifest.csv`` and ``left_out.csv``; the commands ``fpt-lightning datasets``."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from fpt_lightning.data.images import read_image
from fpt_lightning.data.manifest import Manifest, Sample
from fpt_lightning.data.sources import read_manifest
from fpt_lightning.data.splits import draw_validation, random_split
from fpt_lightning.datasets import DATASETS, Found, Recipe
from fpt_lightning.errors import ConfigurationError, DataError, ImageError
from fpt_lightning.files import file_digest, write_rows

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
            reason) is written beside it.
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
    found = recipe.samples(root)
    if not os.access(path.parent, os.W_OK):
        raise ConfigurationError(f"nothing can be written in the folder {path.parent}: give another --manifest.")
    official = {sample.split for sample in found.samples}
    samples = _drop_copies(found, _drop_unreadable(found))
    if not samples:
        raise DataError(f"no image of {recipe.title} in {root} is usable: {_reasons(found.left_out) or 'none found'}.")
    for what, lost in (
        ("split", official - {sample.split for sample in samples}),
        ("class", {recipe.classes[s.label] for s in found.samples} - {recipe.classes[s.label] for s in samples}),
    ):
        if lost:
            raise DataError(
                f"{recipe.title} in {root} leaves the {what} {', '.join(sorted(lost))} empty, as its images are not "
                f"usable: {_reasons(found.left_out)}."
            )
    if official == {""}:
        samples = random_split(samples, seed)
    elif "val" not in official:
        samples = draw_validation(samples, seed)
    checked = _write(Manifest(root, tuple(samples), recipe.classes), found.left_out, path)
    print(_report(recipe, checked, found.left_out, path))
    return checked


def _drop_unreadable(found: Found) -> dict[str, list[Sample]]:
    """The images that open, in ascending order of their ids, by digest of the file."""
    samples = sorted(found.samples, key=lambda sample: sample.id)
    alike: defaultdict[str, list[Sample]] = defaultdict(list)
    with ThreadPoolExecutor() as pool:
        problems = pool.map(_problem, [found.root / sample.id for sample in samples])
        for sample, problem in zip(
            samples, tqdm(problems, "reading every image", len(samples), unit="image"), strict=True
        ):
            if problem:
                found.left_out[sample.id] = f"unreadable: {problem.replace(f'{found.root}{os.sep}', '')}"
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


def _write(manifest: Manifest, left_out: Mapping[str, str], path: Path) -> Manifest:
    """Both files, once the manifest has been read again without a complaint; else none."""
    unchecked = path.with_name(f"{path.name}.unchecked")
    try:
        manifest.write(unchecked)
        checked = read_manifest(manifest.root, unchecked, classes=manifest.classes)
        write_rows(path.with_name(LEFT_OUT), [("image", "reason"), *sorted(left_out.items())])
        os.replace(unchecked, path)
    finally:
        unchecked.unlink(missing_ok=True)
    return checked


def _report(recipe: Recipe, manifest: Manifest, left_out: Mapping[str, str], path: Path) -> str:
    here = len(manifest.samples) + sum((manifest.root / id).is_file() for id in left_out)
    lines = [
        f"{recipe.title}: {here:,} images here, {recipe.images:,} published ({here - recipe.images:+,}).",
        f"{len(manifest.samples):,} are in {path}:",
        manifest.summary(),
    ]
    if left_out:
        lines.append(f"Left out, one by one in {path.with_name(LEFT_OUT)}: {_reasons(left_out)}.")
    return "\n".join(lines)


def _reasons(left_out: Mapping[str, str]) -> str:
    """How often each reason, up to its colon, occurs."""
    counts = Counter(reason.split(":")[0] for reason in left_out.values())
    return "; ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
