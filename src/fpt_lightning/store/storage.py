"""The files of a store, on this machine or far away: ranges of many of them at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import fsspec

from fpt_lightning.errors import FPTError, StoreError, in_one_line
from fpt_lightning.store.place import is_local

AT_ONCE = 64  # requests to a remote storage
REMOTE_REMEDY = "check the network, the endpoint, the bucket and the credentials"


class Range(NamedTuple):
    """Bytes of a file.

    Attributes:
        path: of the file, below the store.
        start: the first byte, or counted from the end where it is negative.
        stop: behind the last byte; None for all that follow.
    """

    path: str
    start: int = 0
    stop: int | None = None


class Storage:
    """Reads the files below a store's place.

    Args:
        url: of the store, as ``fpt_lightning.store.place.resolve`` has it.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def read(self, ranges: Sequence[Range]) -> list[bytes | None]:
        """The bytes of each range, as far as its file has them; None where there is no such file.

        Raises:
            StoreError: the storage cannot be reached, or refuses.
        """
        with reaching(self.url):
            if is_local(self.url):
                return [_read_local(f"{self.url}/{path}", start, stop) for path, start, stop in ranges]
            filesystem, root = open_filesystem(self.url)
            paths, starts, stops = (list(given) for given in zip(*ranges, strict=True)) if ranges else ([], [], [])
            found = filesystem.cat_ranges([f"{root}/{path}" for path in paths], starts, stops, on_error="return")
            return [_content(each) for each in found]


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a place and the path there; for one process, as it does not outlive a fork.

    Raises:
        StoreError: the package of its protocol is not installed, or nothing knows it.
    """
    options: dict[str, Any] = {}
    if url.startswith("s3://"):  # which has room for 10 else
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {"max_pool_connections": AT_ONCE, **given}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:  # of no package, or of an unknown protocol
        raise StoreError(f"the feature store {url} cannot be reached: {error}") from error
    return filesystem, path


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Say which store could not be reached, and what to do.

    Raises:
        StoreError: in place of what its storage raises, each another kind.
    """
    try:
        yield
    except FPTError:
        raise
    except Exception as error:
        why = in_one_line(error).rstrip(".")
        remedy = "make it readable" if is_local(url) else REMOTE_REMEDY
        raise StoreError(f"the feature store {url} cannot be read ({why}): {remedy}, then try again.") from error


def _read_local(path: str, start: int, stop: int | None) -> bytes | None:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = max(0, size + start) if start < 0 else start
            return os.pread(file.fileno(), max(0, min(size, size if stop is None else stop) - first), first)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _content(found: bytes | BaseException) -> bytes | None:
    if isinstance(found, FileNotFoundError):
        return None
    if isinstance(found, BaseException):
        if "satisfiable" in str(found):  # a range of an empty file
            return b""
        raise found
    return found
