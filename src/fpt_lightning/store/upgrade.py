"""From format 4, whose records say nothing of the data, to format 5."""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from fpt_lightning.errors import DamagedStoreError
from fpt_lightning.store.index import open_group
from fpt_lightning.store.layout import (
    ABSENT,
    EARLIER_RECORDS,
    OWNER,
    RECORDS,
    SHARD,
    array_documents,
    create_array,
    fingerprint,
    open_array,
    row_checksums,
    row_owners,
    with_records,
    writing,
)
from fpt_lightning.store.lock import lock_store
from fpt_lightning.store.place import resolve
from fpt_lightning.store.specification import FORMAT
from fpt_lightning.store.storage import open_filesystem
from fpt_lightning.store.store import FeatureStore


def upgrade(url: str) -> list[str]:
    """Bring a store of format 4 up to date, for which all of its data are read.

    The new records lie beside the earlier ones until the group's attributes, which are one file, name them: whatever
    stops it, the store is whole in one of the two formats, and another call goes on. What format 4 could not tell, such
    as shards that had been swapped, is taken over as it is.

    Returns:
        Which rows cannot be read, and why; they count as absent from now on.

    Raises:
        StoreError: there is no store, or one of another format, or damaged; another process is writing it, or it
            cannot be written.
    """
    url = resolve(url)
    group = open_group(url, writable=True)
    lock = lock_store(url)
    try:
        specification, damaged = group.attrs.asdict().get("specification"), list[str]()
        if not isinstance(specification, dict) or specification.get("format") != FORMAT:
            damaged = _write_records(_EarlierStore(url, group, tolerant=True))
        _remove_earlier(url)
        return damaged
    finally:
        if lock is not None:
            lock.close()


class _EarlierStore(FeatureStore):
    """A store of format 4, whose records hold neither owners nor checksums."""

    format = FORMAT - 1

    def _open_records(self, group: zarr.Group) -> Any:
        return open_array(group, self.url, EARLIER_RECORDS, (OWNER,), np.dtype("int64"))

    def _foreign(self, table: NDArray[np.int64]) -> NDArray[np.intp]:
        return np.empty(0, np.intp)

    def _checksum(self, row: int, name: str) -> int | None:
        return None


def _write_records(store: _EarlierStore) -> list[str]:
    attributes: dict[str, Any] = store._group.attrs.asdict()
    attributes["specification"] = {**attributes["specification"], "format": FORMAT}
    wanted = np.zeros((len(store.records), OWNER + 1 + len(store.sample_arrays)), np.int64)
    wanted[:, :OWNER] = store.records
    owners = row_owners(attributes["specification"], store.ids, store.orientations)
    wanted[:, OWNER] = np.where(store.records[:, 0] == ABSENT, 0, owners)
    damaged = [f"the record of {store.name(row)} is damaged: {why}" for row, why in store.lost_records.items()]
    with writing(store.url):
        target, known = _target(store)
        same = (known[:, : OWNER + 1] == wanted[:, : OWNER + 1]).all(1)
        wanted[same] = known[same]  # of a call that was stopped
        for start in range(0, len(wanted), SHARD):
            for row in (np.flatnonzero((store.done & ~same)[start : start + SHARD]) + start).tolist():
                try:
                    read = [store.read([row], name) for name in store.sample_arrays]
                    wanted[row, OWNER + 1 :] = [row_checksums(block)[0] for block in read]
                except DamagedStoreError as error:
                    wanted[row] = 0
                    damaged.append(str(error))
            target[start : start + SHARD] = wanted[start : start + SHARD]
        attributes["arrays"] = array_documents(store.url, with_records(store.sample_arrays))
        store._group.attrs.put({**attributes, "fingerprint": fingerprint(attributes)})
    return damaged


def _target(store: _EarlierStore) -> tuple[Any, NDArray[np.int64]]:
    """The array of the new records, and what a call that was stopped wrote into it."""
    rows, record = len(store.records), with_records(store.sample_arrays)[RECORDS]
    try:
        target = open_array(store._group, store.url, RECORDS, *record)
        target.resize((rows, *record[0]))
        return target, target[:]
    except Exception:  # there is none, or it is cut off
        create_array(f"{store.url}/{RECORDS}", RECORDS, rows, *record)
        target = open_array(store._group, store.url, RECORDS, *record)
        return target, target[:]


def _remove_earlier(url: str) -> None:
    filesystem, path = open_filesystem(url)
    with writing(url):
        if filesystem.exists(f"{path}/{EARLIER_RECORDS}"):
            filesystem.rm(f"{path}/{EARLIER_RECORDS}", recursive=True)
