"""Which encoder: a plain ViT of timm by its name and shape, its weights, and what is taken of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Any, cast

import timm
import torch
from torch import nn

from fpt_lightning.encoder.precision import PRECISIONS
from fpt_lightning.encoder.selection import CRITERIA, number_of_tokens
from fpt_lightning.encoder.weight_files import (
    OF_FILES,
    WEIGHT_SUFFIXES,
    are_weights,
    existing_weights,
    weights_file_digest,
)
from fpt_lightning.errors import ConfigurationError, EncoderError, in_one_line

_HUB, _FOLDER = "hf-hub:", "local-dir:"


@dataclass(frozen=True)
class EncoderShape:
    """What a ViT of timm looks like, known without its weights.

    Attributes:
        name: timm's model name.
        width: D.
        heads: H.
        depth: number of blocks.
        patch_size: (height, width) in pixels.
        prefix_tokens: class token and registers ahead of the patches.
        class_token: whether token 0 is a class token.
        parameters: number of parameters at the native resolution with a 1000-class head, as published learnable ratios
            count them.
        any_size: whether timm fits its position embedding to the images in every call.
    """

    name: str
    width: int
    heads: int
    depth: int
    patch_size: tuple[int, int]
    prefix_tokens: int
    class_token: bool
    parameters: int
    any_size: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def tokens(self, resolution: tuple[int, int]) -> int:
        """N at a resolution (height, width).

        Raises:
            ConfigurationError: the resolution is not a multiple of the patch size.
        """
        check_resolution("resolution", resolution, self.patch_size, self.name)
        return self.prefix_tokens + (resolution[0] // self.patch_size[0]) * (resolution[1] // self.patch_size[1])


def check_resolution(argument: str, resolution: tuple[int, int], patch_size: tuple[int, int], encoder: str) -> None:
    """Refuse a resolution (height, width) in pixels that ``patch_size`` does not divide.

    Raises:
        ConfigurationError: with the nearest resolutions that would do.
    """
    if any(side < patch or side % patch for side, patch in zip(resolution, patch_size, strict=True)):
        near = [
            sorted({max(patch, side // patch * patch), (side // patch + 1) * patch})
            for side, patch in zip(resolution, patch_size, strict=True)
        ]
        raise ConfigurationError(
            f"{argument} {resolution[0]} x {resolution[1]} is not a multiple of the patch size "
            f"{patch_size[0]} x {patch_size[1]} of {encoder}: the nearest are {near[0]} (height) and {near[1]} (width)."
        )


def _similar(name: str) -> list[str]:
    """Names of timm's ViTs that share most words with a name, and of these the nearest."""
    asked = name.lower().split(".")[0]
    words = [word for word in re.split(r"[^a-z0-9]+", asked) if len(word) > 2]

    def nearness(known: str) -> tuple[int, float]:
        return sum(word in known for word in words), SequenceMatcher(None, asked, known).ratio()

    vits = [*timm.list_models(module="vision_transformer"), *timm.list_models(module="eva")]
    return sorted(vits, key=nearness, reverse=True)[:3]


def nearest_side(wanted: int, patch_size: tuple[int, int]) -> int:
    """The side in pixels of square images nearest to a wanted one that ``patch_size`` divides; of two, the larger."""
    step = math.lcm(*patch_size)
    return max(1, (2 * wanted + step) // (2 * step)) * step


@cache
def encoder_shape(name: str) -> EncoderShape:
    """The shape of timm's model ``name``, from a build without memory for weights (about 0.2 s).

    Raises:
        EncoderError: timm has no such model, or it is not a plain ViT.
    """
    if is_in_a_repository(name):
        return _shape_of(name, _from_its_repository(name))
    if not timm.is_model(name):
        if "/" in name:
            raise EncoderError(f"encoder {name!r} is not a model of timm: of a repository, give 'hf-hub:{name}'.")
        near = ", ".join(_similar(name))
        raise EncoderError(f"encoder {name!r} is not a model of timm {timm.__version__}; the nearest are {near}.")
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=1000)
    except RuntimeError as error:  # of a tag that is none
        known = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")) or "no weights"
        raise EncoderError(f"encoder {name!r}: {error} timm {timm.__version__} has {known}.") from error
    return _shape_of(name, model)


def is_in_a_repository(name: str) -> bool:
    """Whether timm takes a model's shape from the ``config.json`` of a repository or of a folder."""
    return name.startswith((_HUB, _FOLDER))


def _from_its_repository(name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, pretrained=False, num_classes=1000)
    except Exception as error:  # no network, no access, no such repository, or one that is not timm's
        raise EncoderError(
            f"encoder {name!r}: timm cannot build it from its config.json ({in_one_line(error)}), which must be one of "
            "timm and, on a hub, within reach, whatever pretrained is. Otherwise give timm's name of the architecture "
            "as encoder, and the file or folder of the weights as pretrained."
        ) from error
    return model


def _shape_of(name: str, model: nn.Module) -> EncoderShape:
    blocks = getattr(model, "blocks", None)
    patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    attention = getattr(blocks[0], "attn", None) if isinstance(blocks, nn.ModuleList | nn.Sequential) else None
    plain = (
        attention is not None
        and isinstance(patch_size, tuple)
        and not hasattr(model.patch_embed, "backbone")  # a hybrid's patches are of its convolutions' maps
        and hasattr(attention, "fused_attn")
        and hasattr(attention, "num_heads")
        and isinstance(getattr(model, "num_prefix_tokens", None), int)
    )
    if not plain or not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise EncoderError(
            f"encoder {name!r} ({type(model).__name__}) is not a plain vision transformer: FPT+ taps one global "
            "self-attention a block, which convolutional, windowed and hierarchical backbones do not have. Use a ViT, "
            "DeiT, DINOv2, DINOv3, EVA02, SigLIP or BEiT of timm."
        )
    return EncoderShape(
        name=name,
        width=cast(int, model.embed_dim),
        heads=cast(int, cast(Any, attention).num_heads),
        depth=len(blocks),
        patch_size=cast(tuple[int, int], patch_size),
        prefix_tokens=cast(int, model.num_prefix_tokens),
        class_token=getattr(model, "cls_token", None) is not None,
        parameters=sum(p.numel() for p in model.parameters()),
        any_size=bool(getattr(model, "dynamic_img_size", False)),
    )


@dataclass(frozen=True)
class EncoderConfig:
    """Which features the frozen encoder gives.

    Attributes:
        name: timm's model name, a tag included where wanted (``vit_base_patch16_224.augreg_in21k``), or
            ``hf-hub:owner/repository`` or ``local-dir:folder`` with a ``config.json`` of timm.
        pretrained: True for the published weights, False for a fixed random initialisation, or a local path: of a
            ``.safetensors``, ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` or ``.pth.tar`` file, of an index of shards
            (``.index.json``), or of a folder with either, as transformers saves it.
        layers: tapped blocks, counted from 0; the upper half by default (paper, section 4.5).
        token_ratio: share of the tokens kept in every head (paper: 0.2).
        criterion: ``global`` (attention column mean over all tokens, the paper's) or ``class_token``.
        precision: of the encoder's linear layers: ``fp32`` (never TF32), or ``bf16`` or ``fp16`` (autocast). Attention
            maps, their means and norms are fp32 in all.

    Raises:
        ConfigurationError: a layer, ratio, criterion or precision that does not exist.
        EncoderError: not a plain ViT of timm, or a weights file of an unknown kind.
    """

    name: str
    pretrained: bool | str = True
    layers: tuple[int, ...] | None = None
    token_ratio: float = 0.2
    criterion: str = "global"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        shape = self.shape
        layers = self.tapped_layers
        number_of_tokens(1, self.token_ratio)
        if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < shape.depth:
            raise ConfigurationError(
                f"layers is {list(layers)}: give distinct blocks of {self.name} in ascending order, "
                f"from 0 to {shape.depth - 1}."
            )
        if self.criterion not in CRITERIA:
            raise ConfigurationError(f"criterion is {self.criterion!r}: choose one of {', '.join(CRITERIA)}.")
        if self.precision not in PRECISIONS:
            raise ConfigurationError(f"encoder_precision is {self.precision!r}: choose one of {', '.join(PRECISIONS)}.")
        if self.criterion == "class_token" and not shape.class_token:
            raise ConfigurationError(
                f"criterion is 'class_token', but {self.name} has no class token: use criterion 'global'."
            )
        if isinstance(self.pretrained, str) and not are_weights(self.pretrained):
            raise EncoderError(
                f"pretrained is {self.pretrained!r}: give true, false or a file ending in {', '.join(WEIGHT_SUFFIXES)} "
                "or .index.json, or a folder that holds one."
            )

    @property
    def shape(self) -> EncoderShape:
        return encoder_shape(self.name)

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """The tapped blocks: ``layers``, or the upper half of the encoder."""
        return tuple(range(self.shape.depth // 2, self.shape.depth)) if self.layers is None else self.layers

    @property
    def weights_path(self) -> str | None:
        """The file or folder of the weights, where they are local."""
        if self.pretrained is True and self.name.startswith(_FOLDER):
            return self.name.removeprefix(_FOLDER)
        return self.pretrained if isinstance(self.pretrained, str) else None

    def check_weights(self) -> None:
        """Refuse a file or folder of weights that is not there.

        Raises:
            EncoderError: naming it.
        """
        if self.weights_path is not None:
            existing_weights(self.weights_path)

    def weights(self) -> str:
        """What identifies the weights without loading them: timm's tag, a repository, ``random``, or SHA-256 of files.

        Raises:
            EncoderError: the weights file is not there.
        """
        if self.weights_path is not None:
            return OF_FILES + weights_file_digest(existing_weights(self.weights_path))
        if self.pretrained is False:
            return "random"
        if is_in_a_repository(self.name):
            return self.name
        model_cfg = timm.get_pretrained_cfg(self.name)
        tag = f".{model_cfg.tag}" if model_cfg is not None and model_cfg.tag else ""
        return f"timm:{self.name.split('.')[0]}{tag}"
