"""Damage of a feature store: found by reading all of it, and forgotten, so that a preload computes it again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.errors import StoreError
from fpt_lightning.store.index import REPAIR
from fpt_lightning.store.layout import RECORDS, SHARD, writing
from fpt_lightning.store.storage import AT_ONCE, open_filesystem
from fpt_lightning.store.store import FeatureStore
from fpt_lightning.store.writing import WritableStore


class Damage(NamedTuple):
    """What cannot be read of a store.

    Attributes:
        row: whose.
        array: of ``FeatureStore.sample_arrays``, or ``records``.
        reason: for people.
    """

    row: int
    array: str
    reason: str


def check_present(store: FeatureStore) -> None:
    """Make sure that every complete row has its chunks, as Zarr reads an absent chunk as zeros.

    Raises:
        StoreError: naming the first sample whose data are gone, or the extension of the store was stopped.
    """
    if not store.extended:
        raise StoreError(f"the arrays of the feature store {store.url} have not {len(store.ids)} samples: {REPAIR}.")
    for name, shard, present in _shards(store):
        rows = _complete_rows(store, shard)
        absent = rows[~present[rows % SHARD]]
        if len(absent):
            raise StoreError(
                f"the feature store {store.url} has lost the {name} of {store.name(absent[0])} (shard {shard}): "
                f"rebuild it, or what is lost of it, with `{REPAIR}`."
            )


def verify(store: FeatureStore) -> list[Damage]:
    """All that cannot be read of the complete rows: every chunk is read, and its checksum compared.

    The store must have been opened ``tolerant``, else damaged records were an error already.
    """
    damage = [Damage(row, "records", reason) for row, reason in store.lost_records.items()]
    store.verify_again()
    for name, shard, _ in _shards(store):
        found = store.damage(_complete_rows(store, shard).tolist(), name)
        damage += [Damage(row, name, reason) for row, reason in found.items()]
    return damage


def forget_damaged(store: WritableStore) -> list[str]:
    """Count the samples that ``verify`` finds damaged as absent, so that a preload computes them again.

    Returns:
        Their ids.
    """
    damage = verify(store)
    rows_of = {shard: range(shard * SHARD, (shard + 1) * SHARD) for shard in {d.row // SHARD for d in damage}}
    unreadable = {s for s, rows in rows_of.items() if store.lost_records.keys() >= {*rows} & {*range(len(store.done))}}
    broken = {f"{RECORDS}/c/{shard}/0" for shard in unreadable}
    broken |= {
        store.shard_path(d.array, d.row // SHARD)
        for d in damage
        if d.array in store.sample_arrays and not store.present(d.array, d.row // SHARD).any()
    }
    with writing(store.url):
        filesystem, path = open_filesystem(store.url)
        for file in broken:  # what Zarr could not write into; rows that are forgotten next, or found lost until then
            if filesystem.exists(f"{path}/{file}"):
                filesystem.rm(f"{path}/{file}")
    store.forget_rows(sorted({d.row for d in damage if d.row // SHARD not in unreadable}))
    return list(dict.fromkeys(store.source(d.row)[0] for d in damage))


def _shards(store: FeatureStore) -> Iterator[tuple[str, int, NDArray[np.bool_]]]:
    """Each array and shard that has complete rows, and which of its chunks are there."""
    shards = [
        (name, int(shard)) for name in store.sample_arrays for shard in np.unique(np.flatnonzero(store.done) // SHARD)
    ]
    store.load_indices(shards)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for given, present in zip(shards, pool.map(lambda given: store.present(*given), shards), strict=True):
            yield *given, present


def _complete_rows(store: FeatureStore, shard: int) -> NDArray[np.intp]:
    return np.flatnonzero(store.done[shard * SHARD : (shard + 1) * SHARD]) + shard * SHARD
