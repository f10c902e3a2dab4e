"""The frozen vision transformer and the tap on its attention (paper, sections 3.2 and 3.5)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models import load_state_dict_from_hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fpt_lightning.encoder.config import EncoderConfig, is_in_a_repository
from fpt_lightning.encoder.execution import autocast, use_fused_attention
from fpt_lightning.encoder.precision import HALF, full_precision, halve_linear_layers
from fpt_lightning.encoder.selection import (
    attention_with_importance,
    class_token_importance,
    number_of_tokens,
    select_tokens,
)
from fpt_lightning.encoder.weight_files import existing_weights
from fpt_lightning.encoder.weights import fit_weights, load_weights, weights_digest
from fpt_lightning.errors import ConfigurationError, EncoderError

_SEEDING = threading.Lock()  # timm draws from the global generator


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
    embeddings, which makes one mechanism for every family of timm. What follows the last tapped block is left out of
    the model, and of that block, where there is a class token, only what it becomes is computed. Threads may share an
    encoder: it holds nothing of a call.

    Args:
        config: the encoder and what to select.
        resolution: (height, width) of the images in pixels; position embeddings are interpolated by timm.

    Raises:
        ConfigurationError: the resolution is not a multiple of the patch size.
        EncoderError: weights that do not fit.
    """

    @full_precision()
    def __init__(self, config: EncoderConfig, resolution: tuple[int, int]) -> None:
        super().__init__()
        self.config = config
        self.resolution = resolution
        self.shape = config.shape
        self.tokens = self.shape.tokens(resolution)
        self.selected = number_of_tokens(self.tokens, config.token_ratio)
        self.model = build_encoder(config, resolution)
        self.digest = "" if next(self.model.parameters()).is_meta else weights_digest(self.model)
        vit, last = cast(Any, self.model), config.tapped_layers[-1]
        vit.reset_classifier(0)  # of 21,843 classes, it would be a fifth of a ViT-B
        vit.blocks, vit.norm = vit.blocks[: last + 1], nn.Identity()
        if self.shape.class_token:
            for part in (vit.blocks[last].attn.proj, vit.blocks[last].mlp):
                part.register_forward_pre_hook(_class_token_alone)
        self.requires_grad_(False)
        self.eval()
        if config.precision in HALF:
            halve_linear_layers(self.model, config.precision)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Encoded:
        """The frozen pass, in the configuration's precision whatever autocast and PyTorch's settings say.

        Args:
            images: (B, 3, height, width), normalised, at this encoder's resolution.

        Raises:
            ConfigurationError: images of another size than the resolution.
            EncoderError: attention that cannot be intercepted.
        """
        if images.shape[-2:] != self.resolution:
            raise ConfigurationError(
                f"the images are {images.shape[-2]} x {images.shape[-1]} pixels, but the encoder was built for the "
                f"resolution {self.resolution[0]} x {self.resolution[1]}."
            )
        tap = _AttentionTap(self.config, self.selected)
        with full_precision(), autocast(images.device, HALF.get(self.config.precision)), tap:
            output: Tensor = cast(Any, self.model).forward_features(images.float())
        features, indices = tap.collect()
        pooled = output[:, 0] if self.shape.class_token else output[:, self.shape.prefix_tokens :].mean(1)
        return Encoded(features, indices, pooled.float())


def _class_token_alone(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Take the class token out of (B, N, D); what is made of it is added to all tokens, and to it rightly."""
    return (inputs[0][:, :1],)


class _AttentionTap(TorchFunctionMode):
    """Intercepts the attention calls of one pass, one a block, and keeps keys and values of tapped blocks' tokens."""

    def __init__(self, config: EncoderConfig, selected: int) -> None:
        super().__init__()
        self.config, self.selected = config, selected
        self.calls = 0
        self.keys_values: list[Tensor] = []
        self.indices: list[Tensor] = []

    def collect(self) -> tuple[Tensor, Tensor]:
        """``features`` and ``indices`` as ``Encoded`` has them."""
        blocks = self.config.tapped_layers[-1] + 1
        if self.calls != blocks:
            raise EncoderError(
                f"{blocks} blocks of {self.config.name} called scaled_dot_product_attention {self.calls} times, so "
                "their keys and values cannot be taken; unset TIMM_FUSED_ATTN if it is 0."
            )
        return torch.stack(self.keys_values, 2).float(), torch.stack(self.indices, 1)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        block, self.calls = self.calls, self.calls + 1
        if block not in self.config.tapped_layers:
            return func(*args, **(kwargs or {}))
        return self._attention(block, func, *args, **(kwargs or {}))

    def _attention(
        self,
        block: int,
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
        if is_causal or enable_gqa or query.shape != key.shape:
            raise EncoderError(f"block {block} of {self.config.name} has no plain self-attention to tap.")
        if self.config.criterion == "global":
            output, importance = attention_with_importance(query, key, value, bias=attn_mask, scale=scale)
        else:
            output = func(query, key, value, attn_mask=attn_mask, scale=scale)
            importance = class_token_importance(query, key, bias=attn_mask, scale=scale)
        keys_values, indices = select_tokens(key, value, importance, self.selected)
        self.keys_values.append(keys_values)
        self.indices.append(indices)
        return output


def check_finite(encoded: Encoded, names: Sequence[str], config: EncoderConfig) -> None:
    """Refuse what an encoder gave that is not finite.

    Args:
        encoded: of B images.
        names: of these.
        config: of the encoder.

    Raises:
        EncoderError: naming the first such image.
    """
    finite = [part.flatten(1).isfinite().all(1) for part in (encoded.features, encoded.pooled)]
    sound = torch.stack(finite).all(0).tolist()
    if all(sound):
        return
    if config.precision == "fp16":
        remedy = "the largest number of fp16 is 65504: use model.encoder_precision bf16 or fp32"
    else:
        remedy = "its weights are damaged, or do not suit it: give others as model.pretrained"
    raise EncoderError(
        f"the features of {names[sound.index(False)]} that {config.name} gives in {config.precision} are not finite; "
        f"{remedy}."
    )


@full_precision()
def build_encoder(config: EncoderConfig, resolution: tuple[int, int], pooling: bool = False) -> nn.Module:
    """timm's model at a resolution, on the CPU or on "meta"; a random initialisation is the same every time.

    It leaves the random generators of all devices as they were. Threads build one after the other, but what another
    thread draws from PyTorch's global generator meanwhile is seeded too.

    Args:
        config: its name and weights.
        resolution: (height, width) of the images in pixels; position embeddings are interpolated by timm.
        pooling: whether a weights file must hold what follows the blocks: the final norm and pooling.

    Raises:
        EncoderError: weights that are out of reach or do not fit.
    """
    device = torch.empty(0).device  # that a context asks for, such as Lightning's around ``configure_model``
    with device if device.type == "meta" else torch.device("cpu"):
        model, tensors = _created(config, resolution)
        if tensors is not None:  # not by timm, which may leave out what does not fit
            fit_weights(model, tensors, f"the weights file of {config.name}", pooling)
        if config.weights_path is not None:
            load_weights(model, existing_weights(config.weights_path), pooling)
    use_fused_attention(model)
    return model


def _created(config: EncoderConfig, resolution: tuple[int, int]) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """timm's model, and the weights of a repository that are still to be loaded."""
    remote = config.pretrained is True and config.weights_path is None
    hub = config.name.removeprefix("hf-hub:") if remote and is_in_a_repository(config.name) else None
    fixed: dict[str, Any] = {"dynamic_img_size": False} if config.shape.any_size else {}  # else resized in each call
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the generators of all devices
        try:
            model: nn.Module = timm.create_model(
                config.name, pretrained=remote and hub is None, img_size=resolution, **fixed
            )
            return model, None if hub is None else load_state_dict_from_hf(hub, weights_only=True)
        except Exception as error:  # a hub that is out of reach, or has no such weights, fails in many ways
            if not remote:
                raise
            raise EncoderError(
                f"timm cannot load the published weights of {config.name} ({type(error).__name__}: {error}). Without a "
                "network, give a local file as model.pretrained."
            ) from error
