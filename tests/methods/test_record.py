"""What a checkpoint may hold: anything else is one error, before a model of any size is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import fails, run, write_config
from fpt_lightning import FPTPlusModule
from fpt_lightning.deployment.checkpoints import load_trained
from fpt_lightning.errors import CheckpointError, ConfigurationError, NonFiniteError
from small import write_images

Checkpoint = dict[str, Any]
HUGE = 10**12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``config.yaml``, and a run of one epoch; nothing below may be changed."""
    folder = tmp_path_factory.mktemp("trained")
    write_config(write_images(folder / "images", {"a": 10, "b": 10, "c": 10}), folder)
    run("fit", "--config", folder / "config.yaml", "--trainer.max_epochs", 1)
    return folder


def put(*path: str) -> Callable[[Checkpoint, Any], None]:
    """What puts a value in a place of a checkpoint."""

    def change(checkpoint: Checkpoint, value: Any) -> None:
        for name in path[:-1]:
            checkpoint = checkpoint[name]
        checkpoint[path[-1]] = value

    return change


OWN, SPECIFICATION = ("fpt_lightning",), ("fpt_lightning", "specification")
TENSOR = "fusion.prompts"


@pytest.mark.parametrize(
    ("change", "value", "said"),
    [
        (put(*OWN, "classes"), ["a", "b"], "its thresholds are of a, b, c, no classes"),
        (put(*OWN, "classes"), ["a", "b", "b"], "its classes is"),
        (put(*OWN, "classes"), ["a", "b", "c", "d"], "names 4 classes, has 3 outputs"),
        (put(*OWN, "classes"), "abc", "its classes is 'abc'"),
        (put(*OWN, "thresholds"), {"a": "0.5"}, "its thresholds is"),
        (put(*OWN, "thresholds"), {"z": 0.5}, "its thresholds are of z"),
        (put(*OWN, "calibration", "temperature"), float("nan"), "its calibration is"),
        (put(*OWN, "calibration", "temperature"), 0, "its calibration is"),
        (put(*OWN, "calibration", "biases"), [float("inf")] * 3, "its calibration is"),
        (put(*OWN, "calibration", "biases"), [0.1, -0.1], "it has 2 biases of 3 classes"),
        (put(*OWN, "calibration"), None, "its calibration is None"),
        (put(*OWN, "case_rule"), "median", "its case_rule is 'median'"),
        (put(*OWN, "case_thresholds"), {"z": 0.5}, "its case_thresholds are of z"),
        (put(*OWN, "nonconformity"), {"": [[0.1, 0.2], [1.0]]}, "its nonconformity is"),
        (put(*OWN, "nonconformity"), {"": [[0.2, 0.1], [1.0, 1.0]]}, "its nonconformity is"),
        (put(*OWN, "nonconformity"), {"": [[-0.1], [1.0]]}, "its nonconformity is"),
        (put(*OWN, "nonconformity"), {"": [[0.1], [0.0]]}, "its nonconformity is"),
        (put(*OWN, "nonconformity"), {"": [[float("inf")], [1.0]]}, "its nonconformity is"),
        (put(*OWN, "nonconformity"), {"": torch.ones(2, 3)}, "its nonconformity is"),
        (put(*OWN, "nonconformity"), {"a": [[0.1], [1.0]]}, "its nonconformity is of a."),
        (put(*OWN, "seed"), -1, "its seed is -1"),
        (put(*OWN, "seen"), {"train": torch.zeros(3)}, "its seen is"),
        (put(*OWN, "split"), None, "its split is None"),
        (put(*SPECIFICATION), 3, "damaged"),
        (put(*SPECIFICATION, "std"), [0.0, 0.2, 0.2], "specification's std is"),
        (put(*SPECIFICATION, "mean"), [float("nan")] * 3, "specification's mean is"),
        (put(*SPECIFICATION, "resolution"), [-64, 64], "specification's resolution is"),
        (put(*SPECIFICATION, "resolution"), [64], "specification's resolution is"),
        (put(*SPECIFICATION, "image_size"), 0, "specification's image_size is 0"),
        (put(*SPECIFICATION, "fit"), "stretch", "specification's fit is 'stretch'"),
        (put("hyper_parameters"), None, "it has no hyper_parameters"),
        (put("hyper_parameters", "prompts"), HUGE, "by its own hyper_parameters (3, 1000000000000, 64)"),
        (put("hyper_parameters", "num_classes"), HUGE, "its hyper_parameters make no FPTPlusModule"),
        (put("hyper_parameters", "prompts"), "many", "its hyper_parameters make no FPTPlusModule"),
        (put("hyper_parameters", "unknown"), 1, "its hyper_parameters make no FPTPlusModule"),
        (put("state_dict", TENSOR), torch.zeros(2, 2), f"its {TENSOR} is (2, 2), by its own"),
        (put("state_dict", TENSOR), 3.0, f"{TENSOR} of its state_dict is float"),
        (put("state_dict", TENSOR), torch.tensor(float("inf")), f"the checkpoint's {TENSOR} is not finite"),
        (put("state_dict", "more"), torch.zeros(2), "its more is (2,), by its own hyper_parameters not there"),
        (put("state_dict"), [], "no state_dict"),
    ],
)
def test_what_no_training_writes(
    change: Callable[[Checkpoint, Any], None], value: Any, said: str, folder: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(folder / "run" / "best.ckpt", weights_only=True)
    change(checkpoint, value)
    torch.save(checkpoint, tmp_path / "best.ckpt")
    with pytest.raises((CheckpointError, NonFiniteError)) as error:
        load_trained(tmp_path / "best.ckpt")
    assert said in str(error.value)


def test_a_checkpoint_of_before_prediction_sets_has_none(folder: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(folder / "run" / "best.ckpt", weights_only=True)
    module, _ = load_trained(folder / "run" / "best.ckpt")
    assert module.nonconformity == checkpoint["fpt_lightning"]["nonconformity"]
    (scores, shares), predictions = module.nonconformity[""], module.predictions([("x", -1, [0.5, 0.3, 0.2])])
    assert (len(scores), shares) == (3, [1.0] * 3)
    assert module.sets(predictions, 0.75).units == 3
    with pytest.raises(ConfigurationError, match=r"needs 4 labelled validation patients .* there are 3"):
        module.sets(predictions, 0.8)
    del checkpoint["fpt_lightning"]["nonconformity"]
    torch.save(checkpoint, tmp_path / "best.ckpt")
    with pytest.raises(CheckpointError, match=r"holds nothing of validation images: .* Train it again"):
        load_trained(tmp_path / "best.ckpt")[0].sets(predictions, 0.75)


@pytest.mark.parametrize("part", ["optimizer_states", "lr_schedulers", "loops", "callbacks", "epoch"])
@pytest.mark.parametrize("value", [None, [], ["x"], [{"state": {0: {"step": "x"}}, "param_groups": []}]])
def test_what_lightning_restores(
    part: str, value: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stumbles over some, and passes over others as if nothing were to be restored."""
    checkpoint = torch.load(folder / "run" / "last.ckpt", weights_only=True)
    checkpoint[part] = value
    torch.save(checkpoint, tmp_path / "last.ckpt")
    root = tmp_path / "run"
    message = fails(
        capsys, "fit", "--config", folder / "config.yaml", "--ckpt_path", tmp_path / "last.ckpt",
        "--trainer.default_root_dir", root, "--trainer.max_epochs", 1,
    )  # fmt: skip
    assert message.startswith("CheckpointError: the checkpoint is damaged")


@pytest.mark.parametrize("value", [None, [], {"num_classes": "x"}])
def test_classes_are_taken_from_sound_arguments(
    value: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(folder / "run" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = value
    torch.save(checkpoint, tmp_path / "best.ckpt")
    text = (folder / "config.yaml").read_text().replace("num_classes: 3", "num_classes: null")
    (tmp_path / "config.yaml").write_text(text)
    message = fails(capsys, "test", "--config", tmp_path / "config.yaml", "--ckpt_path", tmp_path / "best.ckpt")
    assert "hyper_parameters" in message or "num_classes" in message


def test_a_callable_that_a_checkpoint_names_is_not_called(folder: Path, tmp_path: Path) -> None:
    """By Lightning, from its version 2.6.6 on."""
    content = torch.load(folder / "run" / "best.ckpt", weights_only=True)
    content["hyper_parameters"]["_instantiator"] = "os.mkdir"
    torch.save(content, tmp_path / "hostile.ckpt")
    with pytest.raises(ValueError, match=r"'os\.mkdir' from the checkpoint is not in the allowlist"):
        FPTPlusModule.load_from_checkpoint(tmp_path / "hostile.ckpt", weights_only=True)
