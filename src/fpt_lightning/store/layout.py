"""Where things lie in a feature store's Zarr group (paper, section 3.6): its arrays, their shards, its attributes.

Layout (Zarr v3, one row a chunk, whole shards of rows, every chunk with a crc32c checksum):

    features    (rows, 2, L, H, T, head_dim)   keys and values, as the codec has them (fpt_lightning.store.codecs)
    ..._scales  (rows, L, H, ...)              their scales and offsets, of the codecs that have any
    indices     (rows, L, H, T)                their tokens, int32, most important first
    pooled      (rows, D)                      the pooled feature after the last tapped block, fp32
    images      (rows, size, size, 3)          the low-resolution copies, uint8
    row_records (rows, 5 + arrays)             int64: 0 absent, 1 complete, 2 left out (its image is broken); of the
                                               image file the bytes, the time of change in ns, and the first 8 bytes of
                                               its SHA-256; whose record it is (``row_owners``); and the crc32c of the
                                               row in each of the arrays above, in their order

A sample has a row for each of its orientations (``fpt_lightning.data.orientations``), its image first. The attributes
hold the specification, the sample ids in the order of the rows, a copy of the arrays' metadata, and a fingerprint of
all that. A record says whose it is and which data are its, so that files that were swapped, or copied in from another
store, are noticed. A shard has one writer. A row's record is written after its data, and the group after its arrays,
each file under a partial name first: whatever stops a writer leaves complete rows and absent ones, or no store. Only
who holds ``fpt_lightning.store.lock.lock_store`` writes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from fpt_lightning.errors import FPTError, StoreError, in_one_line
from fpt_lightning.store.place import is_local
from fpt_lightning.store.storage import REMOTE_REMEDY, Range, Storage

SHARD = 16  # rows
ABSENT, COMPLETE, LEFT_OUT = range(3)  # what a record says of its row
RECORDS = "row_records"
EARLIER_RECORDS = "records"  # of format 4: (rows, 4), the first columns of today's
OWNER = 4  # column of a record; those of the row's data follow
Arrays = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


def with_records(arrays: Arrays) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of what each array of a store has for a row: these of its samples, and the records."""
    return {**arrays, RECORDS: ((OWNER + 1 + len(arrays),), np.dtype("int64"))}


def row_bytes(arrays: Arrays) -> int:
    """Stored bytes of one row of these arrays and of its record, without Zarr's metadata."""
    return sum(math.prod(size) * dtype.itemsize for size, dtype in with_records(arrays).values())


def row_owners(specification: Mapping[str, Any], ids: Sequence[str], orientations: int) -> NDArray[np.int64]:
    """What tells the rows of a store from others, and from those of stores made with other settings.

    Args:
        specification: as the store's attributes have it.
        ids: of the samples, in the order of the rows.
        orientations: of each sample, a row each.

    Returns:
        (len(ids) * orientations,): the crc32c of specification, orientation and id.
    """
    made = json.dumps(specification, sort_keys=True).encode()
    starts = [google_crc32c.value(made + bytes([each])) for each in range(orientations)]
    names = [id.encode("utf-8", "surrogatepass") for id in ids]
    return np.array([google_crc32c.extend(start, name) for name in names for start in starts], np.int64)


def row_checksums(block: NDArray[Any]) -> list[int]:
    """The crc32c of each row, as Zarr has it of the row's chunk."""
    return [google_crc32c.value(row.reshape(-1).view(np.uint8)) for row in np.ascontiguousarray(block)]


def create_array(where: str | MemoryStore, name: str, rows: int, sample: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Make an array of the layout.

    Args:
        where: its own URL, or memory.
        name: of the array.
        rows: how many.
        sample: shape of a row.
        dtype: of the numbers.
    """
    sharded = name not in (RECORDS, EARLIER_RECORDS)
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
    names, documents = list(names), {}
    found = Storage(url).read([Range(f"{name}/zarr.json") for name in names])
    for name, content in zip(names, found, strict=True):
        try:
            documents[name] = json.loads(content or b"")
            documents[name]["shape"][0] = 0
        except (ValueError, TypeError, LookupError) as error:
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
        StoreError: in place of an ``OSError``, or of whatever a remote storage raises.
    """
    try:
        yield
    except FPTError:
        raise
    except Exception as error:
        local = is_local(url)
        if local and not isinstance(error, OSError):
            raise
        why = (error.strerror if local and isinstance(error, OSError) else None) or in_one_line(error).rstrip(".")
        remedy = "make room, or make it writable" if local else REMOTE_REMEDY
        raise StoreError(
            f"the feature store {url} cannot be written: {why}. What is complete of it is kept: {remedy}, and preload "
            "again; or name another data.store."
        ) from error
