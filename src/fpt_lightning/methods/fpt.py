"""FPT+, fine-grained prompt tuning plus (paper, section 3), and FPT, the method before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from fpt_lightning.encoder.config import check_resolution, nearest_side
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.fusion import FineGrainedFusion, ProjectedFusion, PromptHead
from fpt_lightning.methods.side import SideViT


class FPTPlusModule(FeatureModule):
    """A side ViT that learns from low-resolution images and from prompts that ask a frozen encoder's tokens.

    Args:
        num_classes: number of classes.
        side_resolution: side of the low-resolution images in pixels (paper, section 3.3); by default the multiple of
            the encoder's patch size that is nearest to ``SIDE_RESOLUTION``.
        reduction: the side network's width is the encoder's divided by this.
        prompts: number of fine-grained prompts of a layer (paper, section 3.4).
        dropout: after the shared out-projector.
        prompt_head: whether a linear head reads the fused prompts of all layers too, as in ``QueryTokensModule``. Its
            logits are added to those of the side network, whose own head then starts from zero, so that training starts
            from the prompts alone; with real weights the side network took no part in the end either
            (``docs/evidence.md``). Not in the paper: false is FPT+ as published.
        gradient_checkpointing: whether the side network's blocks are computed again in the backward pass: less memory
            for more time. On a GPU the stored tokens are widened in as small pieces as on a CPU, likewise.
        **kwargs: see ``FeatureModule`` and ``ClassificationModule``.

    Raises:
        ConfigurationError: values that cannot work together.
        EncoderError: ``encoder`` is not a plain ViT of timm.
    """

    LABEL = "FPT+"
    INPUTS: ClassVar[frozenset[str]] = frozenset({"side_images", "features"})
    ARCHITECTURE: ClassVar[tuple[str, ...]] = (
        *FeatureModule.ARCHITECTURE,
        "side_resolution",
        "reduction",
        "prompts",
        "prompt_head",
    )
    FUSION: ClassVar[type[FineGrainedFusion | ProjectedFusion]] = FineGrainedFusion
    SIDE_RESOLUTION: ClassVar[int] = 128
    """Published side of the low-resolution images in pixels."""

    def __init__(
        self,
        num_classes: int | None = None,
        side_resolution: int | None = None,
        reduction: int = 8,
        prompts: int = 16,
        dropout: float = 0.5,
        prompt_head: bool = True,
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        shape = self.encoder_shape
        if side_resolution is None:
            side_resolution = nearest_side(self.SIDE_RESOLUTION, shape.patch_size)
        check_resolution("side_resolution", (side_resolution, side_resolution), shape.patch_size, shape.name)
        width = shape.width // reduction if reduction > 0 and shape.width % reduction == 0 else 0
        if width == 0 or width % shape.heads:
            raise ConfigurationError(
                f"reduction is {reduction}: the encoder's width {shape.width} divided by it must be a multiple of its "
                f"{shape.heads} heads."
            )
        self.hparams["side_resolution"] = self.side_resolution = side_resolution  # as a checkpoint is held against it
        depth = len(self.encoder_config.tapped_layers)
        self.fusion = self.FUSION(depth, shape.heads, shape.width, width, prompts, dropout, gradient_checkpointing)
        self.side = SideViT(
            width,
            shape.heads,
            depth,
            shape.patch_size,
            (side_resolution, side_resolution),
            self.task.outputs,
            gradient_checkpointing,
        )
        self.prompt_head = PromptHead(depth, prompts, width, self.task.outputs) if prompt_head else None
        if prompt_head:
            nn.init.zeros_(self.side.head.weight)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Classify a batch of ``side_images`` with ``features`` (stored) or ``images`` (encoded now).

        Returns:
            Logits (B, classes).

        Raises:
            ConfigurationError: features of another encoder or of other layers.
        """
        features = self.features(batch)
        if self.prompt_head is None:
            logits: Tensor = self.side(batch["side_images"], self.fusion.by_layer(features))
            return logits
        prompts = self.fusion(features)
        return cast(Tensor, self.side(batch["side_images"], prompts) + self.prompt_head(prompts))


class FPTModule(FPTPlusModule):
    """FPT, the earlier method: a side block for every block of the encoder, prompts at the side network's width.

    Args:
        num_classes: number of classes.
        prompt_head: see ``FPTPlusModule``.
        **kwargs: see ``FPTPlusModule``; ``layers`` are all of the encoder's by default.

    Raises:
        ConfigurationError: values that cannot work together.
        EncoderError: ``encoder`` is not a plain ViT of timm.
    """

    LABEL = "FPT"
    ALL_LAYERS = True
    FUSION = ProjectedFusion
    SIDE_RESOLUTION = 224

    def __init__(self, num_classes: int | None = None, prompt_head: bool = False, **kwargs: Any) -> None:
        super().__init__(num_classes, prompt_head=prompt_head, **kwargs)
