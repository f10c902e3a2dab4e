"""How keys and values are coded, stored and widened again: one row of ``CODECS`` a codec.

The paper's store (section 3.6) holds fp32. A linear codec keeps small integers with scales in fp16 (and offsets, where
the range is narrow), which lie in arrays of their own: ``value = integer * scale + offset``. Keys and values travel
coded to the device and are widened there, one layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpt_lightning.errors import ConfigurationError, StoreError
from fpt_lightning.store.specification import FeatureShape, FeatureSpecification


class Features(NamedTuple):
    """Keys and values of B samples as a codec has them.

    Attributes:
        features: (B, 2, L, H, T, head_dim), floating or int8; or (B, 2, L, H, T, head_dim / 2), uint8, of two 4-bit
            integers a byte: those of the channels in the first half (low) and in the second (high).
        key_scales: None for floating features; (B, L, H, 1, T, 1), fp16, a scale a token; or (B, L, H, 2, 1, head_dim),
            fp16, scale and offset of a channel.
        value_scales: None for floating features; (B, L, H, 1 or 2, T, 1), fp16, scale (and offset) of a token.
    """

    features: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def head_dim(self) -> int:
        return self.features.shape[-1] * (2 if self.features.dtype == torch.uint8 else 1)

    def layer(self, index: int) -> tuple[Coded, Coded]:
        """Keys and values of the tapped layer ``index``; views, nothing is copied."""
        scales = [None if s is None else s[:, index] for s in (self.key_scales, self.value_scales)]
        return Coded(self.features[:, 0, index], scales[0]), Coded(self.features[:, 1, index], scales[1])

    def take(self, positions: Tensor) -> Features:
        """The same of some tokens only: in every head those at positions (B, L, H, K) of its T, int64."""
        scales = [s if s is None or s.shape[-2] == 1 else _taken(s, positions[:, :, :, None]) for s in self[1:]]
        return Features(_taken(self.features, positions[:, None]), *scales)


class Coded(NamedTuple):
    """Keys or values of one layer: ``data`` (B, H, T, ...) and ``scales`` (B, H, 1 or 2, ...), as in ``Features``."""

    data: Tensor
    scales: Tensor | None

    def widened(self, dtype: torch.dtype) -> Tensor:
        """(B, H, T, head_dim) in a floating dtype; the data themselves where they have it."""
        if self.scales is None:
            return self.data.to(dtype)
        packed = self.data.dtype == torch.uint8
        integers = torch.cat([self.data & 15, self.data >> 4], -1) if packed else self.data
        scale, *offset = self.scales.to(dtype).unbind(2)
        wide = integers.to(dtype).mul_(scale)
        return wide.add_(offset[0]) if offset else wide


@dataclass(frozen=True)
class Codec:
    """A way to store keys and values.

    Attributes:
        bits: of a number.
        largest_error: of keys or values of a head, beyond which a codec is refused: ``relative_error``.
    """

    bits: int
    largest_error: float

    def arrays(self, shape: FeatureShape) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of each array that a sample has."""
        layers, heads, tokens, head_dim = shape.layers, shape.heads, shape.tokens, shape.head_dim
        last, dtype = {32: (head_dim, "float32"), 16: (head_dim, "float16"), 8: (head_dim, "int8")}.get(
            self.bits, (head_dim // 2, "uint8")
        )
        arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        arrays["features"] = ((2, layers, heads, tokens, last), np.dtype(dtype))
        if self.bits <= 8:
            keys = (1, tokens, 1) if self.bits == 8 else (2, 1, head_dim)
            values = (1 if self.bits == 8 else 2, tokens, 1)
            arrays["key_scales"] = ((layers, heads, *keys), np.dtype("float16"))
            arrays["value_scales"] = ((layers, heads, *values), np.dtype("float16"))
        return arrays

    def holds(self, errors: Tensor) -> bool:
        """Whether these ``relative_error`` are all small enough; not where any is not finite."""
        return bool((errors <= self.largest_error).all())

    def encode(self, features: Tensor) -> Features:
        """Code keys and values.

        Args:
            features: (B, 2, L, H, T, head_dim), fp32.
        """
        if self.bits >= 16:
            return Features(features.to(torch.float32 if self.bits == 32 else torch.float16))
        keys, values = features.unbind(1)
        if self.bits == 8:
            coded = [_symmetric(keys), _symmetric(values)]
        else:  # a channel of keys, a token of values: that is where their outliers lie (KIVI, arXiv:2402.02750)
            coded = [_ranged(keys, over=-2), _ranged(values, over=-1)]
        integers, scales = zip(*coded, strict=True)
        return Features(torch.stack(integers, 1), *scales)


CODECS: dict[str, Codec] = {
    "fp32": Codec(32, 1e-6),
    "fp16": Codec(16, 0.1),
    "int8": Codec(8, 0.1),
    "int4": Codec(4, 0.3),
}


def check_codec(codec: str, head_dim: int | None = None) -> None:
    """Refuse an unknown codec, or one that cannot pack an odd ``head_dim``.

    Raises:
        ConfigurationError: with the known ones.
    """
    if codec not in CODECS:
        raise ConfigurationError(f"codec is {codec!r}: choose one of {', '.join(CODECS)}.")
    if head_dim is not None and CODECS[codec].bits == 4 and head_dim % 2:
        raise ConfigurationError(f"codec is 'int4', which packs pairs, but a head has {head_dim} channels: use int8.")


def relative_error(features: Tensor, coded: Features) -> Tensor:
    """What coding takes from keys and values: RMS of the error / RMS of a typical channel.

    The typical one is the median of those that are not all zeros. Relative to all, an outlier among them would hide
    what the codec does to the others.

    Args:
        features: (B, 2, L, H, T, head_dim), fp32.
        coded: of the same.

    Returns:
        (B, 2, L, H), fp32; not finite where the features are not.
    """
    layers = range(features.shape[2])
    wide = [torch.stack([part.widened(torch.float32) for part in coded.layer(i)], 1) for i in layers]
    error = (torch.stack(wide, 2) - features).square().mean((-2, -1))
    typical = _median_of_nonzero(features.square().mean(-2))
    return torch.where(error == 0, error, error / typical).sqrt()


def _median_of_nonzero(x: Tensor) -> Tensor:
    """Over the last dimension, of what is neither zero nor NaN, the lower of two in the middle; NaN of nothing.

    ``nanmedian`` has no deterministic form on a GPU.
    """
    known = x.where(x != 0, torch.nan).sort(-1).values  # NaN last
    middle = (~known.isnan()).sum(-1, keepdim=True).sub(1).clamp(min=0) // 2
    return known.gather(-1, middle)[..., 0]


def encode(features: Tensor, specification: FeatureSpecification, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Keys and values as the specification's codec stores them, by array.

    Args:
        features: (B, 2, L, H, T, head_dim), fp32.
        specification: of the store.
        names: of the B images, for the error.

    Raises:
        StoreError: values that are not finite, or that the codec would distort, naming encoder, block, head and image.
    """
    codec = CODECS[specification.codec]
    coded = codec.encode(features)
    errors = relative_error(features, coded)  # (B, 2, L, H)
    if not codec.holds(errors):
        _refuse(features, errors, specification, names)
    return {name: part.cpu().numpy() for name, part in coded._asdict().items() if part is not None}


def _refuse(features: Tensor, errors: Tensor, specification: FeatureSpecification, names: Sequence[str]) -> NoReturn:
    name, codec = specification.codec, CODECS[specification.codec]
    image = int((~(errors <= codec.largest_error)).flatten(1).any(1).nonzero()[0])
    worst = errors[image].nan_to_num(torch.inf, torch.inf).argmax()
    part, layer, head = (int(i) for i in torch.unravel_index(worst, errors.shape[1:]))
    largest = features[image, part, layer, head].abs().max().item()
    one = features[image : image + 1]
    others = [name for name, other in CODECS.items() if other.holds(relative_error(one, other.encode(one)))]
    if math.isfinite(largest):
        remedy = f"use codec {' or '.join(others)}" if others else "no codec holds them"
    else:
        remedy = "the encoder gives NaN or Inf"
    raise StoreError(
        f"the features of {names[image]} do not fit {name}: {('keys', 'values')[part]} of block "
        f"{specification.layers[layer]}, head {head}, of {specification.encoder} (largest magnitude {largest:g}) would "
        f"have an error of {100 * errors[image, part, layer, head].item():.3g}%, where {100 * codec.largest_error:g}% "
        f"is allowed: {remedy}."
    )


def _symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 in -127 to 127 with a scale a token: x (B, L, H, T, head_dim) to integers and scales (B, L, H, 1, T, 1)."""
    scale = _rounded(x.abs().amax(-1, keepdim=True) / 127)
    integers = (x / scale).round().clamp(-127, 127).to(torch.int8)
    return integers, scale.half().unsqueeze(3)


def _ranged(x: Tensor, over: int) -> tuple[Tensor, Tensor]:
    """4 bits over the range of each group, packed: x (B, L, H, T, head_dim) to integers and (B, L, H, 2, ...)."""
    low, high = x.amin(over, keepdim=True), x.amax(over, keepdim=True)
    scale, offset = _rounded((high - low) / 15), low.half().float()
    integers = ((x - offset) / scale).round().clamp(0, 15).to(torch.uint8)
    first, second = integers.chunk(2, -1)
    return first | second << 4, torch.stack([scale, offset], 3).half()


def _rounded(scale: Tensor) -> Tensor:
    """As fp16 will have it, and never 0."""
    return scale.half().float().clamp(min=2**-24)


def _taken(x: Tensor, positions: Tensor) -> Tensor:
    """x (..., T, C) at positions (..., K), broadcast over what they lack: (..., K, C)."""
    return x.gather(-2, positions[..., None].expand(*x.shape[:-2], -1, x.shape[-1]))


def as_features(batch: Mapping[str, Any]) -> Features:
    """The coded features of a batch, whose keys are their arrays' names."""
    return Features(batch["features"], batch.get("key_scales"), batch.get("value_scales"))
