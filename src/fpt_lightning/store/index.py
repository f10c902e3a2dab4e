"""What a feature store says of itself: how it was made, which samples it has, and the state of each of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np
import zarr
from numpy.typing import NDArray

from fpt_lightning.data.image_files import ImageFiles, short_digest
from fpt_lightning.data.pages import file_and_page
from fpt_lightning.errors import StaleStoreError, StoreError
from fpt_lightning.progress import track
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
from fpt_lightning.store.reader import CRC_BYTES, FOREIGN, checksum_of
from fpt_lightning.store.specification import FORMAT, FeatureShape, FeatureSpecification
from fpt_lightning.store.storage import AT_ONCE, Range, Storage

REPAIR = "fpt-lightning store repair --config CONFIG"
UPGRADE = "fpt-lightning store upgrade"


class FileRecord(NamedTuple):
    """What tells an image file from another.

    Attributes:
        size: in bytes.
        changed: time of its last change in ns.
        digest: of its content (``fpt_lightning.data.image_files.short_digest``).
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
        return cls(status.st_size, status.st_mtime_ns, short_digest(path))


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
        orientations: rows of a sample.
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
        self.orientations = self.specification.orientations
        self.rows = {id: position * self.orientations for position, id in enumerate(self.ids)}
        self.owners = row_owners(attributes["specification"], self.ids, self.orientations)
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

    def source(self, row: int) -> tuple[str, int]:
        """The id of a row's sample, and the orientation that the row is of."""
        return self.ids[row // self.orientations], row % self.orientations

    def name(self, row: int) -> str:
        """What a row is of, for people."""
        id, orientation = self.source(row)
        return f"orientation {orientation} of {id}" if orientation else id

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
                remedy = f"\nTo keep its normalisation although it would now be of other images, give {given}."
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
        return self._in_state(ids, ABSENT)

    def left_out(self, ids: Sequence[str]) -> list[str]:
        """Those of the samples that were left out, as their images could not be read."""
        return self._in_state(ids, LEFT_OUT)

    def missing_rows(self, ids: Sequence[str]) -> list[int]:
        """Ascending, the absent rows of samples that the store has."""
        return sorted(row for row in self._rows_of(ids) if self.records[row, 0] == ABSENT)

    def _in_state(self, ids: Sequence[str], state: int) -> list[str]:
        """Those of the samples of which a row is in a state; samples that the store does not have are absent."""
        found = (self._records_of(ids)[..., 0] == state).any(1)
        return [ids[position] for position in np.flatnonzero(found).tolist()]

    def _rows_of(self, ids: Sequence[str]) -> list[int]:
        return [self.rows[id] + each for id in ids for each in range(self.orientations)]

    def _records_of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Of each sample, (samples, orientations, columns); 0 of those that the store does not have."""
        rows = np.array([self.rows.get(id, -1) for id in ids], np.intp)
        records = np.zeros((len(rows), self.orientations, self.records.shape[1]), np.int64)
        records[rows >= 0] = self.records[rows[rows >= 0, None] + np.arange(self.orientations)]
        return records

    def changed(self, files: ImageFiles, by_content: bool = False) -> list[str]:
        """Those of the samples that are stored or left out, but whose image file is another by now.

        Args:
            files: of the samples' images; one that is gone has not changed.
            by_content: whether every file is read and its digest compared. Otherwise a file is another if its size
                differs; if only its time of change does, its content decides.
        """
        records = self._records_of(files.ids)
        stored = (records[..., 0] != ABSENT) & files.present[:, None]
        another = (stored & (records[..., 1] != files.sizes[:, None])).any(1)
        doubtful = stored if by_content else stored & (records[..., 2] != files.changed[:, None])
        read = np.flatnonzero(doubtful.any(1) & ~another).tolist()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            digests = track(pool.map(files.digest, read), "images read again", len(read))
            for position, digest in zip(read, digests, strict=True):
                another[position] = (doubtful[position] & (records[position, :, 3] != digest)).any()
        return [files.ids[position] for position in np.flatnonzero(another)]

    def retime(self, files: ImageFiles) -> list[int]:
        """Take over the times of change of files that ``changed`` read and found to be those recorded, such as copies.

        Returns:
            Their rows.
        """
        records = self._records_of(files.ids)[:, 0]
        other = (records[:, 0] != ABSENT) & (records[:, 1] == files.sizes) & (records[:, 2] != files.changed)
        same = [i for i in np.flatnonzero(other).tolist() if files.known_digest(i) == records[i, 3]]
        rows = [self.rows[files.ids[i]] + each for i in same for each in range(self.orientations)]
        self.records[rows, 2] = np.repeat(files.changed[same], self.orientations)
        return rows

    def digests(self, files: ImageFiles) -> NDArray[np.int64]:
        """Of the images' files, (images,), as far as they are known without reading; 0 otherwise."""
        records = self._records_of(files.ids)[:, 0]
        same = (records[:, 1] == files.sizes) & (records[:, 2] == files.changed) & (records[:, 0] != ABSENT)
        return np.where(same, records[:, 3], 0)

    def _read_records(self, tolerant: bool) -> tuple[NDArray[np.int64], dict[int, str]]:
        """All of the records, and why those of some rows are damaged; these are 0."""
        array, total, lost = self._arrays[RECORDS], self.orientations * len(self.ids), dict[int, str]()
        width = array.shape[1]
        shards = range(-(-total // SHARD))
        table = np.zeros((len(shards) * SHARD, OWNER + 1 + len(self.sample_arrays)), np.int64)
        contents = self._storage.read([Range(f"{array.basename}/c/{shard}/0") for shard in shards])
        for shard, content in zip(shards, contents, strict=True):
            rows = range(shard * SHARD, min((shard + 1) * SHARD, total))
            if content is None:
                continue  # none of these rows was ever written
            data, checksum = content[:-CRC_BYTES], content[-CRC_BYTES:]
            if len(data) != 8 * width * SHARD or checksum_of(data) != checksum:
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
