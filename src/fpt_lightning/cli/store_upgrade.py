"""The command ``store upgrade``: from the format of an earlier version to today's."""

from __future__ import annotations

from fpt_lightning.store.specification import FORMAT
from fpt_lightning.store.upgrade import upgrade


def store_upgrade(url: str) -> None:
    """Bring a feature store of the format before up to date: it is read once, and nothing is computed again.

    Args:
        url: the store's path or fsspec URL.

    Raises:
        StoreError: there is none, or it is of another format, or damaged, or cannot be written.
    """
    damaged = upgrade(url)
    print("\n".join([*damaged, f"the feature store {url} has the format {FORMAT}."]))
    if damaged:
        print(f"{len(damaged)} rows are damaged and count as absent: compute them again with `fpt-lightning preload`.")
