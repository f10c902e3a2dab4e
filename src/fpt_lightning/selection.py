"""Which tokens matter: attention column means and the top tokens of every head (paper, section 3.5).

Letters used throughout the package: B images, L tapped layers, H heads, N tokens, T selected tokens,
M prompts, D encoder width, d side width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fpt_lightning.errors import ConfigurationError

Criterion = Literal["global", "class_token"]
CRITERIA: tuple[str, ...] = get_args(Criterion)

_MAP_BYTES = 16 * 2**20  # the largest piece of an attention map that is held at once


def number_of_tokens(tokens: int, token_ratio: float) -> int:
    """T = int(N * token_ratio), at least 1.

    Args:
        tokens: N, prefix tokens included.
        token_ratio: share of the tokens to keep, in (0, 1].

    Raises:
        ConfigurationError: ``token_ratio`` is outside (0, 1].
    """
    if not 0 < token_ratio <= 1:
        raise ConfigurationError(f"token_ratio is {token_ratio}: give a share in (0, 1], such as 0.2.")
    return max(1, int(tokens * token_ratio))


def attention_with_importance(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention together with the ``global`` importance of its tokens, without ever holding a whole N x N map.

    The importance of token j in head h is the mean over all queries i of ``softmax(q_i . k_j * scale + bias)``: the
    column mean of the attention map. A few rows of one image's map exist at a time.

    Args:
        query: (B, H, N, head_dim).
        key: (B, H, N, head_dim).
        value: (B, H, N, head_dim).
        bias: added to the scores, broadcastable to (B, H, N, N); a boolean one keeps where True.
        scale: factor on the scores; ``1 / sqrt(head_dim)`` by default.

    Returns:
        The attention's output (B, H, N, head_dim) and the importance (B, H, N), fp32.
    """
    batch, heads, tokens, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, float("-inf"))
        bias = bias.expand(batch, heads, tokens, tokens)
    rows = max(1, _MAP_BYTES // (4 * heads * tokens))
    output = torch.empty_like(value)
    importance = torch.zeros(batch, heads, tokens, dtype=torch.float32, device=query.device)
    for image in range(batch):
        transposed = key[image].transpose(-1, -2)
        for start in range(0, tokens, rows):
            stop = min(start + rows, tokens)
            scores = (query[image, :, start:stop] * scale) @ transposed
            if bias is not None:
                scores = scores + bias[image, :, start:stop]
            attention = scores.softmax(-1, dtype=torch.float32)
            importance[image] += attention.sum(-2)
            output[image, :, start:stop] = attention.to(value.dtype) @ value[image]
    return output, importance / tokens


def class_token_importance(
    query: Tensor, key: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The attention that the class token (token 0) pays to every token.

    Args:
        query: (B, H, N, head_dim).
        key: (B, H, N, head_dim).
        bias: added to the scores, broadcastable to (B, H, N, N); a boolean one keeps where True.
        scale: factor on the scores; ``1 / sqrt(head_dim)`` by default.

    Returns:
        The importance (B, H, N), fp32.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = ((query[:, :, :1] * scale) @ key.transpose(-1, -2)).float()
    if bias is not None:
        row = bias.expand(*bias.shape[:-2], query.shape[-2], key.shape[-2])[..., :1, :]
        scores = scores.masked_fill(~row, float("-inf")) if row.dtype == torch.bool else scores + row
    return F.softmax(scores, -1)[:, :, 0]


def select_tokens(key: Tensor, value: Tensor, importance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Keep each head's ``count`` most important tokens.

    Args:
        key: (B, H, N, head_dim).
        value: (B, H, N, head_dim).
        importance: (B, H, N).
        count: T.

    Returns:
        Keys and values (B, 2, H, T, head_dim) and their indices (B, H, T), int64, most important first.
    """
    indices = importance.topk(count, dim=-1).indices
    positions = indices[..., None].expand(*indices.shape, key.shape[-1])
    return torch.stack([key.gather(2, positions), value.gather(2, positions)], 1), indices
