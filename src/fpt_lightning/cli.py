"""The command line: LightningCLI with ``preload``, ``plan`` and ``explain``, beside commands without a Trainer."""

from __future__ import annotations

import csv
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

import fpt_lightning
from fpt_lightning import commands
from fpt_lightning.callbacks import EpochSeconds, LearnableParameters, PeakMemory, ResultsWriter
from fpt_lightning.checkpoints import read_checkpoint
from fpt_lightning.datamodules import ImageDataModule, PreloadedFeatureDataModule
from fpt_lightning.datasets.preparation import list_datasets, prepare
from fpt_lightning.errors import CheckpointError, ConfigurationError, DataError, FPTError
from fpt_lightning.explainer import ExplanationWriter
from fpt_lightning.export import export
from fpt_lightning.manifest import Kind
from fpt_lightning.methods import METHODS, ClassificationModule
from fpt_lightning.planner import CONTEXT_BYTES, Setting, parse_memory, plan, shared_arguments, table

_COMMANDS: dict[str, Any] = {
    "datasets": {
        "_help": "list the paper's data sets, or prepare one: write the manifest of what its owners distribute",
        "list": list_datasets,
        "prepare": prepare,
    },
    "store": {
        "_help": "say what a feature store holds, or read all of it to find damage",
        "info": commands.store_info,
        "verify": commands.store_verify,
    },
    "evaluate": commands.evaluate,
    "compare": commands.compare,
    "export": export,
}
"""What needs no Trainer: functions, or several of them by name; their arguments and docstrings are the command's."""

_PRELOAD_SETTINGS = ("accelerator", "devices", "num_nodes", "enable_progress_bar")  # of the frozen pass within fit


class Trainer(L.Trainer):
    """Lightning's trainer with the frozen pass, the planner and explanations as three more things it does."""

    def preload(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        overwrite: bool = False,
        repair: bool = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Run every image through the frozen encoder into the feature store, or go on with it.

        Args:
            model: whose encoder.
            datamodule: whose images and store.
            overwrite: remove a store made with other settings, and start anew.
            repair: read the whole store first, and compute again what is damaged.
            ckpt_path: not used; a configuration saved by fit holds it.
            weights_only: not used; a configuration saved by fit holds it.
        """
        if not isinstance(datamodule, PreloadedFeatureDataModule):
            raise ConfigurationError(
                f"data is {type(datamodule).__name__}, which has no store: preload needs PreloadedFeatureDataModule."
            )
        datamodule.preload(model, self, overwrite, repair)

    def plan(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        gpu_memory: str | None = None,
        all_methods: bool = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Print parameters, memory and store that a run will need; nothing is loaded, encoded or trained.

        Args:
            model: the method.
            datamodule: its data; images need not be there.
            gpu_memory: of the GPU, such as 8GiB: the largest batch and resolution that fit are looked for.
            all_methods: a row for every method, with the arguments that it shares with the model.
            ckpt_path: not used; a configuration saved by fit holds it.
            weights_only: not used; a configuration saved by fit holds it.
        """
        assert isinstance(model, ClassificationModule)
        assert isinstance(datamodule, ImageDataModule)
        setting = _setting(model, datamodule, str(self.precision))
        memory = None if gpu_memory is None else parse_memory(gpu_memory)
        methods = list(METHODS.values()) if all_methods else [type(model)]
        plans, left_out = [], []
        for method in methods:
            arguments = shared_arguments(method, type(model), setting.arguments)
            try:
                plans.append(plan(replace(setting, method=method, arguments=arguments), memory))
            except ConfigurationError as error:
                if not all_methods:
                    raise
                left_out.append(f"{method.LABEL} is left out: {error}")
        images, uncounted = _count_images(datamodule, model.task.KIND)
        height, width = setting.resolution
        print(
            f"{model.encoder_shape.name} at {height} x {width} pixels, batch {setting.batch_size}, precision "
            f"{setting.precision}, {'no store' if setting.codec is None else f'codec {setting.codec}'}\n\n"
            f"{table(plans, images, memory)}\n\n"
            "Memory: peak of live tensors, predicted as on a CPU, of training and of the frozen pass (batches of "
            f"{setting.preload_batch_size}).\nA GPU adds its context and the allocator's reserve, for which "
            f"{CONTEXT_BYTES / 2**30:g} GiB of --gpu-memory is set aside (an assumption, not a measurement)."
        )
        print("\n".join([*uncounted, *left_out]))

    def explain(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        out: str,
        layer: int | None = None,
        head: int | None = None,
        images: int = 16,
        split: Literal["val", "test"] | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Show what a trained model looked at: pictures of images, and over all of them how far to trust these.

        Args:
            model: FPT+ or FPT.
            datamodule: its data.
            out: folder of the pictures and numbers (``fpt_lightning.explainer.ExplanationWriter``).
            layer: tapped block of the encoder, counted from 0, that is drawn; the last one by default.
            head: whose tokens and attention are drawn; all of them by default.
            images: how many are drawn, evenly spread over all.
            split: of the data set, from the store where the data module has one; by default every image below
                data.root, through the encoder.
            ckpt_path: the trained model's checkpoint.
            weights_only: not used; only tensors and plain values are read.
        """
        assert isinstance(datamodule, ImageDataModule)
        datamodule.explained = split
        cast(Any, self).callbacks.append(ExplanationWriter(out, model, layer, head, images))
        self.predict(model, datamodule=datamodule, return_predictions=False, ckpt_path=ckpt_path, weights_only=True)


def _setting(model: ClassificationModule, data: ImageDataModule, precision: str) -> Setting:
    if precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise ConfigurationError(f"trainer.precision is {precision!r}: plan predicts 32-true, 16-mixed and bf16-mixed.")
    stored = data if isinstance(data, PreloadedFeatureDataModule) else None
    return Setting(
        method=type(model),
        arguments={k: v for k, v in model.hparams.items() if not k.startswith("_")},  # those are LightningCLI's
        resolution=data.resolution,
        batch_size=data.batch_size,
        precision="32-true" if precision == "32-true" else "bf16-mixed",
        codec=None if stored is None else stored.codec,
        mirrored=stored is not None and stored.mirrored,
        image_size=data.image_size,
        preload_batch_size=1 if stored is None else stored.preload_batch_size,
    )


def _count_images(data: ImageDataModule, kind: Kind) -> tuple[int | None, list[str]]:
    try:
        return len(data.read_manifest(kind).samples), []
    except DataError as error:
        return None, [f"The images are not counted, so the store is of 1,000: {error}"]


class RunLogger(CSVLogger):
    """``metrics.csv`` in the run's own folder; a resumed run goes on where its checkpoint was written.

    Args:
        save_dir: the run's folder.
        resumed_at: the global step of the checkpoint that a run goes on from.
    """

    def __init__(self, save_dir: str, resumed_at: int | None = None) -> None:
        super().__init__(save_dir, name="", version="")
        self.resumed_at = resumed_at

    @property
    def experiment(self) -> Any:
        if self._experiment is None and self.resumed_at is not None:
            path = Path(self.log_dir) / "metrics.csv"
            earlier = path.with_name("metrics.csv.earlier")  # stays until its rows are written again
            if path.is_file() and not earlier.is_file():
                os.replace(path, earlier)
            rows = list(csv.DictReader(earlier.open(newline=""))) if earlier.is_file() else []
            # a kill may have cut the last row
            whole = [row for row in rows if None not in row.values() and row["step"].isdecimal()]
            kept = [{k: v for k, v in row.items() if v != ""} for row in whole if int(row["step"]) < self.resumed_at]
            writer: Any = super().experiment
            writer.metrics = kept
            writer.save()
            earlier.unlink(missing_ok=True)
            return writer
        return super().experiment


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written under a partial name: a run that is killed keeps its last whole one.

    Lightning moves a temporary file in its place, which is a copy where the temporary folder is on another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        partial = Path(f"{path}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # PyTorch has one of its own for a full disk
            partial.unlink(missing_ok=True)
            raise CheckpointError(
                f"the checkpoint {path} cannot be written: {error}. An earlier one is kept: make room, then go on by "
                "--ckpt_path."
            ) from error
        os.replace(partial, path)


class SaveRunConfig(SaveConfigCallback):
    """Saves ``config.yaml`` and ``split.csv`` in the run's folder when fit starts; a run that goes on keeps its own."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self.already_saved:
            return
        self.already_saved = True
        if trainer.is_global_zero and self.config.get("ckpt_path") is None:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            data = getattr(trainer, "datamodule", None)
            if isinstance(data, ImageDataModule) and data.listed is not None:
                data.listed.write(folder / "split.csv")
            partial = folder / f"{self.config_filename}.partial"
            self.parser.save(self.config, partial, overwrite=True, multifile=False)
            os.replace(partial, folder / self.config_filename)


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
            parser_kwargs={
                "version": fpt_lightning.__version__,
                "prog": "fpt-lightning",
                "epilog": f"Commands without a Trainer, each with its own --help: {', '.join(_COMMANDS)}.",
            },
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
                *_checkpoints(root, *self.model.task.MONITOR),
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
        first = getattr(rank_zero_only, "rank", 0) in (0, None)
        if first and self.subcommand == "fit" and path is None and (folder / "config.yaml").exists():
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

    def before_fit(self) -> None:
        """Make the store that is missing, with the same devices."""
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


class BestCheckpoint(ModelCheckpoint):
    """Of equal scores the later wins: a small validation split is soon perfect, and the model goes on learning."""

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        tied = current is not None and self.best_model_score is not None and bool(current == self.best_model_score)
        return tied or super().check_monitor_top_k(trainer, current)


def _checkpoints(root: str, metric: str, mode: str) -> list[ModelCheckpoint]:
    """``best.ckpt`` (weights only) by a validation metric, ``last.ckpt`` (all that resuming needs) after each epoch."""
    best = BestCheckpoint(
        root, "best", monitor=f"val_{metric}", mode=mode, save_weights_only=True, enable_version_counter=False
    )
    last = ModelCheckpoint(root, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    return [best, last]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _quieten() -> None:
    """Leave out what Lightning says at every start and nobody can act on."""
    for message in (
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*does not have many workers.*",
        ".*module\\(s\\) in eval mode at the start of training.*",  # what is frozen
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*LightningCLI's args parameter is intended to run from within Python.*",
    ):
        warnings.filterwarnings("ignore", message)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 calls what jsonargparse 5 drops
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)  # each operation that is not folded
    noise = ("💡 Tip", "TPU available")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not record.getMessage().startswith(noise)
    )


def _spelled(args: list[str]) -> list[str]:
    """Commands as jsonargparse has them.

    ``store repair`` is a preload; of ``plan --gpu-memory 8GiB --all-methods`` it knows no hyphens and no bare flags.
    """
    if args[:2] == ["store", "repair"]:
        return ["preload", *args[2:], "--repair", "true"]
    if "plan" not in args:
        return args
    spelled = [arg.replace("--gpu-memory", "--gpu_memory").replace("--all-methods", "--all_methods") for arg in args]
    bare = [
        i
        for i, arg in enumerate(spelled)
        if arg == "--all_methods" and spelled[i + 1 : i + 2] not in (["true"], ["false"])
    ]
    return [f"{arg}=true" if i in bare else arg for i, arg in enumerate(spelled)]


def _made_for_people(error: BaseException | None) -> FPTError | None:
    """The error of ours that a library passed on as one of its own, if there is one."""
    while error is not None and not isinstance(error, FPTError):
        error = error.__cause__ or error.__context__
    return error


def main(args: Sequence[str] | None = None) -> None:
    """The console script: errors made for people are one message on stderr, with exit status 2."""
    _quieten()
    given = sys.argv[1:] if args is None else list(args)
    try:
        given = _spelled(given)
        if given and given[0] in _COMMANDS:
            auto_cli(_COMMANDS, args=given, prog="fpt-lightning")
        else:
            CommandLine(given)
    except Exception as raised:
        error = _made_for_people(raised)
        if error is None or os.environ.get("FPT_TRACEBACK"):
            raise
        text = str(error)
        if text.startswith("Caught "):  # in a worker process, whose traceback precedes the message
            text = text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
        print(f"fpt-lightning: {type(error).__name__}: {text}", file=sys.stderr)
        raise SystemExit(2) from None
