"""All that is found in the stored features of a data set, in memory."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.audit.duplicates import Copies, Pair, near_duplicates
from fpt_lightning.audit.labels import Doubt, doubtful_labels, robust_scale
from fpt_lightning.audit.neighbours import directions, nearest
from fpt_lightning.audit.shortcuts import RINGS, Told, find_shortcuts, questions
from fpt_lightning.data.manifest import Manifest, Sample
from fpt_lightning.data.splits import deal_folds
from fpt_lightning.errors import ConfigurationError, a_few
from fpt_lightning.files import align

NEIGHBOURS = 10
"""Images of other groups that are asked about an image."""
FOLDS = 5
"""Of the probes; groups stay whole."""
LONELY = 3.5
"""Robust deviations of the distance to its neighbours from which an image is an outlier (Iglewicz and Hoaglin 1993)."""

MapKind = Literal["pca", "umap"]


@dataclass(frozen=True)
class Audit:
    """What was found in N images.

    Attributes:
        manifest: of the images.
        pairs: near-duplicates, those that leak first.
        doubts: labels that are likely wrong, the likeliest first.
        loneliness: (N,), robust deviations of the mean distance to the nearest images of other groups.
        told: how well attributes tell the label, and the features the attributes.
        places: (N, 2), of the map.
        axes: names of its two directions.
    """

    manifest: Manifest
    pairs: list[Pair]
    doubts: list[Doubt]
    loneliness: NDArray[np.float64]
    told: list[Told]
    places: NDArray[np.float64]
    axes: tuple[str, str]

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self.manifest.samples

    @property
    def outliers(self) -> list[int]:
        """Rows of images that are unlike all others, the loneliest first."""
        order = np.argsort(-self.loneliness, kind="stable")
        return [int(row) for row in order if self.loneliness[row] > LONELY]

    @property
    def leaks(self) -> int:
        """How many near-duplicates lie in several splits or are of several groups."""
        return sum(bool(crossed(self.samples, pair)) for pair in self.pairs)

    @property
    def ringing(self) -> list[Told]:
        """The shortcuts that are pointed out, the surest first."""
        return sorted((each for each in self.told if each.rings), key=lambda each: -each.auc.value)

    def verdict(self) -> list[str]:
        """What the shortcut check comes to, in sentences."""
        if not self.ringing:
            return [
                "No attribute alone tells a label, and the features do not tell the split, with an AUC whose whole "
                f"interval is above {RINGS}."
            ]
        told: dict[tuple[str, bool], list[Told]] = {}
        for each in self.ringing:
            told.setdefault((each.attribute, each.from_features), []).append(each)
        return [
            first.sentence() + (f" Also {a_few([each.told for each in rest])}." if rest else "")
            for first, *rest in told.values()
        ]

    def basis(self) -> str:
        """How many images and groups, in a sentence."""
        named = {sample.group for sample in self.samples} - {""}
        groups = f" of {len(named):,} groups" if named else "; no groups, such as patients, are known"
        return f"{len(self.samples):,} images{groups}."

    def table(self, width: int) -> str:
        """For people, as wide as the terminal."""
        attributes, ringing = ({each.attribute for each in found} for found in (self.told, self.ringing))
        rows = [
            [
                "near-duplicates",
                f"{len(self.pairs):,} pair{'s' * (len(self.pairs) != 1)}",
                f"{self.leaks:,} across splits or groups",
            ],
            ["likely wrong labels", f"{len(self.doubts):,}", f"of {len(self.samples):,} images"],
            ["outliers", f"{len(self.outliers):,}", f"of {len(self.samples):,} images"],
            ["shortcuts", f"{len(ringing):,}", f"of {len(attributes):,} attributes ring"],
        ]
        said = [textwrap.fill(sentence, width) for sentence in self.verdict()]
        return "\n\n".join([f"Audit: {self.basis()}", align(rows), "\n".join(said)])


def find(
    manifest: Manifest,
    pooled: NDArray[np.float32],
    copies: Copies,
    attributes: Mapping[str, Sequence[str]],
    ordered: bool = False,
    map: MapKind = "pca",
) -> Audit:
    """Look for what is wrong with a data set.

    Args:
        manifest: of N images.
        pooled: (N, C), their features.
        copies: gives their low-resolution copies.
        attributes: by name, the value of each image as text.
        ordered: whether classes are grades from low to high.
        map: how places are found.

    Raises:
        ConfigurationError: a map whose package is not installed.
    """
    check_map(map)
    samples, kind = manifest.samples, manifest.kind
    names = [sample.group or sample.case or f"\0{sample.id}" for sample in samples]
    groups = np.unique(names, return_inverse=True)[1].astype(np.int64)
    folds = np.array(deal_folds(samples, FOLDS, 0, kind))
    pointing = directions(pooled)
    others = nearest(pointing, NEIGHBOURS, groups)
    pairs = near_duplicates(pointing, copies)
    places, axes = _places(pooled, pointing, map)
    return Audit(
        manifest,
        sorted(pairs, key=lambda pair: not crossed(samples, pair)),
        doubtful_labels(samples, kind, manifest.classes, ordered, pooled, others.rows, folds),
        _loneliness(others.cosines),
        find_shortcuts(attributes, questions(samples, kind, manifest.classes), pooled, groups, folds),
        places,
        axes,
    )


def check_map(map: str) -> None:
    """Refuse a map whose package is not installed.

    Raises:
        ConfigurationError: naming it.
    """
    if map == "umap" and find_spec("umap") is None:
        raise ConfigurationError("map is 'umap', which needs umap-learn: pip install umap-learn, or take --map pca.")


def crossed(samples: Sequence[Sample], pair: Pair) -> list[str]:
    """What a near-duplicate leaks across: split, group."""
    first, second = samples[pair.first], samples[pair.second]
    kept = {"split": (first.split, second.split), "group": (first.group, second.group)}
    return [name for name, (one, other) in kept.items() if one != other]


def label_of(manifest: Manifest, sample: Sample) -> str:
    """A sample's label in words; several are joined."""
    if manifest.kind == "single-label":
        return manifest.classes[sample.label] if sample.label >= 0 else ""
    if manifest.kind == "regression":
        return "" if sample.targets[0] != sample.targets[0] else f"{sample.targets[0]:.6g}"
    return ", ".join(name for name, target in zip(manifest.classes, sample.targets, strict=True) if target == 1)


def _loneliness(cosines: NDArray[np.float32]) -> NDArray[np.float64]:
    known = np.isfinite(cosines)
    distances = 1 - np.where(known, cosines, 0).sum(1, dtype=np.float64) / np.maximum(known.sum(1), 1)
    return np.asarray((distances - np.median(distances)) / max(robust_scale(distances), 1e-12))


def _places(
    pooled: NDArray[np.float32], pointing: NDArray[np.float32], map: MapKind
) -> tuple[NDArray[np.float64], tuple[str, str]]:
    if map == "umap":
        import umap

        return np.asarray(umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(pointing), np.float64), (
            "",
            "",
        )
    centred = pooled.astype(np.float64) - pooled.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]])  # else their signs are the library's
    shares = values[:-3:-1] / max(values.sum(), 1e-12)
    first, second = (f"component {i + 1}, {share:.0%} of the variance" for i, share in enumerate(shares))
    return centred @ axes, (first, second)
