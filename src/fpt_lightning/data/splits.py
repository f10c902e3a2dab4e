"""Splits: drawn at random or by folds, stratified, groups whole; and what may not be in two of them (paper, 4.1)."""

from __future__ import annotations

import hashlib
import os
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.data.image_files import ImageFiles
from fpt_lightning.data.manifest import SPLITS, Kind, Manifest, Sample
from fpt_lightning.errors import ConfigurationError, DataError, OutputError, OverlapError, a_few
from fpt_lightning.files import write_rows

FRACTIONS = (0.7, 0.1, 0.2)  # the paper's random partition (section 4.1)
_VALIDATION_FOLDS = 8  # one of them is drawn: of 80% of all images, the 10% of that partition
_TOLERATED = 0.2  # of a part's share of all images, that it may lack for the sake of the strata's shares
_ENDS = 2**16  # bytes of a file that tell most files apart


def random_split(samples: Sequence[Sample], seed: int, kind: Kind = "single-label") -> list[Sample]:
    """Split 70/10/20 at random, stratified; a group stays whole."""
    dealt = _deal(samples, FRACTIONS, seed, kind)
    return [replace(sample, split=SPLITS[part]) for sample, part in zip(samples, dealt, strict=True)]


def draw_validation(samples: Sequence[Sample], seed: int, kind: Kind = "single-label") -> list[Sample]:
    """Make an eighth of the training images validation images, at random, stratified; a group stays whole."""
    return fold_split(samples, 1, _VALIDATION_FOLDS, seed, kind)


def fold_split(
    samples: Sequence[Sample], fold: int, folds: int, seed: int, kind: Kind = "single-label"
) -> list[Sample]:
    """The splits of one fold of a cross-validation; see ``read_manifest``.

    Raises:
        ConfigurationError: there is no such fold.
    """
    given = bool(samples[0].split)
    if folds < (2 if given else 3) or not 1 <= fold <= folds:
        raise ConfigurationError(
            f"data.fold is {fold} of data.folds {folds}: give a fold from 1 to {folds}, and at least "
            f"{'2 folds' if given else '3 folds, of which one tests and one validates'}."
        )
    pool = [sample for sample in samples if not given or sample.split != "test"]
    dealt = dict(zip((s.id for s in pool), deal_folds(pool, folds, seed, kind), strict=True))
    special = {fold - 1: "val"} if given else {fold - 1: "test", fold % folds: "val"}
    return [replace(s, split=special.get(dealt[s.id], "train")) if s.id in dealt else s for s in samples]


def deal_folds(samples: Sequence[Sample], folds: int, seed: int, kind: Kind = "single-label") -> list[int]:
    """Which of the folds, from 0, each sample is dealt to, at random, stratified; a group stays whole."""
    return _deal(samples, [1 / folds] * folds, seed, kind)


def _deal(samples: Sequence[Sample], fractions: Sequence[float], seed: int, kind: Kind) -> list[int]:
    """Which part each sample is dealt to, at random, so that each part has its fraction of each stratum.

    Groups stay whole: they are dealt, large ones first, to the part that lacks most images of the group's strata.
    """
    strata = _strata(samples, kind)
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        groups[sample.group or f"\0{sample.id}"].append(position)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda name: len(groups[name]), reverse=True)
    totals = Counter(stratum for own in strata for stratum in own)
    lacking = {stratum: [total * fraction for fraction in fractions] for stratum, total in totals.items()}
    part_of = [0] * len(samples)
    for name in order:
        counts = Counter(stratum for position in groups[name] for stratum in strata[position])
        chosen = max(range(len(fractions)), key=lambda i: sum(lacking[s][i] * n for s, n in counts.items()))
        for stratum, n in counts.items():
            lacking[stratum][chosen] -= n
        for position in groups[name]:
            part_of[position] = chosen
    _even_out(part_of, [groups[name] for name in order], strata, lacking, fractions)
    return part_of


def _even_out(
    part_of: list[int],
    groups: Sequence[Sequence[int]],
    strata: Sequence[tuple[int, ...]],
    lacking: Mapping[int, list[float]],
    fractions: Sequence[float],
) -> None:
    """Move groups from parts with too many images to those that lack many, where strata are too small for their shares.

    Of many classes of a few images each, rounding every class alone would leave a small part empty. Moved is what the
    strata miss least, until every part has its share of all images to one image or group.

    Args:
        part_of: of each sample; changed.
        groups: positions of samples.
        strata: of each sample.
        lacking: by stratum, images that each part lacks; changed.
        fractions: of the parts.
    """
    dealt = Counter(part_of)
    short = [fraction * len(part_of) - dealt[part] for part, fraction in enumerate(fractions)]
    if all(abs(lack) <= max(1, _TOLERATED * len(part_of) * f) for lack, f in zip(short, fractions, strict=True)):
        return

    def gain(group: Sequence[int], to: int) -> float:
        own = [stratum for position in group for stratum in strata[position]]
        return sum(lacking[stratum][to] - lacking[stratum][part_of[group[0]]] for stratum in own) / len(own)

    while (most := max(short)) >= 1:
        to = short.index(most)
        movable = [group for group in groups if len(group) <= min(most, -short[part_of[group[0]]]) + 0.5]
        if not movable:
            return
        group = max(movable, key=lambda group: gain(group, to))
        for position in group:
            for stratum in strata[position]:
                lacking[stratum][to] -= 1
                lacking[stratum][part_of[position]] += 1
            short[to] -= 1
            short[part_of[position]] += 1
            part_of[position] = to


def _strata(samples: Sequence[Sample], kind: Kind) -> list[tuple[int, ...]]:
    """What each sample counts as: its class; its positive labels, or -1 without any; its number's fifth of all."""
    if kind == "single-label":
        return [(sample.label,) for sample in samples]
    if kind == "multi-label":
        return [tuple(i for i, t in enumerate(sample.targets) if t == 1) or (-1,) for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: samples[i].targets)
    return [(5 * rank // len(samples),) for _, rank in sorted(zip(order, range(len(samples)), strict=True))]


Digests = Callable[[ImageFiles], NDArray[np.int64]]
"""What is known of files' content: ``fpt_lightning.data.image_files.short_digest`` of each, or 0."""


OVERLAPS = "overlaps.csv"


class _Overlap(NamedTuple):
    """Two images of different splits that share something: a row of ``overlaps.csv``."""

    kind: str  # case, group or file
    split: str
    image: str
    other_split: str
    other_image: str
    shared: str  # name of the case or group; the first 16 digits of the file's SHA-256


def check_splits(
    manifest: Manifest, allow_overlap: bool, digests: Digests | None = None, overlaps: Path | None = None
) -> dict[str, int]:
    """Refuse an empty split, and groups or identical files in several splits unless they are allowed.

    Args:
        manifest: the data set.
        allow_overlap: warn only.
        digests: what is known of the files' content.
        overlaps: CSV file that lists every image of which another split has the case, the group or the file, with one
            of that split. An earlier list there is replaced, or removed where nothing overlaps; another file is kept,
            and the list has a free name beside it.

    Returns:
        How many cases, groups and files are in several splits.

    Raises:
        DataError: an empty split.
        OverlapError: a few by name, and where all are.
    """
    empty = [split for split in SPLITS if not manifest.split(split)]
    if empty:
        groups = {sample.group or sample.id for sample in manifest.samples}
        few = "" if len(groups) >= len(SPLITS) else f" of {len(groups)} groups ({a_few(sorted(groups))}), kept whole"
        raise DataError(
            f"the data set {manifest.root} ({len(manifest.samples)} images{few}) leaves the split {', '.join(empty)} "
            f"empty: give it more {'groups' if few else 'images'}, or a CSV manifest with a split column."
        )
    crossing = {"case": _crossing(manifest, "case"), "group": _crossing(manifest, "group")}
    told = [
        f"{len(found)} {what}s have images in more than one split: {a_few([pairs[0].shared for pairs in found])}"
        for what, found in crossing.items()
        if found
    ]
    if identical := _identical_files(manifest, digests):
        few = a_few(sorted(f"{pairs[0].image} = {pairs[0].other_image}" for pairs in identical))
        told.append(f"{len(identical)} images are also in another split, to the byte: {few}")
    rows = [pair for found in (*crossing.values(), identical) for pairs in found for pair in pairs]
    listed = "" if overlaps is None else _list_overlaps(rows, overlaps)
    if told and not allow_overlap:
        raise OverlapError(f"{'; '.join(told)}: mend the splits, or allow it by data.allow_overlap true{listed}.")
    if told:
        warnings.warn(f"{'; '.join(told)}: test figures are too good{listed}.", stacklevel=2)
    return {**{what: len(found) for what, found in crossing.items()}, "file": len(identical)}


def _list_overlaps(rows: Sequence[_Overlap], path: Path) -> str:
    """Write the list, and say where it is, or why it is not; without rows, take away an earlier one."""
    try:
        if not rows:
            if _is_list(path):
                path.unlink()
            return ""
        beside = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in count(1))
        path = next(name for name in chain([path], beside) if not os.path.lexists(name) or _is_list(name))
        write_rows(path, [_Overlap._fields, *rows])
    except (OSError, OutputError) as error:
        return f"; all of them cannot be listed ({error})"
    return f"; {path} lists all"


def _is_list(path: Path) -> bool:
    """Whether a file is such a list, and no other."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline().rstrip() == ",".join(_Overlap._fields).encode()


def _paired(kind: str, shared: str, samples: Iterable[Sample]) -> list[_Overlap]:
    """A row for each image of several splits, with the first one of another split."""
    first, *rest = sorted(samples, key=lambda sample: (SPLITS.index(sample.split), sample.id))
    other = next(sample for sample in rest if sample.split != first.split)
    pairs = [(first, other), *((s, other) if s.split == first.split else (first, s) for s in rest if s is not other)]
    return [_Overlap(kind, one.split, one.id, two.split, two.id, shared) for one, two in pairs]


def _crossing(manifest: Manifest, what: Literal["case", "group"]) -> list[list[_Overlap]]:
    """Cases or groups with images in several splits, by name."""
    own: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in manifest.samples:
        name = getattr(sample, what)
        if name and (what == "case" or name != sample.case):
            own[name].append(sample)
    return [_paired(what, name, own[name]) for name in sorted(own) if len({s.split for s in own[name]}) > 1]


def _identical_files(manifest: Manifest, digests: Digests | None) -> list[list[_Overlap]]:
    """Images with the same bytes in several splits.

    Files of one size and of known digests are told apart by these; of others, those with the same ends are read whole.
    """
    files, splits = manifest.files, [sample.split for sample in manifest.samples]
    assert files is not None
    known = np.zeros(len(splits), np.int64) if digests is None else digests(files)

    def crossing(groups: Iterable[Sequence[int]], key: Callable[[int], object]) -> list[list[int]]:
        """The parts of each group that are alike in something and in several splits."""
        parts: defaultdict[object, list[int]] = defaultdict(list)
        for i, group in enumerate(groups):
            for position in group:
                parts[i, key(position)].append(position)
        return [part for part in parts.values() if len({splits[position] for position in part}) > 1]

    def digest(position: int) -> int:
        return int(known[position]) or files.digest(position)

    _, size_of, counts = np.unique(files.sizes, return_inverse=True, return_counts=True)
    shared = np.flatnonzero((counts[size_of] > 1) & (files.sizes > 0))  # empty files are alike in their damage alone
    alike = crossing([shared.tolist()], lambda position: (files.sizes[position], files.pages[position]))
    told = [group for group in alike if known[group].all()]
    others = crossing((group for group in alike if not known[group].all()), lambda i: _ends(files.path(i)))
    found = crossing([*told, *others], digest)
    return [
        _paired("file", f"{digest(same[0]) + 2**63:016x}", [manifest.samples[position] for position in same])
        for same in found
    ]


def _ends(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(_ENDS)
        file.seek(-min(_ENDS, path.stat().st_size), os.SEEK_END)
        return hashlib.sha256(start + file.read()).hexdigest()
