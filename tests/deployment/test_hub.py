"""A model's folder: the same outputs to the last bit, and nothing in it that a checkpoint could not hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fpt_lightning import Predictor
from fpt_lightning.deployment.card import card, write_card
from fpt_lightning.deployment.checkpoints import load_trained
from fpt_lightning.deployment.ensemble import write_ensemble
from fpt_lightning.deployment.export import export
from fpt_lightning.deployment.hub import CONFIG, ENCODER, README, WEIGHTS
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import build_encoder
from fpt_lightning.errors import CheckpointError, ConfigurationError, ExportError, NonFiniteError
from fpt_lightning.methods import METHODS
from fpt_lightning.methods.record import KEY
from small import TINY, save_trained

PIXELS = [np.random.default_rng(seed).integers(0, 256, (70, 90, 3), np.uint8) for seed in range(2)]


def trained(folder: Path, method: str = "fpt_plus", **settings: Any) -> Path:
    own = TINY if method == "fpt_plus" else {"encoder": "test_vit"}
    path = save_trained(METHODS[method], folder / "best.ckpt", (64, 96), **{**own, **settings})
    content = torch.load(path, weights_only=True)
    labels = {"multilabel": ("a", "b", "c")}.get(settings.get("task", ""), ("",))
    content[KEY] |= {
        "nonconformity": {name: [[0.1 / 3, 0.2, 0.7], [0.5, 0.5, 1.0]] for name in labels},
        "seen": {"train": torch.tensor([1, 2])},
    }
    torch.save(content, path)
    return path


def shared(path: Path, out: Path, **options: Any) -> Path:
    export(ckpt_path=str(path), out=str(out), format="hub", **options)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of FPT+ on an untrained encoder, whose weights are in it too; nothing below may be changed."""
    place = tmp_path_factory.mktemp("hub")
    return shared(trained(place), place / "model", with_encoder=True)


@pytest.mark.parametrize(
    ("method", "settings", "with_encoder"),
    [
        ("fpt_plus", {"test_time_orientations": 2}, False),
        ("fpt_plus", {"task": "coral"}, True),
        ("lora", {"task": "multilabel"}, True),
        ("stored_linear", {"task": "regression"}, False),
    ],
)
def test_the_outputs_are_the_same_to_the_last_bit(
    method: str, settings: dict[str, Any], with_encoder: bool, tmp_path: Path
) -> None:
    path = trained(tmp_path, method, **settings)
    first = Predictor(path)
    again = Predictor.from_pretrained(shared(path, tmp_path / "model", with_encoder=with_encoder))
    found, expected = again(PIXELS), first(PIXELS)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.scores.std() > 0
    assert again.table(found, coverage=0.6) == first.table(expected, coverage=0.6)
    assert (again.specification, again.module.calibration) == (first.specification, first.module.calibration)
    assert (again.module.thresholds, again.module._seed) == (first.module.thresholds, first.module._seed)
    files = {README, CONFIG, WEIGHTS, *([ENCODER] if with_encoder else [])}
    assert {file.name for file in (tmp_path / "model").iterdir()} == files


def test_a_file_of_weights_is_given_again_or_shared_too(tmp_path: Path) -> None:
    weights, moved = tmp_path / "encoder.pt", tmp_path / "moved.pt"
    model = build_encoder(EncoderConfig("test_vit", pretrained=False), (160, 160))  # positions of another grid
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    torch.save({"model": model.state_dict()}, weights)
    path = trained(tmp_path, pretrained=str(weights))
    expected = Predictor(path)(PIXELS).scores
    without, whole = shared(path, tmp_path / "without"), shared(path, tmp_path / "whole", with_encoder=True)
    weights.rename(moved)
    np.testing.assert_array_equal(Predictor.from_pretrained(whole)(PIXELS).scores, expected)
    with pytest.raises(CheckpointError, match=r"without the encoder's weights of test_vit \(sha256:.*with_encoder"):
        Predictor.from_pretrained(without)
    np.testing.assert_array_equal(Predictor.from_pretrained(without, pretrained=str(moved))(PIXELS).scores, expected)
    with pytest.raises(CheckpointError, match="other weights"):
        Predictor.from_pretrained(without, pretrained=False)
    for place in (without, whole):
        assert not [file for file in place.iterdir() if str(tmp_path).encode() in file.read_bytes()]
    assert "give their file as `pretrained`" in (without / README).read_text()


def test_an_ensemble(tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"{i}.ckpt")
        content = torch.load(trained(tmp_path), weights_only=True)
        content["state_dict"]["fusion.prompts"] += i
        torch.save(content, paths[-1])
    write_ensemble(paths, tmp_path / "ensemble.ckpt", {"a": 0.25})
    expected = Predictor(tmp_path / "ensemble.ckpt")(PIXELS).scores
    again = Predictor.from_pretrained(shared(tmp_path / "ensemble.ckpt", tmp_path / "model"))
    np.testing.assert_array_equal(again(PIXELS).scores, expected)


def test_what_a_folder_holds(folder: Path) -> None:
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever may read one may read all
    config = json.loads((folder / CONFIG).read_text())
    assert config[KEY]["seen"] == {}  # names of patients could be guessed from their digests
    assert config["hyper_parameters"]["pretrained"] is None
    assert load_file(folder / WEIGHTS).keys() == torch.load(folder.parent / "best.ckpt")["state_dict"].keys()
    text = (folder / README).read_text()
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "fpt-lightning"
    assert "Predictor.from_pretrained(" in text
    assert "The encoder's weights are in `encoder.safetensors`" in text
    module, _ = load_trained(folder)
    assert text.startswith(card(module).rstrip())


def test_the_card_is_that_of_the_test(tmp_path: Path) -> None:
    path = trained(tmp_path)
    write_card(tmp_path / "card.md", load_trained(path)[0])
    (tmp_path / "card.md").write_text((tmp_path / "card.md").read_text().replace("not stated", "screening"))
    first = shared(path, tmp_path / "model")
    assert "Intended use: screening" in (first / README).read_text()
    assert (shared(first, tmp_path / "again") / README).read_text() == (first / README).read_text()


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """What changes a part of the configuration, or the tensors of a file."""

    def edit(folder: Path) -> None:
        if name.endswith(".json"):
            content = json.loads((folder / name).read_text())
            change(content)
            (folder / name).write_text(json.dumps(content))
        else:
            tensors = load_file(folder / name)
            change(tensors)
            save_file(tensors, folder / name)

    return edit


def put(*keys: str, value: Any) -> Callable[[Path], None]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edited(CONFIG, change)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), r"has no config\.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"has no model\.safetensors"),
    "no encoder": (lambda folder: (folder / ENCODER).unlink(), r"has no encoder\.safetensors"),
    "cut off": (lambda folder: (folder / CONFIG).write_text("{"), "cannot be read as JSON"),
    "nested": (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "cannot be read as JSON"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), "is not the configuration"),
    "a number that is none": (put(KEY, "calibration", value=float("nan")), "NaN is no number"),
    "huge": (lambda folder: (folder / CONFIG).write_bytes(b" " * (2**26 + 1)), "which no configuration has"),
    "of another library": (put("library_name", value="timm"), "is not the configuration"),
    "of a later version": (put("format", value=2), "has the format 2, this version reads 1"),
    "no record": (put(KEY, value=None), "it lacks hyper_parameters or fpt_lightning"),
    "no digest": (put("weights_digest", value=None), "lacks the digests"),
    "another method": (put(KEY, "method", value="Other"), "was not written by a method of fpt-lightning"),
    "a temperature": (put(KEY, "calibration", "temperature", value=-1), "its calibration is"),
    "scores": (put(KEY, "nonconformity", value={"": [[2, 1], [1, 1]]}), "its nonconformity is"),
    "a size": (put("hyper_parameters", "prompts", value=10**12), "by its own hyper_parameters"),
    "a resolution": (put(KEY, "specification", "resolution", value=[-64, 64]), "specification's resolution is"),
    "weights cut off": (lambda folder: (folder / WEIGHTS).write_bytes(b"\x08"), "cannot be read as safetensors"),
    "weights changed": (edited(WEIGHTS, lambda tensors: tensors["fusion.prompts"].add_(1)), "its digest is another"),
    "encoder changed": (edited(ENCODER, lambda tensors: tensors["pos_embed"].add_(1)), "its digest is another"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_one_error(damage: str, folder: Path, tmp_path: Path) -> None:
    change, said = DAMAGED[damage]
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    change(copy)
    with pytest.raises((CheckpointError, NonFiniteError), match=said):
        Predictor.from_pretrained(copy)


def test_a_path_in_a_strangers_configuration_is_not_followed(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    put("encoder_digest", value=None)(copy)
    put("hyper_parameters", "pretrained", value="/etc/passwd")(copy)
    with pytest.raises(CheckpointError, match="is without the encoder's weights of test_vit"):
        Predictor.from_pretrained(copy)


def test_a_repository_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = Predictor.from_pretrained("clinic/model", revision="v1")(PIXELS)
    np.testing.assert_array_equal(found.scores, Predictor(folder)(PIXELS).scores)
    assert asked == [("clinic/model", "v1", [README, CONFIG, ENCODER, WEIGHTS])]


@pytest.mark.parametrize("source", ["clinic/model", "no such folder", "a/b/c"])
def test_a_repository_out_of_reach(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=rf"'{source}' is no folder here, and cannot be had from the hub"):
        Predictor.from_pretrained(source)


def test_options_that_cannot_work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder.parent / "best.ckpt"
    with pytest.raises(ConfigurationError, match="there already"):
        shared(path, folder)
    with pytest.raises(ConfigurationError, match="attention is true"):
        shared(path, tmp_path / "model", attention=True)
    with pytest.raises(ConfigurationError, match="with_encoder is true"):
        export(ckpt_path=str(path), out=str(tmp_path / "m.onnx"), with_encoder=True)
    with pytest.raises(ConfigurationError, match="revision is 'v1', but"):
        Predictor.from_pretrained(folder, revision="v1")
    monkeypatch.setattr("fpt_lightning.deployment.export.fit_weights", lambda model, *_: model.pos_embed.data.add_(1))
    with pytest.raises(ExportError, match="are read as others"):
        shared(path, tmp_path / "model", with_encoder=True)
    assert not list(tmp_path.iterdir())
