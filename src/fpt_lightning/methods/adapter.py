"""Adapters (AdaptFormer; Chen et al., 2022): a bottleneck beside the MLP of every block."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fpt_lightning.errors import ConfigurationError
from fpt_lightning.methods.tuning import EncoderTuningModule


class AdapterModule(EncoderTuningModule):
    """A learnable bottleneck beside each block's MLP, on the same normalised input.

    Args:
        num_classes: number of classes.
        reduction: the bottleneck's width is the encoder's divided by this (96 for ViT-B).
        scale: of the bottleneck's output.
        **kwargs: see ``EncoderTuningModule`` and ``ClassificationModule``.
    """

    LABEL = "Adapter"
    ARCHITECTURE: ClassVar[tuple[str, ...]] = (*EncoderTuningModule.ARCHITECTURE, "reduction", "scale")

    def __init__(self, num_classes: int | None = None, reduction: int = 8, scale: float = 0.1, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.bottleneck = self.encoder_shape.width // reduction if reduction > 0 else 0
        if self.bottleneck == 0:
            raise ConfigurationError(f"reduction is {reduction}: give 1 to {self.encoder_shape.width}.")
        self.scale = scale

    def adapt(self, vit: Any) -> None:
        """Put a bottleneck beside every MLP."""
        for block in vit.blocks:
            block.mlp = AdaptedMLP(block.mlp, self.encoder_shape.width, self.bottleneck, self.scale)


class AdaptedMLP(nn.Module):
    """``mlp(x) + scale * up(relu(down(x)))``; starts as the MLP alone.

    Args:
        mlp: the block's own.
        width: D.
        bottleneck: width between ``down`` and ``up``.
        scale: fixed.
    """

    def __init__(self, mlp: nn.Module, width: int, bottleneck: int, scale: float) -> None:
        super().__init__()
        self.mlp, self.scale = mlp, scale
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for constant in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(constant)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) from (B, N, D)."""
        adapted: Tensor = self.mlp(x) + self.scale * self.up(torch.relu(self.down(x)))
        return adapted
