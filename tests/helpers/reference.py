"""A deliberately naive second implementation, which the tests hold the package against.

Everything the package does with care for memory is done here in the plainest way: full attention maps, one query at a
time, python loops over images, layers and heads, in double precision, from the weights of the modules. No
``scaled_dot_product_attention``, no interception. timm runs its own norms, MLPs, embeddings and residuals; what it
computes in its attention is recomputed here and then compared with what timm itself gave.

Letters: B images, L tapped layers, H heads, N tokens, T selected tokens, M prompts, D encoder width, d side width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from timm.models import register_model
from torch import Tensor, nn

SMALL = {"embed_dim": 64, "depth": 5, "num_heads": 4}


def small(of: str, suffix: str = "", **options: Any) -> str | None:
    """Register timm's model ``of`` at width 64, 5 blocks and 4 heads, its other options untouched; return its name."""
    name = f"fpt_{of}{suffix}"
    if timm.is_model(name):
        return name
    if not timm.is_model(of):
        return None  # an older timm
    entrypoint = timm.model_entrypoint(of)

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model: nn.Module = entrypoint(pretrained=pretrained, **{**SMALL, **options, **kwargs})
        return model

    build.__name__, build.__module__ = name, __name__
    register_model(build)
    return name


_FAMILIES = {
    "vit": small("vit_base_patch16_224"),
    "vit-dynamic-size": "test_vit",
    "vit-qk-norm": small("vit_base_patch16_224", "_qk_norm", qk_norm=True),
    "vit-inner-norm": small("beit3_base_patch16_224"),
    "vit-register-no-class": "test_vit2",
    "vit-register-map-pool": "test_vit3",
    "vit-rms-norm": "test_vit4" if timm.is_model("test_vit4") else None,
    "deit": small("deit_tiny_patch16_224"),
    "deit-distilled": small("deit_tiny_distilled_patch16_224"),
    "deit3": small("deit3_small_patch16_224"),
    "dinov2": small("vit_small_patch14_dinov2"),
    "dinov2-registers": small("vit_small_patch14_reg4_dinov2"),
    "dinov3": small("vit_small_patch16_dinov3"),
    "dinov3-qkv-bias": small("vit_small_patch16_dinov3_qkvb"),
    "eva": small("eva_giant_patch14_224"),
    "eva02-fused": small("eva02_tiny_patch14_224"),
    "eva02-separate": small("eva02_base_patch14_224"),
    "eva02-inner-norm": small("eva02_base_patch16_clip_224"),
    "siglip": small("vit_base_patch16_siglip_224"),
    "perception-encoder": small("vit_pe_core_tiny_patch16_384"),
    "rope-mixed": small("vit_small_patch16_rope_mixed_224"),
    "grouped-queries": small("vit_base_patch16_sapiens2", num_kv_heads=2),
    "beit": small("beit_base_patch16_224"),
    "beitv2": small("beitv2_base_patch16_224"),
}
FAMILIES: dict[str, str] = {family: name for family, name in _FAMILIES.items() if name is not None}


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter, those that start at a constant included, a value that matters; attention becomes peaky."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            owner, _, kind = name.rpartition(".")
            if "norm" in owner.rpartition(".")[2] and kind == "weight":
                parameter.copy_(1 + 0.3 * noise)
            elif any(part in name for part in ("qkv.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")):
                parameter.copy_(noise * 1.4 / math.sqrt(parameter.shape[-1]))
            elif "gamma" in name:
                parameter.copy_(0.6 + 0.2 * noise)
            elif "relative_position_bias_table" in name or "token" in name or "pos_embed" in name:
                parameter.copy_(noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            elif name != "rope.freqs":
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))


def images_for(resolution: tuple[int, int], batch: int = 2) -> Tensor:
    """Noise (B, 3, height, width), the same every time."""
    return torch.randn(batch, 3, *resolution, generator=torch.Generator().manual_seed(3))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- attention of timm


@dataclass
class Attended:
    """One image in one block."""

    maps: Tensor  # (H, N, N), rows are queries
    keys: Tensor  # (H, N, head_dim)
    values: Tensor  # (H, N, head_dim)
    output: Tensor  # (N, D), after the block's own projection


def naive_attention(attention: nn.Module, x: Tensor, grid: tuple[int, int], rope: Tensor | None) -> Attended:
    """Recompute a block's attention for one image from its weights.

    Args:
        attention: the ``attn`` module of a block.
        x: (N, D), what the block gives to it.
        grid: (rows, columns) of patches, for the relative position bias.
        rope: timm's table of sines and cosines (patches, 2 head_dim), or (H, patches, 2 head_dim); None without.
    """
    module: Any = attention
    x = x.double()
    prefix = len(x) - grid[0] * grid[1]
    maps, all_keys, all_values, outputs = [], [], [], []
    for head in range(module.num_heads):
        group = head // getattr(module, "num_kv_groups", 1)
        query = naive_norm(getattr(module, "q_norm", None), _projected(module, x, "q", head))
        keys = naive_norm(getattr(module, "k_norm", None), _projected(module, x, "k", group))
        values = _projected(module, x, "v", group)
        if rope is not None:
            table = (rope[head] if rope.ndim == 3 else rope).double()
            half = bool(module.rotate_half)
            query = torch.cat([query[:prefix], rotated(query[prefix:], table, half)])
            keys = torch.cat([keys[:prefix], rotated(keys[prefix:], table, half)])
        bias = torch.zeros(len(x), len(x), dtype=torch.float64)
        if getattr(module, "relative_position_bias_table", None) is not None:
            bias = module.relative_position_bias_table[:, head].double()[relative_positions(grid)]
        attention_map = naive_map(query, keys, bias)
        maps.append(attention_map)
        all_keys.append(keys)
        all_values.append(values)
        outputs.append(attention_map @ values)
    output = naive_norm(getattr(module, "norm", None), torch.cat(outputs, -1))
    output = output @ module.proj.weight.double().T
    if module.proj.bias is not None:
        output = output + module.proj.bias.double()
    return Attended(torch.stack(maps), torch.stack(all_keys), torch.stack(all_values), output)


def naive_map(query: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """Attention map (queries, keys) of one head, one query at a time."""
    rows = []
    for q, b in zip(query, bias, strict=True):
        scores = keys @ q / math.sqrt(len(q)) + b
        weights = torch.exp(scores - scores.max())
        rows.append(weights / weights.sum())
    return torch.stack(rows)


def naive_norm(norm: nn.Module | None, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, from the module's weights."""
    if norm is None or isinstance(norm, nn.Identity):
        return x
    module: Any = norm
    if "Rms" not in type(norm).__name__ and "RMS" not in type(norm).__name__:
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + module.eps) * module.weight.double()
    return x if getattr(module, "bias", None) is None else x + module.bias.double()


def rotated(x: Tensor, table: Tensor, half: bool) -> Tensor:
    """Rotate the pairs of channels of x (patches, head_dim): neighbours, or a half apart."""
    width = x.shape[-1]
    sin, cos = table[:, :width], table[:, width:]
    out = torch.empty_like(x)
    for i in range(width // 2):
        a, b = (i, i + width // 2) if half else (2 * i, 2 * i + 1)
        out[:, a] = x[:, a] * cos[:, a] - x[:, b] * sin[:, a]
        out[:, b] = x[:, b] * cos[:, b] + x[:, a] * sin[:, b]
    return out


@cache
def relative_positions(grid: tuple[int, int]) -> Tensor:
    """BEiT's row of the bias table for every (query, key), the class token first."""
    height, width = grid
    patches = [(row, column) for row in range(height) for column in range(width)]
    last = (2 * height - 1) * (2 * width - 1) + 3
    rows = [[last - 1] + [last - 3] * len(patches)]
    for r, c in patches:
        rows.append([last - 2])
        rows[-1] += [(r - s + height - 1) * (2 * width - 1) + c - t + width - 1 for s, t in patches]
    return torch.tensor(rows)


def _projected(module: Any, x: Tensor, which: str, head: int) -> Tensor:
    """Queries, keys or values (N, head_dim) of one head, from fused or separate weights and biases."""
    if module.qkv is not None:
        third = len(module.qkv.weight) // 3
        start = "qkv".index(which) * third
        weight = module.qkv.weight[start : start + third]
        bias = None if module.qkv.bias is None else module.qkv.bias[start : start + third]
        if getattr(module, "q_bias", None) is not None:
            bias = {"q": module.q_bias, "k": torch.zeros(third), "v": module.v_bias}[which]
        head_dim = third // module.num_heads
    else:
        layer = {"q": module.q_proj, "k": module.k_proj, "v": module.v_proj}[which]
        weight, bias = layer.weight, layer.bias
        head_dim = len(module.q_proj.weight) // module.num_heads
    own = slice(head * head_dim, (head + 1) * head_dim)
    out = x @ weight[own].double().T
    return out if bias is None else out + bias[own].double()


# ------------------------------------------------------------------------------------------------------- frozen encoder


@dataclass
class NaiveFeatures:
    """What the tapped blocks hold, before and after selection, for a batch."""

    keys: Tensor  # (B, L, H, N, head_dim)
    values: Tensor  # (B, L, H, N, head_dim)
    importance: dict[str, Tensor]  # criterion: (B, L, H, N)
    block_outputs: list[Tensor]  # L of (B, N, D), timm's own
    attention_error: float  # largest difference between timm's attention output and the naive one, relative

    def selected(self, criterion: str, count: int) -> Tensor:
        """Indices (B, L, H, T) of the most important tokens, by plain sorting."""
        importance = self.importance[criterion]
        rows = [
            sorted(range(importance.shape[-1]), key=lambda token: -row[token])[:count]
            for row in importance.flatten(0, -2).tolist()
        ]
        return torch.tensor(rows).view(*importance.shape[:-1], count)


@torch.no_grad()
def naive_encode(model: nn.Module, images: Tensor, layers: Sequence[int], patch_size: tuple[int, int]) -> NaiveFeatures:
    """Run an untouched timm model and recompute the attention of ``layers`` from its inputs."""
    blocks: Any = model.blocks
    inputs: dict[int, Tensor] = {}
    ropes: dict[int, Tensor | None] = {}
    outputs: dict[int, Tensor] = {}
    block_outputs: dict[int, Tensor] = {}
    handles = []
    for layer in layers:

        def before(module: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
            inputs[layer], ropes[layer] = args[0], kwargs.get("rope")

        def after(module: nn.Module, args: Any, output: Tensor, layer: int = layer) -> None:
            outputs[layer] = output

        def after_block(module: nn.Module, args: Any, output: Tensor, layer: int = layer) -> None:
            block_outputs[layer] = output

        handles.append(blocks[layer].attn.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(blocks[layer].attn.register_forward_hook(after))
        handles.append(blocks[layer].register_forward_hook(after_block))
    model.eval()(images)
    for handle in handles:
        handle.remove()

    grid = images.shape[-2] // patch_size[0], images.shape[-1] // patch_size[1]
    keys, values, columns, first_rows, error = [], [], [], [], 0.0
    for image in range(len(images)):
        for layer in layers:
            attended = naive_attention(blocks[layer].attn, inputs[layer][image], grid, ropes[layer])
            own = outputs[layer][image].double()
            error = max(error, float((own - attended.output).abs().max() / own.abs().max()))
            keys.append(attended.keys)
            values.append(attended.values)
            columns.append(torch.stack([column_mean(attention_map) for attention_map in attended.maps]))
            first_rows.append(attended.maps[:, 0])
    shape = (len(images), len(layers))
    return NaiveFeatures(
        keys=torch.stack(keys).unflatten(0, shape),
        values=torch.stack(values).unflatten(0, shape),
        importance={
            "global": torch.stack(columns).unflatten(0, shape),
            "class_token": torch.stack(first_rows).unflatten(0, shape),
        },
        block_outputs=[block_outputs[layer] for layer in layers],
        attention_error=error,
    )


def column_mean(attention_map: Tensor) -> Tensor:
    """Importance (N) of the tokens of one head: what all queries pay to each, averaged."""
    total = torch.zeros_like(attention_map[0])
    for row in attention_map:
        total = total + row
    return total / len(attention_map)


# ---------------------------------------------------------------------------------------------- fusion and side network


def naive_fusion(fusion: Any, features: Tensor) -> list[Tensor]:
    """Fused prompts, L of (B, M, d), from double-precision features (B, 2, L, H, T, head_dim); no dropout.

    FPT+, or where there is a projection of queries, FPT.
    """
    earlier = hasattr(fusion, "query")
    fused = []
    for layer in range(features.shape[2]):
        images = []
        for image in range(len(features)):
            prompts = []
            for prompt in fusion.prompts[layer]:
                query = fusion.query.weight @ prompt + fusion.query.bias if earlier else naive_norm(fusion.norm, prompt)
                heads = []
                for head in range(features.shape[3]):
                    keys, values = features[image, 0, layer, head], features[image, 1, layer, head]
                    width = keys.shape[-1]
                    own = query[head * width : (head + 1) * width]
                    heads.append(naive_map(own[None], keys, torch.zeros(1, len(keys)).double())[0] @ values)
                summary = torch.cat(heads) if earlier else torch.cat(heads) + prompt
                projected = fusion.out.weight @ summary + fusion.out.bias
                prompts.append(projected + prompt if earlier else projected)
            images.append(torch.stack(prompts))
        fused.append(torch.stack(images))
    return fused


def naive_side(side: Any, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Logits (B, classes) of the side network in double precision, one image and one patch at a time."""
    return torch.stack([_naive_side_image(side, images[i], [p[i] for p in prompts]) for i in range(len(images))])


def _naive_side_image(side: Any, image: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    weight, bias = side.patch_embed.proj.weight, side.patch_embed.proj.bias
    height, width = weight.shape[-2:]
    tokens = [side.class_token[0, 0]]
    for top in range(0, image.shape[1], height):
        for left in range(0, image.shape[2], width):
            patch = image[:, top : top + height, left : left + width]
            tokens.append((weight * patch).sum((1, 2, 3)) + bias)
    x = torch.stack(tokens) + side.positions[0]
    for block, prompt in zip(side.blocks, prompts, strict=True):
        x = _naive_block(block, torch.cat([x, prompt]))[: len(tokens)]
    return side.head.weight @ naive_norm(side.norm, x[0]) + side.head.bias


def _naive_block(block: Any, x: Tensor) -> Tensor:
    normed = naive_norm(block.norm1, x)
    heads = []
    for head in range(block.attn.num_heads):
        query, keys, values = (_projected(block.attn, normed, which, head) for which in "qkv")
        heads.append(naive_map(query, keys, torch.zeros(len(x), len(x)).double()) @ values)
    x = x + torch.cat(heads, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
    hidden = naive_norm(block.norm2, x) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def naive_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, averaged over images."""
    losses = [torch.log(torch.exp(row).sum()) - row[label] for row, label in zip(logits, labels, strict=True)]
    return torch.stack(losses).mean()
