"""The frozen vision transformer and the tap on its attention (paper, sections 3.2 and 3.5)."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fpt_lightning.errors import ConfigurationError, EncoderError, in_one_line
from fpt_lightning.selection import (
    CRITERIA,
    attention_with_importance,
    class_token_importance,
    exporting,
    number_of_tokens,
    select_tokens,
)

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "teacher", "student", "encoder")
_PREFIXES = (
    "module.",
    "_orig_mod.",
    "backbone.",
    "encoder.",
    "model.",
    "teacher.",
    "student.",
    "vit.",
    "visual.trunk.",
)
_POSITIONS = ("pos_embed", "relative_position", "rel_pos", "rope")
_HEADS = ("head.", "head_dist.", "classifier.", "fc.")
_POOLING = ("fc_norm.", "norm.", "attn_pool.")  # what follows the blocks; the frozen pass does not use it


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
    """

    name: str
    width: int
    heads: int
    depth: int
    patch_size: tuple[int, int]
    prefix_tokens: int
    class_token: bool
    parameters: int

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


@cache
def encoder_shape(name: str) -> EncoderShape:
    """The shape of timm's model ``name``, from a build without memory for weights (about 0.2 s).

    Raises:
        EncoderError: timm has no such model, or it is not a plain ViT.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
        raise EncoderError(f"encoder {name!r} is not a model of timm {timm.__version__}; similar names: {near}.")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=1000)
    return _shape_of(name, model)


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
    )


@dataclass(frozen=True)
class EncoderConfig:
    """Which features the frozen encoder gives.

    Attributes:
        name: timm's model name, a tag included where wanted (``vit_base_patch16_224.augreg_in21k``).
        pretrained: True for timm's published weights, False for a fixed random initialisation, or the path of a local
            ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file.
        layers: tapped blocks, counted from 0; the upper half by default (paper, section 4.5).
        token_ratio: share of the tokens kept in every head (paper: 0.2).
        criterion: ``global`` (attention column mean over all tokens, the paper's) or ``class_token``.
        precision: of the encoder's linear layers: ``fp32``, or ``bf16`` (autocast). Attention maps, their means and
            norms are fp32 in both.

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
        if isinstance(self.pretrained, str):
            path = Path(self.pretrained)
            if path.suffix.lower() not in _WEIGHT_SUFFIXES:
                raise EncoderError(
                    f"pretrained is {self.pretrained!r}: give true, false or a file ending in "
                    f"{', '.join(_WEIGHT_SUFFIXES)}."
                )

    @property
    def shape(self) -> EncoderShape:
        return encoder_shape(self.name)

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """The tapped blocks: ``layers``, or the upper half of the encoder."""
        return tuple(range(self.shape.depth // 2, self.shape.depth)) if self.layers is None else self.layers

    def weights(self) -> str:
        """What identifies the weights without loading them: timm's tag, ``random``, or a file's SHA-256.

        Raises:
            EncoderError: the weights file is not there.
        """
        if self.pretrained is True:
            model_cfg = timm.get_pretrained_cfg(self.name)
            tag = f".{model_cfg.tag}" if model_cfg is not None and model_cfg.tag else ""
            return f"timm:{self.name.split('.')[0]}{tag}"
        if self.pretrained is False:
            return "random"
        return "sha256:" + _file_digest(_existing_weights(self.pretrained))


def _existing_weights(pretrained: str) -> Path:
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise EncoderError(f"the weights file {pretrained!r} (pretrained) does not exist.")
    return path


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Encoded(NamedTuple):
    """What the frozen encoder gives for B images.

    Attributes:
        features: keys and values of the selected tokens, (B, 2, L, H, T, head_dim), fp32.
        indices: their tokens, most important first, (B, L, H, T), int64.
        pooled: the class token after the last tapped block, or the mean of the patches where there is none, (B, D),
            fp32, not normalised.
    """

    features: Tensor
    indices: Tensor
    pooled: Tensor


class FrozenEncoder(nn.Module):
    """A timm ViT that gives the keys and values of its most attended tokens; it never trains.

    The keys and values are taken where the attention itself uses them: the call of
    ``scaled_dot_product_attention`` inside every tapped block is intercepted, after biases, query/key norms and rotary
    embeddings, which makes one mechanism for every family of timm. Blocks after the last tapped one are not computed,
    and of that one, where there is a class token, only what it becomes.

    Args:
        config: the encoder and what to select.
        resolution: (height, width) of the images in pixels; position embeddings are interpolated by timm.

    Raises:
        ConfigurationError: the resolution is not a multiple of the patch size.
        EncoderError: weights that do not fit.
    """

    def __init__(self, config: EncoderConfig, resolution: tuple[int, int]) -> None:
        super().__init__()
        self.config = config
        self.resolution = resolution
        self.shape = config.shape
        self.tokens = self.shape.tokens(resolution)
        self.selected = number_of_tokens(self.tokens, config.token_ratio)
        self.model = build_encoder(config, resolution)
        self.digest = "" if next(self.model.parameters()).is_meta else weights_digest(self.model)
        cast(Any, self.model).reset_classifier(0)  # of 21,843 classes, it would be a fifth of a ViT-B
        self.requires_grad_(False)
        self.eval()
        self._tap = _AttentionTap(config, self.selected)
        for index, block in enumerate(cast(nn.ModuleList, self.model.blocks)):
            block.register_forward_pre_hook(self._tap.enter(index))
            block.register_forward_hook(self._tap.leave)
        if self.shape.class_token:
            last = cast(Any, self.model).blocks[config.tapped_layers[-1]]
            for part in (last.attn.proj, last.mlp):
                part.register_forward_pre_hook(_class_token_alone)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Encoded:
        """The frozen pass, in the configuration's precision whatever autocast says.

        Args:
            images: (B, 3, height, width), normalised, at this encoder's resolution.

        Raises:
            ConfigurationError: images of another size than the resolution.
            EncoderError: a tapped block whose attention cannot be intercepted.
        """
        if images.shape[-2:] != self.resolution:
            raise ConfigurationError(
                f"the images are {images.shape[-2]} x {images.shape[-1]} pixels, but the encoder was built for the "
                f"resolution {self.resolution[0]} x {self.resolution[1]}."
            )
        bf16 = torch.autocast(images.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        with bf16, self._tap, contextlib.suppress(_LastTap):
            cast(Any, self.model).forward_features(images.float())
        return self._tap.collect()


def _class_token_alone(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Take the class token out of (B, N, D); what is made of it is added to all tokens, and to it rightly."""
    return (inputs[0][:, :1],)


class _LastTap(Exception):  # noqa: N818 - a signal, not an error
    """Raised after the last tapped block: nothing after it is needed."""


class _AttentionTap(TorchFunctionMode):
    """Intercepts the attention call of the tapped blocks and keeps the keys and values of the selected tokens."""

    def __init__(self, config: EncoderConfig, selected: int) -> None:
        super().__init__()
        self.config, self.selected = config, selected
        self.layers = config.tapped_layers
        self.block: int | None = None
        self.keys_values: list[Tensor] = []
        self.indices: list[Tensor] = []
        self.pooled: Tensor | None = None

    def enter(self, index: int) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self.block = index if index in self.layers else None
            if index == 0:
                self.keys_values, self.indices = [], []

        return hook

    def leave(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.block is not None and len(self.keys_values) <= self.layers.index(self.block):
            raise EncoderError(
                f"block {self.block} of {self.config.name} did not call scaled_dot_product_attention, so its keys and "
                "values cannot be taken; unset TIMM_FUSED_ATTN if it is 0."
            )
        if self.block == self.layers[-1]:
            prefix = self.config.shape.prefix_tokens
            self.pooled = output[:, 0] if self.config.shape.class_token else output[:, prefix:].mean(1)
            if not exporting():  # the graph of an export leaves out by itself what nothing needs
                raise _LastTap
        self.block = None

    def collect(self) -> Encoded:
        assert self.pooled is not None
        features, indices = torch.stack(self.keys_values, 2).float(), torch.stack(self.indices, 1)
        encoded = Encoded(features, indices, self.pooled.float())
        self.block, self.keys_values, self.indices, self.pooled = None, [], [], None
        return encoded

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention or self.block is None:
            return func(*args, **(kwargs or {}))
        return self._attention(func, *args, **(kwargs or {}))

    def _attention(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        position = self.layers.index(cast(int, self.block))
        if len(self.keys_values) > position or is_causal or enable_gqa or query.shape != key.shape:
            raise EncoderError(f"block {self.block} of {self.config.name} has no plain self-attention to tap.")
        if self.config.criterion == "global":
            output, importance = attention_with_importance(query, key, value, bias=attn_mask, scale=scale)
        else:
            output = func(query, key, value, attn_mask=attn_mask, scale=scale)
            importance = class_token_importance(query, key, bias=attn_mask, scale=scale)
        keys_values, indices = select_tokens(key, value, importance, self.selected)
        self.keys_values.append(keys_values)
        self.indices.append(indices)
        return output


def build_encoder(config: EncoderConfig, resolution: tuple[int, int], pooling: bool = False) -> nn.Module:
    """timm's model at a resolution; a random initialisation is the same every time and leaves the global RNG alone.

    Args:
        config: its name and weights.
        resolution: (height, width) of the images in pixels; position embeddings are interpolated by timm.
        pooling: whether a weights file must hold what follows the blocks: the final norm and pooling.

    Raises:
        EncoderError: weights that are out of reach or do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model: nn.Module = timm.create_model(config.name, pretrained=config.pretrained is True, img_size=resolution)
        except Exception as error:  # a hub that is out of reach, or has no such weights, fails in many ways
            if config.pretrained is not True:
                raise
            raise EncoderError(
                f"timm cannot load the published weights of {config.name} ({type(error).__name__}: {error}). Without a "
                "network, give a local file as model.pretrained."
            ) from error
    if isinstance(config.pretrained, str):
        load_weights(model, _existing_weights(config.pretrained), pooling)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            cast(Any, module).fused_attn = True  # TIMM_FUSED_ATTN=0 would hide the call that the tap needs
    return model


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters, except those that interpolation to a resolution changes and its head."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith((*_HEADS, *_POOLING)) and not any(part in name for part in _POSITIONS):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: nn.Module, path: Path, pooling: bool = False) -> None:
    """Load a local weights file into a timm model; only tensors are read, no code is run.

    Wrappers (``model``, ``state_dict``, ``teacher``, ...) and prefixes (``module.``, ``backbone.``, ...) are taken off,
    timm's own converters then rename foreign layouts and interpolate position embeddings. Heads are left aside, and
    unless ``pooling``, the final norm and pooling too.

    Raises:
        EncoderError: the file cannot be read, or names or shapes do not fit; each is listed.
    """
    converted = _convert(_plain_state_dict(_read_tensors(path), path), model, path)
    aside = _HEADS if pooling else (*_HEADS, *_POOLING)
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith(aside)}
    given = {k: v for k, v in converted.items() if not k.startswith(aside)}
    problems = [f"missing: {k}" for k in wanted if k not in given]
    problems += [
        f"shape: {k} is {tuple(given[k].shape)}, the model has {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in given and given[k].shape != v.shape
    ]
    problems += [f"not in the model: {k}" for k in given if k not in wanted and "mask_token" not in k]
    if problems:
        listed = "\n  ".join(problems[:12] + ([f"... and {len(problems) - 12} more"] if len(problems) > 12 else []))
        raise EncoderError(f"the weights file {path} does not fit {type(model).__name__}:\n  {listed}")
    own = model.state_dict()
    fitting = {k: v for k, v in converted.items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(fitting, strict=False)


def _read_tensors(path: Path) -> Any:
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has its own exceptions for a damaged or unsafe file
        raise EncoderError(
            f"the weights file {path} cannot be read safely as tensors ({in_one_line(error)}). "
            "Save it as .safetensors, or as a state_dict with torch.save."
        ) from error


def _plain_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((content[w] for w in _WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise EncoderError(f"the weights file {path} holds no state_dict of tensors.")
    while True:
        prefix = next((p for p in _PREFIXES if sum(k.startswith(p) for k in tensors) > len(tensors) // 2), None)
        if prefix is None:
            return tensors
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _on_a_square_grid(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Interpolate positions that timm would take as they are, as there happen to be as many on another grid.

    timm sees that only for a model's native grid; other files are taken to be of square images, as timm takes them
    wherever the numbers differ.
    """
    positions, patch_embed = tensors.get("pos_embed"), cast(Any, model).patch_embed
    grid, native = patch_embed.grid_size, cast(Any, model).pretrained_cfg["input_size"][-1] // patch_embed.patch_size[1]
    side = math.isqrt(grid[0] * grid[1])
    if positions is None or getattr(model, "pos_embed", None) is None or side * side != grid[0] * grid[1]:
        return tensors
    prefix = positions.shape[1] - side * side
    if prefix not in (0, cast(Any, model).num_prefix_tokens) or side in (grid[0], native):
        return tensors
    resampled = resample_abs_pos_embed(positions, list(grid), [side, side], num_prefix_tokens=prefix)
    return {**tensors, "pos_embed": resampled}


def _convert(tensors: dict[str, Tensor], model: nn.Module, path: Path) -> dict[str, Tensor]:
    """timm's conversion of published layouts (its ``checkpoint_filter_fn``), which also interpolates positions."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    tensors = _on_a_square_grid(tensors, model)
    extra = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(convert).parameters else {}
    try:
        return cast(dict[str, Tensor], convert(dict(tensors), model, **extra))
    except Exception as error:  # timm's converters raise whatever the first odd tensor provokes
        raise EncoderError(
            f"the weights file {path} does not fit {type(model).__name__}: {type(error).__name__} {error}"
        ) from error
