"""The short help, held against what the options are."""

from __future__ import annotations

from inspect import Parameter, signature
from types import UnionType
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from commands import run
from fpt_lightning import FPTPlusModule, PreloadedFeatureDataModule
from fpt_lightning.cli.entry import COMMANDS
from fpt_lightning.cli.options import OPTIONS, OWN, Option
from fpt_lightning.cli.trainer import Trainer
from fpt_lightning.cli.training import CommandLine

LISTED = [option for section in OPTIONS.values() for option in section]


def parameters(of: type) -> dict[str, Any]:
    """Defaults by name, those of base classes included."""
    found: dict[str, Any] = {}
    for each in reversed(of.__mro__):
        if "__init__" in each.__dict__:
            found |= {name: parameter.default for name, parameter in signature(each.__init__).parameters.items()}  # type: ignore[misc]
    return found


@pytest.mark.parametrize(
    "option", [o for o in LISTED if o.name.startswith(("data.", "model."))], ids=lambda option: option.name
)
def test_defaults_are_those_of_the_code(option: Option) -> None:
    section, name = option.name.split(".")
    default = parameters({"data": PreloadedFeatureDataModule, "model": FPTPlusModule}[section])[name]
    assert (default is Parameter.empty) == (option.default == "")
    if option.default:
        assert yaml.safe_load(option.default) == default


def test_options_of_audit_alone_are_those_of_the_code() -> None:
    own = signature(Trainer.audit).parameters
    told = {option.name: yaml.safe_load(option.default) for option in OWN["audit"]["Audit"]}
    shared = {"self", "model", "datamodule", "ckpt_path", "weights_only"}
    assert told == {name: parameter.default for name, parameter in own.items() if name not in shared}


def test_every_option_is_known_to_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        CommandLine(["fit", "--config", "examples/quickstart.yaml", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    for option in LISTED:
        top, _, name = option.name.partition(".")
        place = config[top] if top in ("trainer", "") else config
        assert top in config, option
        if top == "trainer" and option.name != "trainer.default_root_dir":
            assert name in place


@pytest.mark.parametrize("command", ["fit", "predict", "preload", "store repair"])
def test_help_is_short_and_narrow(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(*command.split(), "--help")
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: fpt-lightning {command} --config FILE")
    assert COMMANDS[command].help[1:20] in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "--data.resolution [null]" in shown
    assert ("--coverage [null]" in shown) == (command == "predict")
    assert len(LISTED) < 35


def test_all_options_are_a_word_away(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("fit", "--help", "all")
    assert "--trainer.val_check_interval" in capsys.readouterr().out


def test_a_number_of_batches_stays_a_whole_number() -> None:
    """Whatever was imported before: ``typing`` keeps one ``Optional`` of int and float, in either order."""
    hints = get_type_hints(Trainer.__init__)
    limits = [hints[f"limit_{split}_batches"] for split in ("train", "val", "test", "predict")]
    assert all(isinstance(hint, UnionType) for hint in limits)
    assert {get_args(hint) for hint in limits} == {(int, float, type(None))}
