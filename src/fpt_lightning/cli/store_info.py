"""The command ``store info``: a feature store's metadata and records, without its features."""

from __future__ import annotations

from fpt_lightning.store.index import StoreIndex
from fpt_lightning.store.layout import LEFT_OUT


def store_info(url: str) -> None:
    """Say what a feature store holds; its data are not read (see ``verify``).

    Args:
        url: the store's path or fsspec URL.

    Raises:
        StoreError: there is none, or it is of another format, or its metadata are damaged.
    """
    store = StoreIndex.open(url, tolerant=True)
    left_out = store.left_out(store.ids)
    states = {
        "samples": f"{len(store.ids):,}",
        "rows": f"{len(store.records):,}, of which {store.done.sum():,} are complete, "
        f"{(store.records[:, 0] == LEFT_OUT).sum():,} left out as their images could not be read, "
        f"{len(store.lost_records):,} of damaged records",
        "bytes a row": f"{store.bytes_per_row:,}",
        "complete bytes": f"{store.done.sum() * store.bytes_per_row:,}",
        **{f"array {name}": f"{size} {dtype}" for name, (size, dtype) in store.sample_arrays.items()},
    }
    about = {**store.specification.to_dict(), **states, **{f"made with {k}": v for k, v in store.made_with.items()}}
    width = max(map(len, about))
    print("\n".join([f"the feature store {url}", *(f"{name:<{width}}  {value}" for name, value in about.items())]))
    if left_out:
        print("left out: " + ", ".join(left_out))
