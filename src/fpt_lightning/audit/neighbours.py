"""Which images are nearest to each other by the cosine of their pooled features, a block of rows at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BLOCK = 2**24  # cosines held at once: 64 MiB, and six times that in passing


class Neighbours(NamedTuple):
    """The K nearest of N images, the nearest first.

    Attributes:
        rows: (N, K), int64; -1 where there are fewer.
        cosines: (N, K), float32; -inf there.
    """

    rows: NDArray[np.int64]
    cosines: NDArray[np.float32]


def directions(pooled: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pooled features (N, C) less their mean, at unit length: what all images share tells none from another."""
    centred = pooled - pooled.mean(0, dtype=np.float64).astype(np.float32)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(lengths, np.finfo(np.float32).tiny))


def nearest(directions: NDArray[np.float32], count: int, groups: NDArray[np.int64]) -> Neighbours:
    """The nearest images of other groups.

    Args:
        directions: (N, C), at unit length.
        count: K.
        groups: (N,), numbers of groups; different ones give the nearest of all other images.
    """
    total = len(directions)
    rows = np.full((total, count), -1, np.int64)
    cosines = np.full((total, count), -np.inf, np.float32)
    taken, step = min(count, total), max(1, _BLOCK // total)
    for start in range(0, total, step):
        block = slice(start, start + step)
        found = directions[block] @ directions.T
        found[groups[block, None] == groups] = -np.inf
        best = np.argpartition(-found, taken - 1, axis=1)[:, :taken]
        values = np.take_along_axis(found, best, 1)
        order = np.lexsort((best, -values), axis=1)
        rows[block, :taken] = np.take_along_axis(best, order, 1)
        cosines[block, :taken] = np.take_along_axis(values, order, 1)
    rows[np.isneginf(cosines)] = -1
    return Neighbours(rows, cosines)
