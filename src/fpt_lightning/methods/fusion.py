"""Fine-grained prompts and the fusion module (paper, section 3.4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fpt_lightning.encoder.execution import autocast, autocast_dtype, exporting, to_do
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.store.codecs import Coded, Features

_PIECE_BYTES = (2 * 2**20, 64 * 2**20)  # of widened keys: what a core's cache holds; on CUDA a whole layer, mostly


class Fusion(nn.Module, ABC):
    """Base of the fusion modules: prompts that ask the stored keys and values, one set a tapped layer.

    Args:
        layers: L.
        heads: H, the frozen encoder's.
        width: D.
        side_width: d.
        prompt_width: D or d.
        prompts: M.
        dropout: probability at the end.

    Raises:
        ConfigurationError: fewer than one prompt.
    """

    def __init__(
        self, layers: int, heads: int, width: int, side_width: int, prompt_width: int, prompts: int, dropout: float
    ) -> None:
        super().__init__()
        if prompts < 1:
            raise ConfigurationError(f"prompts is {prompts}: give at least 1.")
        self.heads = heads
        self.prompts = nn.Parameter(torch.randn(layers, prompts, prompt_width) * 1e-6)
        self.out = nn.Linear(width, side_width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Features) -> list[Tensor]:
        """Summarise the selected tokens of every tapped layer.

        Args:
            features: keys and values of B images, in any codec; widened one layer at a time.

        Returns:
            L tensors (B, M, d), one for each block of the side network.
        """
        return [self.fuse(prompts, *features.layer(i)) for i, prompts in enumerate(self.prompts)]

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
        """(B, M, D): ``cross_attention`` of one layer's prompts."""
        return cross_attention(self.queries(prompts), keys, values).transpose(1, 2).flatten(-2)


class FineGrainedFusion(Fusion):
    """FPT+: prompts at the encoder's width.

    ``fused_l = Dropout(out(attention(LayerNorm(P_l), K_l, V_l) + P_l))`` with one LayerNorm and one out-projector
    shared by all layers, and no projection of queries. Arguments as for ``Fusion``.
    """

    def __init__(
        self, layers: int, heads: int, width: int, side_width: int, prompts: int = 16, dropout: float = 0.5
    ) -> None:
        super().__init__(layers, heads, width, side_width, width, prompts, dropout)
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def project(self, prompts: Tensor) -> Tensor:
        """See ``Fusion.project``."""
        queries: Tensor = self.norm(prompts)
        return queries

    def fuse(self, prompts: Tensor, keys: Coded, values: Coded) -> Tensor:
        """See ``Fusion.fuse``."""
        fused: Tensor = self.dropout(self.out(self.ask(prompts, keys, values) + prompts))
        return fused


class ProjectedFusion(Fusion):
    """FPT, before FPT+: prompts at the side network's width, whose queries are projected to the encoder's.

    ``fused_l = Dropout(out(attention(query(P_l), K_l, V_l)) + P_l)`` with one query projection and one out-projector
    shared by all layers, and no LayerNorm. Arguments as for ``Fusion``.
    """

    def __init__(
        self, layers: int, heads: int, width: int, side_width: int, prompts: int = 16, dropout: float = 0.5
    ) -> None:
        super().__init__(layers, heads, width, side_width, side_width, prompts, dropout)
        self.query = nn.Linear(side_width, width)

    def project(self, prompts: Tensor) -> Tensor:
        """See ``Fusion.project``."""
        queries: Tensor = self.query(prompts)
        return queries

    def fuse(self, prompts: Tensor, keys: Coded, values: Coded) -> Tensor:
        """See ``Fusion.fuse``."""
        fused: Tensor = self.dropout(self.out(self.ask(prompts, keys, values)) + prompts)
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


def cross_attention(queries: Tensor, keys: Coded, values: Coded) -> Tensor:
    """Ask every image's tokens the same queries, head by head; keys and values are not projected.

    Keys and values are constants: the backward pass widens them once more, recomputes the attention and forms the
    gradient of the queries alone, so that nothing of theirs is kept but what is stored.

    Args:
        queries: (H, M, head_dim).
        keys: of B images, (B, H, T, head_dim) when widened.
        values: like the keys.

    Returns:
        (B, H, M, head_dim), in the queries' dtype, or autocast's.
    """
    if exporting():
        query = queries.expand(keys.data.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(query, keys.widened(queries.dtype), values.widened(queries.dtype))
    dtype = autocast_dtype(queries.device) or queries.dtype
    attended: Tensor = _CrossAttention.apply(queries, dtype, *keys, *values)
    return attended


class _CrossAttention(torch.autograd.Function):
    """``softmax(queries keys^T / sqrt(head_dim)) values``, a few images at a time."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, dtype: torch.dtype, *coded: Tensor | None) -> Tensor:
        ctx.save_for_backward(queries, *coded)
        ctx.dtype = dtype
        attended = queries.new_empty(len(cast(Tensor, coded[0])), *queries.shape, dtype=dtype)
        with autocast(queries.device, None):
            query = queries.to(dtype)
            for images, keys, values in to_do(pieces(query, coded)):
                attended[images] = F.scaled_dot_product_attention(query.expand(len(keys), -1, -1, -1), keys, values)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, *coded = ctx.saved_tensors
        scale = queries.shape[-1] ** -0.5
        query = queries.to(ctx.dtype) * scale
        total = torch.zeros_like(queries)
        with autocast(queries.device, None):
            for images, keys, values in to_do(pieces(query, coded)):
                attention = (query @ keys.transpose(-1, -2)).softmax(-1)
                scores = gradient[images] @ values.transpose(-1, -2)
                scores = attention * (scores - (attention * scores).sum(-1, keepdim=True))
                total += (scores @ keys).sum(0)
        return total * scale, None, *(None for _ in coded)


def pieces(query: Tensor, coded: Sequence[Tensor | None]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The images of a layer, with their keys and values widened to the dtype of the query (H, M, head_dim)."""
    parts = [Coded(cast(Tensor, data), scales) for data, scales in (coded[:2], coded[2:])]
    images, _, tokens, _ = parts[0].data.shape
    size = query.element_size() * len(query) * tokens * query.shape[-1]
    step = max(1, _PIECE_BYTES[query.device.type == "cuda"] // size)
    for start in range(0, images, step):
        piece = slice(start, start + step)
        keys, values = (Coded(p.data[piece], None if p.scales is None else p.scales[piece]) for p in parts)
        yield piece, keys.widened(query.dtype), values.widened(query.dtype)
