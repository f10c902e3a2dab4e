"""What else learns from the stored features alone, without a side network: peers of FPT+ that are smaller still."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fpt_lightning.errors import ConfigurationError
from fpt_lightning.methods.base import initialise_head
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.fusion import FineGrainedFusion, PromptHead, cross_attention


class StoredLinearProbingModule(FeatureModule):
    """A linear head on the stored pooled feature, normalised: the class token, or the mean of the patches.

    Args:
        num_classes: number of classes.
        learning_rate: the highest; other methods' would leave the head half learned.
        **kwargs: see ``FeatureModule`` and ``ClassificationModule``.
    """

    LABEL = "Linear probing, stored"
    INPUTS: ClassVar[frozenset[str]] = frozenset({"pooled"})

    def __init__(self, num_classes: int | None = None, learning_rate: float = 1e-2, **kwargs: Any) -> None:
        super().__init__(num_classes, learning_rate=learning_rate, **kwargs)
        width = self.encoder_shape.width
        self.norm = nn.LayerNorm(width, elementwise_affine=False)  # the head's weights would repeat an affine one
        self.head = initialise_head(nn.Linear(width, self.task.outputs))

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, classes) of ``pooled`` (stored) or ``images`` (encoded now)."""
        logits: Tensor = self.head(self.norm(self.pooled(batch)))
        return logits


class AttentiveProbingModule(FeatureModule):
    """Efficient probing (Psomas et al., 2026, arXiv:2506.10178) of the last tapped layer's stored tokens.

    Learnable queries attend to the tokens; each gathers its own channels of the values, so that together they give one
    feature of width D. Neither keys nor values are projected: they are the encoder's own, head by head.

    Args:
        num_classes: number of classes.
        queries: of each head, each for ``head_dim / queries`` channels.
        learning_rate: the highest; other methods' would leave the queries half learned.
        **kwargs: see ``FeatureModule`` and ``ClassificationModule``.

    Raises:
        ConfigurationError: ``queries`` does not divide the width of a head.
    """

    LABEL = "Attentive probing, stored"
    ARCHITECTURE: ClassVar[tuple[str, ...]] = (*FeatureModule.ARCHITECTURE, "queries")

    def __init__(
        self, num_classes: int | None = None, queries: int = 4, learning_rate: float = 1e-2, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, learning_rate=learning_rate, **kwargs)
        shape = self.encoder_shape
        if queries < 1 or shape.head_dim % queries:
            raise ConfigurationError(
                f"queries is {queries}: give a divisor of the {shape.head_dim} channels of a head."
            )
        self.queries = nn.Parameter(torch.empty(shape.heads, queries, shape.head_dim))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.norm = nn.LayerNorm(shape.width, elementwise_affine=False)
        self.head = initialise_head(nn.Linear(shape.width, self.task.outputs))

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, classes) of ``features`` (stored) or ``images`` (encoded now)."""
        attended = cross_attention(self.queries, *self.features(batch).layer(-1))  # (B, queries, D)
        heads, queries = self.queries.shape[:2]
        parts = attended.view(*attended.shape[:2], heads, queries, -1)  # (B, queries, H, queries, channels)
        gathered = parts.diagonal(dim1=1, dim2=3)  # (B, H, channels, queries)
        logits: Tensor = self.head(self.norm(gathered.transpose(-1, -2).flatten(1)))
        return logits


class QueryTokensModule(FeatureModule):
    """Query tokens on every tapped layer (VQT; Tu et al., 2023, arXiv:2212.03220): FPT+ minus its side ViT.

    The fused prompts of all layers, side by side, go straight into a linear head.

    Args:
        num_classes: number of classes.
        reduction: the fused prompts' width is the encoder's divided by this.
        prompts: query tokens of a layer.
        dropout: after the shared out-projector.
        **kwargs: see ``FeatureModule`` and ``ClassificationModule``.

    Raises:
        ConfigurationError: ``reduction`` does not divide the encoder's width.
    """

    LABEL = "Query tokens, stored"
    ARCHITECTURE: ClassVar[tuple[str, ...]] = (*FeatureModule.ARCHITECTURE, "reduction", "prompts")

    def __init__(
        self, num_classes: int | None = None, reduction: int = 8, prompts: int = 16, dropout: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, **kwargs)
        shape, depth = self.encoder_shape, len(self.encoder_config.tapped_layers)
        if reduction < 1 or shape.width % reduction:
            raise ConfigurationError(f"reduction is {reduction}: give a divisor of the encoder's width {shape.width}.")
        width = shape.width // reduction
        self.fusion = FineGrainedFusion(depth, shape.heads, shape.width, width, prompts, dropout)
        self.head = PromptHead(depth, prompts, width, self.task.outputs)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, classes) of ``features`` (stored) or ``images`` (encoded now)."""
        logits: Tensor = self.head(self.fusion(self.features(batch)))
        return logits
