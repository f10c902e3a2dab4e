"""The command ``store verify``: every byte of a feature store."""

from __future__ import annotations

from fpt_lightning.store.damage import verify
from fpt_lightning.store.index import REPAIR
from fpt_lightning.store.store import FeatureStore


def store_verify(url: str) -> None:
    """Read all of a feature store and list what is damaged, by sample and array; the exit status is then 1.

    Args:
        url: the store's path or fsspec URL.

    Raises:
        StoreError: there is none, or it is of another format, or its metadata are damaged.
    """
    store = FeatureStore.open(url, tolerant=True)
    damage = verify(store)
    for row, array, reason in damage:
        print(f"{store.name(row)}: {array}: {reason}")
    if not store.extended:
        print("the arrays have more or fewer rows than the samples: an extension was stopped")
    if not damage and store.extended:
        print(f"the feature store {url} is sound: {store.done.sum():,} rows were read.")
        return
    samples = len({store.source(row)[0] for row, *_ in damage})
    print(f"{samples} of {len(store.ids)} samples of {url} are damaged: compute them again with `{REPAIR}`.")
    raise SystemExit(1)
