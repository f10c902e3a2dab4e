"""What a model looked at: selected tokens, the attention paid to and by the prompts, and a test of it by deletion.

Plain functions on tensors; letters as in ``fpt_lightning.encoder.selection``, S for the steps of a deletion. Paper,
sections 4.5 (Fig. 5) and 4.7 (Fig. 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import trapezoid
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fpt_lightning.encoder.config import EncoderShape
from fpt_lightning.encoder.execution import exporting
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.evaluation.estimates import Estimate
from fpt_lightning.evaluation.resampling import interval, resample
from fpt_lightning.methods import FPTPlusModule
from fpt_lightning.methods.base import as_stored
from fpt_lightning.methods.fusion import Fusion
from fpt_lightning.methods.side import SideViT
from fpt_lightning.store.codecs import Features, as_features

ORDERS = ("most attended first", "in random order", "least attended first")
"""In which tokens are deleted."""
FRACTIONS = tuple(step / 10 for step in range(11))
"""Shares of the selected tokens that are deleted, by default."""


class TokenMap(NamedTuple):
    """What tokens have, where they lie.

    Attributes:
        patches: (..., rows, columns), from the upper left; zero where no token was selected.
        prefix: (..., prefix tokens), of the class token and registers, which lie nowhere.
    """

    patches: Tensor
    prefix: Tensor


def on_grid(values: Tensor, indices: Tensor, shape: EncoderShape, resolution: tuple[int, int]) -> TokenMap:
    """Put what the selected tokens have where they lie.

    Args:
        values: (..., T).
        indices: of the tokens among the encoder's N, broadcastable to the values.
        shape: of the encoder.
        resolution: (height, width) in pixels of the images that it saw.

    Raises:
        ConfigurationError: tokens that the encoder does not have at this resolution.
    """
    tokens = shape.tokens(resolution)
    if not exporting() and not 0 <= int(indices.min()) <= int(indices.max()) < tokens:
        raise ConfigurationError(
            f"the indices go from {int(indices.min())} to {int(indices.max())}, but {shape.name} has {tokens} tokens "
            f"at {resolution[0]} x {resolution[1]} pixels: give the resolution that they were selected at."
        )
    spread = values.new_zeros(*values.shape[:-1], tokens)
    spread.scatter_add_(-1, indices.expand_as(values).long(), values)
    rows, columns = (side // patch for side, patch in zip(resolution, shape.patch_size, strict=True))
    prefix = shape.prefix_tokens
    return TokenMap(spread[..., prefix:].reshape(*values.shape[:-1], rows, columns), spread[..., :prefix])


def token_maps(indices: Tensor, shape: EncoderShape, resolution: tuple[int, int]) -> TokenMap:
    """Where the selected tokens lie, from their stored indices alone.

    Args:
        indices: (..., T), such as (L, H, T).
        shape: of the encoder.
        resolution: (height, width) in pixels of the images that it saw.

    Returns:
        1 where a head selected the token, 0 elsewhere, int64; summed over heads, how many selected it.

    Raises:
        ConfigurationError: see ``on_grid``.
    """
    return on_grid(torch.ones_like(indices, dtype=torch.long), indices, shape, resolution)


@torch.no_grad()
def prompt_attention(fusion: Fusion, features: Features) -> Tensor:
    """The attention that every prompt pays to the selected tokens (Fig. 9): (B, L, H, M, T), which sums to 1 over T."""
    layers = []
    for index, prompts in enumerate(fusion.prompts):
        queries = fusion.queries(prompts)
        keys = features.layer(index)[0].widened(queries.dtype)
        layers.append((queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(-1))
    return torch.stack(layers, 1)


def overlay(attention: Tensor, indices: Tensor, shape: EncoderShape, resolution: tuple[int, int]) -> TokenMap:
    """The prompts' attention by layer, averaged over prompts and heads, where it lies.

    Args:
        attention: (..., L, H, M, T).
        indices: (..., L, H, T).
        shape: of the encoder.
        resolution: (height, width) in pixels of the images that it saw.

    Returns:
        (..., L, rows, columns), which with the prefix tokens sums to 1 in each layer.

    Raises:
        ConfigurationError: see ``on_grid``.
    """
    found = on_grid(attention.mean(-2), indices, shape, resolution)
    return TokenMap(found.patches.mean(-3), found.prefix.mean(-2))


@torch.no_grad()
def side_attention(side: SideViT, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """The attention that the side network's n tokens pay to the prompts.

    It is computed once more from the queries and keys of each block's fused kernel, which gives no attention.

    Args:
        side: the network.
        images: (B, 3, height, width), as ``SideViT.forward`` takes them.
        prompts: one (B, M, d) for each block, likewise.

    Returns:
        (B, L, H, n, M), class token first. A token's attention to the prompts and to the n tokens sums to 1; summed
        over M and averaged over H and n, it is what Fig. 5 shows.
    """
    tap = _AttentionToLast(prompts[0].shape[1])
    with tap:
        side(images, prompts)
    return torch.stack(tap.found, 1)


class _AttentionToLast(TorchFunctionMode):
    """Keeps the attention that every attention's call pays from all tokens but the last to these last."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.found = count, list[Tensor]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            attention = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1)
            self.found.append(attention[:, :, : -self.count, -self.count :])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def deletion_curves(
    score: Callable[[Features], Tensor],
    features: Features,
    attention: Tensor,
    seeds: Sequence[int],
    draws: int = 5,
    fractions: Sequence[float] = FRACTIONS,
) -> dict[str, Tensor]:
    """How the score changes as selected tokens are taken out of the fusion's attention, in every layer and head.

    The attention of what is left sums to 1 again. Where all are taken out, nothing is attended: the fusion gives what
    it gives for values of zero, that is its prompts without tokens.

    Args:
        score: from features of B images, with fewer tokens or all, to (B,), such as the predicted class's probability.
        features: of B images, in any codec.
        attention: ``prompt_attention`` of them; tokens are ordered by its mean over the prompts.
        seeds: B, of each image's random orders.
        draws: how many random orders are averaged.
        fractions: S shares of the T tokens of every head to take out.

    Returns:
        Curves (B, S) by order: those of ``ORDERS``.
    """
    most = attention.mean(-2).argsort(-1, descending=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def random() -> Tensor:
        return torch.stack([torch.rand(most.shape[1:], generator=g) for g in generators]).argsort(-1).to(most.device)

    def curve(order: Tensor) -> Tensor:
        return torch.stack([score(without(features, order, share)) for share in fractions], 1)

    curves = curve(most), torch.stack([curve(random()) for _ in range(draws)]).mean(0), curve(most.flip(-1))
    return dict(zip(ORDERS, curves, strict=True))


class Looked(NamedTuple):
    """What a model looked at in B images.

    Attributes:
        prompts: ``prompt_attention``, (B, L, H, M, T).
        side: ``side_attention``, summed over the prompts and averaged over heads and tokens, (B, L).
        deletion: ``deletion_curves`` of the predicted class; None where there are none.
    """

    prompts: Tensor
    side: Tensor
    deletion: dict[str, Tensor] | None


@torch.no_grad()
def look(
    module: FPTPlusModule,
    batch: Mapping[str, Any],
    scores: Tensor,
    seeds: Sequence[int] | None = None,
    draws: int = 5,
    fractions: Sequence[float] = FRACTIONS,
) -> Looked:
    """What a model looked at.

    Args:
        module: FPT+ or FPT.
        batch: of B images, with ``features`` and ``side_images``.
        scores: that the module gave for them.
        seeds: see ``deletion_curves``; None leaves these out, which take tens of evaluations. A regression, which has
            no class, has none.
        draws: likewise.
        fractions: likewise.
    """
    batch = as_stored(batch, len(scores))
    features = as_features(batch)
    attention = prompt_attention(module.fusion, features)
    side = side_attention(module.side, batch["side_images"], module.fusion(features)).sum(-1).mean((2, 3))
    if seeds is None or module.task.KIND == "regression":
        return Looked(attention, side, None)
    predicted = scores.argmax(-1, keepdim=True)

    def score(features: Features) -> Tensor:
        changed = module.scores(module({**batch, **features._asdict()}).float())  # of this view alone
        return changed.gather(-1, predicted)[:, 0]

    return Looked(attention, side, deletion_curves(score, features, attention, seeds, draws, fractions))


def without(features: Features, order: Tensor, share: float) -> Features:
    """Features less the first tokens of every head.

    Args:
        features: of B images.
        order: (B, L, H, T), positions of the tokens, the first to go first.
        share: of the T tokens to take out, rounded to whole ones.

    Returns:
        The features themselves where none is taken out; one token of zeros a head, to which attention gives zeros,
        where all are.
    """
    tokens = order.shape[-1]
    removed = round(share * tokens)
    if removed == 0:
        return features
    if removed < tokens:
        return features.take(order[..., removed:])
    return Features(torch.zeros(len(order), 2, *order.shape[1:3], 1, features.head_dim, device=order.device))


def area_between(
    upper: NDArray[np.float64], lower: NDArray[np.float64], fractions: Sequence[float] = FRACTIONS
) -> NDArray[np.float64]:
    """The area between curves (N, S) of a deletion, over the share deleted from 0 to 1: (N,), in the score's unit."""
    return np.asarray(trapezoid(upper - lower, fractions, axis=-1))


def mean_with_interval(
    values: NDArray[np.float64], groups: Sequence[str], resamples: int = 2000, seed: int = 0
) -> list[Estimate]:
    """Means over N images, with 95% intervals of a bootstrap that draws whole groups.

    Args:
        values: (N, K).
        groups: N, such as patients; images that belong to none are their own.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        K means; of a single group, there is no interval.
    """
    weights = resample(groups, resamples, seed)
    resampled = weights @ values / weights.sum(1, keepdims=True)
    alone = len(set(groups)) < 2
    found = []
    for mean, column in zip(values.mean(0), resampled.T, strict=True):
        ends = interval(column)
        low, high = (math.nan, math.nan) if alone else (ends["low"], ends["high"])
        found.append(Estimate(float(mean), low, high))
    return found
