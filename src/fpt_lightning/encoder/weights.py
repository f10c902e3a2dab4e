"""Weight files: read as tensors alone, brought to timm's names, loaded whole or refused."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from fpt_lightning.errors import EncoderError, a_few, in_one_line
from fpt_lightning.files import load_pickle

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
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
_ASIDE = re.compile(  # what only pretraining uses: decoders of MAE, heads of self-distillation, the texts of CLIP
    r"decoder_|decoder\.|predictor\.|projector\.|dino_head\.|ibot_head\.|dino_loss\.|ibot_patch_loss\.|queue|"
    r"text\.|logit_scale$|logit_bias$|visual\.head\."
)
_UNUSED = re.compile(  # what timm computes itself, or needs to tell a layout by
    r"(.*\.)?(mask_token|relative_position_index|num_batches_tracked|rope_embed\.periods|bias_mask)$"
)


def existing_weights(pretrained: str) -> Path:
    """The path of a weights file.

    Raises:
        EncoderError: it is not there.
    """
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise EncoderError(f"the weights file {pretrained!r} (pretrained) does not exist.")
    return path


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
    timm's own converters then rename foreign layouts and interpolate position embeddings. Of a student and its teacher
    the teacher is taken. Heads and what only pretraining uses are left aside, and unless ``pooling``, the final norm
    and pooling too. Every other tensor of the file must be in the model.

    Raises:
        EncoderError: the file cannot be read, or names or shapes do not fit; each is listed.
    """
    tensors = _plain_state_dict(_read_tensors(path), path)
    converted = _convert(tensors, model, path)
    aside = _HEADS if pooling else (*_HEADS, *_POOLING)
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith(aside)}
    given = {k: v for k, v in converted.items() if not k.startswith(aside)}
    problems = [f"missing: {k}" for k in wanted if k not in given]
    problems += [
        f"shape: {k} is {tuple(given[k].shape)}, the model has {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in given and given[k].shape != v.shape
    ]
    problems += [f"not in the model: {k}" for k in given if k not in wanted and not _UNUSED.match(k)]
    lost = _dropped(tensors, model, path, aside)
    problems += [f"not used by timm's {type(model).__name__}: {name}" for name in lost]
    if any(name.endswith("qkv.bias") for name in lost):
        problems.append("a model with qkvb in its name, such as vit_base_patch16_dinov3_qkvb, takes these biases")
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
        return load_pickle(path)
    except ValueError as error:
        reason = str(error)
    except Exception as error:  # safetensors has its own for a damaged file
        reason = in_one_line(error)
    raise EncoderError(
        f"the weights file {path} cannot be read safely as tensors ({reason}). Save it as .safetensors, or as a "
        "state_dict with torch.save."
    )


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
        tensors = _of_the_teacher(tensors)
        tensors = {k: v for k, v in tensors.items() if not _ASIDE.match(k)}
        prefix = next((p for p in _PREFIXES if sum(k.startswith(p) for k in tensors) > len(tensors) // 2), None)
        if prefix is None:
            return tensors
        others = [k for k in tensors if not k.startswith((prefix, *_HEADS))]
        if others:
            raise EncoderError(
                f"the weights file {path} has most names below {prefix!r}, but also {a_few(others)}: give a file of "
                "the encoder alone."
            )
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _of_the_teacher(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a student and its moving average in one file the latter, which is what is published and evaluated."""
    teacher, student = (re.compile(rf"(.*\.)?{name}\.") for name in ("teacher", "student"))
    both = any(teacher.match(k) for k in tensors) and any(student.match(k) for k in tensors)
    return {k: v for k, v in tensors.items() if not student.match(k)} if both else tensors


def _dropped(tensors: dict[str, Tensor], model: nn.Module, path: Path, aside: tuple[str, ...]) -> list[str]:
    """Tensors that timm's conversion loses without a word.

    Each is followed by a number that takes the place of its values; a conversion moves, joins and interpolates them. It
    joins along one dimension, so that the edges of what it gives show all that is in it.
    """
    numbered = {k: torch.full((), float(i + 1)).expand(v.shape) for i, (k, v) in enumerate(tensors.items())}
    converted = _convert(numbered, model, path)
    edges = [edge for t in converted.values() for edge in ((t[..., :1], t[:1]) if t.ndim > 1 else (t,))]
    kept = {round(value) for edge in edges for value in torch.unique(edge.float()).tolist()}
    lost = [k for i, k in enumerate(tensors) if i + 1 not in kept and k not in converted]
    return [k for k in lost if not k.startswith(aside) and not _UNUSED.match(k)]


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
