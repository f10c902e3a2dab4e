"""``fit`` and what else takes a model and data from one configuration, as Lightning's command line runs it."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from fpt_lightning.cli.callbacks import EpochSeconds, LearnableParameters, PeakMemory, ResultsWriter, Stoppable
from fpt_lightning.cli.misuse import in_words
from fpt_lightning.cli.run_folder import (
    RunLogger,
    SaveRunConfig,
    WholeCheckpoints,
    check_free,
    checkpoint_callbacks,
    claim,
    logged_at,
)
from fpt_lightning.cli.screen import CheckpointResult, ImageProgress, results
from fpt_lightning.cli.trainer import Trainer
from fpt_lightning.data.manifest import Manifest
from fpt_lightning.datamodules.base import is_first_process
from fpt_lightning.datamodules.images import ImageDataModule
from fpt_lightning.datamodules.preloaded import PreloadedFeatureDataModule
from fpt_lightning.datamodules.samples import check_processes
from fpt_lightning.deployment.checkpoints import read_checkpoint, read_trained
from fpt_lightning.encoder.precision import check_precision
from fpt_lightning.errors import CheckpointError, ConfigurationError
from fpt_lightning.explanation.writer import ExplanationWriter
from fpt_lightning.methods import ClassificationModule
from fpt_lightning.methods.ensemble import EnsembleModule, is_ensemble
from fpt_lightning.methods.record import TrainingRecord
from fpt_lightning.methods.tasks import task_class
from fpt_lightning.methods.trained import TrainedModule

_PRELOAD_SETTINGS = ("accelerator", "devices", "num_nodes", "enable_progress_bar")  # of the frozen pass within fit


_EVALUATED = {"fit": ("val", "test"), "validate": ("val",), "test": ("test",)}
"""Splits that a stage evaluates."""


class CommandLine(LightningCLI):
    """``fit``, ``test``, ``predict`` and what else takes a model and data, from one configuration."""

    TRAINER: ClassVar[type[Trainer]] = Trainer
    """Whose methods are the commands."""

    TELLS: ClassVar[bool] = True
    """Whether ``fit`` prints what its tests found, which the run's folder has anyway."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        self.results = ResultsWriter()
        self._given = sys.argv[1:] if args is None else list(args)
        super().__init__(
            ClassificationModule,
            ImageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=self.TRAINER,
            trainer_defaults={
                "max_epochs": 20,
                "gradient_clip_val": 1.0,
                "log_every_n_steps": 10,
                "default_root_dir": "runs/run",
                "enable_model_summary": False,
            },
            seed_everything_default=0,
            save_config_callback=SaveRunConfig,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": "fpt-lightning",
                "exit_on_error": False,  # main says it in a line
                **{name: {"exit_on_error": False} for name in self.subcommands()},
            },
            args=self._given,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """That which is called, as the parser of each takes a tenth of a second; or all, behind other options."""
        own = {name: {"model", "datamodule"} for name in ("preload", "plan", "audit", "explain")}
        every = {**LightningCLI.subcommands(), **own}
        return {name: skipped for name, skipped in every.items() if name in self._given[:1]} or every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.description = "Train classifiers on high-resolution medical images with a frozen vision transformer."
        parser.add_argument(
            "--report_pictures",
            type=NonNegativeInt,
            default=0,
            help="how many of the most confident errors report.html shows, with names and pictures",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse what the parser refuses in a line, with the nearest of the command's options.

        Raises:
            ConfigurationError: an option that there is not, or a value of another type.
        """
        try:
            if "test" in self._subcommand_parsers:
                self._subcommand_parsers["test"].set_defaults(verbose=False)  # Lightning's table of what is shown here
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            command = next((arg for arg in args if arg in self._subcommand_parsers), "")
            of_command = self._subcommand_parsers.get(command, parser)
            raise ConfigurationError(in_words(str(error), of_command._option_string_actions)) from error

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if type(seed) is int and not 0 <= seed < 2**32:
            raise ConfigurationError(f"seed_everything is {seed}: give a number from 0 to {2**32 - 1}.")
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration as typed: what a checkpoint holds is compared with it, never put in its place."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        root, fit = str(config["default_root_dir"]), self.subcommand == "fit"
        given = config["logger"]
        loggers: list[Logger] = [] if given in (None, True, False) else given if isinstance(given, list) else [given]
        if fit and given is not False and not config["fast_dev_run"]:
            loggers = [*loggers, RunLogger(root)]
        callbacks = [Stoppable(), self.results, PeakMemory()]
        plugins = _as_list(config["plugins"] or [])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpoints()]
        if fit:
            callbacks += [
                LearnableParameters(),
                EpochSeconds(),
                *([LearningRateMonitor("epoch")] if loggers else []),
                *checkpoint_callbacks(root, *self.model.task.MONITOR),
            ]
        else:
            kwargs["enable_checkpointing"] = False
        if self.subcommand in ("preload", "plan", "audit", "explain"):
            loggers, callbacks = [], [Stoppable()]
        bars = [each for each in _as_list(config["callbacks"] or []) if isinstance(each, ProgressBar)]
        if config["enable_progress_bar"] is not False and self.subcommand not in ("plan", "audit") and not bars:
            callbacks.append(ImageProgress(f"val_{self.model.task.MONITOR[0]}"))
        if self.subcommand in ("preload", "explain"):
            kwargs["precision"] = None  # the frozen pass and the pictures are in fp32, whatever trains
        if self.subcommand in ("plan", "audit"):  # for whatever device, here
            kwargs |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "callbacks": None}
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(logger=loggers or False, **kwargs)

    def before_instantiate_classes(self) -> None:
        path, folder = self._get(self.config, "ckpt_path"), Path(self._get(self.config, "trainer").default_root_dir)
        if path in ("best", "last", "ensemble"):  # the run's own
            path = self.config[self.subcommand].ckpt_path = str(folder / f"{path}.ckpt")
        if path is None and self.subcommand in ("validate", "test", "predict", "explain"):
            raise CheckpointError(
                f"{self.subcommand} needs a trained model: give --ckpt_path, such as runs/run/best.ckpt."
            )
        if path is not None and self.subcommand == "fit" and Path(path).is_dir():
            raise CheckpointError(
                f"{path} (ckpt_path) is a model to share, without the state of its training: fit goes on from a run's "
                "last.ckpt."
            )
        self.checkpoint = None if path is None else read_trained(path)
        if self.subcommand in ("fit", "validate", "test", "predict"):
            _check_writable(folder)
        if self._writes_run:
            check_free(folder, path)
        self._find_classes()
        for logger in _as_list(self._get(self.config, "trainer").logger):
            _check_package(getattr(logger, "class_path", ""))
            if "save_dir" in getattr(logger, "init_args", ()) and logger.init_args.save_dir in (None, "."):
                logger.init_args.save_dir = self._get(self.config, "trainer").default_root_dir

    def _find_classes(self) -> None:
        """Take a number of classes that is not given from the checkpoint, or else from the data."""
        given = self._get(self.config, "model").init_args
        self._listed: Manifest | None = None
        if given.get("num_classes", 0) is not None:
            return
        if self.checkpoint is not None:
            TrainingRecord.of(self.checkpoint)  # or its refusal
            given.num_classes = self.checkpoint["hyper_parameters"].get("num_classes")
            if type(given.num_classes) is not int:
                raise CheckpointError(f"the checkpoint is damaged: its num_classes is {given.num_classes!r:.80}.")
            return
        parser, asked = ArgumentParser(), self._get(self.config, "data")
        parser.add_subclass_arguments(ImageDataModule, "data")
        data = parser.instantiate_classes(parser.parse_object({"data": asked.as_dict()})).data
        data.folder = self._lists
        self._listed = data.read_manifest(task_class(given.get("task", "multiclass")).KIND)
        given.num_classes = len(data.class_names)

    def after_instantiate_classes(self) -> None:
        """Let errors name this very command, and results the checkpoint they are of."""
        self.datamodule.folder, self.results.pictures = self._lists, self._get(self.config, "report_pictures")
        if self._listed is not None:  # read once
            self.datamodule.manifest = self.datamodule.listed = self._listed
        if self.checkpoint is not None:
            self.model = self._as_trained(self.checkpoint)
        if isinstance(self.datamodule, PreloadedFeatureDataModule):
            options = shlex.join(["preload", *_of_store(self._given), "--overwrite", "true"])
            self.datamodule.rebuild = f"fpt-lightning {options}"
        path = self._get(self.config, "ckpt_path")
        if path is not None:
            self.results.checkpoint = Path(path).resolve().name if Path(path).is_dir() else Path(path).stem
        if self.checkpoint is not None and type(epoch := self.checkpoint.get("epoch")) is int:
            self.results.epoch = epoch + 1

    def _as_trained(self, checkpoint: dict[str, Any]) -> ClassificationModule:
        """The model, or as many of it as a checkpoint of an ensemble holds.

        Raises:
            CheckpointError: an ensemble that is to be trained or explained.
        """
        if is_ensemble(checkpoint) and self.subcommand in ("fit", "explain"):
            raise CheckpointError(
                f"{self._get(self.config, 'ckpt_path')} is an ensemble, and {self.subcommand} takes one model: give "
                "a member's checkpoint."
            )
        return EnsembleModule.like(self.model, checkpoint)

    @property
    def _writes_run(self) -> bool:
        """Whether this process trains and leaves a run in the folder."""
        fast = self._get(self.config, "trainer").fast_dev_run
        return self.subcommand == "fit" and not fast and is_first_process()

    @property
    def _lists(self) -> Path | None:
        """Where what is wrong with the data is listed: the run's folder, or the command's own part of it."""
        trainer = self._get(self.config, "trainer")
        if trainer.fast_dev_run:
            return None
        folder = Path(trainer.default_root_dir)
        return folder if self.subcommand in ("fit", "preload", "plan", "audit") else folder / str(self.subcommand)

    def check(self, stage: str) -> None:
        """Refuse what cannot work before anything is read, encoded, trained or written.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
        """
        check_precision(self.trainer)
        if stage == "fit":
            self.model.check_trainer(self.trainer)
        if self.checkpoint is not None:
            TrainedModule.on_load_checkpoint(self.model, self.checkpoint)
            if stage == "fit":
                self.model.check_optimizer(self.checkpoint)
                self._check_seed(self.model._seed)
        self.datamodule.check(stage, self.model)
        for split in _EVALUATED.get(stage, ()):
            check_processes(len(self.datamodule.labelled.split(split)), self.trainer.world_size)
        if self.checkpoint is not None:
            encoder = getattr(self.model, "encoder_config", None)
            asked = None if encoder is None else self.datamodule.asked(encoder)
            self.model.check_data(self.datamodule, stage, asked)

    def _check_seed(self, trained: int | None) -> None:
        seed = self._get(self.config, "seed_everything")
        if type(seed) is int and trained not in (None, seed):
            raise CheckpointError(
                f"seed_everything is {seed}, but the checkpoint's run was seeded with {trained}: give that, or start a "
                "new run with yours."
            )

    def before_validate(self) -> None:
        self.check("validate")

    def before_test(self) -> None:
        self.check("test")
        self._check_coverage()

    def before_predict(self) -> None:
        self.check("predict")
        self._check_coverage()

    def _check_coverage(self) -> None:
        coverage = self._get(self.config, "coverage")
        if coverage is not None:
            self.model.check_coverage(coverage)

    def before_plan(self) -> None:
        """Plan for the accelerator that the trainer is asked for, in whose place a CPU stands."""
        asked, planned = self._get(self.config, "trainer").accelerator, self.config_init["plan"]
        on_gpu = asked in ("gpu", "cuda") or (asked == "auto" and CUDAAccelerator.is_available())
        if planned.device == "auto" and on_gpu:
            planned.device = "cuda"

    def after_plan(self) -> None:
        """End with the error that fit would end with before it encodes or trains anything."""
        _check_writable(Path(self._get(self.config, "trainer").default_root_dir))
        self.check("fit")
        if isinstance(self.datamodule, PreloadedFeatureDataModule) and self.datamodule.uses_store(self.model):
            self.datamodule.check_store(self.model.encoder_config)

    def before_audit(self) -> None:
        _check_writable(Path(self._get(self.config, "trainer").default_root_dir))
        self.check("test")

    def before_explain(self) -> None:
        given = {name: self._get(self.config, name) for name in ("layer", "head", "images", "deletion")}
        ExplanationWriter(self._get(self.config, "out"), self.model, **given)  # which refuses what it cannot draw
        self.datamodule.explained = self._get(self.config, "split")
        self.check("predict")

    def before_fit(self) -> None:
        """Make the store that is missing, with the same devices."""
        self.check("fit")
        if self._writes_run:
            self._lock = claim(Path(self.trainer.default_root_dir), self._get(self.config, "ckpt_path"))
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger) and self.checkpoint is not None:
                logger.go_on(self.checkpoint["epoch"])
        config = self._get(self.config_init, "trainer")
        if isinstance(self.datamodule, PreloadedFeatureDataModule) and self.datamodule.uses_store(self.model):
            settings = {name: config[name] for name in _PRELOAD_SETTINGS}
            strategy = config["strategy"] if isinstance(config["strategy"], str) else "auto"
            trainer = L.Trainer(
                **settings,
                strategy=strategy,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                callbacks=[Stoppable(), *([] if settings["enable_progress_bar"] is False else [ImageProgress()])],
            )
            self.datamodule.preload(self.model, trainer)

    def after_fit(self) -> None:
        """Test the last and the best checkpoint, and keep both results with the run."""
        root = Path(self.trainer.default_root_dir)
        if self._get(self.config, "trainer").fast_dev_run:
            return
        self.results.folder, tested = root, list[CheckpointResult]()
        for name in ("last", "best"):  # whose files stay
            path = root / f"{name}.ckpt"
            if path.is_file():
                tested = self._test(name, path) + tested
            else:
                why = "no epoch was validated" if name == "best" else "no epoch was finished"
                rank_zero_warn(f"{why}, so that there is no {path} to test.")
        if self.TELLS:
            if tested:
                print(f"\n{results(tested)}\n")
                self._say_cases(tested[0].name)
            self._say_where()

    def _test(self, name: str, path: Path) -> list[CheckpointResult]:
        """Test one of the run's checkpoints; loggers get its metrics under its own name."""
        root, epoch, metric = path.parent, read_checkpoint(path)["epoch"], f"val_{self.model.task.MONITOR[0]}"
        self.results.checkpoint, self.results.fitted = name, epoch
        self.results.writes = name == "best" or not path.with_name("best.ckpt").is_file()
        self.results.epoch = epoch + 1
        loggers, self.trainer.loggers = self.trainer.loggers, []
        self.trainer.test(self.model, self.datamodule, ckpt_path=str(path), weights_only=True, verbose=False)
        self.trainer.loggers = loggers
        found = {key: float(v) for key, v in self.trainer.callback_metrics.items() if key.startswith("test_")}
        for logger in loggers:
            logger.log_metrics({f"{name}_{key}": v for key, v in found.items()}, self.trainer.global_step)
        if name not in self.results.evaluations:  # in another process, or of images without labels
            return []
        value = logged_at(root, metric, epoch)
        return [CheckpointResult(name, epoch + 1, metric, value, self.results.evaluations[name])]

    def after_test(self) -> None:
        """Say what came out."""
        for name, evaluation in self.results.evaluations.items():
            print(f"\n{evaluation.table()}\n")
            self._say_cases(name)
        self._say_where()

    def _say_cases(self, name: str) -> None:
        if name in self.results.cases:
            print(f"{self.results.cases[name].table()}\n")

    def _say_where(self) -> None:
        if self.results.told:
            print(self.results.told)


def _of_store(args: Sequence[str]) -> list[str]:
    """The options of a command line that may decide what a store holds."""
    kept, keeps = list[str](), False
    for arg in args:
        if arg.startswith("--") or arg == "-c":
            keeps = arg.startswith(("--config", "-c", "--model", "--data"))
        if keeps:
            kept.append(arg)
    return kept


def _check_writable(folder: Path) -> None:
    """Refuse a run's folder that is a file or cannot be made or written.

    Raises:
        ConfigurationError: naming it.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "is a file" if not there.is_dir() else "cannot be written"
        raise ConfigurationError(f"trainer.default_root_dir is {folder}, but {there} {why}: give another folder.")


def _check_package(logger: str) -> None:
    """Refuse a logger whose package is an extra that is not installed.

    Raises:
        ConfigurationError: with the extra.
    """
    if logger.endswith("TensorBoardLogger") and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise ConfigurationError("TensorBoardLogger needs tensorboard: pip install 'fpt-lightning[tensorboard]'.")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
