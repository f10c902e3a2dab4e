"""Which tokens matter: attention column means and the top tokens of every head (paper, section 3.5).

Letters used throughout the package: B images, L tapped layers, H heads, N tokens, T selected tokens,
M prompts, D encoder width, d side width.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fpt_lightning.encoder.execution import autocast, exporting, sketching, to_do
from fpt_lightning.errors import ConfigurationError

Criterion = Literal["global", "class_token"]
CRITERIA: tuple[str, ...] = get_args(Criterion)

_MAP_BYTES = 8 * 2**20  # the largest piece of the attention maps that is held at once: what a CPU's caches hold,
_GPU_MAP_BYTES = 256 * 2**20  # and what keeps a GPU busy


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
    column mean of the attention map. A piece of one image's maps exists at a time, some heads or some rows of one head.
    All of it is computed in fp32, whatever autocast says.

    Args:
        query: (B, H, N, head_dim).
        key: (B, H, N, head_dim).
        value: (B, H, N, head_dim).
        bias: added to the scores, broadcastable to (B, H, N, N); a boolean one keeps where True.
        scale: factor on the scores; ``1 / sqrt(head_dim)`` by default.

    Returns:
        The attention's output (B, H, N, head_dim) and the importance (B, H, N), fp32.
    """
    if exporting():
        return _attention_in_one_piece(query, key, value, bias, scale)
    batch, heads, tokens, head_dim = query.shape
    scores_query = query.float() * (head_dim**-0.5 if scale is None else scale)
    bias = None if bias is None else bias.expand(batch, heads, tokens, tokens)
    output = value.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)  # as fused attention lays it out
    importance = torch.zeros(batch, heads, tokens, device=query.device)
    some_heads, rows = piece_of_maps(heads, tokens, sketching() or query.device)
    memory = torch.empty(some_heads * rows * tokens, device=query.device)
    with autocast(query.device, None):
        for image, some in to_do(product(range(batch), parts(heads, some_heads))):
            own = image, some
            keys, values = key[own].float().transpose(1, 2), value[own].float()
            for some_rows in to_do(parts(tokens, rows)):
                piece = *own, some_rows
                queries = scores_query[piece]
                attention = memory[: queries.shape[:2].numel() * tokens].view(*queries.shape[:2], tokens)
                torch.bmm(queries, keys, out=attention)
                if bias is not None and bias.dtype == torch.bool:
                    attention.masked_fill_(~bias[piece], float("-inf"))
                elif bias is not None:
                    attention += bias[piece]
                torch.softmax(attention, -1, out=attention)
                importance[own] += attention.sum(1)
                output[piece] = attention @ values
    return output, importance / tokens


def _attention_in_one_piece(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """``attention_with_importance`` by whole maps (B, H, N, N)."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
    attention = scores.softmax(-1)
    return attention @ value, attention.mean(-2)


def parts(count: int, size: int) -> list[slice]:
    """The slices of ``size`` (the last may be shorter) that make up ``count``."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def piece_of_maps(heads: int, tokens: int, device: torch.device) -> tuple[int, int]:
    """How many heads and rows of an image's attention maps (H, N, N) make a piece: whole maps, or a part of one."""
    limit, one_map = _MAP_BYTES if device.type == "cpu" else _GPU_MAP_BYTES, 4 * tokens**2
    if one_map <= limit:
        return min(heads, limit // one_map), tokens
    return 1, max(1, math.ceil(tokens / math.ceil(one_map / limit)))


def class_token_importance(
    query: Tensor, key: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The attention that the class token (token 0) pays to every token, in fp32 whatever autocast says.

    Args:
        query: (B, H, N, head_dim).
        key: (B, H, N, head_dim).
        bias: added to the scores, broadcastable to (B, H, N, N); a boolean one keeps where True.
        scale: factor on the scores; ``1 / sqrt(head_dim)`` by default.

    Returns:
        The importance (B, H, N), fp32.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with autocast(query.device, None):
        scores = (query[:, :, :1].float() * scale) @ key.float().transpose(-1, -2)
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
