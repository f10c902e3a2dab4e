"""Weights files: every layout and form that they are published in, loaded whole or refused."""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.nn import functional as F

from fpt_lightning.encoder.config import EncoderConfig, encoder_shape
from fpt_lightning.encoder.frozen import FrozenEncoder, build_encoder
from fpt_lightning.encoder.weights import weights_digest
from fpt_lightning.errors import EncoderError
from reference import FAMILIES, assert_close, images_for, randomise
from weight_files import Tensors, assert_encodes_like, kept, prefixed, save, source_model


@pytest.mark.parametrize(
    ("suffix", "prefix"),
    [
        (".safetensors", ""),
        (".safetensors", "backbone."),
        (".pt", ""),
        (".bin", "encoder."),
        (".pth", "module."),
        (".pth", "module.backbone."),
        (".pth", "_orig_mod.module."),
    ],
)
def test_weights_file_with_prefixes(tmp_path: Path, suffix: str, prefix: str) -> None:
    model = source_model()
    assert_encodes_like(save(prefixed(model.state_dict(), prefix), tmp_path / f"weights{suffix}"), model)


WRAPPERS: dict[str, Callable[[Tensors], Any]] = {
    "model": lambda own: {"model": own, "epoch": 3, "optimizer": {"state": {}}},
    "state_dict": lambda own: {"state_dict": prefixed(own, "module."), "arch": "vit"},
    "model_state_dict": lambda own: {"model_state_dict": own},
    "teacher with a head of its own": lambda own: {
        "student": {"backbone.cls_token": torch.zeros(1)},
        "teacher": prefixed(own, "backbone.") | {"dino_head.last_layer.weight": torch.zeros(4, 4)},
    },
    "one in another": lambda own: {"model": {"state_dict": prefixed(own, "module.encoder.")}},
    "half precision": lambda own: {"model": {k: v.half() for k, v in own.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_file_with_wrappers(tmp_path: Path, wrapper: str) -> None:
    model = source_model()
    path = save(WRAPPERS[wrapper](model.state_dict()), tmp_path / "weights.pth")
    assert_encodes_like(path, model.half().float() if wrapper == "half precision" else model)


def test_weights_file_without_or_with_another_head(tmp_path: Path) -> None:
    model = source_model()
    body = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    assert_encodes_like(save(body, tmp_path / "headless.pth"), model)
    body["head.weight"], body["head.bias"] = torch.zeros(7, 64), torch.zeros(7)
    assert_encodes_like(save(body, tmp_path / "another.pth"), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_back_its_own_weights(tmp_path: Path, family: str) -> None:
    """And the file is digested alike at its own and at another resolution."""
    name = FAMILIES[family]
    patch = encoder_shape(name).patch_size[0]
    model = source_model(name, (6 * patch, 6 * patch))
    config = EncoderConfig(name, pretrained=save(model.state_dict(), tmp_path / "weights.safetensors"))
    native = FrozenEncoder(config, (6 * patch, 6 * patch))
    assert all(torch.equal(v, native.model.state_dict()[k]) for k, v in kept(model).items())
    other = FrozenEncoder(config, (9 * patch, 5 * patch))
    assert other(images_for(other.resolution))[1].max() < other.tokens
    assert native.digest == other.digest


@pytest.mark.parametrize("resolution", [(96, 160), (80, 320)])
def test_positions_are_interpolated(tmp_path: Path, resolution: tuple[int, int]) -> None:
    """The second resolution has as many patches as the published 160 x 160, in another grid."""
    model = source_model("test_vit", (160, 160))
    encoder = FrozenEncoder(EncoderConfig("test_vit", save(model.state_dict(), tmp_path / "w.pth")), resolution)
    class_token, grid = model.pos_embed[:, :1], model.pos_embed[:, 1:].unflatten(1, (10, 10)).permute(0, 3, 1, 2)
    size = (resolution[0] // 16, resolution[1] // 16)
    expected = F.interpolate(grid, size, mode="bicubic", antialias=True, align_corners=False)
    assert_close(encoder.model.pos_embed, torch.cat([class_token, expected.flatten(2).mT], 1))
    assert torch.equal(encoder.model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_relative_positions_are_interpolated(tmp_path: Path) -> None:
    name = FAMILIES["beit"]
    model = source_model(name, (96, 96))
    encoder = FrozenEncoder(EncoderConfig(name, save(model.state_dict(), tmp_path / "w.pth")), (96, 160))
    own, table = (m.blocks[1].attn.relative_position_bias_table for m in (encoder.model, model))
    assert own.shape == (11 * 19 + 3, 4)
    assert torch.equal(own[-3:], table[-3:])  # those of the class token
    assert torch.allclose(own[11 * 19 // 2], table[11 * 11 // 2], atol=1e-2)  # distance zero
    assert own[:-3].std() > 0.3


def test_published_layout_of_deit3(tmp_path: Path) -> None:
    name = FAMILIES["deit3"]
    model = source_model(name)
    published = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): v for key, v in model.state_dict().items()}
    assert "blocks.0.gamma_2" in published
    assert_encodes_like(save({"model": published}, tmp_path / "deit3.pth"), model, name)


def test_published_layout_of_dinov2(tmp_path: Path) -> None:
    """Registers named otherwise, a position for the class token, a mask token."""
    name = FAMILIES["dinov2-registers"]
    model = source_model(name, (56, 56))
    published = dict(model.state_dict())
    published["register_tokens"] = published.pop("reg_token")
    extra = torch.randn(1, 1, 64)
    published["pos_embed"] = torch.cat([extra, published["pos_embed"]], 1)
    published["cls_token"] = published["cls_token"] - extra
    published["mask_token"] = torch.zeros(1, 64)
    encoder = FrozenEncoder(EncoderConfig(name, save(published, tmp_path / "dinov2.pth")), (56, 56))
    for key, tensor in kept(model).items():
        assert_close(encoder.model.state_dict()[key], tensor)


def in_layout_of_dinov3(model: nn.Module) -> Tensors:
    """Weights of timm's model under Meta's names, with one bias for queries, keys and values."""
    own, published = model.state_dict(), {}
    for key, tensor in own.items():
        if key.endswith("q_bias"):
            v_bias = own[key.replace("q_bias", "v_bias")]
            key, tensor = key.replace("q_bias", "qkv.bias"), torch.cat([tensor, torch.zeros(64), v_bias])
        if not key.endswith("v_bias"):
            name = key.replace("reg_token", "storage_tokens")
            published[name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")] = tensor
    return published


def test_published_layout_of_dinov3(tmp_path: Path) -> None:
    name = FAMILIES["dinov3-qkv-bias"]
    model = source_model(name)
    published = in_layout_of_dinov3(model)
    published |= {f"{key}_mask": torch.ones(192) for key in published if key.endswith("qkv.bias")}
    published |= {"rope_embed.periods": torch.ones(4), "mask_token": torch.zeros(1, 64)}
    assert_encodes_like(save(published, tmp_path / "dinov3.pth"), model, name)


def without_some(own: Tensors) -> Tensors:
    return {k: v for k, v in own.items() if k not in ("cls_token", "blocks.2.attn.qkv.bias")}


MISFITS: dict[str, tuple[Callable[[Tensors], Tensors], list[str]]] = {
    "missing": (without_some, ["missing: cls_token, blocks.2.attn.qkv.bias"]),
    "extra": (
        lambda own: own | {"blocks.6.norm1.weight": torch.ones(64), "adapter": torch.ones(2)},
        ["not in the model: adapter, blocks.6.norm1.weight"],
    ),
    "shape": (
        lambda own: own | {"blocks.1.mlp.fc1.weight": torch.ones(128, 64)},
        ["shape: blocks.1.mlp.fc1.weight (128, 64) instead of (192, 64)"],
    ),
    "a number for positions": (
        lambda own: own | {"pos_embed": torch.ones(())},
        ["does not fit VisionTransformer: IndexError", "the file has: "],
    ),
    "patches of another size": (
        lambda own: own | {"patch_embed.proj.weight": torch.ones(64, 3, 14, 14)},
        ["shape: patch_embed.proj.weight (64, 3, 14, 14) instead of (64, 3, 16, 16)"],
    ),
    "another width": (
        lambda own: dict(timm.create_model("deit_tiny_patch16_224", img_size=64).state_dict()),
        ["shape: cls_token (1, 1, 192) instead of (1, 1, 64)", " and 71 more"],
    ),
}


def test_published_weights_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to the hub")

    encoder_shape("test_vit")
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        EncoderError, match=r"weights of test_vit \(OSError: no route.* a local file as model.pretrained"
    ):
        FrozenEncoder(EncoderConfig("test_vit", pretrained=True), (64, 64))


def test_positions_of_a_square_grid_are_interpolated_to_another_grid_of_as_many(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", pretrained=False, img_size=96)  # 6 x 6 patches
    path = save(dict(source.state_dict()), tmp_path / "weights.safetensors")
    encoder = FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (144, 64))  # 9 x 4 patches
    expected = resample_abs_pos_embed(source.pos_embed, [9, 4], [6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(encoder.model.pos_embed, expected)
    assert not torch.equal(encoder.model.pos_embed, source.pos_embed)


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_that_do_not_fit_are_listed(tmp_path: Path, kind: str) -> None:
    change, messages = MISFITS[kind]
    path = save(change(dict(source_model().state_dict())), tmp_path / "weights.safetensors")
    with pytest.raises(EncoderError) as caught:
        FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (64, 64))
    assert path in str(caught.value)
    assert all(message in str(caught.value) for message in messages)
    assert len(str(caught.value).splitlines()) <= 14


class Payload:
    """Code in a pickle: creates a file when it is read by a careless reader."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("where", ["beside the tensors", "alone, without torch.save"])
def test_code_in_a_weights_file_is_refused_and_not_run(tmp_path: Path, where: str) -> None:
    target, path = tmp_path / "ran", tmp_path / "weights.pth"
    if where == "beside the tensors":
        torch.save({"model": source_model().state_dict(), "extra": Payload(target)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(target)))
    with pytest.raises(EncoderError, match=r"weights\.pth cannot be read safely"):
        FrozenEncoder(EncoderConfig("test_vit", pretrained=str(path)), (64, 64))
    assert not target.exists()


@pytest.fixture
def truncated(tmp_path: Path) -> Callable[[str], str]:
    def cut(suffix: str) -> str:
        path = tmp_path / f"weights{suffix}"
        save(source_model().state_dict(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return str(path)

    return cut


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_weights_file(truncated: Callable[[str], str], suffix: str) -> None:
    path = truncated(suffix)
    with pytest.raises(EncoderError, match=re.escape(f"{path} cannot be read")):
        FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (64, 64))


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {"model": {}}, {"model": None}])
def test_weights_file_without_tensors(tmp_path: Path, content: Any) -> None:
    path = save(content, tmp_path / "weights.pth")
    with pytest.raises(EncoderError, match="holds no state_dict"):
        FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (64, 64))


def test_missing_weights_file(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere.pth")
    with pytest.raises(EncoderError, match=re.escape(path) + ".*does not exist"):
        FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (64, 64))
    with pytest.raises(EncoderError, match="does not exist"):
        EncoderConfig("test_vit", pretrained=path).weights()


@pytest.mark.parametrize("name", ["weights.npz", "weights", "yes"])
def test_weights_file_of_another_kind(name: str) -> None:
    with pytest.raises(EncoderError, match=f"pretrained is '{name}': give true, false or a file ending in"):
        EncoderConfig("test_vit", pretrained=name)


def test_weights_are_named_without_loading_them(tmp_path: Path) -> None:
    assert EncoderConfig("test_vit", False).weights() == "random"
    assert EncoderConfig("vit_tiny_patch16_224.augreg_in21k").weights() == "timm:vit_tiny_patch16_224.augreg_in21k"
    model = source_model()
    names = []
    for seed in (0, 0, 1):
        randomise(model, seed)
        path = save(model.state_dict(), tmp_path / f"{len(names)}.safetensors")
        names.append(EncoderConfig("test_vit", path).weights())
    assert len(set(names)) == 2
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", name) for name in names)


def test_digest_follows_every_weight_that_features_depend_on() -> None:
    model = build_encoder(EncoderConfig("test_vit", False), (64, 64))
    digest = weights_digest(model)
    for name in ("blocks.0.attn.qkv.weight", "blocks.5.mlp.fc2.bias", "cls_token", "patch_embed.proj.weight"):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[0] += 1e-3
        assert weights_digest(changed) != digest
    with torch.no_grad():
        model.head.weight.zero_()
    assert weights_digest(model) == digest


# Files that hold more than the encoder


def test_the_teacher_of_a_joint_file_is_taken(tmp_path: Path) -> None:
    """DINO's and iBOT's files hold both; names in one dict, or the one in the other."""
    model, other = source_model(), timm.create_model("test_vit", img_size=64).state_dict()
    own = model.state_dict()
    joint = {**prefixed(other, "student.backbone."), **prefixed(own, "teacher.backbone.")}
    joint |= {"teacher.dino_head.mlp.0.weight": torch.zeros(2, 2), "student.dino_head.mlp.0.weight": torch.zeros(2, 2)}
    assert_encodes_like(save(joint, tmp_path / "joint.pth"), model)
    assert_encodes_like(save({"model": prefixed(joint, "module.")}, tmp_path / "wrapped.pth"), model)


def test_what_only_pretraining_uses_is_left_aside(tmp_path: Path) -> None:
    """The decoder of an MAE, as RETFound's file has it beside its arguments; the texts of a CLIP."""
    model = source_model()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.ones(8, 64)}
    decoder |= {f"decoder_blocks.{i}.attn.qkv.weight": torch.ones(24, 8) for i in range(80)}
    content = {"model": {**model.state_dict(), **decoder}, "args": argparse.Namespace(lr=1e-3, data="x"), "epoch": 3}
    for name in ("checkpoint.pth", "checkpoint.ckpt", "checkpoint.pth.tar"):
        assert_encodes_like(save(content, tmp_path / name), model)
    texts = {f"text.transformer.{i}.weight": torch.ones(2) for i in range(200)}
    clip = {**prefixed(model.state_dict(), "visual.trunk."), **texts, "logit_scale": torch.ones(())}
    assert_encodes_like(save(clip | {"visual.head.proj.weight": torch.ones(2)}, tmp_path / "clip.bin"), model)


def test_every_other_tensor_is_accounted_for(tmp_path: Path) -> None:
    own = source_model().state_dict()
    path = save({**prefixed(own, "backbone."), "neck.weight": torch.ones(2)}, tmp_path / "neck.pth")
    with pytest.raises(EncoderError, match=r"has an encoder below 'backbone.', but also neck.weight: give a file of"):
        FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (64, 64))


def test_biases_that_timm_would_drop_are_named(tmp_path: Path) -> None:
    """timm's converter drops the biases of queries and values for models of DINOv3 that have none."""
    published = in_layout_of_dinov3(source_model(FAMILIES["dinov3-qkv-bias"]))
    path = save(published, tmp_path / "dinov3.pth")
    with pytest.raises(
        EncoderError, match=r"(?s)not used by timm's conversion: blocks.0.attn.qkv.bias.*qkvb in its name"
    ):
        FrozenEncoder(EncoderConfig(FAMILIES["dinov3"], pretrained=path), (64, 64))


def test_a_refused_pickle_names_what_it_holds(tmp_path: Path) -> None:
    """And never repeats how PyTorch's safety is switched off."""
    path = save({"model": source_model().state_dict(), "when": Payload(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(EncoderError) as refused:
        FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (64, 64))
    said = str(refused.value)
    assert re.search(r"it holds .*pathlib\.Path.*, which could run code", said)
    assert "weights_only" not in said
    assert "option" not in said
    assert "\n" not in said


# --------------------------------------------------------------------------------------------------- shards and folders


def save_shards(folder: Path, suffix: str = ".safetensors") -> tuple[nn.Module, Path]:
    """A model in two shards; the path of their index."""
    model = source_model()
    own = list(model.state_dict().items())
    halves = {f"model-0000{i + 1}-of-00002{suffix}": dict(own[i::2]) for i in range(2)}
    for name, half in halves.items():
        save(half, folder / name)
    weight_map = {tensor: name for name, half in halves.items() for tensor in half}
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return model, index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(tmp_path: Path, suffix: str) -> None:
    model, index = save_shards(tmp_path, suffix)
    assert_encodes_like(str(index), model)
    assert_encodes_like(str(tmp_path), model)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_one_file(tmp_path: Path, name: str) -> None:
    model = source_model()
    path = save(model.state_dict(), tmp_path / name)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2, "hidden_act": "gelu"}')
    (tmp_path / "another.safetensors").write_bytes(b"")
    assert_encodes_like(str(tmp_path), model)
    assert EncoderConfig("test_vit", str(tmp_path)).weights() == EncoderConfig("test_vit", path).weights()


def test_the_digest_of_shards_follows_every_shard(tmp_path: Path) -> None:
    _, index = save_shards(tmp_path)
    digests = [EncoderConfig("test_vit", str(path)).weights() for path in (tmp_path, index)]
    for shard in sorted(tmp_path.glob("*.safetensors")):
        save({k: v + 1 for k, v in load_file(shard).items()}, shard)
        digests.append(EncoderConfig("test_vit", str(tmp_path)).weights())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for digest in digests)


def renamed_in(index: Path, name: str) -> None:
    """An index that has the first shard elsewhere."""
    index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", name))


def without_a_tensor(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    tensors.pop("cls_token")
    save(tensors, shard)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (
        lambda index: (index.parent / "model-00002-of-00002.safetensors").unlink(),
        r"the shard 'model-00002-of-00002.safetensors' that the index .* names is not beside it",
    ),
    "shard above": (
        lambda index: renamed_in(index, "../model.safetensors"),
        r"names '\.\./model\.safetensors', which is not a file of its own folder",
    ),
    "shard elsewhere": (lambda index: renamed_in(index, "/etc/passwd"), "names '/etc/passwd', which is not a file of"),
    "shard on another drive": (lambda index: renamed_in(index, "C:w.bin"), "names 'C:w.bin', which is not a file of"),
    "no JSON": (lambda index: index.write_text("{"), r"index\.json cannot be read as JSON"),
    "a list": (lambda index: index.write_text("[]"), r"index\.json is not a JSON object"),
    "no map": (lambda index: index.write_text("{}"), "has no weight_map"),
    "a map of numbers": (lambda index: index.write_text('{"weight_map": {"a": 1}}'), "has no weight_map"),
    "several files": (
        lambda index: save(source_model().state_dict(), index.parent / "model.safetensors"),
        r"holds model\.safetensors and model\.safetensors\.index\.json: give the file itself as pretrained",
    ),
    "no file": (lambda index: index.unlink(), r"holds none of model\.safetensors, .*: give the file itself"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_shards_and_folders_are_refused_before_anything_is_read(tmp_path: Path, kind: str) -> None:
    change, message = BROKEN[kind]
    _, index = save_shards(tmp_path)
    change(index)
    with pytest.raises(EncoderError, match=message):
        EncoderConfig("test_vit", str(tmp_path)).weights()
    with pytest.raises(EncoderError, match=message):
        FrozenEncoder(EncoderConfig("test_vit", str(tmp_path)), (64, 64))


def test_shards_that_hold_others_than_their_index_says(tmp_path: Path) -> None:
    _, index = save_shards(tmp_path)
    without_a_tensor(tmp_path)
    with pytest.raises(EncoderError, match=r"do not agree: cls_token is not in model-00001-of-00002\.safetensors\."):
        FrozenEncoder(EncoderConfig("test_vit", str(index)), (64, 64))
    save_shards(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"].pop("pos_embed")
    index.write_text(json.dumps(content))
    with pytest.raises(EncoderError, match=r"do not agree: pos_embed is only in model-00002-of-00002\.safetensors\."):
        FrozenEncoder(EncoderConfig("test_vit", str(index)), (64, 64))


# --------------------------------------------------------------------------------------------------------- repositories


@pytest.fixture
def repository(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A model in a folder as timm saves it, with arguments of its own; the model and the folder."""
    model: nn.Module = timm.create_model("test_vit", img_size=64, depth=3, num_classes=5)
    randomise(model)
    config = {"architecture": "test_vit", "num_classes": 5, "model_args": {"depth": 3}, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save(model.state_dict(), tmp_path / "model.safetensors")
    return model, tmp_path


def assert_has_weights_of(encoder: FrozenEncoder, model: nn.Module) -> None:
    assert encoder.shape.depth == 3
    own = encoder.model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in kept(model).items())


def test_an_encoder_in_a_folder(repository: tuple[nn.Module, Path]) -> None:
    model, folder = repository
    config = EncoderConfig(f"local-dir:{folder}")
    assert config.weights() == EncoderConfig("test_vit", str(folder)).weights()
    assert_has_weights_of(FrozenEncoder(config, (64, 64)), model)
    untrained = replace(config, pretrained=False)
    assert untrained.weights() == "random"
    assert FrozenEncoder(untrained, (64, 64)).digest != weights_digest(model)
    (folder / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="holds none of"):
        config.weights()


def test_an_encoder_on_a_hub(repository: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, filename: str, **_: Any) -> str:
        if not (folder / filename).is_file():
            raise LocalEntryNotFoundError(f"{repo_id} has no {filename}")
        return str(folder / filename)

    model, folder = repository
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    config = EncoderConfig("hf-hub:somebody/test")
    assert config.weights() == "hf-hub:somebody/test"
    assert_has_weights_of(FrozenEncoder(config, (64, 64)), model)
    save({k: v for k, v in model.state_dict().items() if k != "cls_token"}, folder / "model.safetensors")
    with pytest.raises(
        EncoderError, match=r"weights file of hf-hub:somebody/test does not fit .*\n  missing: cls_token"
    ):
        FrozenEncoder(config, (64, 64))
    (folder / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="timm cannot load the published weights of hf-hub:somebody/test"):
        FrozenEncoder(config, (64, 64))
    save({"model": model.state_dict(), "extra": Payload(folder / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="timm cannot load the published weights of hf-hub:somebody/test"):
        FrozenEncoder(config, (64, 64))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, pretrained: bool) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", unreachable)
    message = r"encoder 'hf-hub:a/b': timm cannot build it from its config.json \(OSError: no route.* as pretrained"
    with pytest.raises(EncoderError, match=message):
        EncoderConfig("hf-hub:a/b", pretrained)


def test_a_repository_that_is_not_one_of_timm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(EncoderError, match=r"config.json \(KeyError: 'architecture'\), which must be one of timm"):
        EncoderConfig(f"local-dir:{tmp_path}")
    with pytest.raises(EncoderError, match=r"'timm/test_vit' is not a model of timm: .* give 'hf-hub:timm/test_vit'"):
        EncoderConfig("timm/test_vit")
