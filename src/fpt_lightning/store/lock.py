"""One writer of a local store at a time: a lock of the operating system, which a crash releases."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from fpt_lightning.errors import StoreError
from fpt_lightning.files import take_lock
from fpt_lightning.store.layout import writing
from fpt_lightning.store.place import is_local, resolve


def lock_store(url: str, shared: bool = False) -> IO[bytes] | None:
    """Keep other preloads from writing a local store while the file that is returned is open, or until a crash.

    The lock is that of the operating system on ``{url}.lock``. A remote store has none: None is returned.

    Args:
        url: of the store, which need not be there yet.
        shared: whether other processes of this preload may hold the lock too.

    Raises:
        StoreError: another preload holds it, or nothing can be written beside the store.
    """
    url = resolve(url)
    if not is_local(url):
        return None
    with writing(url):
        path = Path(f"{url}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+")
    share_lock(file, url, shared)
    return file


def share_lock(file: IO[bytes], url: str, shared: bool = True) -> None:
    """Take a store's lock, or turn the exclusive one into a shared one."""
    if not take_lock(file, shared):
        raise StoreError(
            f"another preload is writing the feature store {url}: wait for it, or stop it, then preload again."
        )
