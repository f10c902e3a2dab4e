"""Visual prompt tuning, VPT-deep (Jia et al., 2022): learnable tokens ahead of every block."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fpt_lightning.encoder.execution import exporting
from fpt_lightning.errors import ConfigurationError, EncoderError
from fpt_lightning.methods.tuning import EncoderTuningModule


class PromptTuningModule(EncoderTuningModule):
    """VPT-deep: M learnable tokens join the sequence of every block, and are replaced by the next block's own.

    As a deep prompt leaves the sequence after its block, all that others see of it are its keys and values; only these
    are computed, once for a batch. The result is that of the full sequence, for any position embedding.

    Args:
        num_classes: number of classes.
        prompts: M, tokens for each block (paper: 16).
        **kwargs: see ``EncoderTuningModule`` and ``ClassificationModule``.
    """

    LABEL = "Prompt tuning"
    ARCHITECTURE: ClassVar[tuple[str, ...]] = (*EncoderTuningModule.ARCHITECTURE, "prompts")

    def __init__(self, num_classes: int | None = None, prompts: int = 16, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        if prompts < 1:
            raise ConfigurationError(f"prompts is {prompts}: give at least 1.")
        self.prompts = prompts

    def adapt(self, vit: Any) -> None:
        """Give every attention its prompts."""
        shape = self.encoder_shape
        bound = math.sqrt(6 / (3 * math.prod(shape.patch_size) + shape.width))  # Jia et al.: as for a patch embedding
        for block in vit.blocks:
            prompts = torch.empty(self.prompts, shape.width).uniform_(-bound, bound)
            block.attn = PromptedAttention(block.attn, _norm_before(block), prompts)


class PromptedAttention(nn.Module):
    """A block's self-attention over its tokens and over prompts that have no output.

    Args:
        attention: timm's, which calls ``scaled_dot_product_attention``.
        norm: what the block applies ahead of its attention.
        prompts: initial (M, D).
    """

    def __init__(self, attention: nn.Module, norm: nn.Module, prompts: Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.prompts = nn.Parameter(prompts)
        self._norm = (norm,)  # the block's own: no submodule of this one

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N, D) from (B, N, D)."""
        with _KeysAndValues() as projected, contextlib.suppress(_Projected):
            self.attention(self._norm[0](self.prompts)[None])
        with _MoreTokens(*projected.taken):
            output: Tensor = self.attention(x, *args, **kwargs)
        return output


def _norm_before(block: Any) -> nn.Module:
    """The norm between the sequence and the attention; timm's post-norm blocks have none there."""
    norm = block.norm1
    return nn.Identity() if "Post" in type(block).__name__ or not isinstance(norm, nn.Module) else norm


class _Projected(Exception):  # noqa: N818 - a signal, not an error
    """The keys and values are known: the rest of the attention is not needed."""


class _KeysAndValues(TorchFunctionMode):
    """Takes the keys and values of an attention's call, (1, H, M, head_dim) each, and ends it there."""

    taken: tuple[Tensor, Tensor]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.taken = args[1], args[2]
            if not exporting():  # the graph of an export leaves out by itself what nothing needs
                raise _Projected
        return func(*args, **(kwargs or {}))


class _MoreTokens(TorchFunctionMode):
    """Adds keys and values to those of an attention's call, without position bias."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value, *rest = args
        key = torch.cat([self.keys.expand(key.shape[0], -1, -1, -1), key], 2)
        value = torch.cat([self.values.expand(value.shape[0], -1, -1, -1), value], 2)
        bias = kwargs.get("attn_mask")
        if rest or (bias is not None and bias.dtype == torch.bool):
            raise EncoderError("this attention's mask leaves no place for prompts.")
        if bias is not None:
            kwargs["attn_mask"] = F.pad(bias, (self.keys.shape[2], 0))
        return func(query, key, value, **kwargs)
