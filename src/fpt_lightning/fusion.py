"""Fine-grained prompts and the fusion module (paper, section 3.4)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpt_lightning.errors import ConfigurationError


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

    def forward(self, features: Tensor) -> list[Tensor]:
        """Summarise the selected tokens of every tapped layer.

        Args:
            features: keys and values (B, 2, L, H, T, head_dim) in any floating dtype; a narrow one is widened one
                layer at a time.

        Returns:
            L tensors (B, M, d), one for each block of the side network.
        """
        return [self.fuse(prompts, features[:, 0, i], features[:, 1, i]) for i, prompts in enumerate(self.prompts)]

    @abstractmethod
    def fuse(self, prompts: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(B, M, d) from one layer's prompts and its keys and values (B, H, T, head_dim)."""


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

    def fuse(self, prompts: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See ``Fusion.fuse``."""
        summary = cross_attention(self.norm(prompts), keys, values, self.heads)
        fused: Tensor = self.dropout(self.out(summary + prompts))
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

    def fuse(self, prompts: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See ``Fusion.fuse``."""
        summary = cross_attention(self.query(prompts), keys, values, self.heads)
        fused: Tensor = self.dropout(self.out(summary) + prompts)
        return fused


def cross_attention(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Ask every image's tokens the same queries, head by head; keys and values are not projected.

    Args:
        queries: (M, D).
        keys: (B, H, T, head_dim), any floating dtype.
        values: (B, H, T, head_dim), any floating dtype.
        heads: H.

    Returns:
        (B, M, D), in the queries' dtype.
    """
    query = queries.view(len(queries), heads, -1).transpose(0, 1)  # (H, M, head_dim)
    query = query.expand(keys.shape[0], -1, -1, -1)
    attended = F.scaled_dot_product_attention(query, keys.to(query.dtype), values.to(query.dtype))
    return attended.transpose(1, 2).flatten(-2)
