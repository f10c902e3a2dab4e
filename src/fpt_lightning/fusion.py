"""Fine-grained prompts and the fusion module (paper, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpt_lightning.errors import ConfigurationError


class FineGrainedFusion(nn.Module):
    """FPT+: prompts at the encoder's width ask the stored keys and values, one set a tapped layer.

    ``fused_l = Dropout(out(attention(LayerNorm(P_l), K_l, V_l) + P_l))`` with one LayerNorm and one out-projector
    shared by all layers, and no projection of queries.

    Args:
        layers: L.
        heads: H, the frozen encoder's.
        width: D.
        side_width: d.
        prompts: M.
        dropout: probability after the out-projector.
    """

    def __init__(
        self, layers: int, heads: int, width: int, side_width: int, prompts: int = 16, dropout: float = 0.5
    ) -> None:
        super().__init__()
        if prompts < 1:
            raise ConfigurationError(f"prompts is {prompts}: FPT+ needs at least 1.")
        self.heads = heads
        self.prompts = nn.Parameter(torch.randn(layers, prompts, width) * 1e-6)
        self.norm = nn.LayerNorm(width, eps=1e-5)
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
        return [self._fuse(layer, features[:, 0, layer], features[:, 1, layer]) for layer in range(len(self.prompts))]

    def _fuse(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        prompts = self.prompts[layer]
        query = self.norm(prompts).unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (H, M, head_dim)
        query = query.expand(keys.shape[0], -1, -1, -1)
        attended = F.scaled_dot_product_attention(query, keys.to(query.dtype), values.to(query.dtype))
        summary = attended.transpose(1, 2).flatten(-2) + prompts
        fused: Tensor = self.dropout(self.out(summary))
        return fused
