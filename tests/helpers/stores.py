"""Feature stores of made-up numbers, which no encoder is needed for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.store.index import FileRecord
from fpt_lightning.store.layout import SHARD
from fpt_lightning.store.specification import FeatureShape
from fpt_lightning.store.store import FeatureStore, sample_arrays
from small import SPECIFICATION

SHAPE = FeatureShape(layers=2, heads=3, tokens=4, head_dim=6)
SIZE = SPECIFICATION.image_size
SAMPLE_ARRAYS = list(sample_arrays("int8", SHAPE, SIZE))
IDS = [f"{name}/{i:03d}.png" for name in "ab" for i in range(10)]  # two shards; the same stems in two classes


def content(rows: Sequence[int], codec: str = "int8") -> dict[str, NDArray[Any]]:
    """Numbers that belong to these rows."""
    generators = [np.random.default_rng(row) for row in rows]
    return {
        name: np.stack([rng.integers(0, 100, size) for rng in generators]).astype(dtype)
        for name, (size, dtype) in sample_arrays(codec, SHAPE, SIZE).items()
    }


def write(store: FeatureStore, rows: Sequence[int]) -> None:
    """What belongs to these rows, a shard at a time."""
    for start in range(0, len(store.ids), SHARD):
        if part := [row for row in rows if start <= row < start + SHARD]:
            store.write(part, content(part, store.specification.codec), [FileRecord(1000 + row, 7, 8) for row in part])


def shard_file(url: str, name: str, shard: int) -> Path:
    """Of an array of a local store."""
    (file,) = (path for path in (Path(url) / name / "c" / str(shard)).rglob("*") if path.is_file())
    return file


def assert_rows(store: FeatureStore, rows: Sequence[int]) -> None:
    """These rows hold, bit by bit, what belongs to them."""
    for row in rows:
        for name, array in content([row], store.specification.codec).items():
            stored = store.read([row], name)[0]
            assert stored.dtype == array.dtype
            np.testing.assert_array_equal(stored, array[0])
