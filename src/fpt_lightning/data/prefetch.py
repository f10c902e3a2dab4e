"""A data loader that runs ahead in threads, where worker processes would cost more than they save."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

AHEAD = 1
"""Batches that are ready, beside the one in use and the one that is being prepared."""
_MOST = 32  # threads, which share Python's lock


def usable_threads(asked: int | None, processes: int) -> int:
    """How many threads decode images in one of the processes of this machine.

    Args:
        asked: for each process; None for its share of the cores that this process may use, of which 32 at most.
        processes: that decode side by side.
    """
    if asked is not None:
        return asked
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST, usable // processes))


class PrefetchingLoader(DataLoader[Any]):
    """A ``DataLoader`` whose ``num_workers=0`` prepares the next batches in threads of this process.

    Reading, decoding, resizing and augmenting release Python's lock for most of their time, and batches of features
    are too large to be moved between processes. Whatever stops the loop stops the threads.

    Args:
        dataset: with several threads it has ``in_threads(batches, threads)``, a generator of what it gives for batches
            of keys, which threads prepare (``items_in_threads``); of dicts, where memory is pinned.
        threads: of this process; one prepares whole batches.
        **kwargs: as of ``torch.utils.data.DataLoader``.
    """

    def __init__(self, dataset: Dataset[Any], threads: int = 1, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.threads = threads

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_workers:
            return super().__iter__()
        return _ahead(super().__iter__() if self.threads == 1 else self._in_threads())

    def _in_threads(self) -> Iterator[Any]:
        dataset: Any = self.dataset
        batches = self.sampler if self.batch_sampler is None else self.batch_sampler
        prepared = dataset.in_threads(batches, self.threads)
        try:
            yield from map(pinned, prepared) if self.pin_memory else prepared  # neither holds a batch as it makes one
        finally:
            prepared.close()


def pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its tensors in pinned memory."""
    return {name: part.pin_memory() if isinstance(part, Tensor) else part for name, part in batch.items()}


def items_in_threads(
    prepare: Callable[[Any], Any],
    gather: Callable[[list[Any]], Any],
    batches: Iterable[Sequence[Any]],
    threads: int,
) -> Generator[Any, None, None]:
    """Batches of items that take long; beside those of the batch that is asked for, one item a thread is ahead.

    Args:
        prepare: an item by its key, in any of the threads.
        gather: a batch of prepared items.
        batches: keys.
        threads: that prepare items.
    """
    given = [list(batch) for batch in batches]
    ahead, pending = chain.from_iterable(given), deque[Future[Any]]()
    pool = thread_pool(threads)
    try:
        for batch in given:
            pending += [pool.submit(prepare, key) for key in islice(ahead, max(0, len(batch) + threads - len(pending)))]
            yield gather([pending.popleft().result() for _ in batch])
    finally:
        pool.shutdown(cancel_futures=True)


def thread_pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch's operations start no others; everywhere else they do as before."""
    everywhere, started = torch.get_num_threads(), threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread that has not asked takes the number of all others when it first computes
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "decoding", start)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(everywhere)  # which the threads above have changed for those that start later
    return pool


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def put(item: tuple[Any, BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            if device is not None:  # a thread starts on the first, where memory would be pinned for all processes
                torch.cuda.set_device(device)
            while not stopped.is_set():
                put((next(batches), None))
        except BaseException as error:  # the consumer raises it, StopIteration included
            put((None, error))
        finally:
            if isinstance(batches, Generator):
                batches.close()  # and with it its threads

    thread = threading.Thread(target=run, name="prefetch", daemon=True)

    def take() -> Any:
        batch, error = ready.get()
        if error is not None:
            raise error
        return batch

    thread.start()
    try:
        while True:
            yield take()  # held by nobody but the consumer, who may have moved it to a device
    except StopIteration:
        return
    finally:
        stopped.set()
        thread.join()
