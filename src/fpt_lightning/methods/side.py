"""The side network: a small ViT on the low-resolution image (paper, sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fpt_lightning.encoder.execution import use_fused_attention


class SideViT(nn.Module):
    """A pre-norm ViT whose block l also attends to the fused prompts of tapped layer l.

    The prompts are appended to the sequence for that block and removed after it, so that its length stays constant.
    Initialised with a truncated normal of std 0.02; no dropout inside.

    Args:
        width: d.
        heads: number of heads, the frozen encoder's.
        depth: number of blocks, one a tapped layer.
        patch_size: (height, width) in pixels, the frozen encoder's.
        resolution: (height, width) of the low-resolution image in pixels, a multiple of the patch size.
        outputs: of the linear head on the class token.
        gradient_checkpointing: whether the backward pass computes each block again, instead of keeping what is in it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        patch_size: tuple[int, int],
        resolution: tuple[int, int],
        outputs: int,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.patch_embed = PatchEmbed(img_size=resolution, patch_size=cast(Any, patch_size), embed_dim=width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio=4, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, outputs)
        use_fused_attention(self.blocks)  # which the explanation intercepts
        self.apply(_initialise)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, images: Tensor, prompts: Iterable[Tensor]) -> Tensor:
        """Classify.

        Args:
            images: (B, 3, height, width), normalised and augmented.
            prompts: one (B, M, d) for each block, asked for when the block runs.

        Returns:
            Logits (B, classes).
        """
        x = self.patch_embed(images)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        length = x.shape[1]
        for block, prompt in zip(self.blocks, prompts, strict=True):
            sequence = torch.cat([x, prompt.to(x.dtype)], 1)
            again = self.gradient_checkpointing and block is not self.blocks[-1]  # whose backward pass is the next
            if again and torch.is_grad_enabled():
                sequence = checkpoint(block, sequence, use_reentrant=False, preserve_rng_state=False)
            else:
                sequence = block(sequence)
            x = sequence[:, :length]
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
