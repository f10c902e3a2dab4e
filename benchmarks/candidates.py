"""Query tokens with one idea of the field added: what ``evidence.py`` tries beside the method's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpt_lightning.methods import QueryTokensModule
from fpt_lightning.methods.base import initialise_head

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


CANDIDATES: dict[str, type[QueryTokensModule]] = {
    "own_rate": PromptsAtOwnRate,
    "from_keys": PromptsFromKeys,
    "mixup": MixedPrompts,
    "layers_normalised": LayersNormalised,
    "with_pooled": WithPooledFeature,
}
"""By short name."""
