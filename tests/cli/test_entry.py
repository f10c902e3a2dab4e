"""The table of commands: what each imports before it runs, and what is said of commands that there are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fpt_lightning
from fpt_lightning.cli.entry import COMMANDS, main
from fpt_lightning.store.specification import FeatureShape
from fpt_lightning.store.writing import WritableStore
from small import SPECIFICATION

HEAVY = ("torch", "lightning", "timm", "torchmetrics", "zarr", "scipy", "matplotlib")
PREDICTIONS = "path,label,prob_a,prob_b\n1.png,a,0.9,0.1\n2.png,b,0.2,0.8\n3.png,b,0.6,0.4\n"
SHAPE = FeatureShape(layers=3, heads=2, tokens=3, head_dim=4)


def imported(folder: Path, *arguments: str) -> set[str]:
    """The heavy libraries that a command has imported when it ends."""
    code = f"""
import sys
from fpt_lightning.cli import main
try:
    main({list(arguments)!r})
except SystemExit as stopped:
    assert not stopped.code, stopped.code
print("imported", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--help"], set()),
        (["--version"], set()),
        (["datasets", "list"], set()),
        (["datasets", "--help"], set()),
        (["store", "info", "s.zarr"], {"zarr"}),
        (["store", "verify", "s.zarr"], {"zarr", "torch"}),
        (["compare", "p.csv", "p.csv", "--resamples", "9"], set()),
        (["evaluate", "p.csv", "--resamples", "9"], {"matplotlib"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_imports_what_it_needs(arguments: list[str], needed: set[str], tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(PREDICTIONS)
    WritableStore.create(str(tmp_path / "s.zarr"), SPECIFICATION, SHAPE, {})
    assert imported(tmp_path, *arguments) == needed


def test_the_package_imports_what_is_asked_for_of_it() -> None:
    code = "import sys, fpt_lightning; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert set(fpt_lightning.__all__) <= set(dir(fpt_lightning))
    assert all(hasattr(fpt_lightning, name) for name in fpt_lightning.__all__)
    with pytest.raises(AttributeError, match="module 'fpt_lightning' has no attribute 'FPTModule'"):
        fpt_lightning.FPTModule  # noqa: B018


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_is_there(name: str) -> None:
    assert callable(COMMANDS[name].load())


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for name, command in COMMANDS.items():
        assert f"{name} {command.help}" in said


@pytest.mark.parametrize("arguments", [[], ["fitt"], ["datasets", "foo"], ["store"]])
def test_what_is_no_command_is_refused_with_those_there_are(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert {"datasets": "prepare", "store": "verify", "fitt": "'fit'", "": "COMMAND"}["".join(arguments[:1])] in said


def test_an_option_of_a_group_of_commands_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning takes ``--config`` ahead of a command."""
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(tmp_path / "none.yaml"), "fit"])
    assert stopped.value.code == 2
    assert "none.yaml" in capsys.readouterr().err
