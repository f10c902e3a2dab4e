"""Damage of a feature store: found by reading all of it, and forgotten, so that a preload computes it again."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import fsspec
import numpy as np

from fpt_lightning.errors import StoreError
from fpt_lightning.store.index import REPAIR
from fpt_lightning.store.layout import SHARD
from fpt_lightning.store.reader import AT_ONCE, CRC_BYTES, index_bytes
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
    damage = [Damage(row, "records", "the checksum of the records is wrong") for row in store.lost_records]
    store.verify_again()
    for name in store.sample_arrays:
        for row in np.flatnonzero(store.done).tolist():
            try:
                store.read([row], name)
            except StoreError as error:
                damage.append(Damage(row, name, str(error.__cause__)))
    return damage


def forget_damaged(store: WritableStore) -> list[str]:
    """Count the samples that ``verify`` finds damaged as absent, so that a preload computes them again.

    Returns:
        Their ids.
    """
    damage = verify(store)
    filesystem, path = fsspec.core.url_to_fs(store.url)
    broken = {f"records/c/{row // SHARD}/0" for row in store.lost_records}
    broken |= {
        store.shard_path(d.array, d.row // SHARD)
        for d in damage
        if d.array in store.sample_arrays and not store.present(d.array, d.row // SHARD).any()
    }
    for file in broken:  # what Zarr could not write into; rows that are forgotten next, or found lost until then
        if filesystem.exists(f"{path}/{file}"):
            filesystem.rm(f"{path}/{file}")
    store.forget_rows(sorted({d.row for d in damage if d.array != "records"}))
    return list(dict.fromkeys(store.source(d.row)[0] for d in damage))
