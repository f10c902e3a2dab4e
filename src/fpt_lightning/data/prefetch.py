"""A data loader that runs ahead in a thread, where worker processes would cost more than they save."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

_AHEAD = 2  # batches


class PrefetchingLoader(DataLoader[Any]):
    """A ``DataLoader`` whose ``num_workers=0`` prepares the next batches in one thread of this process.

    Reading, decoding, resizing and augmenting release Python's lock for most of their time, and batches of features
    are too large to be moved between processes. Whatever stops the loop stops the thread. Arguments as for
    ``torch.utils.data.DataLoader``.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        return batches if self.num_workers else _ahead(batches)


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(item: tuple[Any, BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            while not stopped.is_set():
                put((next(batches), None))
        except BaseException as error:  # the consumer raises it, StopIteration included
            put((None, error))

    thread = threading.Thread(target=run, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield batch
            del batch
    finally:
        stopped.set()
        thread.join()
