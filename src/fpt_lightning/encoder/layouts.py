"""Layouts of published weights: what is the encoder in a file, and its tensors under timm's names."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from fpt_lightning.errors import EncoderError, a_few

Tensors = dict[str, Tensor]

KNOWN_LAYOUTS = (
    "timm's and what timm converts (DeiT, MAE, DINO, DINOv2, DINOv3, BEiT, EVA, CLIP of OpenAI and open_clip), MoCo "
    "v3, and transformers' ViT, DeiT, ViTMAE, BEiT, Dinov2 with and without registers, DINOv3ViT, CLIP and SigLIP"
)

_PUBLISHED = (("teacher", "student"), ("base_encoder", "momentum_encoder"))
"""Of two encoders in one file the one that is published and evaluated, and the other."""

_HEADS = re.compile(r"(.*\.)?(\w*head|head_dist|\w*classifier|fc)\.")
_ASIDE = re.compile(  # what only pretraining uses: decoders of MAE, heads of self-distillation, the texts of CLIP
    r"(.*\.)?(decoder_|decoder\.|predictor\.|projector\.|dino_head\.|ibot_head\.|dino_loss\.|ibot_patch_loss\.|queue|"
    r"text\.|text_model\.|text_encoder\.|text_projection|visual_projection\.|logit_scale$|logit_bias$|visual\.head\.)"
)
_TEXTS_OF_OPENAI = re.compile(r"(transformer\.|token_embedding\.|positional_embedding$|ln_final\.)")
_WRAPPERS = re.compile(r"(module|_orig_mod|model|backbone|encoder)\.")


class Layout(NamedTuple):
    """Names of tensors.

    Attributes:
        anchor: the name of the patches' weights, by which the layout is told and the encoder found.
        rules: patterns and what they become, one after the other; a name that becomes "" is left aside.
    """

    anchor: str
    rules: tuple[tuple[str, str], ...]


_TIMM = Layout(
    "patch_embed.proj.weight",
    ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),  # DINOv2 counts its blocks on from chunk to chunk
)
_LAYOUTS = (
    _TIMM,
    Layout(
        "embeddings.patch_embeddings.projection.weight",  # transformers' ViT, DeiT, BEiT and Dinov2
        (
            (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
            (r"^embeddings\.distillation_token$", "dist_token"),
            (r"^embeddings\.position_embeddings$", "pos_embed"),
            (r"^layernorm\.", "norm."),
            (r"^pooler\.layernorm\.", "fc_norm."),
            (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),  # layers: in memory since transformers 5
            (r"\.(?:attention\.attention\.)?relative_position_bias\.", ".attn."),
            (r"\.attention\.attention\.(?:(q)uery|(k)ey|(v)alue)\.", r".attn.\1\2\3."),
            (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
            (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"\.(?:intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
            (r"\.(?:output\.dense|mlp\.weights_out)\.", ".mlp.fc2."),
            (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
            (r"\.lambda_([12])$", r".gamma_\1"),
        ),
    ),
    Layout(
        "embeddings.patch_embeddings.weight",  # transformers' DINOv3ViT
        (
            (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
            (r"^embeddings\.cls_token$", "cls_token"),
            (r"^embeddings\.register_tokens$", "reg_token"),
            (r"^embeddings\.mask_token$", ""),
            (r"^(?:model\.)?layer\.(\d+)\.", r"blocks.\1."),  # model: in memory since transformers 5
            (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
            (r"\.attention\.o_proj\.", ".attn.proj."),
            (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
            (r"\.mlp\.up_proj\.", ".mlp.fc1."),
            (r"\.mlp\.down_proj\.", ".mlp.fc2."),
            (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
        ),
    ),
    Layout(
        "embeddings.patch_embedding.weight",  # transformers' CLIP and SigLIP
        (
            (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
            (r"^embeddings\.class_embedding$", "cls_token"),
            (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
            (r"^embeddings\.position_ids$", ""),
            (r"^pre_layrnorm\.", "norm_pre."),
            (r"^post_layernorm\.", "norm."),
            (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
            (r"\.self_attn\.(q|k|v)_proj\.", r".attn.\1."),
            (r"\.self_attn\.out_proj\.", ".attn.proj."),
            (r"\.layer_norm([12])\.", r".norm\1."),
            (r"^head\.probe$", "attn_pool.latent"),
            (r"^head\.attention\.in_proj_(weight|bias)$", r"attn_pool.qkv.\1"),
            (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
            (r"^head\.layernorm\.", "attn_pool.norm."),
            (r"^head\.mlp\.", "attn_pool.mlp."),
        ),
    ),
)


def encoder_of(tensors: Tensors, source: str) -> Tensors:
    """The tensors of the encoder in a file, under timm's names where the layout is one of transformers.

    Of a student and its teacher the teacher is taken, of MoCo's two encoders the base encoder. What only pretraining
    uses and the heads beside the encoder are left aside. Other layouts are left to timm's own converters.

    Args:
        tensors: of the file, by name.
        source: what they are from, for errors.

    Raises:
        EncoderError: several encoders, or an encoder beside something unknown.
    """
    for one, other in _PUBLISHED:
        if all(any(_has_part(name, part) for name in tensors) for part in (one, other)):
            tensors = {k: v for k, v in tensors.items() if not _has_part(k, other)}
    tensors = {k: v for k, v in tensors.items() if not _ASIDE.match(k)}
    found = {
        name.removesuffix(layout.anchor): layout
        for layout in _LAYOUTS
        for name in tensors
        if f".{name}".endswith(f".{layout.anchor}")
    }
    if not found:
        return _for_timm(tensors)
    if len(found) > 1:
        raise EncoderError(
            f"{source} holds {len(found)} encoders, below {' and '.join(map(repr, sorted(found)))}: give a file of one."
        )
    ((prefix, layout),) = found.items()
    others = [k for k in tensors if not k.startswith(prefix) and not _HEADS.match(k)]
    if others:
        raise EncoderError(
            f"{source} has an encoder below {prefix!r}, but also {a_few(others)}: give a file of the encoder alone."
        )
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if layout is _TIMM:
        return _renamed(own, layout)
    if own[layout.anchor].ndim != 4:
        return own  # patches in an order that timm does not know, as SigLIP 2 with native aspect ratios has them
    return _reshaped(_renamed(own, layout))


def fold_layer_scales(tensors: Tensors, model: Tensors) -> Tensors:
    """Multiply the scales of what blocks add (LayerScale) into the layer before them, where a model has none.

    It computes the same. UNI has such scales, timm's ``vit_large_patch16_224`` does not.

    Args:
        tensors: by timm's names.
        model: the model's own.
    """
    folded = dict(tensors)
    for name in tensors:
        match = re.fullmatch(r"(blocks\.\d+)\.(?:ls([12])\.gamma|gamma_([12]))", name)
        if match is None or name in model:
            continue
        layer = f"{match[1]}.attn.proj" if "1" in match.groups()[1:] else f"{match[1]}.mlp.fc2"
        parts = [part for part in (f"{layer}.weight", f"{layer}.bias") if part in tensors]
        if not parts or any(tensors[part].shape[:1] != tensors[name].shape for part in parts):
            continue
        scale = folded.pop(name).float()  # whose product a half may not hold
        for part in parts:
            rows = scale.reshape(-1, *[1] * (tensors[part].ndim - 1))
            folded[part] = tensors[part].float() * rows
    return folded


def _has_part(name: str, part: str) -> bool:
    return f".{part}." in f".{name}"


def _for_timm(tensors: Tensors) -> Tensors:
    """Tensors in a layout that timm's converters may know by its own names, such as OpenAI's of CLIP."""
    while tensors and (wrapper := _WRAPPERS.match(next(iter(tensors)))):
        if not all(name.startswith(wrapper[0]) for name in tensors):
            break
        tensors = {k.removeprefix(wrapper[0]): v for k, v in tensors.items()}
    texts = _TEXTS_OF_OPENAI if "visual.conv1.weight" in tensors else None
    return {k: v for k, v in tensors.items() if texts is None or not texts.match(k)}


def _renamed(tensors: Tensors, layout: Layout) -> Tensors:
    renamed: Tensors = {}
    for old, tensor in tensors.items():
        new = old
        for pattern, replacement in layout.rules:
            new = re.sub(pattern, replacement, new)
        if new:
            renamed[old if new in renamed else new] = tensor  # two of one name: neither is lost unseen
    return renamed


def _reshaped(tensors: Tensors) -> Tensors:
    """Tensors of timm's names in timm's shapes: queries, keys and values in one, a class token (1, 1, D)."""
    done = dict(tensors)
    if "cls_token" in tensors:
        done["cls_token"] = tensors["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in tensors and tensors["pos_embed"].ndim == 2:
        done["pos_embed"] = tensors["pos_embed"][None]
    for name in tensors:
        attention, _, kind = name.rpartition(".q.")
        parts = [f"{attention}.{part}.{kind}" for part in ("q", "k", "v")]
        if attention and len({tensors[part].shape for part in parts if part in tensors}) > 1:
            continue
        if attention and all(part in tensors for part in parts):
            done[f"{attention}.qkv.{kind}"] = torch.cat([done.pop(part) for part in parts])
        elif attention and kind == "bias" and parts[2] in tensors:  # DINOv3 and BEiT have none of the keys
            done |= {f"{attention}.q_bias": done.pop(parts[0]), f"{attention}.v_bias": done.pop(parts[2])}
        if ".mlp.fc1." in name and name.replace(".fc1.", ".fc1_g.") in tensors:
            done[name.replace(".fc1.", ".fc1_x.")] = done.pop(name)
        if name.startswith("attn_pool.qkv."):
            kind, joined = name.rpartition(".")[2], done.pop(name)
            width = joined.shape[0] // 3
            done |= {f"attn_pool.q.{kind}": joined[:width], f"attn_pool.kv.{kind}": joined[width:]}
    return done
