"""Data that lie whole in a store, but are not those of their row: refused at reading, found, and computed again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import google_crc32c
import numpy as np
import pytest

from fpt_lightning.errors import StoreError
from fpt_lightning.store.damage import forget_damaged, verify
from fpt_lightning.store.index import FileRecord
from fpt_lightning.store.layout import SHARD
from fpt_lightning.store.store import FeatureStore
from fpt_lightning.store.writing import WritableStore
from small import SPECIFICATION
from stores import IDS, SAMPLE_ARRAYS, SHAPE, assert_rows, content, shard_file, write

Damaged = set[tuple[int, str]]  # rows and arrays
FOREIGN = "it belongs to another row or store"


def swap(one: Path, two: Path) -> None:
    between = one.with_suffix(".swapped")
    one.rename(between)
    two.rename(one)
    between.rename(two)


def another_store(folder: Path, **changes: Any) -> FeatureStore:
    """Of the same samples and settings, with other numbers."""
    store = WritableStore.create(str(folder / "another.zarr"), replace(SPECIFICATION, **changes), SHAPE, {})
    store = store.extend(IDS)
    for start in (0, SHARD):
        rows = range(start, min(start + SHARD, len(IDS)))
        store.write(rows, content([row + 100 for row in rows]), [FileRecord(1000 + row, 7, 8) for row in rows])
    return store


def swapped_places(store: FeatureStore, folder: Path) -> Damaged:
    swap(shard_file(store.url, "features", 0), shard_file(store.url, "features", 1))
    return {(row, "features") for row in range(20)}


def swapped_shapes(store: FeatureStore, folder: Path) -> Damaged:
    swap(shard_file(store.url, "images", 0), shard_file(store.url, "indices", 0))
    return {(row, name) for row in range(SHARD) for name in ("images", "indices")}


def swapped_arrays(store: FeatureStore, folder: Path) -> Damaged:
    """Of the same shape and dtype."""
    assert store.sample_arrays["key_scales"] == store.sample_arrays["value_scales"]
    swap(shard_file(store.url, "key_scales", 1), shard_file(store.url, "value_scales", 1))
    return {(row, name) for row in range(SHARD, 20) for name in ("key_scales", "value_scales")}


def another_shard(store: FeatureStore, folder: Path) -> Damaged:
    shutil.copy(shard_file(another_store(folder).url, "images", 0), shard_file(store.url, "images", 0))
    return {(row, "images") for row in range(SHARD)}


def half_copied(store: FeatureStore, folder: Path) -> Damaged:
    """A copy of a newer store over this one that was stopped."""
    newer = another_store(folder)
    for name in SAMPLE_ARRAYS[:3]:
        shutil.copytree(Path(newer.url) / name, Path(store.url) / name, dirs_exist_ok=True)
    return {(row, name) for row in range(20) for name in SAMPLE_ARRAYS[:3]}


def half_copied_records(store: FeatureStore, folder: Path) -> Damaged:
    """Records first, then the data of the first shard."""
    newer = another_store(folder)
    shutil.copytree(Path(newer.url) / "row_records", Path(store.url) / "row_records", dirs_exist_ok=True)
    for name in SAMPLE_ARRAYS:
        shutil.copy(shard_file(newer.url, name, 0), shard_file(store.url, name, 0))
    return {(row, name) for row in range(SHARD, 20) for name in SAMPLE_ARRAYS}


def copied_chunk(store: FeatureStore, folder: Path) -> Damaged:
    """Within a shard, whose index names one row's chunk for another row, and has the right checksum."""
    file = shard_file(store.url, "pooled", 0)
    whole = file.read_bytes()
    data, tail = whole[: -16 * SHARD - 4], whole[-16 * SHARD - 4 : -4]
    index = np.frombuffer(tail, "<u8").reshape(SHARD, 2).copy()
    index[3] = index[5]
    file.write_bytes(data + index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little"))
    return {(3, "pooled")}


def swapped_records(store: FeatureStore, folder: Path) -> Damaged:
    swap(Path(store.url) / "row_records/c/0/0", Path(store.url) / "row_records/c/1/0")
    return {(row, "records") for row in range(20) if row < 4 or row >= SHARD}


def other_settings(store: FeatureStore, folder: Path) -> Damaged:
    """Records of a store of the same samples with other settings."""
    other = another_store(folder, weights_digest="4567")
    shutil.copy(Path(other.url) / "row_records/c/0/0", Path(store.url) / "row_records/c/0/0")
    return {(row, "records") for row in range(SHARD)}


SPOILS = [
    swapped_places,
    swapped_shapes,
    swapped_arrays,
    another_shard,
    half_copied,
    half_copied_records,
    copied_chunk,
    swapped_records,
    other_settings,
]


@pytest.fixture(params=SPOILS, ids=lambda spoil: spoil.__name__)
def spoiled(
    request: pytest.FixtureRequest, make: Callable[..., FeatureStore], tmp_path: Path
) -> tuple[FeatureStore, Damaged]:
    store = make()
    return store, request.param(store, tmp_path)


@pytest.fixture
def far(spoiled: tuple[FeatureStore, Damaged]) -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.put(spoiled[0].url, "/spoiled.zarr", recursive=True)
    yield "memory://spoiled.zarr"
    memory.rm("/spoiled.zarr", recursive=True)


def found(url: str) -> Damaged:
    """By ``verify``; a foreign shard may also have fewer rows."""
    damage = verify(FeatureStore.open(url, tolerant=True))
    assert {reason for *_, reason in damage} <= {FOREIGN, "the shard does not hold it"}
    return {(row, array) for row, array, _ in damage}


def test_it_is_refused_at_reading_with_its_sample(
    spoiled: tuple[FeatureStore, Damaged], far: str, tmp_path: Path
) -> None:
    store, damaged = spoiled
    row, array = min(damaged)
    for opened in ({"url": store.url}, {"url": far}, {"url": far, "cache": str(tmp_path / "cache")}):
        with pytest.raises(StoreError, match=rf"{IDS[row]}.*{FOREIGN}"):
            FeatureStore.open(**opened).read([row], array)
    with pytest.raises(StoreError, match=rf"{IDS[row]}.*{FOREIGN}"):
        FeatureStore.open(store.url).load([array])


def test_verify_finds_all_of_it_and_nothing_else(spoiled: tuple[FeatureStore, Damaged], far: str) -> None:
    store, damaged = spoiled
    assert found(store.url) == found(far) == damaged


def test_repair_counts_it_as_absent_and_leaves_the_others(spoiled: tuple[FeatureStore, Damaged]) -> None:
    store, damaged = spoiled
    spoilt = WritableStore.open(store.url, tolerant=True)
    lost = {row for row, _ in damaged} | set(spoilt.missing_rows(IDS))
    sound = [row for row in range(20) if row not in lost]
    before = {name: spoilt.read(sound, name) for name in SAMPLE_ARRAYS}
    assert set(forget_damaged(spoilt)) == {IDS[row] for row, _ in damaged}
    repaired = WritableStore.open(store.url)
    assert set(repaired.missing_rows(IDS)) == lost
    for name, block in before.items():
        np.testing.assert_array_equal(repaired.read(sound, name), block)
    write(repaired, sorted(lost))
    assert found(store.url) == set()
    assert_rows(FeatureStore.open(store.url), sorted(lost))
