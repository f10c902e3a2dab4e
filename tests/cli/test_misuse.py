"""What cannot be taken is said in a line: which option, its value, and what may stand there."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import fails


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--model.learnin_rate", "1"], "there is no option model.learnin_rate: did you mean model.learning_rate?"),
        (["--model.gradient_checkpoint", "true"], "did you mean model.gradient_checkpointing?"),  # of the method itself
        (["--trainer.max_epochz", "3"], "there is no option trainer.max_epochz: did you mean trainer.max_epochs?"),
        (["--data.elephants", "1"], "there is no option data.elephants.\n"),
        (["more"], "there is no option more.\n"),
        (["--model", "FPTPlusModul"], "FPTPlusModul, which is no class that is known: did you mean FPTPlusModule?"),
        (["--data", "ImageDatamodul"], "data is ImageDatamodul, which is no class that is known: did you mean Image"),
        (["--model.learning_rate", "abc"], "model.learning_rate is abc: give float."),
        (["--model.layers", "[a]"], "model.layers is ['a']: give list[int]."),
        (["--model.class_weights", "[1, a]"], "model.class_weights is [1.0, 'a']: give 'balanced', list[float]."),
        (["--data.resolution", "x"], "data.resolution is x: give int, tuple[int, int]."),
        (["--trainer.precision", "17"], "trainer.precision is 17: give 64, 32, 16, 'transformer-engine', "),
        (["--trainer.logger", "TensorBoardLogger"], "trainer.logger needs save_dir."),
        (["--trainer.max_epochs"], "argument --trainer.max_epochs: expected one argument"),
        (["--config", "none.yaml"], "File does not exist: '"),
        (["--seed_everything", "-4"], "seed_everything is -4: give a number from 0 to 4294967295."),
        (["--trainer.strategy", "zeppelin"], "You selected an invalid strategy name: `strategy='zeppelin'`"),
        (["--trainer.accelerator", "abacus"], "You selected an invalid accelerator name: `accelerator='abacus'`"),
        (["--trainer.limit_train_batches", "-1"], "You have passed invalid value -1 for limit_train_batches"),
        (["--trainer.check_val_every_n_epoch", "0"], "trainer.check_val_every_n_epoch is 0: give 1 or more."),
        (["--trainer.gradient_clip_val", "-1.5"], "trainer.gradient_clip_val is -1.5: give 0 or more."),
        (["--data.batch_size", "0"], "data.batch_size is 0: give 1 or more."),
        (["--data.num_workers", "-1"], "data.num_workers is -1: give 0 or more."),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_an_option_of_fit(option: list[str], said: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "fit", "--config", config, *option)
    assert message.startswith("ConfigurationError: ")
    assert said in message
    assert len(message.splitlines()) == 1


def test_an_option_of_a_file(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("model: {class_path: FPTPlusModule, init_args: {num_classes: 3, promts: 3}}\n")
    message = fails(capsys, "fit", "--config", config, "--config", other)
    assert "there is no option model.promts: did you mean model.prompts?" in message
    other.write_text("modle: 3\n")
    assert "there is no option modle: did you mean model?" in fails(capsys, "fit", "--config", other)


def test_a_setting_that_fails_at_its_use(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As Lightning knows the number of batches only then."""
    message = fails(capsys, "fit", "--config", config, "--trainer.val_check_interval", 999)
    assert "`val_check_interval` (999) must be less than or equal to the number of the training batches" in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit"], "fit needs a configuration: give --config FILE, such as examples/quickstart.yaml."),
        (["preload"], "preload needs a configuration: give --config FILE, such as examples/quickstart.yaml."),
        (["test", "--model.num_classes", "3"], "model has options but no class: give --config FILE, or --model with"),
        (["evaluate"], "needed: evaluate.predictions."),
        (["evaluate", "p.csv", "--resamples", "a"], "resamples is a: give int."),
        (["export", "best.ckpt", "--fomat", "onnx"], "there is no option fomat: did you mean format?"),
    ],
)
def test_an_option_of_another_command(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in fails(capsys, *arguments)
