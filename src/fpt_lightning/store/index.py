"""What a feature store says of itself: how it was made, which samples it has, and the state of each of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import fsspec
import numpy as np
import zarr
from numpy.typing import NDArray
from tqdm.auto import tqdm

from fpt_lightning.data.image_files import ImageFiles, short_digest
from fpt_lightning.data.pages import file_and_page
from fpt_lightning.errors import StaleStoreError, StoreError
from fpt_lightning.store.layout import (
    ABSENT,
    COMPLETE,
    LEFT_OUT,
    RECORDS,
    SHARD,
    array_documents,
    fingerprint,
    open_array,
    row_bytes,
)
from fpt_lightning.store.reader import AT_ONCE
from fpt_lightning.store.specification import FORMAT, FeatureShape, FeatureSpecification

REPAIR = "fpt-lightning store repair --config CONFIG"


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
        url: where it is, a local path or any fsspec URL.
        specification: what made it.
        shape: of one sample's features.
        made_with: versions and device, for the record.
        sample_arrays: shape and dtype of what each array has for a row.
        ids: sample ids in the order of the rows.
        views: rows of a sample.
        rows: the first (or only) row of each sample, by its id.
        records: (rows, 4), int64; see ``fpt_lightning.store.layout``.
        lost_records: those of rows whose records are damaged, where that is tolerated; they are 0.
    """

    def __init__(self, url: str, group: zarr.Group, tolerant: bool = False) -> None:
        self.url = url
        self._group = group
        try:
            attributes = cast(dict[str, Any], group.attrs.asdict())
            if attributes["specification"].get("format") != FORMAT:
                raise StoreError(
                    f"the feature store {url} has the format {attributes['specification'].get('format')!r}, this "
                    f"version of fpt-lightning reads {FORMAT}: rebuild it."
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
        self._arrays = {name: open_array(group, url, name, *row) for name, row in RECORDS.items()}
        self.records, self.lost_records = self._read_records(tolerant)

    def _declared_arrays(self, documents: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """What the arrays' own metadata say; ``FeatureStore`` knows what they must."""
        sizes = {name: tuple(document["shape"][1:]) for name, document in documents.items() if name not in RECORDS}
        if not all(type(side) is int for size in sizes.values() for side in size):
            raise TypeError("the shape of an array is not of whole numbers")
        return {name: (size, np.dtype(documents[name]["data_type"])) for name, size in sizes.items()}

    @classmethod
    def open(cls, url: str, tolerant: bool = False) -> Self:
        """Open an existing store.

        Args:
            url: where.
            tolerant: whether damaged records count as absent.

        Raises:
            StoreError: there is none, or it is of another format or damaged.
        """
        return cls(url, open_group(url), tolerant)

    @staticmethod
    def exists(url: str) -> bool:
        """Whether a Zarr group is there, complete or not."""
        filesystem, path = fsspec.core.url_to_fs(url)
        return bool(filesystem.exists(f"{path}/zarr.json"))

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
        return [self.rows[id] + view for id in ids for view in range(self.views)]

    def _records_of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Of each sample, (samples, views, columns); 0 of those that the store does not have."""
        rows = np.array([self.rows.get(id, -1) for id in ids], np.intp)
        records = np.zeros((len(rows), self.views, self.records.shape[1]), np.int64)
        records[rows >= 0] = self.records[rows[rows >= 0, None] + np.arange(self.views)]
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
            digests = tqdm(pool.map(files.digest, read), "images read again", len(read), disable=not read)
            for position, digest in zip(read, digests, strict=True):
                another[position] = (doubtful[position] & (records[position, :, 3] != digest)).any()
        return [files.ids[position] for position in np.flatnonzero(another)]

    def digests(self, files: ImageFiles) -> NDArray[np.int64]:
        """Of the images' files, (images,), as far as they are known without reading; 0 otherwise."""
        records = self._records_of(files.ids)[:, 0]
        same = (records[:, 1] == files.sizes) & (records[:, 2] == files.changed) & (records[:, 0] != ABSENT)
        return np.where(same, records[:, 3], 0)

    def _read_records(self, tolerant: bool) -> tuple[NDArray[np.int64], list[int]]:
        """The records, and the rows whose are damaged; those are 0."""
        array, total, lost = self._arrays["records"], self.views * len(self.ids), list[int]()
        records = np.zeros((total, 4), np.int64)
        try:
            records[: array.shape[0]] = array[:total]
        except Exception:  # zarr raises differently for each kind of damage: which rows?
            for start in range(0, total, SHARD):
                rows = range(start, min(start + SHARD, total))
                try:
                    records[start : rows.stop] = array[start : rows.stop]
                except Exception as error:
                    if not tolerant:
                        raise StoreError(
                            f"the records of {self.name(start)} to {self.name(rows[-1])} in the feature store "
                            f"{self.url} are damaged ({error}): compute them again with `{REPAIR}`."
                        ) from error
                    lost += rows
        return records, lost


def open_group(url: str, writable: bool = False) -> zarr.Group:
    """The Zarr group of an existing store.

    Raises:
        StoreError: there is none, or it cannot be opened.
    """
    try:
        return zarr.open_group(url, mode="r+" if writable else "r")
    except (FileNotFoundError, zarr.errors.GroupNotFoundError) as error:
        raise StoreError(f"there is no feature store at {url}.") from error
    except Exception as error:  # damaged metadata surfaces as JSON, key or value errors
        raise StoreError(f"the feature store {url} cannot be opened: {type(error).__name__}: {error}.") from error
