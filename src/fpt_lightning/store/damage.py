"""Damage of a feature store: found by reading all of it, and forgotten, so that a preload computes it again."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from fpt_lightning.errors import StoreError
from fpt_lightning.store.index import REPAIR
from fpt_lightning.store.layout import RECORDS, SHARD, writing
from fpt_lightning.store.reader import CRC_BYTES, index_bytes
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

    A shard whose file is large enough for its complete rows has them; the index of any other is read. Every chunk is
    verified when it is read first.

    Raises:
        StoreError: naming the first sample whose data are gone, or the extension of the store was stopped.
    """
    if not store.extended:
        raise StoreError(f"the arrays of the feature store {store.url} have not {len(store.ids)} samples: {REPAIR}.")
    rows = np.flatnonzero(store.done)
    shards, complete = np.unique(rows // SHARD, return_counts=True)
    for name, (size, dtype) in store.sample_arrays.items():
        needed = complete * (math.prod(size) * dtype.itemsize + CRC_BYTES) + index_bytes(SHARD)
        small = shards[store.shard_sizes(name, shards.tolist()) < needed].tolist()
        store.load_indices([(name, shard) for shard in small])
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for shard, present in zip(small, pool.map(partial(store.present, name), small), strict=True):
                own = rows[rows // SHARD == shard]
                absent = own[~present[own % SHARD]]
                if len(absent):
                    raise StoreError(
                        f"the feature store {store.url} has lost the {name} of {store.name(absent[0])} (shard {shard}):"
                        f" rebuild it, or what is lost of it, with `{REPAIR}`."
                    )


def verify(store: FeatureStore) -> list[Damage]:
    """All that cannot be read of the complete rows: every chunk is read, and its checksum compared.

    The store must have been opened ``tolerant``, else damaged records were an error already.
    """
    damage = [Damage(row, "records", reason) for row, reason in store.lost_records.items()]
    store.verify_again()
    rows = np.flatnonzero(store.done)
    shards = [part.tolist() for part in np.split(rows, np.flatnonzero(np.diff(rows // SHARD)) + 1) if len(part)]
    for name in store.sample_arrays:
        store.load_indices([(name, own[0] // SHARD) for own in shards])
        for own in shards:
            damage += [Damage(row, name, reason) for row, reason in store.damage(own, name).items()]
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
