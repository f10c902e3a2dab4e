"""What FPT+ is built up from, one component at a time (paper, Fig. 7): the two steps that are no setting of FPT+."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fpt_lightning import FPTPlusModule
from fpt_lightning.encoder.frozen import Encoded


class SideNetworkAlone(FPTPlusModule):
    """The same side ViT with no prompts in its sequence, and no encoder.

    Args:
        num_classes: number of classes.
        prompt_head: there is none, as published.
        **kwargs: see ``FPTPlusModule``; what concerns prompts and stored tokens is not used.
    """

    INPUTS: ClassVar[frozenset[str]] = frozenset({"side_images"})

    def __init__(self, num_classes: int, prompt_head: bool = False, **kwargs: Any) -> None:
        super().__init__(num_classes, prompt_head=prompt_head, **kwargs)
        del self.fusion

    @property
    def frozen_parameters(self) -> int:
        """None: there is no encoder."""
        return 0

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, classes) of ``side_images``."""
        images: Tensor = batch["side_images"]
        none = images.new_zeros(len(images), 0, self.side.norm.normalized_shape[0])
        logits: Tensor = self.side(images, [none] * len(self.side.blocks))
        return logits


class MLPTransfer(FPTPlusModule):
    """The same side ViT, to whose tokens an MLP adds what the encoder holds at the same place, layer by layer.

    It takes the values of all tokens, so the side network's images must have the encoder's resolution. The MLP
    (D -> d -> d) is shared by all layers. Registers are left out; an encoder without class token adds nothing to the
    side network's.

    Args:
        num_classes: number of classes.
        prompt_head: there is none, as published.
        **kwargs: see ``FPTPlusModule``; ``token_ratio`` must be 1, ``prompts`` and ``dropout`` are not used.
    """

    def __init__(self, num_classes: int, prompt_head: bool = False, **kwargs: Any) -> None:
        super().__init__(num_classes, prompt_head=prompt_head, **kwargs)
        del self.fusion
        width = self.side.norm.normalized_shape[0]
        self.transfer = nn.Sequential(nn.Linear(self.encoder_shape.width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, classes) of ``side_images`` and ``images`` (encoded now)."""
        added = self.transfer(self._aligned(values_in_order(self.encode(batch["images"]))))  # (B, L, 1 + patches, d)
        x = self.side.patch_embed(batch["side_images"])
        x = torch.cat([self.side.class_token.expand(len(x), -1, -1), x], 1) + self.side.positions
        for block, tokens in zip(self.side.blocks, added.unbind(1), strict=True):
            x = block(x + tokens)
        logits: Tensor = self.side.head(self.side.norm(x)[:, 0])
        return logits

    def _aligned(self, values: Tensor) -> Tensor:
        """(B, L, 1 + patches, D), as the side network's tokens are, from (B, L, N, D)."""
        first = values[:, :, :1] if self.encoder_shape.class_token else torch.zeros_like(values[:, :, :1])
        return torch.cat([first, values[:, :, self.encoder_shape.prefix_tokens :]], 2)


def values_in_order(encoded: Encoded) -> Tensor:
    """The values (B, L, N, D) of all tokens in their own order, heads side by side; ``token_ratio`` must be 1."""
    values = encoded.features[:, 1]  # (B, L, H, N, head_dim)
    places = encoded.indices[..., None].expand_as(values)
    return torch.zeros_like(values).scatter_(3, places, values).transpose(2, 3).flatten(3)
