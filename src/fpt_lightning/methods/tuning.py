"""The methods that train (parts of) the encoder itself, on augmented high-resolution images (paper, section 4.3).

Full fine-tuning, linear probing, attention tuning and BitFit choose what of the encoder learns; prompt tuning,
adapters, LoRA and AdaLoRA, in files of their own, add to it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fpt_lightning.encoder.config import EncoderConfig, check_resolution
from fpt_lightning.encoder.frozen import build_encoder
from fpt_lightning.encoder.precision import full_precision
from fpt_lightning.encoder.weights import weights_digest
from fpt_lightning.errors import CheckpointError, ConfigurationError, EncoderError
from fpt_lightning.methods.base import ClassificationModule, initialise_head
from fpt_lightning.methods.record import check_tensors


class EncoderModule(ClassificationModule):
    """Base of the methods with the encoder inside: a subclass says what learns in it, or adds what learns to it.

    The encoder gets a new linear head on its own pooling; its weights are loaded when training or testing starts, at
    the data's resolution (``configure_model``), or by ``build``. A checkpoint holds only what learns.

    Args:
        num_classes: number of classes.
        **kwargs: see ``ClassificationModule``.

    Raises:
        ConfigurationError: values that cannot work.
        EncoderError: ``encoder`` is not a plain ViT of timm.
    """

    INPUTS: ClassVar[frozenset[str]] = frozenset({"images"})
    FREEZES: ClassVar[bool] = True
    """Whether the encoder is frozen but for a part, and so stays in evaluation mode."""
    gradient_checkpointing = False

    def __init__(self, num_classes: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.encoder_config = EncoderConfig(name=self.hparams["encoder"], pretrained=self.hparams["pretrained"])
        self.vit: Any = None
        self.resolution: tuple[int, int] | None = None

    @abstractmethod
    def adapt(self, vit: Any) -> None:
        """Let learn what shall learn of timm's ViT, whose parameters are frozen; the head learns in any case."""

    @full_precision()
    def build(self, resolution: tuple[int, int]) -> None:
        """Build the encoder with its new head, frozen but for what learns.

        Args:
            resolution: (height, width) of the images in pixels.

        Raises:
            ConfigurationError: the patch size does not divide the resolution, or the encoder has nothing to tune.
            EncoderError: weights that are out of reach or do not fit.
            CheckpointError: other weights than those this model was trained with.
        """
        check_resolution("resolution", resolution, self.encoder_shape.patch_size, self.encoder_shape.name)
        vit = cast(Any, build_encoder(self.encoder_config, resolution, pooling=True))
        if not next(vit.parameters()).is_meta:
            self.check_weights(weights_digest(vit))
        constants = [p for p in vit.parameters() if not p.requires_grad]  # such as sine position embeddings
        vit.requires_grad_(False)
        vit.reset_classifier(self.task.outputs)
        self.adapt(vit)
        for constant in constants:
            constant.requires_grad_(False)
        for head in _heads(vit):
            initialise_head(head).requires_grad_(True)
        vit.set_grad_checkpointing(self.gradient_checkpointing)
        self.vit, self.resolution = vit, resolution
        self.train(self.training)

    def configure_model(self) -> None:
        """Build at the resolution of the trainer's data module, once; without a trainer, leave that to a checkpoint."""
        if self.vit is not None or self._trainer is None:
            return
        resolution: tuple[int, int] | None = getattr(getattr(self.trainer, "datamodule", None), "resolution", None)
        if resolution is None:
            raise ConfigurationError(
                f"{type(self).__name__} does not know the resolution of its images: use a data module of "
                "fpt-lightning, or call build((height, width)) first."
            )
        self.build(resolution)

    def train(self, mode: bool = True) -> EncoderModule:
        """Set the mode; an encoder that is frozen but for a part stays in evaluation mode."""
        super().train(mode)
        if self.vit is not None and self.FREEZES:
            self.vit.eval()
        return self

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, classes) of high-resolution ``images``.

        Raises:
            ConfigurationError: the encoder is not built, or for another resolution.
        """
        if self.vit is None:
            raise ConfigurationError(f"{type(self).__name__} is not built: call build((height, width)) first.")
        images: Tensor = batch["images"]
        if images.shape[-2:] != self.resolution:
            raise ConfigurationError(
                f"the images are {images.shape[-2]} x {images.shape[-1]} pixels, but {type(self).__name__} was built "
                f"for the resolution {self.resolution}."
            )
        logits: Tensor = self.vit(images)
        return logits

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep of the weights only what learns, and what the task took from the training labels."""
        super().on_save_checkpoint(checkpoint)
        kept = self._kept_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the encoder where there is none, and complete the checkpoint with its frozen weights.

        Raises:
            CheckpointError: see ``ClassificationModule``; or the checkpoint is of another resolution, or holds other
                parameters than learn here.
        """
        super().on_load_checkpoint(checkpoint)
        trained = None if self.specification is None else self.specification.resolution
        if self.vit is None:
            if trained is None:
                raise CheckpointError("the checkpoint does not say its resolution: call build((height, width)) first.")
            self.build(trained)
        if trained not in (None, self.resolution):
            raise CheckpointError(
                f"this model was trained at the resolution {trained}, the data have {self.resolution}: set "
                "data.resolution to the model's."
            )
        own, kept = self.state_dict(), self._kept_names()
        check_tensors(checkpoint["state_dict"], {name: own[name] for name in kept})
        frozen = {k: v for k, v in own.items() if k not in kept}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **frozen}

    def _kept_names(self) -> set[str]:
        learnable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return learnable | {f"task.{name}" for name in self.task.state_dict()}


def _heads(vit: Any) -> Iterator[nn.Linear]:
    """The classifier; distilled DeiTs have two."""
    heads = vit.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        if not isinstance(head, nn.Linear):
            raise EncoderError(f"{type(vit).__name__} has no linear head to replace, but {type(head).__name__}.")
        yield head


class LinearProbingModule(EncoderModule):
    """Linear probing: the head alone learns, so nothing of the encoder is kept for a backward pass.

    Args:
        num_classes: number of classes.
        learning_rate: the highest; higher than of methods with more to learn.
        **kwargs: see ``ClassificationModule``.
    """

    LABEL = "Linear probing"

    def __init__(self, num_classes: int | None = None, learning_rate: float = 3e-3, **kwargs: Any) -> None:
        super().__init__(num_classes, learning_rate=learning_rate, **kwargs)

    def adapt(self, vit: Any) -> None:
        """Nothing but the head."""


class EncoderTuningModule(EncoderModule):
    """Base of the methods that back-propagate through the encoder.

    Args:
        num_classes: number of classes.
        gradient_checkpointing: compute each block again in the backward pass instead of keeping its activations.
        **kwargs: see ``ClassificationModule``.

    Raises:
        ConfigurationError: values that cannot work.
        EncoderError: ``encoder`` is not a plain ViT of timm.
    """

    def __init__(self, num_classes: int | None = None, gradient_checkpointing: bool = False, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.gradient_checkpointing = gradient_checkpointing


class FineTuningModule(EncoderTuningModule):
    """Full fine-tuning: everything learns, in training mode.

    Args:
        num_classes: number of classes.
        learning_rate: the highest; what the encoder knows is lost above it.
        **kwargs: see ``EncoderTuningModule`` and ``ClassificationModule``.
    """

    LABEL = "Full fine-tuning"
    FREEZES = False

    def __init__(self, num_classes: int | None = None, learning_rate: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(num_classes, learning_rate=learning_rate, **kwargs)

    def adapt(self, vit: Any) -> None:
        """Let everything learn."""
        vit.requires_grad_(True)


class AttentionTuningModule(EncoderTuningModule):
    """Attention tuning (Touvron et al., 2022): all weights of the self-attentions learn, and the head.

    Args:
        num_classes: number of classes.
        learning_rate: the highest; a starting point between those of full fine-tuning and of fewer parameters.
        **kwargs: see ``EncoderTuningModule`` and ``ClassificationModule``.
    """

    LABEL = "Attention tuning"

    def __init__(self, num_classes: int | None = None, learning_rate: float = 5e-5, **kwargs: Any) -> None:
        super().__init__(num_classes, learning_rate=learning_rate, **kwargs)

    def adapt(self, vit: Any) -> None:
        """Let the attention of every block learn."""
        for block in vit.blocks:
            block.attn.requires_grad_(True)


class BitFitModule(EncoderTuningModule):
    """BitFit (Ben-Zaken et al., 2022): every bias learns, and the head.

    Args:
        num_classes: number of classes.
        learning_rate: the highest; higher than of methods with more to learn.
        **kwargs: see ``EncoderTuningModule`` and ``ClassificationModule``.
    """

    LABEL = "BitFit"

    def __init__(self, num_classes: int | None = None, learning_rate: float = 3e-3, **kwargs: Any) -> None:
        super().__init__(num_classes, learning_rate=learning_rate, **kwargs)

    def adapt(self, vit: Any) -> None:
        """Let the biases learn.

        Raises:
            ConfigurationError: the blocks have none.
        """
        biases = {name: p for name, p in vit.named_parameters() if name.rpartition(".")[2].endswith("bias")}
        if not any(name.startswith("blocks.") for name in biases):
            raise ConfigurationError(
                f"{self.encoder_shape.name} has no biases in its blocks: BitFit has nothing to tune."
            )
        for parameter in biases.values():
            parameter.requires_grad_(True)


def build_on_meta(
    method: Callable[[], ClassificationModule], resolution: tuple[int, int] | None
) -> ClassificationModule:
    """A method as it trains at a resolution, encoder included where it is inside, without weights or memory.

    Args:
        method: makes the method, such as ``lambda: LoRAModule(5)``.
        resolution: (height, width) of the encoder's images in pixels; None leaves an encoder inside unbuilt.

    Raises:
        ConfigurationError: settings that cannot work.
    """
    with torch.device("meta"):
        module = method()
        if isinstance(module, EncoderModule) and resolution is not None:
            module.encoder_config = replace(module.encoder_config, pretrained=False)
            module.build(resolution)
    return module
