"""One name for the place of a feature store, whatever way it was written."""

from __future__ import annotations

import os
import re

from fpt_lightning.errors import StoreError

_LOCAL = re.compile("(file|local):(//)?")
_ALIASES = {"s3a": "s3", "gcs": "gs"}  # of fsspec


def resolve(place: str) -> str:
    """The same for every way to write a place, so that it has one lock, one cache and one list of what was left out.

    Args:
        place: a path, which may begin with ``~`` or hold symbolic links; or any fsspec URL.

    Returns:
        The real, absolute path of a local place; else its URL, without empty segments and ``.`` in its path.

    Raises:
        StoreError: it is empty.
    """
    if not place:
        raise StoreError("the place of a feature store (data.store) is empty: name a folder or a URL.")
    if local := _LOCAL.match(place):
        place = place[local.end() :]
    if "://" not in place:
        return os.path.realpath(os.path.expanduser(place))
    chain, _, path = place.rpartition("://")
    *outer, protocol = chain.split("::")
    root = "/" if path.startswith("/") else ""
    kept = "/".join(part for part in path.split("/") if part not in ("", "."))
    return "::".join([*outer, _ALIASES.get(protocol, protocol)]) + f"://{root}{kept}"


def is_local(url: str) -> bool:
    """Whether a place, as ``resolve`` has it, is of this machine's file system."""
    return os.path.isabs(url)
