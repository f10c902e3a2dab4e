"""Raw reading of shards, and buffers that are used again; test_store.py damages what is read."""

from __future__ import annotations

import gc
import pickle

import numpy as np
import torch

from fpt_lightning.store.reader import BufferPool

SHAPE, DTYPE = (4, 5), np.dtype("int8")


def test_a_buffer_is_used_again_once_nobody_holds_it() -> None:
    pool = BufferPool()
    first = pool.take(SHAPE, DTYPE)
    assert (first.shape, first.dtype) == (SHAPE, DTYPE)
    address = first.ctypes.data
    del first
    gc.collect()
    again = pool.take(SHAPE, DTYPE)
    assert again.ctypes.data == address
    assert pool.take(SHAPE, DTYPE).ctypes.data != address
    assert pool.take(SHAPE, np.dtype("float16")).ctypes.data != address


def test_a_buffer_is_never_used_again_while_a_tensor_or_view_holds_it() -> None:
    pool = BufferPool()
    kept = []
    for hold in (
        lambda array: torch.from_numpy(array),
        lambda array: torch.from_numpy(array)[1:, 0],
        lambda array: array[2],
        lambda array: torch.from_numpy(array).view(torch.uint8).flatten(),
    ):
        array = pool.take(SHAPE, DTYPE)
        array[...] = len(kept)
        kept.append(hold(array))
        del array
        gc.collect()
    for number, held in enumerate(kept):
        assert (np.asarray(held) == number).all()


def test_a_buffer_that_another_thread_takes_first() -> None:
    class TakenMeanwhile(list[np.ndarray]):
        def __len__(self) -> int:
            return 1

    pool = BufferPool()
    pool._free[SHAPE, DTYPE.str] = TakenMeanwhile()
    assert pool.take(SHAPE, DTYPE).shape == SHAPE


def test_each_process_has_a_pool_of_its_own() -> None:
    pool = BufferPool()
    pool.take(SHAPE, DTYPE)
    assert pickle.loads(pickle.dumps(pool)).take(SHAPE, DTYPE).shape == SHAPE
