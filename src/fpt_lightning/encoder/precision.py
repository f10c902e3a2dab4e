"""In which arithmetic the frozen encoder runs: fp32 as IEEE 754 has it, or its linear layers in half precision."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from fpt_lightning.errors import ConfigurationError

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Of linear layers, by precision."""


def halve_linear_layers(model: nn.Module, precision: str) -> None:
    """Hold weights in half precision that autocast would cast to it at every call: the same results, half the memory.

    Args:
        model: that does not train.
        precision: one of ``HALF``.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(HALF[precision])


def check_precision(trainer: Any) -> None:
    """Refuse a trainer whose precision rounds what a model is given, as Lightning's ``bf16-true`` does.

    Labels of 1,000 to 2,000 would be up to 4 off, the scales of stored features lose bits, and images would have other
    features than in the frozen pass.

    Args:
        trainer: Lightning's.

    Raises:
        ConfigurationError: naming the precision.
    """
    given = torch.zeros((), dtype=torch.float32)
    if trainer.precision_plugin.convert_input(given).dtype != given.dtype:
        raise ConfigurationError(
            f"trainer.precision is {trainer.precision!r}, which rounds or widens labels, images and stored features "
            "before the model sees them: use 32-true, bf16-mixed or 16-mixed."
        )


class _FullPrecision:
    """PyTorch's settings for the whole process: changed by the first thread that enters, put back by the last."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._undo: list[Callable[[], None]] = []

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                for read, write, wanted in _settings():
                    if (value := read()) != wanted:
                        write(wanted)
                        self._undo.append(partial(write, value))

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            while self._inside == 0 and self._undo:
                self._undo.pop()()


_full_precision = _FullPrecision()


@contextmanager
def full_precision() -> Iterator[None]:
    """What is fp32 stays so, in all threads: no TF32 or bf16 in products and convolutions, new tensors are fp32.

    TF32 is PyTorch's default in the convolutions of a GPU (the patch embedding), and
    ``torch.set_float32_matmul_precision`` brings it to all products; ``torch.set_default_dtype`` makes others of the
    tensors that a model creates. The features of a store must not depend on them.
    """
    _full_precision.enter()
    try:
        yield
    finally:
        _full_precision.leave()


def _settings() -> list[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """How each is read and written, and what it is to be."""
    dtype = (torch.get_default_dtype, torch.set_default_dtype, torch.float32)
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):  # before torch 2.9
        convolutions = (
            partial(getattr, backends.cudnn, "allow_tf32"),
            partial(setattr, backends.cudnn, "allow_tf32"),
            False,
        )
        products = (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
        return [dtype, convolutions, products]
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    name = "fp32_precision"
    return [dtype, *((partial(getattr, place, name), partial(setattr, place, name), "ieee") for place in places)]
