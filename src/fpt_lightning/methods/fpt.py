"""FPT+: fine-grained prompt tuning plus (paper, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fpt_lightning.encoder import EncoderConfig, check_resolution
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.fusion import FineGrainedFusion
from fpt_lightning.methods.base import ClassificationModule
from fpt_lightning.selection import Criterion
from fpt_lightning.side import SideViT


class FPTPlusModule(ClassificationModule):
    """A side ViT that learns from low-resolution images and from prompts that ask a frozen encoder's tokens.

    A batch with stored ``features`` never touches the encoder; one with ``images`` runs it, without gradient.

    Args:
        num_classes: number of classes.
        layers: tapped blocks of the encoder, counted from 0; the upper half by default (paper, section 4.5).
        token_ratio: share of the tokens kept in every head (paper, section 3.5).
        criterion: of a token's importance: ``global`` (the paper's) or ``class_token``.
        side_resolution: side of the low-resolution images in pixels (paper, section 3.3).
        reduction: the side network's width is the encoder's divided by this.
        prompts: number of fine-grained prompts of a layer (paper, section 3.4).
        dropout: after the shared out-projector.
        **kwargs: see ``ClassificationModule``.

    Raises:
        ConfigurationError: values that cannot work together.
        EncoderError: ``encoder`` is not a plain ViT of timm.
    """

    ARCHITECTURE: ClassVar[tuple[str, ...]] = (
        *ClassificationModule.ARCHITECTURE,
        "layers",
        "token_ratio",
        "criterion",
        "side_resolution",
        "reduction",
        "prompts",
    )

    def __init__(
        self,
        num_classes: int,
        layers: list[int] | None = None,
        token_ratio: float = 0.2,
        criterion: Criterion = "global",
        side_resolution: int = 128,
        reduction: int = 8,
        prompts: int = 16,
        dropout: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        self.save_hyperparameters()
        self.encoder_config = EncoderConfig(
            name=self.hparams["encoder"],
            pretrained=self.hparams["pretrained"],
            layers=None if layers is None else tuple(layers),
            token_ratio=token_ratio,
            criterion=criterion,
        )
        shape = self.encoder_shape
        check_resolution("side_resolution", (side_resolution, side_resolution), shape.patch_size, shape.name)
        width = shape.width // reduction if reduction > 0 and shape.width % reduction == 0 else 0
        if width == 0 or width % shape.heads:
            raise ConfigurationError(
                f"reduction is {reduction}: the encoder's width {shape.width} divided by it must be a multiple of its "
                f"{shape.heads} heads."
            )
        self.side_resolution = side_resolution
        depth = len(self.encoder_config.tapped_layers)
        self.fusion = FineGrainedFusion(depth, shape.heads, shape.width, width, prompts, dropout)
        self.side = SideViT(
            width, shape.heads, depth, shape.patch_size, (side_resolution, side_resolution), num_classes
        )

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Classify a batch of ``side_images`` with ``features`` (stored) or ``images`` (encoded now).

        Returns:
            Logits (B, classes).

        Raises:
            ConfigurationError: features of another encoder or of other layers.
        """
        features: Tensor = batch["features"] if "features" in batch else self.encode(batch["images"])
        layers, shape = len(self.encoder_config.tapped_layers), self.encoder_shape
        if (features.shape[1:4], features.shape[-1]) != ((2, layers, shape.heads), shape.head_dim):
            raise ConfigurationError(
                f"the features have the shape {tuple(features.shape)}, but {shape.name} with {layers} tapped layers "
                f"gives (B, 2, {layers}, {shape.heads}, T, {shape.head_dim})."
            )
        logits: Tensor = self.side(batch["side_images"], self.fusion(features))
        return logits
