"""The console script: the table of commands, each imported when it is called, and errors said for people."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

from fpt_lightning.cli.options import short_help
from fpt_lightning.errors import ConfigurationError, FPTError, in_one_line


class Command(NamedTuple):
    """A command of the table.

    Attributes:
        help: in a line.
        source: ``module:name`` of what runs it.
    """

    help: str
    source: str

    def load(self) -> Any:
        module, name = self.source.split(":")
        return getattr(import_module(f"fpt_lightning.{module}"), name)


_TRAINING = "cli.training:CommandLine"  # Lightning's own command line, which knows its commands by name
_FOLDS = "cli.crossval:cross_validate"  # which has one too

COMMANDS: dict[str, Command] = {
    "init": Command("look at a folder or table of images, and write a configuration for it", "cli.init:init"),
    "fit": Command("make the store if it is missing, train, and test the best and the last epoch", _TRAINING),
    "crossval": Command("every fold, with one or several seeds, from one store: one report, one ensemble", _FOLDS),
    "validate": Command("a trained model on the validation images", _TRAINING),
    "test": Command("a trained model on the test images, or on those of another hospital", _TRAINING),
    "predict": Command("a trained model on every image of a folder", _TRAINING),
    "preload": Command("the frozen pass alone: every image once through the encoder, into the store", _TRAINING),
    "plan": Command("parameters, memory and store that a run will need; nothing runs", _TRAINING),
    "audit": Command("duplicates, doubtful labels, outliers and shortcuts, from the stored features", _TRAINING),
    "explain": Command("pictures of what a trained model looked at, and how far to trust them", _TRAINING),
    "datasets list": Command("the paper's data sets", "datasets.preparation:list_datasets"),
    "datasets prepare": Command("write the manifest of one, from its owners' files", "datasets.preparation:prepare"),
    "store info": Command("what a feature store holds", "cli.store_info:store_info"),
    "store verify": Command("read all of a feature store to find damage", "cli.store_verify:store_verify"),
    "store repair": Command("compute again what is damaged", _TRAINING),
    "store upgrade": Command("bring one of the format before up to date", "cli.store_upgrade:store_upgrade"),
    "evaluate": Command("score a predictions file, of any model", "cli.evaluate:evaluate"),
    "compare": Command("two predictions files of the same images", "cli.compare:compare"),
    "export": Command(
        "a trained model as one file (ONNX, torch.export) or a folder to share", "deployment.export:export"
    ),
}
"""By name, in the order of use."""

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a command that SIGTERM stopped."""

_ALL = ("--help", "all")
"""Asks for all options, where ``--help`` tells those that people change."""
_OF_LIGHTNING = (_TRAINING, _FOLDS)
"""What parses its own arguments."""

_AUTO = Command("every method on stored features, compared on validation", "cli.auto:fit_all")  # fit --model auto

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""What a system refuses for want of room or of rights, whose remedy people know."""

_SETTINGS = ("MisconfigurationException", "UsageError")
"""Lightning's errors of settings of the trainer that cannot work here, and W&B's of an account that it lacks."""
_RESTORES = "lightning.pytorch.trainer.connectors.checkpoint_connector"
"""What stumbles over a checkpoint whose state of training is not what Lightning writes."""

_NOISE = (
    "💡 Tip",
    "GPU available",
    "Loaded model weights",
    "Restored all states",
    "Restoring states",
    "Seed set to",
    "TPU available",
    "`Trainer.fit` stopped",
)
"""How Lightning's messages begin that tell nothing new."""

_GROUPS = {"datasets": "the paper's data sets", "store": "what a feature store holds, and damage of it"}


def main(args: Sequence[str] | None = None) -> None:
    """The console script: errors made for people are one message on stderr, with exit status 2.

    SIGTERM stops it as Ctrl-C does, with exit status 143.
    """
    _quieten()
    given = sys.argv[1:] if args is None else list(args)
    try:
        if (command := _asks_help(given)) is not None:
            print(short_help(command, COMMANDS[command].help))
            return
        with _stopped_by_sigterm():
            _run(_spelled([arg for arg, before in zip(given, ["", *given], strict=False) if (before, arg) != _ALL]))
    except Exception as raised:
        told = _for_people(raised)
        if told is None or os.environ.get("FPT_TRACEBACK"):
            raise
        print(f"fpt-lightning: {told}", file=sys.stderr)
        raise SystemExit(2) from None


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops what Ctrl-C stops."""


def terminate(*_: object) -> None:
    """Handle SIGTERM: Lightning's prediction would go on to its end, and its training end as if it were done.

    Raises:
        Terminated: always.
    """
    raise Terminated


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stopped:
        reason: BaseException | None = stopped
        while reason is not None and not isinstance(reason, Terminated):
            reason = reason.__context__  # Lightning exits where it was interrupted
        if reason is None:
            raise
        raise SystemExit(TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(args: list[str]) -> None:
    first = args[0] if args else ""
    if first.startswith("-") and first not in ("-h", "--help", "--version"):
        COMMANDS["fit"].load()(args)  # Lightning's options ahead of a command
        return
    named = [name for name in COMMANDS if name.split() == args[: len(name.split())]]
    called = named or [name for name in COMMANDS if name.split()[0] == first]  # of a group, such as datasets --help
    if not called:
        _parser().parse_args(args)  # prints help or version, or refuses what is no command
    elif named == ["fit"] and _asks_auto(args):
        _AUTO.load()(args)
    elif any(COMMANDS[name].source in _OF_LIGHTNING for name in named):
        COMMANDS[first].load()(args)
    else:
        from jsonargparse import auto_cli

        from fpt_lightning.cli.misuse import in_words

        try:
            auto_cli(_components(called), args=args, prog="fpt-lightning", exit_on_error=False)
        except argparse.ArgumentError as error:
            options = [option for name in called for option in signature(COMMANDS[name].load()).parameters]
            raise ConfigurationError(in_words(str(error), options)) from error


def _asks_help(args: Sequence[str]) -> str | None:
    """Which of the commands that train or use a model is to be explained shortly."""
    named = [name for name, command in COMMANDS.items() if command.source in _OF_LIGHTNING]
    asked = {"-h", "--help"} & set(args) and _ALL not in pairwise(args)
    return next((name for name in named if asked and name.split() == list(args[: len(name.split())])), None)


def _asks_auto(args: Sequence[str]) -> bool:
    return "--model=auto" in args or ("--model", "auto") in pairwise(args)


def _components(names: Sequence[str]) -> dict[str, Any]:
    """Functions by name, those of a group in a dictionary of their own, as jsonargparse takes them."""
    components: dict[str, Any] = {}
    for name in names:
        if COMMANDS[name].source not in _OF_LIGHTNING:
            *group, last = name.split()
            within = components.setdefault(group[0], {"_help": _GROUPS[group[0]]}) if group else components
            within[last] = COMMANDS[name].load()
    return components


def _parser() -> argparse.ArgumentParser:
    """What says which commands there are, without importing them."""
    parser = argparse.ArgumentParser(
        "fpt-lightning",
        description="Train classifiers on high-resolution medical images with a frozen vision transformer.",
        epilog="Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('fpt-lightning')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help)
    return parser


def _quieten() -> None:
    """Leave out what Lightning says at every start and nobody can act on."""
    for message in (
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*does not have many workers.*",
        ".*number of training batches .* is smaller than the logging interval.*",  # the history has a row an epoch
        ".*module\\(s\\) in eval mode at the start of training.*",  # what is frozen
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*LightningCLI's args parameter is intended to run from within Python.*",
    ):
        warnings.filterwarnings("ignore", message)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 calls what jsonargparse 5 drops
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)  # each operation that is not folded
    for module in ("pytorch.utilities.rank_zero", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{module}").addFilter(lambda record: not record.getMessage().startswith(_NOISE))


def _spelled(args: list[str]) -> list[str]:
    """Commands as jsonargparse has them.

    ``store repair`` is a preload; of ``plan --gpu-memory 8GiB --all-methods`` and of ``init`` it knows no hyphens and
    no bare flags; of ``--by sex --by site`` it would keep the last.
    """
    if args[:1] in (["evaluate"], ["audit"]):
        return [re.sub(r"^--by(?=$|=)", "--by+", arg) for arg in args]
    if args[:2] == ["store", "repair"]:
        return ["preload", *args[2:], "--repair", "true"]
    if "plan" not in args and args[:1] != ["init"]:
        return args
    spelled = [arg.replace("--gpu-memory", "--gpu_memory").replace("--all-methods", "--all_methods") for arg in args]
    bare = [
        i
        for i, arg in enumerate(spelled)
        if arg == "--all_methods" and spelled[i + 1 : i + 2] not in (["true"], ["false"])
    ]
    return [f"{arg}=true" if i in bare else arg for i, arg in enumerate(spelled)]


def _for_people(raised: BaseException) -> str | None:
    """What to say of an error that has a remedy; None of one that has none, which is a fault of the software.

    It is one of ours, which a library may have passed on as one of its own, one of a setting, or the system's of a file
    that cannot be read or written.
    """
    error: BaseException | None = raised
    while error is not None and not isinstance(error, FPTError) and type(error).__name__ not in _SETTINGS:
        error = error.__cause__ or error.__context__
    if error is not None:
        text = str(error)
        if text.startswith("Caught "):  # in a worker process, whose traceback precedes the message
            text = text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
        return f"{type(error).__name__ if isinstance(error, FPTError) else 'ConfigurationError'}: {text}"
    modules = _modules(raised)
    if _RESTORES in modules:
        return f"CheckpointError: the checkpoint is damaged, or of another version ({in_one_line(raised)})."
    if isinstance(raised, ValueError) and modules[-1].startswith("lightning."):  # of a setting, at its use
        return f"ConfigurationError: {raised}"
    if isinstance(raised, OSError) and raised.errno in _REFUSED:
        return f"OutputError: {raised.filename or 'a file'} cannot be read or written: {raised.strerror}."
    return None


def _modules(error: BaseException) -> list[str]:
    """Through which an error came, the one that raised it last."""
    return [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
