"""Layouts of published weights: the models of transformers themselves, and what other repositories publish."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import FrozenEncoder, build_encoder
from fpt_lightning.encoder.weights import fit_weights
from fpt_lightning.errors import EncoderError
from reference import FAMILIES, assert_close, images_for, randomise, small
from weight_files import assert_encodes_like, prefixed, save, source_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# ---------------------------------------------------------------------------------------------- models of transformers

SHAPE: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "image_size": 64}
VIT = SHAPE | {"intermediate_size": 256, "patch_size": 16}
DINOV2 = SHAPE | {"image_size": 56, "patch_size": 14}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GELU = {"hidden_act": "gelu"}  # timm's SigLIP has it exact

CLIP = small("vit_base_patch16_clip_quickgelu_224")
GIANT = small("vit_giant_patch14_dinov2", mlp_ratio=5.5)  # whose gated MLP rounds its width up
GATED = small("vit_huge_plus_patch16_dinov3_qkvb")

MODELS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "ViT": ("ViTModel", VIT | {"layer_norm_eps": 1e-6}, FAMILIES["vit"]),
    "ViT with a head": ("ViTForImageClassification", VIT | {"layer_norm_eps": 1e-6}, FAMILIES["vit"]),
    "ViTMAE": (
        "ViTMAEForPreTraining",
        VIT | {"layer_norm_eps": 1e-6, "mask_ratio": 0.0, "decoder_num_hidden_layers": 1},
        FAMILIES["vit"],
    ),
    "DeiT": (
        "DeiTForImageClassificationWithTeacher",
        VIT | {"layer_norm_eps": 1e-6},
        FAMILIES["deit-distilled"],
    ),
    "BEiT": (
        "BeitForImageClassification",
        VIT | {"layer_norm_eps": 1e-6, "use_relative_position_bias": True},
        FAMILIES["beit"],
    ),
    "Dinov2": ("Dinov2Model", DINOV2, FAMILIES["dinov2"]),  # and RAD-DINO
    "Dinov2 with a head": ("Dinov2ForImageClassification", DINOV2, FAMILIES["dinov2"]),
    "Dinov2 with SwiGLU": ("Dinov2Model", DINOV2 | {"use_swiglu_ffn": True}, GIANT),
    "Dinov2WithRegisters": ("Dinov2WithRegistersModel", DINOV2, FAMILIES["dinov2-registers"]),
    "DINOv3": ("DINOv3ViTModel", VIT | {"num_register_tokens": 4}, FAMILIES.get("dinov3-qkv-bias")),
    "DINOv3 with SwiGLU": (
        "DINOv3ViTModel",
        VIT | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
        GATED,
    ),
    "CLIP": ("CLIPModel", {"vision_config": VIT, "text_config": TEXT, "projection_dim": 8}, CLIP),
    "CLIP's images": ("CLIPVisionModel", VIT, CLIP),
    "SigLIP": ("SiglipModel", {"vision_config": VIT | GELU, "text_config": TEXT}, FAMILIES["siglip"]),
    "SigLIP's images": ("SiglipVisionModel", VIT | GELU, FAMILIES["siglip"]),
}
TOWERS = ("vit", "deit", "beit", "dinov2", "vision_model")


def of_transformers(kind: str) -> tuple[Any, Any, str]:
    """A model whose weights all matter, its image encoder, and the name of timm's."""
    model_class, settings, name = MODELS[kind]
    if name is None:
        pytest.skip("this timm has no such model")
    whole = getattr(transformers, model_class)
    model = whole(whole.config_class(**settings)).eval()
    tower = next((getattr(model, part) for part in TOWERS if hasattr(model, part)), model)
    randomise(tower)
    return model, tower, name


def images_of(model: nn.Module) -> Tensor:
    size = 56 if model.patch_embed.patch_size[0] == 14 else 64  # type: ignore[union-attr,index]
    return images_for((size, size))


def assert_same_tokens(path: Path, tower: Any, name: str) -> None:
    """timm's model with the file's weights gives the tokens of transformers' model, and pools them as SigLIP does."""
    size = tower.config.image_size
    model = build_encoder(EncoderConfig(name, pretrained=str(path)), (size, size), pooling=True).eval()
    images = images_of(model)
    with torch.no_grad():
        tokens, output = model.forward_features(images), tower(images)  # type: ignore[operator]
        expected = output.last_hidden_state
        if "ids_restore" in output:  # MAE shuffles its patches
            patches = expected[:, 1:].gather(1, output.ids_restore[..., None].expand(-1, -1, 64))
            expected = torch.cat([expected[:, :1], patches], 1)
        if hasattr(tower, "pre_layrnorm"):  # CLIP normalises the class token alone
            expected, tokens = output.pooler_output, tokens[:, 0]
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.3
        if hasattr(tower, "head"):
            torch.testing.assert_close(model(images), output.pooler_output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_transformers(tmp_path: Path, kind: str) -> None:
    model, tower, name = of_transformers(kind)
    model.save_pretrained(tmp_path)
    assert_same_tokens(tmp_path, tower, name)


@pytest.mark.parametrize("kind", ["ViT with a head", "BEiT", "Dinov2WithRegisters", "DINOv3"])
def test_models_of_transformers_saved_by_a_trainer(tmp_path: Path, kind: str) -> None:
    """Their names in memory, which transformers 5 changed, below the module's."""
    model, tower, name = of_transformers(kind)
    save({"state_dict": prefixed(model.state_dict(), "model."), "epoch": 1}, tmp_path / "last.ckpt")
    assert_same_tokens(tmp_path / "last.ckpt", tower, name)


def test_shards_of_a_model_of_transformers(tmp_path: Path) -> None:
    model, tower, name = of_transformers("Dinov2")
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert_same_tokens(path, tower, name)


def test_positions_that_older_transformers_count(tmp_path: Path) -> None:
    model, tower, name = of_transformers("CLIP")
    counted = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    assert_same_tokens(Path(save(model.state_dict() | counted, tmp_path / "pytorch_model.bin")), tower, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 8}, "config.json says 8 heads, timm's model has 4"),
        ({"hidden_act": "quick_gelu"}, "says hidden_act 'quick_gelu', timm's model has GELU.*quickgelu"),
    ],
)
def test_a_config_is_held_against_the_model(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """In what the shapes of weights do not show."""
    transformers.ViTModel(transformers.ViTConfig(**VIT | change)).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(EncoderError, match=message):
            FrozenEncoder(EncoderConfig(FAMILIES["vit"], pretrained=str(path)), (64, 64))


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "DINOv3", "SigLIP's images"])
def test_no_tensor_of_transformers_is_missed(tmp_path: Path, kind: str) -> None:
    """A file without any one of the first block's tensors, or with one more, is refused."""
    published, tower, name = of_transformers(kind)
    published.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    size = tower.config.image_size
    model = build_encoder(EncoderConfig(name, pretrained=False), (size, size))
    block = [k for k in tensors if re.search(r"layers?\.0\.", k)]
    assert len(block) > 10
    for gone in block:
        with pytest.raises(EncoderError, match=r"missing: blocks\.0\."):
            fit_weights(model, {k: v for k, v in tensors.items() if k != gone}, "a file")
    with pytest.raises(EncoderError, match=r"not in the model: .*adapter"):
        fit_weights(model, tensors | {block[0].replace(".0.", ".0.adapter."): torch.ones(3)}, "a file")


# --------------------------------------------------------------------------------------------------- other repositories


def test_published_layout_of_moco_v3(tmp_path: Path) -> None:
    """Its linear classification takes the base encoder, not the momentum encoder."""
    model, other = source_model(), timm.create_model("test_vit", img_size=64)
    encoders = {}
    for name, own in (("base_encoder", model), ("momentum_encoder", other)):
        tensors = {k: v for k, v in own.state_dict().items() if not k.startswith("head.")}
        tensors |= {"head.0.weight": torch.ones(8, 64), "head.1.running_mean": torch.ones(8)}
        encoders |= prefixed(tensors, f"module.{name}.")
    published = {**encoders, "module.predictor.0.weight": torch.ones(8, 8)}
    content = {"epoch": 300, "arch": "vit_base", "state_dict": published, "optimizer": {"state": {}}}
    assert_encodes_like(save(content, tmp_path / "vit-b-300ep.pth.tar"), model)


def test_published_layout_of_dinov2_in_training(tmp_path: Path) -> None:
    """Blocks in chunks, each of which counts on; the teacher beside its head."""
    name = FAMILIES["dinov2"]
    model = source_model(name, (56, 56))
    chunk = {f"blocks.{block}.": f"blocks.{block // 2}.{block}." for block in range(5)}
    own = {re.sub(r"^blocks\.\d+\.", lambda match: chunk[match[0]], k): v for k, v in model.state_dict().items()}
    assert {"blocks.0.1.norm1.weight", "blocks.2.4.mlp.fc2.bias"} <= set(own)
    teacher = prefixed(own | {"mask_token": torch.zeros(1, 64)}, "backbone.")
    teacher["dino_head.mlp.0.weight"] = torch.ones(2, 2)
    path = save({"teacher": teacher}, tmp_path / "teacher_checkpoint.pth")
    encoder = FrozenEncoder(EncoderConfig(name, pretrained=path), (56, 56))
    for key, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layer_scales_that_a_model_has_not_are_folded_into_its_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """As UNI has them, which its owners build with ``init_values``: the same function of images."""
    name = FAMILIES["vit"]
    original = timm.create_model(name, img_size=64, init_values=1e-5).eval()
    randomise(original)
    for key, parameter in original.named_parameters():
        if key.endswith("gamma"):
            parameter.data *= 1e-3  # so small that halves do not hold a product
    published = {k: v.to(dtype) for k, v in original.state_dict().items()}
    original.load_state_dict(published)
    path = save(published, tmp_path / "pytorch_model.bin")
    model = build_encoder(EncoderConfig(name, pretrained=path), (64, 64)).eval()
    images = images_for((64, 64))
    with torch.no_grad():
        assert_close(model.forward_features(images), original.forward_features(images))
    assert not any("ls1" in key for key in model.state_dict())


def in_layout_of_openai(model: nn.Module) -> dict[str, Tensor]:
    swaps = {
        r"^patch_embed\.proj\.": "conv1.",
        r"^pos_embed$": "positional_embedding",
        r"^cls_token$": "class_embedding",
        r"^norm_pre\.": "ln_pre.",
        r"^norm\.": "ln_post.",
        r"\.norm(\d)\.": r".ln_\1.",
        r"^blocks\.": "transformer.resblocks.",
        r"\.qkv\.": ".in_proj_",
        r"\.attn\.proj\.": ".attn.out_proj.",
        r"\.fc1\.": ".c_fc.",
        r"\.mlp\.fc2\.": ".mlp.c_proj.",
    }
    published = {}
    for key, tensor in model.state_dict().items():
        for pattern, name in swaps.items():
            key = re.sub(pattern, name, key)
        if not key.startswith("head."):
            published[f"visual.{key}"] = tensor[0] if "positional" in key else tensor
    published["visual.class_embedding"] = published["visual.class_embedding"].flatten()
    return published | {"visual.proj": torch.ones(64, 8)}


def test_published_layout_of_openai_s_clip(tmp_path: Path) -> None:
    assert CLIP is not None
    model = source_model(CLIP)
    texts = {f"transformer.resblocks.{i}.ln_1.weight": torch.ones(8) for i in range(2)}
    texts |= {"token_embedding.weight": torch.ones(9, 8), "positional_embedding": torch.ones(7, 8)}
    texts |= {"ln_final.weight": torch.ones(8), "text_projection": torch.ones(8, 8), "logit_scale": torch.ones(())}
    published = {**texts, **in_layout_of_openai(model)}
    for name, content in (("clip.pt", published), ("ddp.pt", {"state_dict": prefixed(published, "module.")})):
        assert_encodes_like(save(content, tmp_path / name), model, CLIP)
    path = save(published | {"adapter.weight": torch.ones(2)}, tmp_path / "more.pt")
    with pytest.raises(EncoderError, match=r"not used by timm's conversion: adapter\.weight"):
        FrozenEncoder(EncoderConfig(CLIP, pretrained=path), (64, 64))


def test_biases_of_zeros_are_no_loss(tmp_path: Path) -> None:
    """DINOv3 was published with such; timm has models without them."""
    without, with_biases = (FAMILIES.get(name) for name in ("dinov3", "dinov3-qkv-bias"))
    if without is None or with_biases is None:
        pytest.skip("this timm has no DINOv3")
    model = source_model(without)
    published = {k.replace("reg_token", "storage_tokens"): v for k, v in model.state_dict().items()}
    published |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(192) for i in range(5)}
    assert_encodes_like(save(published, tmp_path / "dinov3.pth"), model, without)


# --------------------------------------------------------------------------------------------------- what is not known


def naflex(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """SigLIP 2 with native aspect ratios: patches as vectors, their channels last."""
    return {
        "vision_model.embeddings.patch_embedding.weight": own["patch_embed.proj.weight"].flatten(1),
        "vision_model.encoder.layers.0.layer_norm1.weight": own["blocks.0.norm1.weight"],
    }


UNKNOWN: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "other names": (
        lambda own: {f"trunk.stage_{k}".replace("proj", "conv"): v for k, v in own.items()},
        r"(?s)missing: cls_token, .* and \d+ more\n.*not in the model: trunk\..*the file has: trunk\.stage_cls_token "
        r"\(1, 1, 64\), .*\n.*the model has: cls_token \(1, 1, 64\), .*\n.*known layouts: timm's .*DINOv3ViT, CLIP",
    ),
    "two encoders": (
        lambda own: prefixed(own, "online.") | prefixed(own, "target."),
        "holds 2 encoders, below 'online.' and 'target.': give a file of one",
    ),
    "SigLIP 2 NaFlex": (naflex, r"not in the model: embeddings\.patch_embedding\.weight"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_layouts_show_both_sides(tmp_path: Path, kind: str) -> None:
    change, message = UNKNOWN[kind]
    path = save(change(dict(source_model().state_dict())), tmp_path / "weights.pth")
    with pytest.raises(EncoderError, match=message) as caught:
        FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (64, 64))
    assert len(str(caught.value).splitlines()) <= 14


def test_a_model_that_weights_do_not_fit_is_as_it_was(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", img_size=64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    given = {k: v + 1 for k, v in before.items() if k != "blocks.5.mlp.fc2.bias"}
    with pytest.raises(EncoderError, match=r"^the weights file of x does not fit VisionTransformer"):
        fit_weights(model, given, "the weights file of x")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
