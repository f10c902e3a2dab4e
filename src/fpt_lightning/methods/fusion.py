"""Fine-grained prompts and the fusion module (paper, section 3.4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fpt_lightning.encoder.execution import autocast, autocast_dtype, exporting, sketching, to_do
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.store.codecs import Coded, Features

_PIECE_BYTES, _GPU_PIECE_BYTES = 2 * 2**20, 64 * 2**20


class Fusion(nn.Module, ABC):
    """Base of the fusion modules: prompts that ask the stored keys and values, one set a tapped layer.

    Args:
        layers: L.
        heads: H, the frozen encoder's.
        width: D.
        side_width: d.
        prompts: M.
        dropout: probability at the end.
        saving: whether stored tokens are widened a few at a time on a GPU too, for less memory and more time.

    Raises:
        ConfigurationError: fewer than one prompt.
    """

    FULL_WIDTH: ClassVar[bool]
    """Whether the prompts have the encoder's width D, rather than the side network's d."""

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        side_width: int,
        prompts: int = 16,
        dropout: float = 0.5,
        saving: bool = False,
    ) -> None:
        super().__init__()
        if prompts < 1:
            raise ConfigurationError(f"prompts is {prompts}: give at least 1.")
        self.heads, self.saving = heads, saving
        self.prompts = nn.Parameter(torch.randn(layers, prompts, width if self.FULL_WIDTH else side_width) * 1e-6)
        self.out = nn.Linear(width, side_width)
        self.dropout = nn.Dropout(dropout)
        self.add_projection(width, side_width)

    @abstractmethod
    def add_projection(self, width: int, side_width: int) -> None:
        """Make what ``project`` needs."""

    def forward(self, features: Features) -> list[Tensor]:
        """Summarise the selected tokens of every tapped layer.

        Args:
            features: keys and values of B images, in any codec; widened one layer at a time.

        Returns:
            L tensors (B, M, d), one for each block of the side network.
        """
        return list(self.by_layer(features))

    def by_layer(self, features: Features) -> Iterator[Tensor]:
        """What ``forward`` gives, each when it is asked for.

        The backward pass goes the other way round: what a layer keeps for it is gone before that of the one below.
        """
        for index, prompts in enumerate(self.prompts):
            yield self.fuse(prompts, *features.layer(index))

    @abstractmethod
    def fuse(self, prompts: Tensor, keys: Coded, values: Coded) -> Tensor:
        """(B, M, d) from one layer's prompts and its keys and values."""

    @abstractmethod
    def project(self, prompts: Tensor) -> Tensor:
        """One layer's prompts as queries (M, D)."""

    def queries(self, prompts: Tensor) -> Tensor:
        """What one layer's prompts ask in the encoder's heads: (H, M, head_dim)."""
        return self.project(prompts).view(len(prompts), self.heads, -1).transpose(0, 1)

    def ask(self, prompts: Tensor, keys: Coded, values: Coded) -> Tensor:
        """(B, M, d): what one layer's prompts attend to, times the out-projector's weight."""
        return cross_attention(self.queries(prompts), keys, values, self.out.weight, self.saving)


class FineGrainedFusion(Fusion):
    """FPT+: prompts at the encoder's width.

    ``fused_l = Dropout(out(attention(LayerNorm(P_l), K_l, V_l) + P_l))`` with one LayerNorm and one out-projector
    shared by all layers, and no projection of queries. Arguments as for ``Fusion``.
    """

    FULL_WIDTH = True

    def add_projection(self, width: int, side_width: int) -> None:
        """See ``Fusion.add_projection``."""
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def project(self, prompts: Tensor) -> Tensor:
        """See ``Fusion.project``."""
        queries: Tensor = self.norm(prompts)
        return queries

    def fuse(self, prompts: Tensor, keys: Coded, values: Coded) -> Tensor:
        """See ``Fusion.fuse``."""
        fused: Tensor = self.dropout(self.ask(prompts, keys, values) + self.out(prompts))  # as ``out`` is linear
        return fused


class ProjectedFusion(Fusion):
    """FPT, before FPT+: prompts at the side network's width, whose queries are projected to the encoder's.

    ``fused_l = Dropout(out(attention(query(P_l), K_l, V_l)) + P_l)`` with one query projection and one out-projector
    shared by all layers, and no LayerNorm. Arguments as for ``Fusion``.
    """

    FULL_WIDTH = False

    def add_projection(self, width: int, side_width: int) -> None:
        """See ``Fusion.add_projection``."""
        self.query = nn.Linear(side_width, width)

    def project(self, prompts: Tensor) -> Tensor:
        """See ``Fusion.project``."""
        queries: Tensor = self.query(prompts)
        return queries

    def fuse(self, prompts: Tensor, keys: Coded, values: Coded) -> Tensor:
        """See ``Fusion.fuse``."""
        fused: Tensor = self.dropout(self.ask(prompts, keys, values) + self.out.bias + prompts)
        return fused


class PromptHead(nn.Linear):
    """A linear head on the fused prompts of all layers, side by side, normalised (VQT; arXiv:2212.03220).

    Args:
        layers: L.
        prompts: M.
        width: of the fused prompts, d.
        outputs: of the head.
    """

    def __init__(self, layers: int, prompts: int, width: int, outputs: int) -> None:
        super().__init__(layers * prompts * width, outputs)
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, prompts: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """Classify.

        Args:
            prompts: L tensors (B, M, d), as ``Fusion`` gives them.

        Returns:
            Logits (B, outputs).
        """
        tokens = torch.cat(list(prompts), 1).flatten(1)
        return super().forward(F.layer_norm(tokens, tokens.shape[1:]))  # the weights would repeat an affine norm


def cross_attention(
    queries: Tensor, keys: Coded, values: Coded, weight: Tensor | None = None, saving: bool = False
) -> Tensor:
    """Ask every image's tokens the same queries, head by head; keys and values are not projected.

    Keys and values are constants: the backward pass widens them once more, recomputes the attention and forms the
    gradients of the queries and the weight alone, so that nothing is kept of the tokens but what is stored.

    Args:
        queries: (H, M, head_dim).
        keys: of B images, (B, H, T, head_dim) when widened.
        values: like the keys.
        weight: (d, H * head_dim), which projects what the heads attended to; none by default.
        saving: whether pieces are small on a GPU too (``piece_bytes``).

    Returns:
        (B, M, H * head_dim), heads side by side, or (B, M, d) where there is a weight; in the queries' dtype, or
        autocast's.
    """
    if exporting():
        attended = _attend(queries, keys, values)
        return attended if weight is None else attended @ weight.T
    dtype = autocast_dtype(queries.device) or queries.dtype
    result: Tensor = _CrossAttention.apply(queries, weight, dtype, saving, *keys, *values)
    return result


class _CrossAttention(torch.autograd.Function):
    """``softmax(queries keys^T / sqrt(head_dim)) values weight^T``, a few images at a time."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, weight: Tensor | None, dtype: torch.dtype, saving: bool, *coded: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(queries, weight, *coded)
        ctx.dtype, ctx.saving = dtype, saving
        heads, prompts, head_dim = queries.shape
        width = heads * head_dim if weight is None else len(weight)
        result = queries.new_empty(len(cast(Tensor, coded[0])), prompts, width, dtype=dtype)
        query, weight = queries.to(dtype), None if weight is None else weight.to(dtype)
        with autocast(queries.device, None):
            for images, keys, values in to_do(pieces(query, saving, coded)):
                attended = _attend(query, keys, values)
                result[images] = attended if weight is None else attended @ weight.T
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, weight, *coded = ctx.saved_tensors
        query, narrow = queries.to(ctx.dtype), None if weight is None else weight.to(ctx.dtype)
        of_queries, of_weight = torch.zeros_like(queries), None if weight is None else torch.zeros_like(weight)
        with autocast(queries.device, None):
            for images, keys, values in to_do(pieces(query, ctx.saving, coded)):
                piece = gradient[images]
                attended, some = _gradients(query, keys, values, piece if narrow is None else piece @ narrow)
                of_queries += some
                if of_weight is not None:
                    of_weight += piece.flatten(0, 1).T @ attended.flatten(0, 1)
        return of_queries, of_weight, None, None, *(None for _ in coded)


def _attend(query: Tensor, keys: Coded, values: Coded) -> Tensor:
    """(B, M, H * head_dim): what the queries (H, M, head_dim) attend to. Widened tokens are gone when it returns."""
    queries = query.expand(keys.data.shape[0], -1, -1, -1)
    wide = keys.widened(query.dtype), values.widened(query.dtype)
    return F.scaled_dot_product_attention(queries, *wide).transpose(1, 2).flatten(-2)


def _gradients(query: Tensor, keys: Coded, values: Coded, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """What ``_attend`` gave, and the gradient of the queries from that of it (B, M, H * head_dim)."""
    scale = query.shape[-1] ** -0.5
    wide = keys.widened(query.dtype)
    attention = (query * scale @ wide.transpose(-1, -2)).softmax(-1)
    tokens = values.widened(query.dtype)
    scores = gradient.reshape(*gradient.shape[:2], len(query), -1).transpose(1, 2) @ tokens.transpose(-1, -2)
    attended = (attention @ tokens).transpose(1, 2).flatten(-2)
    del tokens
    scores = attention * (scores - (attention * scores).sum(-1, keepdim=True))
    return attended, (scores @ wide).sum(0) * scale


def pieces(query: Tensor, saving: bool, coded: Sequence[Tensor | None]) -> Iterator[tuple[slice, Coded, Coded]]:
    """The images of a layer, a few at a time, with their keys and values for the query (H, M, head_dim)."""
    parts = [Coded(cast(Tensor, data), scales) for data, scales in (coded[:2], coded[2:])]
    images, _, tokens, _ = parts[0].data.shape
    size = query.element_size() * len(query) * tokens * query.shape[-1]
    step = max(1, piece_bytes(sketching() or query.device, saving) // size)
    for start in range(0, images, step):
        piece = slice(start, start + step)
        keys, values = (Coded(p.data[piece], None if p.scales is None else p.scales[piece]) for p in parts)
        yield piece, keys, values


def piece_bytes(device: torch.device, saving: bool) -> int:
    """Of the widened keys of a piece: what a core's cache holds; on a GPU a whole layer, mostly, but to save memory."""
    return _PIECE_BYTES if saving or device.type == "cpu" else _GPU_PIECE_BYTES
