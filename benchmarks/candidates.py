"""Methods with one idea of the field added: what ``evidence.py`` tries beside the methods' own settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpt_lightning.encoder.frozen import build_encoder
from fpt_lightning.methods import FPTPlusModule, QueryTokensModule
from fpt_lightning.methods.base import initialise_head
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.side import SideViT

KEYS, ROUNDS = 2048, 20


class PromptsAtOwnRate(QueryTokensModule):
    """Prompts that learn ten times as fast as the rest: they start near zero."""

    LABEL = "prompts at ten times the learning rate"

    def configure_optimizers(self) -> Any:
        """As for every method, but in two groups."""
        found = super().configure_optimizers()
        shared, schedule = found["optimizer"].defaults, found["lr_scheduler"]["scheduler"]
        rest = [each for each in self.parameters() if each is not self.fusion.prompts]
        prompts = {"params": [self.fusion.prompts], "lr": 10 * self.learning_rate}
        groups: list[dict[str, Any]] = [prompts, {"params": rest}]
        optimizer = torch.optim.AdamW(
            groups, lr=self.learning_rate, betas=shared["betas"], weight_decay=shared["weight_decay"]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.lr_lambdas * 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PromptsFromKeys(QueryTokensModule):
    """Prompts that start as centres of the training images' keys, by k-means in each head."""

    LABEL = "prompts that start as k-means centres of the keys"

    def on_train_start(self) -> None:
        """See the class; a run that goes on has its prompts."""
        super().on_train_start()
        if self.trainer.ckpt_path is not None:
            return
        loader = self.trainer.train_dataloader
        assert loader is not None
        features, prompts = self.features(next(iter(loader))), self.fusion.prompts
        for layer in range(len(prompts)):
            keys = features.layer(layer)[0].widened(prompts.dtype).transpose(0, 1).flatten(1, 2)  # (H, B * T, channels)
            prompts.data[layer] = torch.cat([centres(head, prompts.shape[1]) for head in keys], -1)


def centres(points: Tensor, count: int) -> Tensor:
    """(count, channels) by k-means of up to ``KEYS`` of the points (N, channels)."""
    points = points[torch.randperm(len(points))[:KEYS]]
    found = points[:count].clone()
    for _ in range(ROUNDS):
        own = torch.cdist(points, found).argmin(1)
        for centre in sorted({*own.tolist()}):
            found[centre] = points[own == centre].mean(0)
    return found


class MixedPrompts(QueryTokensModule):
    """Mixup (arXiv:1710.09412) of the fused prompts of two images and of their losses, Beta(0.4, 0.4)."""

    LABEL = "mixup of the fused prompts"

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """See the class."""
        share = float(torch.distributions.Beta(0.4, 0.4).sample())
        other, labels = torch.randperm(len(batch["labels"])), batch["labels"]
        fused = [share * each + (1 - share) * each[other] for each in self.fusion(self.features(batch))]
        logits = self.head(fused).float()
        return share * self.task.loss(logits, labels) + (1 - share) * self.task.loss(logits, labels[other])


class LayersNormalised(QueryTokensModule):
    """A LayerNorm of each layer's fused prompts before the head, which normalises all together."""

    LABEL = "a LayerNorm of each layer's fused prompts"

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, classes)."""
        fused = self.fusion(self.features(batch))
        logits: Tensor = self.head([F.layer_norm(each, each.shape[1:]) for each in fused])
        return logits


class WithPooledFeature(QueryTokensModule):
    """With the logits of a linear probe on the stored pooled feature added."""

    LABEL = "with a linear probe's logits of the pooled feature"
    INPUTS: ClassVar[frozenset[str]] = frozenset({"features", "pooled"})

    def __init__(self, num_classes: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.pooled_head = initialise_head(nn.Linear(self.encoder_shape.width, self.task.outputs))

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, classes)."""
        pooled = self.pooled(batch)
        logits: Tensor = super().forward(batch) + self.pooled_head(F.layer_norm(pooled, pooled.shape[1:]))
        return logits


class SideFromEncoder(FPTPlusModule):
    """FPT+ whose side network starts as blocks of the encoder, pruned to its width, as in ladder side-tuning.

    Of the residual stream, of each head and of each MLP the channels with the largest weights are kept
    (arXiv:2206.06522).
    """

    LABEL = "a side network that starts from the encoder's blocks, pruned"

    def on_train_start(self) -> None:
        """See the class; a run that goes on has its weights."""
        super().on_train_start()
        if self.trainer.ckpt_path is None:
            side = self.side_resolution
            assert side is not None
            start_from(self.side, build_encoder(self.encoder_config, (side, side)))


@torch.no_grad()
def start_from(side: SideViT, encoder: Any) -> None:
    """Start the side network's blocks as every n-th of the encoder's, the last one included, all pruned.

    Args:
        side: of the encoder's heads and patches.
        encoder: timm's, at the side network's resolution.
    """
    every = len(encoder.blocks) // len(side.blocks)
    blocks = list(encoder.blocks)[every - 1 :: every]
    written = [_scaled(part, scale) for block in blocks for part, scale in _writers(block)]
    kept = strongest(torch.stack([weight.abs().sum(1) for weight in written]).sum(0), side.norm.weight.numel())
    embed: Any = side.patch_embed.proj
    embed.weight.copy_(encoder.patch_embed.proj.weight[kept])
    embed.bias.copy_(encoder.patch_embed.proj.bias[kept])
    side.class_token.copy_(encoder.cls_token[..., kept])
    side.positions.copy_(encoder.pos_embed[..., kept])
    _copy_norm(side.norm, encoder.norm, kept)
    for block, source in zip(side.blocks, blocks, strict=True):
        _prune(block, source, kept)


def strongest(sizes: Tensor, count: int) -> Tensor:
    """Places of the largest, ascending."""
    return sizes.topk(count).indices.sort().values


def _writers(block: Any) -> list[tuple[nn.Linear, nn.Module]]:
    """The linear layers that write to the residual stream, and the scales of what they write."""
    return [(block.attn.proj, block.ls1), (block.mlp.fc2, block.ls2)]


def _scaled(layer: nn.Linear, scale: Any) -> Tensor:
    """The layer's weight and the bias beside it, with the scale of its outputs (DINOv2) folded in."""
    both = _with_bias(layer)
    return both if isinstance(scale, nn.Identity) else both * scale.gamma[:, None]


def _copy_norm(norm: nn.LayerNorm, source: nn.LayerNorm, kept: Tensor) -> None:
    norm.weight.copy_(source.weight[kept])
    norm.bias.copy_(source.bias[kept])


def _prune(block: Any, source: Any, kept: Tensor) -> None:
    _copy_norm(block.norm1, source.norm1, kept)
    _copy_norm(block.norm2, source.norm2, kept)
    (written, hidden), heads = (_scaled(*each)[kept] for each in _writers(source)), source.attn.num_heads
    read = _with_bias(source.attn.qkv)[:, [*kept, -1]]
    query, key, value = read.view(3, heads, -1, read.shape[1])  # each (heads, channels, kept and the bias)
    out = written[:, :-1].reshape(len(kept), heads, -1).permute(1, 2, 0)  # (heads, channels, kept)
    few = block.attn.head_dim
    matched = _strongest_of_heads(query.abs().sum(-1) * key.abs().sum(-1), few)
    passed = _strongest_of_heads(value.abs().sum(-1) * out.abs().sum(-1), few)
    scale = (few / source.attn.head_dim) ** 0.5  # softmax of products with fewer channels
    chosen = ((query * scale, matched), (key, matched), (value, passed))
    _fill(block.attn.qkv, torch.cat([each.take_along_dim(places, 1) for each, places in chosen]).flatten(0, 1))
    out = out.take_along_dim(passed, 1).flatten(0, 1).T
    _fill(block.attn.proj, torch.cat([out, written[:, -1:]], 1))
    first = _with_bias(source.mlp.fc1)[:, [*kept, -1]]
    some = strongest(first.abs().sum(1) * hidden[:, :-1].abs().sum(0), block.mlp.fc1.out_features)
    _fill(block.mlp.fc1, first[some])
    _fill(block.mlp.fc2, torch.cat([hidden[:, some], hidden[:, -1:]], 1))


def _with_bias(layer: nn.Linear) -> Tensor:
    """The layer's weight, with its bias as the last column."""
    return torch.cat([layer.weight, layer.bias[:, None]], 1)


def _strongest_of_heads(sizes: Tensor, count: int) -> Tensor:
    """Places of the channels (heads, channels) with the largest sizes, to take along them."""
    return torch.stack([strongest(head, count) for head in sizes])[..., None]


def _fill(layer: nn.Linear, both: Tensor) -> None:
    layer.weight.copy_(both[:, :-1])
    layer.bias.copy_(both[:, -1])


CANDIDATES: dict[str, type[FeatureModule]] = {
    "own_rate": PromptsAtOwnRate,
    "from_keys": PromptsFromKeys,
    "mixup": MixedPrompts,
    "layers_normalised": LayersNormalised,
    "with_pooled": WithPooledFeature,
    "side_from_encoder": SideFromEncoder,
}
"""By short name."""
