"""How a call runs: traced for an export, under autocast, or sketched to count its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from itertools import islice
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fpt_lightning.errors import ConfigurationError

_Piece = TypeVar("_Piece")
_SKETCHED: ContextVar[torch.device | None] = ContextVar("sketched", default=None)


def exporting() -> bool:
    """Whether ``torch.export`` traces this call: a graph for any batch holds no loop over its images.

    PyTorch tells it of the process: what another thread computes meanwhile is the same, but takes more memory.
    """
    known = getattr(torch.compiler, "is_exporting", None)  # torch 2.7 and later
    return known is not None and bool(known())


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """``torch.autocast`` to a dtype, or none whatever the caller's.

    Raises:
        ConfigurationError: a dtype, where this PyTorch has no autocast for the device, as of ``mps`` before 2.5.
    """
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, dtype, enabled=dtype is not None)
    if dtype is None:
        return contextlib.nullcontext()
    raise ConfigurationError(
        f"PyTorch {torch.__version__} has no autocast to {str(dtype).removeprefix('torch.')} on {device.type!r}: use "
        "fp32 (model.encoder_precision, trainer.precision 32-true), or a newer PyTorch."
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What the caller's autocast computes in on a device; None without one."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def device_name(device: torch.device) -> str:
    """Of a GPU its model; else the type of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def use_fused_attention(model: nn.Module) -> None:
    """Let timm's attentions call ``scaled_dot_product_attention``, to be intercepted, whatever TIMM_FUSED_ATTN."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            cast(Any, module).fused_attn = True


@contextlib.contextmanager
def sketched(device: torch.device) -> Iterator[None]:
    """Do the first alone of what this thread does piece by piece in the same memory: the memory is that of all.

    Args:
        device: whose pieces it does.
    """
    token = _SKETCHED.set(device)
    try:
        yield
    finally:
        _SKETCHED.reset(token)


def sketching() -> torch.device | None:
    """The device whose pieces are ``sketched``; None where a call is done as a whole."""
    return _SKETCHED.get()


def to_do(pieces: Iterable[_Piece], first: int = 1) -> Iterator[_Piece]:
    """The pieces that a call goes through: all of them, or the first ones within ``sketched``."""
    return islice(pieces, None if sketching() is None else first)
