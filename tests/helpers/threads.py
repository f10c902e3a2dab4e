"""Several threads on one object, in lockstep, so that what one keeps on it meets what another keeps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import nn

_Given = TypeVar("_Given")
_Result = TypeVar("_Result")


def at_once(call: Callable[[_Given], _Result], given: list[_Given]) -> list[_Result]:
    """Each in a thread of its own."""
    with ThreadPoolExecutor(len(given)) as pool:
        return list(pool.map(call, given))


def in_lockstep(blocks: Iterable[nn.Module], threads: int) -> None:
    """Let a thread enter and leave each block only together with the others."""
    barrier = threading.Barrier(threads, timeout=10)

    def meet(*_: Any) -> None:
        barrier.wait()

    for block in blocks:
        block.register_forward_pre_hook(meet)
        block.register_forward_hook(meet)
