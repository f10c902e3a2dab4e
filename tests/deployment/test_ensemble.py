"""Ensembles: a checkpoint of several models, whose scores are the mean of theirs, wherever a checkpoint is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from fpt_lightning import Predictor
from fpt_lightning.deployment.checkpoints import load_trained, read_checkpoint
from fpt_lightning.deployment.ensemble import write_ensemble
from fpt_lightning.deployment.export import Classifier
from fpt_lightning.errors import CheckpointError, ConfigurationError
from fpt_lightning.evaluation.calibration import Calibration
from fpt_lightning.methods import METHODS
from fpt_lightning.methods.ensemble import MOST, EnsembleModule, is_ensemble
from fpt_lightning.methods.record import KEY
from small import TINY, quiet_trainer, save_trained, tiny_model

RESOLUTION = (64, 64)


def members(folder: Path, method: str = "fpt_plus", count: int = 3, **settings: Any) -> list[Path]:
    """Checkpoints of models of one method that differ in their weights and calibrations."""
    own = TINY if method in ("fpt", "fpt_plus") else {"encoder": "test_vit"}
    first = save_trained(METHODS[method], folder / "member.ckpt", RESOLUTION, **{**own, **settings})
    content, paths = torch.load(first, weights_only=True), []
    content |= {"pytorch-lightning_version": L.__version__, "epoch": 0}
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        for tensor in content["state_dict"].values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        content[KEY] |= {
            "calibration": {"temperature": 1.0 + i / 2, "biases": []},
            "seen": {"train": torch.tensor([1, 10 + i]), "val": torch.tensor([20 + i])},
        }
        paths.append(folder / f"member{i}.ckpt")
        torch.save(content, paths[-1])
    return paths


def ensemble(folder: Path, method: str = "fpt_plus", **settings: Any) -> tuple[Path, list[Path]]:
    paths = members(folder, method, **settings)
    out = folder / "ensemble.ckpt"
    write_ensemble(paths, out, {} if settings.get("task") == "regression" else {"a": 0.25})
    return out, paths


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fpt_plus", {"test_time_orientations": 4}),
        ("fpt", {"task": "coral"}),
        ("query_tokens", {"task": "multilabel"}),
        ("attentive", {"task": "ordinal", "calibrate": False}),
        ("stored_linear", {"task": "regression"}),
    ],
)
def test_scores_are_the_mean_of_the_members(
    method: str, settings: dict[str, Any], image_root: Path, tmp_path: Path
) -> None:
    out, paths = ensemble(tmp_path, method, **settings)
    images = sorted(image_root.rglob("*.png"))[8:12]
    alone = [Predictor(path)(images).scores for path in paths]
    assert not np.allclose(alone[0], alone[1], atol=1e-3)
    predictor = Predictor(out)
    found = predictor(images)
    np.testing.assert_allclose(found.scores, np.mean(alone, 0), rtol=1e-5, atol=1e-6)
    if settings.get("task") != "regression":
        assert predictor.module.thresholds == {"a": 0.25}
        assert predictor.decide(found)[:, 0].tolist() == (found.scores[:, 0] >= 0.25).tolist()


def test_the_encoder_is_loaded_once_and_sees_an_image_once(
    image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = ensemble(tmp_path)
    predictor = Predictor(out, batch_size=2)
    module: Any = predictor.module
    (encoder,) = module.encoders
    assert not any(member.encoders for member in module.members)
    monkeypatch.setattr("fpt_lightning.encoder.frozen.build_encoder", None)
    seen = list[int]()
    encoder.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    predictor(sorted(image_root.rglob("*.png"))[:5])
    assert seen == [2, 2, 1]


def test_what_a_checkpoint_of_an_ensemble_holds(tmp_path: Path) -> None:
    out, paths = ensemble(tmp_path)
    content = read_checkpoint(out)
    assert is_ensemble(content)
    assert not is_ensemble(read_checkpoint(paths[0]))
    given = content["hyper_parameters"]["calibrations"]
    assert given == [{"temperature": temperature, "biases": ()} for temperature in (1.0, 1.5, 2.0)]
    assert sorted(set(content[KEY]["seen"]["train"].tolist())) == [1, 10, 11, 12]  # none of which may be tested
    assert content[KEY]["seen"]["val"].tolist() == [20, 21, 22]
    (tmp_path / "of_one").mkdir()
    write_ensemble(paths[:1], tmp_path / "of_one" / "e.ckpt", {})
    module, specification = load_trained(tmp_path / "of_one" / "e.ckpt")
    assert isinstance(module, EnsembleModule)
    assert specification.resolution == RESOLUTION


def test_a_trainer_tests_an_ensemble_and_trains_none(tiny_data: Any, tmp_path: Path) -> None:
    out, paths = ensemble(tmp_path, specification={"fit": "squash"})
    data, module = tiny_data(), EnsembleModule.like(tiny_model(), read_checkpoint(out))
    assert EnsembleModule.like(tiny_model(), read_checkpoint(paths[0])).LABEL == "FPT+"
    data.preload(tiny_model())
    with pytest.raises(ConfigurationError, match="an ensemble is not trained itself"):
        quiet_trainer(tmp_path).fit(module, data)
    losses = []
    for tested, path in ((module, out), *((tiny_model(), path) for path in paths)):
        (metrics,) = quiet_trainer(tmp_path).test(tested, data, ckpt_path=str(path), verbose=False)
        losses.append(metrics["test_loss"])
    assert losses[0] == pytest.approx(np.mean(losses[1:]), rel=1e-5)


def test_an_ensemble_as_one_function_of_images(tmp_path: Path) -> None:
    out, paths = ensemble(tmp_path)
    images = torch.rand(2, 3, *RESOLUTION)
    with torch.no_grad():
        (found,) = Classifier(*load_trained(out))(images)
        alone = [Classifier(*load_trained(path))(images)[0] for path in paths]
    torch.testing.assert_close(found, torch.stack(alone).mean(0))
    assert Classifier(*load_trained(out)).about()["thresholds"] == {"a": 0.25}
    with pytest.raises(ConfigurationError, match=r"FPT\+, mean of 3 has no prompts"):
        Classifier(*load_trained(out), attention=True)


def test_members_that_do_not_belong_together(tmp_path: Path) -> None:
    first = members(tmp_path / "a", count=1)
    for other, message in (
        (members(tmp_path / "b", "query_tokens", 1), "method is 'FPTPlusModule' in .*member0.ckpt and 'QueryTokens"),
        (members(tmp_path / "c", prompts=8, count=1), "prompts is 4 in .* and 8 in"),
        (members(tmp_path / "d", count=1, specification={"mean": (0.1, 0.1, 0.1)}), "specification is Feature"),
    ):
        with pytest.raises(CheckpointError, match=f"differ in their training images and seed alone, but {message}"):
            write_ensemble([*first, *other], tmp_path / "e.ckpt", {})
    lora = save_trained(METHODS["lora"], tmp_path / "lora.ckpt", RESOLUTION, encoder="test_vit")
    with pytest.raises(CheckpointError, match=r"is of LoRAModule: an ensemble is of a method .* on a frozen encoder's"):
        write_ensemble([lora], tmp_path / "e.ckpt", {})
    with pytest.raises(CheckpointError, match=r"member0\.ckpt is given more than once"):
        write_ensemble([*first, *first], tmp_path / "e.ckpt", {})
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        write_ensemble([], tmp_path / "e.ckpt", {})
    assert not (tmp_path / "e.ckpt").exists()


@pytest.mark.parametrize("scaling", [False, True])
def test_checkpoints_of_before_there_were_biases_are_read(scaling: bool, tmp_path: Path) -> None:
    out, paths = ensemble(tmp_path)
    for path, temperature in ((paths[0], 2.5), (out, 1.0)):
        content = torch.load(path, weights_only=True)
        arguments = content["hyper_parameters"]
        del content[KEY]["calibration"], arguments["calibrate"]
        content[KEY]["temperature"], arguments["temperature_scaling"] = temperature, scaling
        if path == out:
            arguments["temperatures"] = [each["temperature"] for each in arguments.pop("calibrations")]
        torch.save(content, path)
        module, _ = load_trained(path)
        expected = [1.0, 1.5, 2.0] if path == out else [2.5]
        assert module.calibrations == [Calibration(each) for each in expected]
        assert module.calibrate is module.hparams["calibrate"] is scaling


def test_a_checkpoint_that_asks_for_what_is_no_ensemble(tmp_path: Path) -> None:
    out, _ = ensemble(tmp_path)
    content = torch.load(out, weights_only=True)
    arguments = content["hyper_parameters"]
    sound: dict[str, Any] = {"temperature": 1.0, "biases": [0.1, 0.0, -0.1]}
    two = [sound, sound]
    refused = r"calibrations is .*: give 1 to 1000, each a temperature above 0 and a bias of each class"
    wrongs: list[Any] = [{**sound, "temperature": wrong} for wrong in (0.0, "1", float("nan"))]
    wrongs += [{**sound, "biases": wrong} for wrong in ([0.1], ["a"] * 3, [float("inf")] * 3, None)]
    for calibrations, member, error, message in (
        *(
            (wrong, "FPTPlusModule", ConfigurationError, refused)
            for wrong in ([], [sound] * (MOST + 1), 3, *([wrong] for wrong in wrongs))
        ),
        (two, "EnsembleModule", ConfigurationError, "member is 'EnsembleModule', which is no method"),
        (two, "FPTPlusModule", CheckpointError, r"its members\.2\..* is .*, by its own hyper_parameters not there"),
    ):
        arguments |= {"calibrations": calibrations, "member": member}
        torch.save(content, out)
        with pytest.raises(error, match=message):
            load_trained(out)
