"""What a feature store says of itself: how it was made, which samples it has, and the state of each of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray

from fpt_lightning.data.pages import file_and_page
from fpt_lightning.errors import StaleStoreError, StoreError
from fpt_lightning.files import file_digest
from fpt_lightning.store.layout import (
    ABSENT,
    COMPLETE,
    LEFT_OUT,
    OWNER,
    RECORDS,
    SHARD,
    array_documents,
    fingerprint,
    open_array,
    row_bytes,
    row_owners,
    with_records,
)
from fpt_lightning.store.place import resolve
from fpt_lightning.store.reader import FOREIGN
from fpt_lightning.store.specification import FORMAT, FeatureShape, FeatureSpecification
from fpt_lightning.store.storage import Range, Storage

REPAIR = "fpt-lightning store repair --config CONFIG"
UPGRADE = "fpt-lightning store upgrade"


class FileRecord(NamedTuple):
    """What tells an image file from another.

    Attributes:
        size: in bytes.
        changed: time of its last change in ns.
        digest: the first 8 bytes of its SHA-256, as a signed number.
    """

    size: int
    changed: int
    digest: int

    @classmethod
    def of(cls, image: Path) -> FileRecord:
        """Of an image's file; zeros where there is none."""
        path = file_and_page(image)[0]
        if not path.is_file():
            return cls(0, 0, 0)
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, _digest(path, status.st_size, status.st_mtime_ns))

    def describes(self, image: Path) -> bool:
        """Whether an image's file is still the one recorded; it is read only if its time alone differs."""
        path = file_and_page(image)[0]
        status = path.stat()
        if self.size != status.st_size:
            return False
        return self.changed == status.st_mtime_ns or self.digest == FileRecord.of(image).digest


@cache
def _digest(path: Path, size: int, changed: int) -> int:
    return int(file_digest(path)[:16], 16) - 2**63


class StoreIndex:
    """A feature store without its features: nothing but its metadata and records is read.

    Use ``open``.

    Attributes:
        url: where it is, a local path or any fsspec URL (``fpt_lightning.store.place``).
        specification: what made it.
        shape: of one sample's features.
        made_with: versions and device, for the record.
        sample_arrays: shape and dtype of what each array has for a row.
        ids: sample ids in the order of the rows.
        views: rows of a sample.
        rows: the first (or only) row of each sample, by its id.
        records: (rows, 4), int64: state and file; see ``fpt_lightning.store.layout``.
        checksums: (rows, arrays), int64: crc32c of the row in each of ``sample_arrays``.
        owners: (rows,), int64, of the records.
        lost_records: why those of some rows are damaged, where that is tolerated; they are 0.
    """

    format: ClassVar[int] = FORMAT

    def __init__(self, url: str, group: zarr.Group, tolerant: bool = False) -> None:
        self.url, self._storage = url, Storage(url)
        self._group = group
        try:
            attributes = cast(dict[str, Any], group.attrs.asdict())
            found = attributes["specification"].get("format")
            if found != self.format:
                remedy = f"bring it up to date with `{UPGRADE} {url}`, or " if found == FORMAT - 1 else ""
                raise StoreError(
                    f"the feature store {url} has the format {found!r}, this version of fpt-lightning reads "
                    f"{self.format}: {remedy}rebuild it."
                )
            self.specification = FeatureSpecification.from_dict(attributes["specification"])
            if attributes.get("fingerprint") != fingerprint(attributes):
                raise StoreError(
                    f"the attributes of the feature store {url} do not match their fingerprint: rebuild it."
                )
            self.shape = FeatureShape(**attributes["shape"])
            self.made_with = {str(name): str(value) for name, value in attributes["made_with"].items()}
            self.ids: tuple[str, ...] = tuple(attributes["ids"])
            if not all(isinstance(id, str) for id in self.ids) or len(set(self.ids)) < len(self.ids):
                raise TypeError("the ids are not text, or not unique")
            documents = dict(attributes["arrays"])
            self.sample_arrays = self._declared_arrays(documents)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{url} is not a feature store of fpt-lightning: {error!r}.") from error
        if array_documents(url, documents) != documents:
            raise StoreError(f"the metadata of an array of the feature store {url} are damaged: rebuild it.")
        self.views = self.specification.views
        self.rows = {id: position * self.views for position, id in enumerate(self.ids)}
        self.owners = row_owners(attributes["specification"], self.ids, self.views)
        self._arrays = {RECORDS: self._open_records(group)}
        self._table, self.lost_records = self._read_records(tolerant)
        self.records, self.checksums = self._table[:, :OWNER], self._table[:, OWNER + 1 :]

    def _declared_arrays(self, documents: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """What the arrays' own metadata say; ``FeatureStore`` knows what they must."""
        sizes = {name: tuple(document["shape"][1:]) for name, document in documents.items() if name != RECORDS}
        if not all(type(side) is int for size in sizes.values() for side in size):
            raise TypeError("the shape of an array is not of whole numbers")
        return {name: (size, np.dtype(documents[name]["data_type"])) for name, size in sizes.items()}

    def _open_records(self, group: zarr.Group) -> Any:
        return open_array(group, self.url, RECORDS, *with_records(self.sample_arrays)[RECORDS])

    @classmethod
    def open(cls, url: str, tolerant: bool = False) -> Self:
        """Open an existing store.

        Args:
            url: where.
            tolerant: whether damaged records count as absent.

        Raises:
            StoreError: there is none, or it is of another format or damaged.
        """
        url = resolve(url)
        return cls(url, open_group(url), tolerant)

    @staticmethod
    def exists(url: str) -> bool:
        """Whether a Zarr group is there, complete or not."""
        url = resolve(url)
        return Storage(url).read([Range("zarr.json")]) != [None]

    @property
    def bytes_per_row(self) -> int:
        """Stored bytes of one row, without Zarr's metadata."""
        return row_bytes(self.sample_arrays)

    def source(self, row: int) -> tuple[str, bool]:
        """The id of a row's sample, and whether the row is of its mirror image."""
        return self.ids[row // self.views], row % self.views == 1

    def name(self, row: int) -> str:
        """What a row is of, for people."""
        id, mirrored = self.source(row)
        return f"the mirror image of {id}" if mirrored else id

    def require(self, asked: FeatureSpecification, rebuild: str, ignore: Sequence[str] = ()) -> None:
        """Hold the store against what is asked.

        Raises:
            StaleStoreError: each differing field, and the command that rebuilds.
        """
        differences = self.specification.differences(asked, ignore)
        if differences:
            remedy = ""
            if any(line.startswith("statistics") for line in differences):
                given = f"data.mean {list(self.specification.mean)} and data.std {list(self.specification.std)}"
                remedy = f"\nTo keep its normalisation although the training images changed, give {given}."
            raise StaleStoreError(
                f"the feature store {self.url} was made with other settings:\n  "
                + "\n  ".join(differences)
                + f"\nRebuild it with\n  {rebuild}\nor name another data.store.{remedy}"
            )

    @property
    def done(self) -> NDArray[np.bool_]:
        """Whether each row is complete."""
        return cast(NDArray[np.bool_], self.records[:, 0] == COMPLETE)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those of the samples that are neither complete nor left out in the store."""
        return [id for id in ids if id not in self.rows or ABSENT in self._states(id)]

    def left_out(self, ids: Sequence[str]) -> list[str]:
        """Those of the samples that were left out, as their images could not be read."""
        return [id for id in ids if id in self.rows and LEFT_OUT in self._states(id)]

    def missing_rows(self, ids: Sequence[str]) -> list[int]:
        """Ascending, the absent rows of samples that the store has."""
        return sorted(row for row in self._rows_of(ids) if self.records[row, 0] == ABSENT)

    def _states(self, id: str) -> list[int]:
        return [int(self.records[row, 0]) for row in self._rows_of([id])]

    def _rows_of(self, ids: Sequence[str]) -> list[int]:
        return [self.rows[id] + view for id in ids for view in range(self.views)]

    def changed(self, root: Path, ids: Sequence[str]) -> list[str]:
        """Those of the samples that are stored or left out, but whose image file below ``root`` is another by now.

        A file is another if its size differs; if only its time of change does, its content decides.
        """
        found = []
        for id in ids:
            known = [FileRecord(*record[1:].tolist()) for record in self._known(id)]
            if known and file_and_page(root / id)[0].is_file() and not all(r.describes(root / id) for r in known):
                found.append(id)
        return found

    def _known(self, id: str) -> NDArray[np.int64]:
        records = self.records[self._rows_of([id])] if id in self.rows else self.records[:0]
        known: NDArray[np.int64] = records[records[:, 0] != ABSENT]
        return known

    def _read_records(self, tolerant: bool) -> tuple[NDArray[np.int64], dict[int, str]]:
        """All of the records, and why those of some rows are damaged; these are 0."""
        array, total, lost = self._arrays[RECORDS], self.views * len(self.ids), dict[int, str]()
        width = array.shape[1]
        shards = range(-(-total // SHARD))
        table = np.zeros((len(shards) * SHARD, OWNER + 1 + len(self.sample_arrays)), np.int64)
        contents = self._storage.read([Range(f"{array.basename}/c/{shard}/0") for shard in shards])
        for shard, content in zip(shards, contents, strict=True):
            rows = range(shard * SHARD, min((shard + 1) * SHARD, total))
            if content is None:
                continue  # none of these rows was ever written
            data, checksum = content[:-4], content[-4:]
            if len(data) != 8 * width * SHARD or google_crc32c.value(data).to_bytes(4, "little") != checksum:
                lost |= dict.fromkeys(rows, "the checksum of its chunk is wrong")
            else:
                table[rows.start : rows.start + SHARD, :width] = np.frombuffer(data, "<i8").reshape(SHARD, width)
        whole = table[:total]
        foreign = self._foreign(whole)
        whole[foreign] = 0
        lost |= dict.fromkeys(foreign.tolist(), FOREIGN)
        if lost and not tolerant:
            first = min(lost)
            others = f" and of {len(lost) - 1} more" if len(lost) > 1 else ""
            raise StoreError(
                f"the records of {self.name(first)}{others} in the feature store {self.url} are damaged "
                f"({lost[first]}): compute them again with `{REPAIR}`."
            )
        return whole, lost

    def _foreign(self, table: NDArray[np.int64]) -> NDArray[np.intp]:
        """Rows whose records are not theirs."""
        return np.flatnonzero((table[:, 0] != ABSENT) & (table[:, OWNER] != self.owners))


def open_group(url: str, writable: bool = False) -> zarr.Group:
    """The Zarr group of an existing store.

    Raises:
        StoreError: there is none, or it cannot be reached or opened.
    """
    if not StoreIndex.exists(url):
        raise StoreError(f"there is no feature store at {url}.")
    try:
        return zarr.open_group(url, mode="r+" if writable else "r")
    except Exception as error:  # damaged metadata surfaces as JSON, key or value errors
        raise StoreError(f"the feature store {url} cannot be opened: {type(error).__name__}: {error}.") from error
