"""Where things lie in a feature store's Zarr group (paper, section 3.6): its arrays, their shards, its attributes.

Layout (Zarr v3, one row a chunk, whole shards of rows, every chunk with a crc32c checksum):

    features    (rows, 2, L, H, T, head_dim)   keys and values, as the codec has them (fpt_lightning.store.codecs)
    ..._scales  (rows, L, H, ...)              their scales and offsets, of the codecs that have any
    indices     (rows, L, H, T)                their tokens, int32, most important first
    pooled      (rows, D)                      the pooled feature after the last tapped block, fp32
    images      (rows, size, size, 3)          the low-resolution copies, uint8
    records     (rows, 4)                      int64: 0 absent, 1 complete, 2 left out (its image is broken); and of the
                                               image file the bytes, the time of change in ns, and the first 8 bytes of
                                               its SHA-256

A sample has one row, or two where the store is mirrored: its image's, then the mirror image's. The group's attributes
hold the specification, the sample ids in the order of the rows, a copy of the arrays' metadata, and a fingerprint of
all that. A shard has one writer. A row's record is written after its data, and the group after its arrays, each file
under a partial name first: whatever stops a writer leaves complete rows and absent ones, or no store. Only who holds
``fpt_lightning.store.lock.lock_store`` writes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from fpt_lightning.errors import StoreError, in_one_line

SHARD = 16  # rows
ABSENT, COMPLETE, LEFT_OUT = range(3)  # what a record says of its row
RECORDS = {"records": ((4,), np.dtype("int64"))}
RECORD_BYTES = 4 * 8


def row_bytes(arrays: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> int:
    """Stored bytes of one row of these arrays and of its record, without Zarr's metadata."""
    return sum(math.prod(size) * dtype.itemsize for size, dtype in arrays.values()) + RECORD_BYTES


def create_array(where: str | MemoryStore, name: str, rows: int, sample: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Make an array of the layout.

    Args:
        where: its own URL, or memory.
        name: of the array.
        rows: how many.
        sample: shape of a row.
        dtype: of the numbers.
    """
    sharded = name not in RECORDS
    return zarr.create_array(
        where,
        shape=(rows, *sample),
        chunks=(1 if sharded else SHARD, *sample),
        shards=(SHARD, *sample) if sharded else None,
        dtype=dtype,
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        overwrite=True,  # what an earlier ``create`` left that was stopped
    )


def open_array(group: zarr.Group, url: str, name: str, sample: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """An array of a store, as ``create_array`` made it.

    Raises:
        StoreError: it is damaged, or made in another way.
    """
    try:
        array: Any = group[name]
        expected = create_array(MemoryStore(), name, array.shape[0], sample, dtype).metadata
    except Exception as error:  # damaged metadata surfaces as errors of many kinds
        raise StoreError(
            f"the array {name} of the feature store {url} is damaged ({in_one_line(error)}): rebuild it."
        ) from error
    if array.metadata != expected:
        raise StoreError(f"the array {name} of the feature store {url} is not as fpt-lightning makes it: rebuild it.")
    return array.with_config({"write_empty_chunks": True})  # an absent chunk must mean an absent sample


def array_documents(url: str, names: Iterable[str]) -> dict[str, Any]:
    """Zarr's metadata of arrays as they lie there, but for their number of rows, which alone changes.

    Raises:
        StoreError: they are damaged or gone.
    """
    filesystem, path = fsspec.core.url_to_fs(url)
    documents = {}
    for name in names:
        try:
            documents[name] = json.loads(filesystem.cat_file(f"{path}/{name}/zarr.json"))
            documents[name]["shape"][0] = 0
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise StoreError(
                f"the metadata of the array {name} of the feature store {url} are damaged or gone "
                f"({type(error).__name__}: {error}): rebuild it."
            ) from error
    return documents


def fingerprint(attributes: Mapping[str, Any]) -> str:
    """SHA-256 of a store's attributes but for itself, as canonical JSON."""
    content = {name: value for name, value in attributes.items() if name != "fingerprint"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def writing(url: str) -> Iterator[None]:
    """Say which store could not be written, and what to do.

    Raises:
        StoreError: in place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"the feature store {url} cannot be written: {error.strerror or error}. What is complete of it is kept: "
            "make room, or make it writable, and preload again; or name another data.store."
        ) from error
