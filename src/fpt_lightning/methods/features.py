"""What the methods on a frozen encoder's features share: which features, stored or computed on the way."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fpt_lightning.encoder.config import EncoderConfig, encoder_shape
from fpt_lightning.encoder.execution import exporting, sketching, to_do
from fpt_lightning.encoder.frozen import Encoded, FrozenEncoder, check_finite
from fpt_lightning.encoder.precision import Precision
from fpt_lightning.encoder.selection import Criterion, parts
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.methods.base import ClassificationModule
from fpt_lightning.methods.record import check_tensors
from fpt_lightning.store.codecs import Features, as_features

_LOADING = threading.Lock()  # of encoders by threads that share a module; of no object, which could not be pickled


class FeatureModule(ClassificationModule):
    """Base of the methods that learn from a frozen encoder's features and never back-propagate through it.

    A batch with stored ``features`` or ``pooled`` never touches the encoder; one with ``images`` runs it, without
    gradient.

    Attributes:
        images_at_once: that are encoded, however large the batch; a data module's ``preload_batch_size``.

    Args:
        num_classes: number of classes.
        layers: tapped blocks of the encoder, counted from 0; the upper half by default (paper, section 4.5).
        token_ratio: share of the tokens kept in every head (paper, section 3.5).
        criterion: of a token's importance: ``global`` (the paper's) or ``class_token``.
        encoder_precision: of the frozen encoder's linear layers: ``fp32``, ``bf16`` or ``fp16``.
        **kwargs: see ``ClassificationModule``.

    Raises:
        ConfigurationError: values that cannot work together.
        EncoderError: ``encoder`` is not a plain ViT of timm.
    """

    INPUTS: ClassVar[frozenset[str]] = frozenset({"features"})
    ARCHITECTURE: ClassVar[tuple[str, ...]] = (*ClassificationModule.ARCHITECTURE, "layers", "token_ratio", "criterion")
    ALL_LAYERS: ClassVar[bool] = False
    """Whether all blocks are tapped where ``layers`` is not given."""

    def __init__(
        self,
        num_classes: int | None = None,
        layers: list[int] | None = None,
        token_ratio: float = 0.2,
        criterion: Criterion = "global",
        encoder_precision: Precision = "fp32",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        name = self.hparams["encoder"]
        if layers is None and self.ALL_LAYERS:
            layers = list(range(encoder_shape(name).depth))
        self.encoder_config = EncoderConfig(
            name=name,
            pretrained=self.hparams["pretrained"],
            layers=None if layers is None else tuple(layers),
            token_ratio=token_ratio,
            criterion=criterion,
            precision=encoder_precision,
        )
        self.images_at_once = 4
        self._frozen: dict[tuple[int, ...], FrozenEncoder] = {}  # a dict, so that it is no submodule

    @property
    def frozen_parameters(self) -> int:
        """The frozen encoder's, with the 1000-class head that published ratios count."""
        return self.encoder_shape.parameters

    @property
    def encoders(self) -> list[FrozenEncoder]:
        """The frozen encoders that have run, one a resolution; none where features came from a store."""
        return list(self._frozen.values())

    def encode(self, images: Tensor, names: Sequence[str] | None = None) -> Encoded:
        """Run the frozen encoder, ``images_at_once`` images at a time; its weights are loaded the first time.

        It is neither a submodule nor learnable: no optimiser, checkpoint or ``train()`` ever reaches it.

        Args:
            images: (B, 3, height, width), fp32, normalised.
            names: of the images, for errors.

        Raises:
            CheckpointError: other weights than those this model was trained with.
            EncoderError: in fp16, features that are not finite, naming the image.
        """
        resolution = (images.shape[-2], images.shape[-1])
        with _LOADING:
            if resolution not in self._frozen:
                self.use_encoder(FrozenEncoder(self.encoder_config, resolution))
            encoder = self._frozen[resolution]
            if next(encoder.parameters()).device != images.device:
                encoder.to(images.device)
        whole = exporting() or len(images) <= self.images_at_once
        encoded: Encoded = encoder(images) if whole else _in_parts(encoder, images, self.images_at_once)
        if self.encoder_config.precision == "fp16" and not exporting() and sketching() is None:
            numbered = [f"image {place} of the batch" for place in range(len(images))]
            check_finite(encoded, names or numbered, self.encoder_config)
        return encoded

    def meet_data(self, trained: bool) -> None:
        """Take over how many images are encoded at once too; see ``TrainedModule``."""
        super().meet_data(trained)
        data = getattr(self.trainer, "datamodule", None)
        self.images_at_once = getattr(data, "preload_batch_size", self.images_at_once)

    def _encoded(self, batch: Mapping[str, Any]) -> Encoded:
        return self.encode(batch["images"], batch.get("ids"))

    def cpu(self) -> Self:
        """Move the live encoders too, as a trainer does when it ends: they would stay on its GPU."""
        for encoder in self.encoders:
            encoder.cpu()
        return super().cpu()

    def use_encoder(self, encoder: FrozenEncoder) -> None:
        """Encode images of the encoder's resolution with it from now on.

        Raises:
            CheckpointError: other weights than those this model was trained with.
        """
        self.check_weights(encoder.digest)
        self._frozen[encoder.resolution] = encoder

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Hold a checkpoint, and its tensors, against this module.

        Raises:
            CheckpointError: see ``ClassificationModule``; or other tensors than learn here.
        """
        super().on_load_checkpoint(checkpoint)
        check_tensors(checkpoint["state_dict"], self.state_dict())

    def features(self, batch: Mapping[str, Any]) -> Features:
        """Keys and values: the stored ones, or those of the images, encoded now.

        Raises:
            ConfigurationError: features of another encoder or of other layers.
        """
        features = as_features(batch) if "features" in batch else Features(self._encoded(batch).features)
        layers, shape = len(self.encoder_config.tapped_layers), self.encoder_shape
        if (features.features.shape[1:4], features.head_dim) != ((2, layers, shape.heads), shape.head_dim):
            raise ConfigurationError(
                f"the features have the shape {tuple(features.features.shape)}, but {shape.name} with {layers} tapped "
                f"layers gives (B, 2, {layers}, {shape.heads}, T, {shape.head_dim}), or half of {shape.head_dim} with "
                "two numbers a byte."
            )
        return features

    def pooled(self, batch: Mapping[str, Any]) -> Tensor:
        """Pooled features (B, D): the stored ones, or those of the images, encoded now.

        Raises:
            ConfigurationError: features of another encoder.
        """
        pooled: Tensor = batch["pooled"] if "pooled" in batch else self._encoded(batch).pooled
        if pooled.shape[1:] != torch.Size([self.encoder_shape.width]):
            raise ConfigurationError(
                f"the pooled features have the shape {tuple(pooled.shape)}, but {self.encoder_shape.name} gives "
                f"(B, {self.encoder_shape.width})."
            )
        return pooled


def _in_parts(encoder: FrozenEncoder, images: Tensor, at_once: int) -> Encoded:
    """What the encoder gives for all images, in the memory of that and of a part's pass."""
    whole: Encoded | None = None
    for some in to_do(parts(len(images), at_once), 2):  # the second is made beside the whole
        encoded = encoder(images[some])
        if whole is None:
            whole = Encoded(*(part.new_empty(len(images), *part.shape[1:]) for part in encoded))
        for part, piece in zip(whole, encoded, strict=True):
            part[some] = piece
        del encoded, piece
    assert whole is not None
    return whole
