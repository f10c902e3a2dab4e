"""Weights of the encoder: loaded whole or refused, whatever layout they were published in."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from fpt_lightning.encoder.layouts import KNOWN_LAYOUTS, Tensors, encoder_of, fold_layer_scales
from fpt_lightning.encoder.weight_files import read_config, read_weights
from fpt_lightning.errors import EncoderError, a_few

_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "teacher", "student", "encoder")
ENCODERS = (
    *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
    *(f"vit_{size}_patch14_{kind}dinov2" for kind in ("", "reg4_") for size in ("small", "base", "large", "giant")),
    *(f"vit_{size}_patch16_dinov3" for size in ("small", "base", "large", "huge_plus")),
    *(f"vit_{size}_patch16_dinov3_qkvb" for size in ("small", "base", "large", "huge_plus")),
    *("vit_base_patch8_224", "vit_base_patch32_224", "vit_base_patch16_siglip_224", "vit_huge_patch14_224"),
)
"""Names of timm that a file of weights is tried on, in this order."""

_POSITIONS = ("pos_embed", "relative_position", "rel_pos", "rope")
_HEADS = ("head.", "head_dist.", "classifier.", "fc.", "pooler.")
_POOLING = ("fc_norm.", "norm.", "attn_pool.")  # what follows the blocks; the frozen pass does not use it
_PATCHES = "patch_embed.proj.weight"
_UNUSED = re.compile(  # what timm computes itself, or needs to tell a layout by
    r"(.*\.)?(mask_token|relative_position_index|num_batches_tracked|rope_embed\.periods|bias_mask)$"
)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": F.gelu,  # timm has it exact where the difference is too small to matter (SigLIP)
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters, except those that interpolation to a resolution changes and its head."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith((*_HEADS, *_POOLING)) and not any(part in name for part in _POSITIONS):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def without_head(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a timm model by name, but for its classifier."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_HEADS)}


def load_weights(model: nn.Module, path: Path, pooling: bool = False) -> None:
    """Load local weights into a timm model; only tensors are read, no code is run.

    See ``fit_weights``. A ``config.json`` of transformers beside them is held against the model.

    Args:
        model: timm's.
        path: of a weights file, of an index of shards (``*.index.json``), or of a folder with either.
        pooling: whether the final norm and pooling must be there.

    Raises:
        EncoderError: files that are not there or cannot be read, or weights that do not fit.
    """
    _check_config(path, model)
    fit_weights(model, read_weights(path), f"the weights file {path}", pooling)


def fit_weights(model: nn.Module, content: Any, source: str, pooling: bool = False) -> None:
    """Load what a weights file held into a timm model.

    Wrappers (``model``, ``state_dict``, ``teacher``, ...) and prefixes (``module.``, ``backbone.``, ...) are taken off,
    published layouts are brought to timm's names, by ``fpt_lightning.encoder.layouts`` and by timm's own converters,
    which also interpolate position embeddings. Heads and what only pretraining uses are left aside, and unless
    ``pooling``, the final norm and pooling too. Every other tensor must be in the model.

    Args:
        model: timm's.
        content: a ``state_dict``, or mappings around one.
        source: what it is from, for errors.
        pooling: whether the final norm and pooling must be there.

    Raises:
        EncoderError: names or shapes do not fit; they are listed, with some of both sides. The model is as it was.
    """
    published = _state_dict(content, source)
    tensors = encoder_of(published, source)
    own: Tensors = model.state_dict()
    converted = fold_layer_scales(_convert(tensors, model, source), own)
    aside = _HEADS if pooling else (*_HEADS, *_POOLING)
    wanted = {k: v for k, v in own.items() if not k.startswith(aside)}
    given = {k: v for k, v in converted.items() if not k.startswith(aside)}
    dropped = [k for k in _dropped(tensors, model, source) if not k.startswith(aside) and not _is_unused(k, tensors[k])]
    patches = wanted[_PATCHES]
    for tensor in tensors.values():  # of another size, which timm would interpolate without a word
        if tensor.ndim == 4 and tensor.shape[:2] == patches.shape[:2] and tensor.shape != patches.shape:
            given[_PATCHES] = tensor
    if misfits := _misfits(given, wanted, dropped):
        raise EncoderError(f"{source} does not fit {type(model).__name__}:{misfits}{_both(published, model)}")
    fitting = {k: v for k, v in converted.items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(fitting, strict=False)


def encoder_of_weights(path: Path) -> str:
    """The first of ``ENCODERS`` that has every tensor of a weights file, and no other.

    The number of heads, which no tensor shows, is held against a ``config.json`` beside the file, where there is one.

    Args:
        path: of a file, an index of shards or a folder.

    Raises:
        EncoderError: files that are not there or cannot be read, or that fit none.
    """
    source, content = f"the weights file {path}", read_weights(path)
    shapes = {tensor.shape for tensor in _state_dict(content, source).values()}
    for name in ENCODERS:
        with torch.device("meta"):
            model: Any = timm.create_model(name, pretrained=False)
        if model.patch_embed.proj.weight.shape not in shapes:
            continue
        try:
            _check_config(path, model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that nothing is copied where no memory is
                fit_weights(model, content, source)
        except EncoderError:
            continue
        return name
    raise EncoderError(
        f"{source} fits none of the encoders that are tried ({a_few(ENCODERS, len(ENCODERS))}): write model.encoder "
        "and model.pretrained yourself; fit says what does not fit."
    )


def _misfits(given: Tensors, wanted: Tensors, dropped: list[str]) -> str:
    """What of a file and of a model has no counterpart, one line a kind; empty where all fits."""
    shapes = {k: (tuple(given[k].shape), tuple(v.shape)) for k, v in wanted.items() if k in given}
    odd = [k for k, v in given.items() if k not in wanted and not _is_unused(k, v)]
    kinds = {
        "missing": [k for k in wanted if k not in given],
        "shape": [f"{k} {one} instead of {other}" for k, (one, other) in shapes.items() if one != other],
        "not in the model": odd,
        "not used by timm's conversion": dropped,
    }
    lines = [f"{kind}: {a_few(names)}" for kind, names in kinds.items() if names]
    if any(name.endswith(("qkv.bias", "q_bias")) for name in [*odd, *dropped]):
        lines.append("a model with qkvb in its name, such as vit_base_patch16_dinov3_qkvb, takes such biases")
    return "".join(f"\n  {line}" for line in lines)


def _is_unused(name: str, tensor: Tensor) -> bool:
    """Whether nothing is lost without a tensor; a bias of zeros adds nothing (DINOv3 was published with such)."""
    return _UNUSED.match(name) is not None or (name.endswith("bias") and not tensor.any())


def _both(tensors: Tensors, model: nn.Module) -> str:
    """A few names of a file and of a model, with their shapes, and the layouts that are known."""
    lines = [
        f"{whose}: {', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in list(named.items())[:4])}, ..."
        for whose, named in (("the file has", tensors), ("the model has", model.state_dict()))
    ]
    return "".join(f"\n  {line}" for line in [*lines, f"known layouts: {KNOWN_LAYOUTS}"])


def _state_dict(content: Any, source: str) -> Tensors:
    while isinstance(content, Mapping):
        inner = next((content[w] for w in _WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise EncoderError(f"{source} holds no state_dict of tensors.")
    return tensors


def _check_config(path: Path, model: nn.Module) -> None:
    """Hold against a model what weights do not show and a ``config.json`` of transformers does."""
    file, config = read_config(path)
    images = config.get("vision_config")  # of a model of images and texts
    config = images if isinstance(images, dict) else config
    block = cast(Any, model).blocks[0]
    heads = config.get("num_attention_heads", block.attn.num_heads)
    if heads != block.attn.num_heads:
        raise EncoderError(f"{file} says {heads} heads, timm's model has {block.attn.num_heads}: give another encoder.")
    gated = config.get("use_swiglu_ffn") or config.get("use_gated_mlp")
    name = "" if gated else str(config.get("hidden_act"))
    x = torch.linspace(-4, 4, 33)
    if name in _ACTIVATIONS and not torch.allclose(block.mlp.act(x), _ACTIVATIONS[name](x), atol=2e-3):
        raise EncoderError(
            f"{file} says hidden_act {name!r}, timm's model has {block.mlp.act}: give another encoder, "
            "such as one with quickgelu in its name."
        )


def _dropped(tensors: Tensors, model: nn.Module, source: str) -> list[str]:
    """Tensors that timm's conversion loses without a word.

    Each is followed by a number that takes the place of its values; a conversion moves, joins and interpolates them. It
    joins along one dimension, so that the edges of what it gives show all that is in it.
    """
    numbered = {k: torch.full((), float(i + 1)).expand(v.shape) for i, (k, v) in enumerate(tensors.items())}
    converted = _convert(numbered, model, source)
    edges = [edge for t in converted.values() for edge in ((t[..., :1], t[:1]) if t.ndim > 1 else (t,))]
    kept = {round(value) for edge in edges for value in torch.unique(edge.float()).tolist()}
    return [k for i, k in enumerate(tensors) if i + 1 not in kept and k not in converted]


def _on_a_square_grid(tensors: Tensors, model: nn.Module) -> Tensors:
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


def _convert(tensors: Tensors, model: nn.Module, source: str) -> Tensors:
    """timm's conversion of published layouts (its ``checkpoint_filter_fn``), which also interpolates positions."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    extra = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(convert).parameters else {}
    try:
        return cast(Tensors, convert(_on_a_square_grid(dict(tensors), model), model, **extra))
    except Exception as error:  # timm's converters raise whatever the first odd tensor provokes
        raise EncoderError(
            f"{source} does not fit {type(model).__name__}: {type(error).__name__} {error}{_both(tensors, model)}"
        ) from error
