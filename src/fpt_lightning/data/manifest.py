"""What a data set is: its images with their labels, splits and groups."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fpt_lightning.data.image_files import ImageFiles
from fpt_lightning.errors import ConfigurationError, DataError, a_few
from fpt_lightning.files import write_rows

SPLITS = ("train", "val", "test")
UNLABELLED = -1
Kind = Literal["single-label", "multi-label", "regression"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image.

    Attributes:
        id: its path relative to the data root, with forward slashes, and ``#12`` behind it where it is page or frame 12
            of that file; the key of its features.
        label: index of its class, or ``UNLABELLED``; not used in other data sets than single-label ones.
        targets: of a multi-label data set, 1, 0 or NaN (unknown) for each class; of a regression, its number.
        split: ``train``, ``val`` or ``test``; empty where there is none.
        group: what must stay on one side of a split, such as a patient; empty where unknown.
        case: what its images are evaluated as one of, such as an exam or an eye; empty where there is none.
    """

    id: str
    label: int = UNLABELLED
    targets: tuple[float, ...] = ()
    split: str = ""
    group: str = ""
    case: str = ""


@dataclass(frozen=True)
class Manifest:
    """All images of a data set.

    Attributes:
        root: the folder that sample ids are relative to.
        samples: in ascending order of their ids.
        classes: names, in the order of the label indices; from the whole data set. Of a regression, the name of its
            number.
        kind: of the labels.
        random: whether the split was drawn, and not given.
        notes: what people should know of how it was read.
        files: of the images, as they were when it was read; None of a list that was not read.
        measured: splits over whose images ``auto`` statistics are measured: in a cross-validation all splits that
            change from fold to fold, so that one store serves every fold.
        unfolded: of a cross-validation, ids of the training images that there are without it, in ascending order: a
            store whose statistics are of these serves every fold too.
        origin: how images came to their splits, in words; empty where nobody asked.
        overlaps: how many cases, groups and files (``case``, ``group``, ``file``) were found in more than one split;
            None where none were looked for.
    """

    root: Path
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    kind: Kind = "single-label"
    random: bool = False
    notes: tuple[str, ...] = ()
    files: ImageFiles | None = field(default=None, compare=False, repr=False)
    measured: tuple[str, ...] = ("train",)
    unfolded: tuple[str, ...] = ()
    origin: str = field(default="", compare=False)
    overlaps: Mapping[str, int] | None = field(default=None, compare=False)

    def look(self) -> Manifest:
        """The data set with its files as they are now."""
        return replace(self, files=ImageFiles.look(self.root, [sample.id for sample in self.samples]))

    def split(self, name: str) -> tuple[Sample, ...]:
        """The samples of one split, in ascending order of their ids."""
        return tuple(sample for sample in self.samples if sample.split == name)

    def to_measure(self) -> tuple[Sample, ...]:
        """The samples over whose images ``auto`` statistics are measured, in ascending order of their ids."""
        return tuple(sample for sample in self.samples if sample.split in self.measured)

    def spread(self, count: int) -> Manifest:
        """So many of its images, evenly spread over all; all, where there are no more."""
        places = np.linspace(0, len(self.samples) - 1, min(count, len(self.samples))).round().astype(int)
        return replace(self, samples=tuple(self.samples[i] for i in places))

    def without(self, ids: Collection[str]) -> Manifest:
        """The data set without some samples, whose images cannot be read.

        Raises:
            DataError: nothing would be left of a split.
        """
        rest = replace(self, samples=tuple(sample for sample in self.samples if sample.id not in ids))
        empty = {sample.split for sample in self.samples} - {sample.split for sample in rest.samples}
        if empty:
            names = ", ".join(f"the split {name} of " for name in sorted(empty) if name)
            raise DataError(f"no image of {names}{self.root} can be read: {a_few(list(ids))}.")
        return rest

    def path(self, sample: Sample) -> Path:
        return self.root / sample.id

    def mixed_cases(self) -> list[str]:
        """Names of cases whose images have different labels."""
        labels: defaultdict[str, set[object]] = defaultdict(set)
        for sample in self.samples:
            labels[sample.case].add((sample.label, sample.targets))
        return sorted(case for case, own in labels.items() if case and len(own) > 1)

    def class_counts(self, split: str) -> list[int]:
        """Images of each class in a split: positive ones of a label, all in a regression."""
        samples = self.split(split)
        if self.kind == "single-label":
            counts = Counter(sample.label for sample in samples)
            return [counts[label] for label in range(len(self.classes))]
        if self.kind == "regression":
            return [len(samples)]
        return [sum(sample.targets[i] == 1 for sample in samples) for i in range(len(self.classes))]

    def summary(self) -> str:
        """A table of images by split and class, for people."""
        width = max(map(len, (*self.classes, "class")))
        rows = [f"{'class':<{width}}" + "".join(f"{split:>8}" for split in SPLITS)]
        if self.kind == "multi-label":
            rows.append(f"{'images':<{width}}" + "".join(f"{len(self.split(split)):>8}" for split in SPLITS))
        counts = {split: self.class_counts(split) for split in SPLITS}
        for label, name in enumerate(self.classes):
            rows.append(f"{name:<{width}}" + "".join(f"{counts[split][label]:>8}" for split in SPLITS))
        return "\n".join(rows)

    def split_digest(self) -> str:
        """SHA-256 of which image is in which split."""
        lines = "\n".join(f"{sample.split} {sample.id}" for sample in self.samples)
        return hashlib.sha256(lines.encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write a CSV file that ``read_manifest`` reads again with the same splits and cases."""
        labels = ("label",) if self.kind == "single-label" else self.classes
        cased = any(sample.case for sample in self.samples)
        rows: list[list[str]] = [["image", *labels, "split", "group", *["case"][:cased]]]
        for sample in self.samples:
            own = [self.classes[sample.label]] if self.kind == "single-label" else [f"{t:.10g}" for t in sample.targets]
            rows.append([sample.id, *own, sample.split, sample.group, *[sample.case][:cased]])
        write_rows(path, rows)


def numbers_of(names: Iterable[str]) -> list[float] | None:
    """Class names as numbers, such as grades; None where one is none."""
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def check_classes(argument: str, expected: int, manifest: Manifest) -> None:
    """Hold a number of classes against a data set.

    Raises:
        ConfigurationError: they differ.
    """
    if expected != len(manifest.classes):
        raise ConfigurationError(
            f"{argument} is {expected}, but the data set {manifest.root} has {len(manifest.classes)} classes "
            f"({a_few(manifest.classes)}): set {argument} to {len(manifest.classes)}."
        )
