"""Several fits of one configuration, each in a folder of its own below one: what is finished is not run again."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from fpt_lightning.cli.run_folder import check_free, is_finished, lock_folder
from fpt_lightning.cli.training import CommandLine
from fpt_lightning.datamodules.base import is_first_process
from fpt_lightning.deployment.checkpoints import read_checkpoint
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.files import write_text

_STOPPED = 130  # the exit status of a program that Ctrl-C ended


class Configuration(CommandLine):
    """What a command line comes to, of which nothing is made or run.

    Attributes:
        settings: of the command, as plain values.
        text: the same as YAML.
    """

    def before_instantiate_classes(self) -> None:
        self.checkpoint = None
        self._find_classes()
        parsed = self.config[self.subcommand]
        self.settings = parsed.as_dict()
        self.text = self._parser(self.subcommand).dump(parsed)

    def instantiate_classes(self) -> None:
        pass

    def after_instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class _Fit(CommandLine):
    """One of several, of which none prints a table of its own."""

    TELLS = False


@dataclass(frozen=True)
class Run:
    """One fit of several.

    Attributes:
        folder: of the run.
    """

    folder: Path

    @property
    def finished(self) -> bool:
        """Whether it was trained, and tested at its best and its last epoch."""
        return is_finished(self.folder)

    @property
    def checkpoint(self) -> Path:
        """Of the best epoch."""
        return self.folder / "best.ckpt"

    @property
    def last(self) -> Path:
        """The checkpoint that it goes on from."""
        return self.folder / "last.ckpt"

    @property
    def validation(self) -> Path:
        """The best epoch's predictions for the validation images."""
        return self.folder / "validate" / "best" / "predictions.csv"

    def go_on(self, args: Sequence[str]) -> None:
        """Train it by the arguments of ``fit``, or go on with it, until all processes have done so."""
        own = ["--trainer.default_root_dir", str(self.folder)]
        if self.last.is_file():
            own += ["--ckpt_path", str(self.last)]
        elif is_first_process() and self.folder.exists():
            shutil.rmtree(self.folder)  # stopped in its first epoch
        fit = _Fit(["fit", *args, *own])
        fit.trainer.strategy.barrier("fitted")  # what the first process wrote is there for all

    def validate(self) -> None:
        """Write the best epoch's predictions for the validation images, where they are missing."""
        if not self.validation.is_file():
            CommandLine(["validate", "--config", str(self.folder / "config.yaml"), "--ckpt_path", str(self.checkpoint)])


@contextmanager
def claimed(path: Path, text: str, runs: Sequence[Run]) -> Iterator[None]:
    """Hold the folder of several runs, and where Ctrl-C or SIGTERM stops them, say what is kept and how they go on.

    Args:
        path: of the file in that folder that says whose runs it holds.
        text: its content.
        runs: all of them.

    Raises:
        ConfigurationError: the folder holds runs of another configuration, naming what differs, or a run of its own; or
            another command is at work there.
    """
    folder = path.parent
    lock = lock_folder(folder) if is_first_process() else None
    try:
        if path.is_file():
            _check_same(path, text)
        else:
            check_free(folder, None)
        if is_first_process():
            write_text(path, text)
        yield
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first
        if is_first_process():
            print(_kept(folder, runs), file=sys.stderr)
        raise SystemExit(_STOPPED) from None
    finally:
        if lock is not None:
            lock.close()


def _check_same(path: Path, text: str) -> None:
    earlier = path.read_text(encoding="utf-8")
    if yaml.safe_load(earlier) != yaml.safe_load(text):  # whatever the order
        there, now = earlier.splitlines(), text.splitlines()
        raise ConfigurationError(
            f"{path.parent} holds runs of another configuration: give another --trainer.default_root_dir, or remove "
            "the folder.\n  there: "
            + "; ".join(line.strip() for line in there if line not in now)
            + "\n  now: "
            + "; ".join(line.strip() for line in now if line not in there)
        )


def _kept(folder: Path, runs: Sequence[Run]) -> str:
    finished = [run for run in runs if run.finished]
    begun = [run for run in runs if run.last.is_file() and run not in finished]
    lines = [f"Stopped. {len(finished)} of {len(runs)} runs are finished and kept in {folder}."]
    lines += [f"{run.folder} goes on after epoch {read_checkpoint(run.last)['epoch'] + 1}." for run in begun]
    return "\n".join(["", *lines, "The same command goes on."])
