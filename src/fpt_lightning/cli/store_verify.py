"""The command ``store verify``: every byte of a feature store, and of the images that it is of."""

from __future__ import annotations

from pathlib import Path

from fpt_lightning.data.image_files import ImageFiles
from fpt_lightning.errors import DataError
from fpt_lightning.store.damage import verify
from fpt_lightning.store.index import REPAIR
from fpt_lightning.store.store import FeatureStore

_ENCODE = "fpt-lightning preload --config CONFIG --data.check digest"


def store_verify(url: str, images: str | None = None) -> None:
    """Read all of a feature store and list what is damaged, by sample and array; the exit status is then 1.

    Args:
        url: the store's path or fsspec URL.
        images: folder of the data set's images (data.root), each of which is then read too, to find those that are not
            the files that were encoded, though size and time may be the same.

    Raises:
        StoreError: there is none, or it is of another format, or its metadata are damaged.
        DataError: none of its images is in that folder.
    """
    store = FeatureStore.open(url, tolerant=True)
    damage = verify(store)
    for row, array, reason in damage:
        print(f"{store.name(row)}: {array}: {reason}")
    if not store.extended:
        print("the arrays have more or fewer rows than the samples: an extension was stopped")
    changed = [] if images is None else _changed(store, Path(images))
    for id in changed:
        print(f"{id}: its image is not the file that was encoded")
    if not damage and store.extended and not changed:
        print(f"the feature store {url} is sound: {store.done.sum():,} rows were read.")
        return
    samples = len({store.source(row)[0] for row, *_ in damage})
    if damage or not store.extended:
        print(f"{samples} of {len(store.ids)} samples of {url} are damaged: compute them again with `{REPAIR}`.")
    if changed:
        print(f"{len(changed)} of {len(store.ids)} images are others by now: encode them again with `{_ENCODE}`.")
    raise SystemExit(1)


def _changed(store: FeatureStore, root: Path) -> list[str]:
    files = ImageFiles.look(root, store.ids)
    if not files.present.any():
        raise DataError(f"none of the images of the feature store {store.url} is in {root} (--images): give data.root.")
    print(f"{files.present.sum():,} of {len(store.ids):,} images are in {root}, and are read.")
    return store.changed(files, by_content=True)
