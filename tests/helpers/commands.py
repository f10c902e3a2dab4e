"""The command line in this process."""

from __future__ import annotations

import pytest

from fpt_lightning.cli import main


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What is said on stderr when a command fails for a reason made for people: one message, status 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.split("fpt-lightning: ")[-1]
    assert "Traceback" not in message
    return message


def run(*args: object) -> None:
    main([str(arg) for arg in args])
