"""``fit`` and what else takes a model and data from one configuration, as Lightning's command line runs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO

from fpt_lightning.cli.callbacks import EpochSeconds, LearnableParameters, PeakMemory, ResultsWriter
from fpt_lightning.cli.run_folder import (
    RunLogger,
    SaveRunConfig,
    WholeCheckpoints,
    checkpoint_callbacks,
    is_first_process,
)
from fpt_lightning.cli.trainer import Trainer
from fpt_lightning.datamodules.images import ImageDataModule
from fpt_lightning.datamodules.preloaded import PreloadedFeatureDataModule
from fpt_lightning.deployment.checkpoints import read_checkpoint
from fpt_lightning.errors import CheckpointError, ConfigurationError
from fpt_lightning.explanation.writer import ExplanationWriter
from fpt_lightning.methods import ClassificationModule
from fpt_lightning.methods.trained import TrainedModule

_PRELOAD_SETTINGS = ("accelerator", "devices", "num_nodes", "enable_progress_bar")  # of the frozen pass within fit


class CommandLine(LightningCLI):
    """``fit``, ``validate``, ``test``, ``predict``, ``preload``, ``plan`` and ``explain`` from one configuration."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        self.results = ResultsWriter()
        super().__init__(
            ClassificationModule,
            ImageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=Trainer,
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
            parser_kwargs={"prog": "fpt-lightning"},
            args=None if args is None else list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        own = {name: {"model", "datamodule"} for name in ("preload", "plan", "explain")}
        return {**LightningCLI.subcommands(), **own}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.description = "Train classifiers on high-resolution medical images with a frozen vision transformer."

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration as typed: what a checkpoint holds is compared with it, never put in its place."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        root, fit = str(config["default_root_dir"]), self.subcommand == "fit"
        given = config["logger"]
        loggers: list[Logger] = [] if given in (None, True, False) else given if isinstance(given, list) else [given]
        if fit and given is not False and not config["fast_dev_run"]:
            loggers = [*loggers, RunLogger(root, None if self.checkpoint is None else self.checkpoint["global_step"])]
        callbacks = [self.results, PeakMemory()]
        if fit:
            plugins = _as_list(config["plugins"] or [])
            if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
                kwargs["plugins"] = [*plugins, WholeCheckpoints()]
            callbacks += [
                LearnableParameters(),
                EpochSeconds(),
                *([LearningRateMonitor("epoch")] if loggers else []),
                *checkpoint_callbacks(root, *self.model.task.MONITOR),
            ]
        else:
            kwargs["enable_checkpointing"] = False
        if self.subcommand in ("preload", "plan", "explain"):
            loggers, callbacks = [], []
        if self.subcommand in ("preload", "explain"):
            kwargs["precision"] = None  # the frozen pass and the pictures are in fp32, whatever trains
        if self.subcommand == "plan":  # for whatever device, here
            kwargs |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "callbacks": None}
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(logger=loggers or False, **kwargs)

    def before_instantiate_classes(self) -> None:
        path = self._get(self.config, "ckpt_path")
        if path is None and self.subcommand in ("validate", "test", "predict", "explain"):
            raise CheckpointError(
                f"{self.subcommand} needs a trained model: give --ckpt_path, such as runs/run/best.ckpt."
            )
        self.checkpoint = None if path is None else read_checkpoint(path)
        folder = Path(self._get(self.config, "trainer").default_root_dir)
        if self.subcommand in ("fit", "validate", "test", "predict"):
            _check_writable(folder)
        if is_first_process() and self.subcommand == "fit" and path is None and (folder / "config.yaml").exists():
            last = folder / "last.ckpt"
            raise ConfigurationError(
                f"{folder} already holds a run: give another --trainer.default_root_dir, remove the folder, or "
                + (
                    f"go on with that run by --ckpt_path {last}."
                    if last.exists()
                    else "start anew: it has no last.ckpt."
                )
            )
        for logger in _as_list(self._get(self.config, "trainer").logger):
            if "save_dir" in getattr(logger, "init_args", ()) and logger.init_args.save_dir in (None, "."):
                logger.init_args.save_dir = self._get(self.config, "trainer").default_root_dir

    def after_instantiate_classes(self) -> None:
        """Let errors name this very command, and results the checkpoint they are of."""
        given = self._get(self.config, "config") or []
        configs = "".join(f" --config {path}" for path in given)
        if isinstance(self.datamodule, PreloadedFeatureDataModule):
            self.datamodule.rebuild = f"fpt-lightning preload{configs} --overwrite true"
        path = self._get(self.config, "ckpt_path")
        if path is not None:
            self.results.checkpoint = Path(path).stem

    def check(self, stage: str) -> None:
        """Refuse what cannot work before anything is read, encoded, trained or written.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
        """
        if stage == "fit":
            self.model.check_trainer(self.trainer)
        if self.checkpoint is not None:
            TrainedModule.on_load_checkpoint(self.model, self.checkpoint)
            if stage == "fit":
                self.model.check_optimizer(self.checkpoint)
        self.datamodule.check(stage, self.model)
        if self.checkpoint is not None:
            encoder = getattr(self.model, "encoder_config", None)
            asked = None if encoder is None else self.datamodule.asked(encoder)
            self.model.check_data(self.datamodule, stage, asked)

    def before_validate(self) -> None:
        self.check("validate")

    def before_test(self) -> None:
        self.check("test")

    def before_predict(self) -> None:
        self.check("predict")

    def before_explain(self) -> None:
        given = {name: self._get(self.config, name) for name in ("layer", "head", "images")}
        ExplanationWriter(self._get(self.config, "out"), self.model, **given)  # which refuses what it cannot draw
        self.datamodule.explained = self._get(self.config, "split")
        self.check("predict")

    def before_fit(self) -> None:
        """Make the store that is missing, with the same devices."""
        self.check("fit")
        config = self._get(self.config_init, "trainer")
        if isinstance(self.datamodule, PreloadedFeatureDataModule) and self.datamodule.uses_store(self.model):
            settings = {name: config[name] for name in _PRELOAD_SETTINGS}
            strategy = config["strategy"] if isinstance(config["strategy"], str) else "auto"
            trainer = L.Trainer(
                **settings, strategy=strategy, logger=False, enable_checkpointing=False, enable_model_summary=False
            )
            self.datamodule.preload(self.model, trainer)

    def after_fit(self) -> None:
        """Test the last and the best checkpoint, and keep both results with the run."""
        root = Path(self.trainer.default_root_dir)
        if self._get(self.config, "trainer").fast_dev_run or not (root / "best.ckpt").is_file():
            return
        self.results.folder = root
        for name in ("last", "best"):
            self.results.checkpoint = name
            self.trainer.test(self.model, self.datamodule, ckpt_path=str(root / f"{name}.ckpt"), weights_only=True)


def _check_writable(folder: Path) -> None:
    """Refuse a run's folder that is a file or cannot be made or written.

    Raises:
        ConfigurationError: naming it.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "is a file" if not there.is_dir() else "cannot be written"
        raise ConfigurationError(f"trainer.default_root_dir is {folder}, but {there} {why}: give another folder.")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
