"""What a run leaves in its folder while it trains: configuration, splits, history and checkpoints, each file whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor

from fpt_lightning.datamodules.base import ManifestDataModule
from fpt_lightning.deployment.hub import read_folder
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.files import (
    keep_beside,
    make_folder,
    read_rows,
    take_lock,
    write_pickle,
    write_rows,
    write_text,
)


def claim(folder: Path, checkpoint: str | None) -> IO[bytes]:
    """Make a folder the place of one run, which no other fit writes to while the lock that is returned is open.

    Args:
        folder: of the run.
        checkpoint: from which it goes on; None where it starts.

    Raises:
        ConfigurationError: another fit is running there, or the folder holds another run.
    """
    lock = lock_folder(folder)
    check_free(folder, checkpoint)  # now that no other can leave a run there
    return lock


def lock_folder(folder: Path) -> IO[bytes]:
    """Make a folder that no other command writes runs to while the lock that is returned is open.

    Raises:
        ConfigurationError: another is at work there.
    """
    make_folder(folder)
    lock = (folder / ".lock").open("ab+")
    if not take_lock(lock):
        lock.close()
        raise ConfigurationError(
            f"another fit is running in {folder}: wait for it, or give another --trainer.default_root_dir."
        )
    return lock


def check_free(folder: Path, checkpoint: str | None) -> None:
    """Refuse a folder that holds another run; what a start left that never came to a checkpoint is none.

    Raises:
        ConfigurationError: naming the folder and its run's last checkpoint.
    """
    own = sorted(folder.glob("*.ckpt"))
    if not own or (checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve()):
        return
    remedies = "give another --trainer.default_root_dir, remove the folder"
    if folder / "last.ckpt" in own:
        remedies += f", or go on with that run by --ckpt_path {folder / 'last.ckpt'}"
    raise ConfigurationError(f"{folder} already holds a run: {remedies}.")


def is_finished(folder: Path) -> bool:
    """Whether a run was trained, and tested at its best and its last epoch."""
    path = folder / "metrics.json"
    return path.is_file() and {"best", "last"} <= set(json.loads(path.read_text(encoding="utf-8")))


def logged(folder: Path, name: str) -> list[float]:
    """A metric of a run, of every epoch that has it."""
    return [float(row[name]) for row in read_rows(folder / "metrics.csv", "history") if row.get(name)]


def logged_at(folder: Path, name: str, epoch: int) -> float | None:
    """A metric of a run at an epoch; None where it was not logged."""
    path = folder / "metrics.csv"
    rows = read_rows(path, "history") if path.is_file() else []
    return next((float(row[name]) for row in rows if row.get(name) and row["epoch"] == str(epoch)), None)


_LOSS = "val_loss"


class RunLogger(Logger):
    """``metrics.csv`` in the run's own folder, a row an epoch; test metrics and single steps are not of an epoch.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path, self._pending, self._changed = Path(folder) / "metrics.csv", dict[str, Any](), False
        self._rows = dict[int, dict[str, Any]]()

    def go_on(self, epoch: int) -> None:
        """Keep the rows up to the epoch, from 0, of the checkpoint that the run goes on from."""
        for row in read_rows(self.path, "history") if self.path.is_file() else []:  # once, several of an epoch
            if row["epoch"].isdecimal() and int(row["epoch"]) <= epoch:
                self._rows.setdefault(int(row["epoch"]), {}).update({n: value for n, value in row.items() if value})

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add to the row of the epoch, or to that of the next one where none is named."""
        kept = {name: value for name, value in metrics.items() if not name.endswith("_step")}
        epoch = kept.pop("epoch", None)
        if epoch is None:
            self._pending |= kept
        elif kept:
            row = self._rows.setdefault(int(epoch), {"epoch": int(epoch)})
            row |= {"step": step, **self._pending, **kept}
            self._pending, self._changed = {}, True

    @rank_zero_only
    def save(self) -> None:
        if self._changed:
            names = sorted({name for row in self._rows.values() for name in row} - {"epoch", "step"})
            columns = ["epoch", "step", *names]
            rows = [[row.get(name, "") for name in columns] for _, row in sorted(self._rows.items())]
            write_rows(self.path, [columns, *rows])
            self._changed = False


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written under a partial name: a run that is killed keeps its last whole one.

    Lightning moves a temporary file in its place, which is a copy where the temporary folder is on another disk. A
    model's folder (``fpt_lightning.deployment.hub``) is read as a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_pickle(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        if Path(path).is_dir():
            return {"pytorch-lightning_version": L.__version__, **read_folder(path)}
        return super().load_checkpoint(path, *args, **options)


class SaveRunConfig(SaveConfigCallback):
    """Saves ``config.yaml`` and ``split.csv`` in the run's folder when fit starts.

    A run that goes on with other settings than before keeps its earlier configuration as ``config-1.yaml``.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self.already_saved:
            return
        self.already_saved = True
        if not trainer.is_global_zero:
            return
        folder, goes_on = Path(trainer.default_root_dir), self.config.get("ckpt_path") is not None
        if not goes_on or not (folder / "split.csv").is_file():
            data = getattr(trainer, "datamodule", None)
            if isinstance(data, ManifestDataModule) and data.listed is not None:
                data.listed.write(folder / "split.csv")
        path, config = folder / self.config_filename, self.config.clone()
        config.ckpt_path = None  # test and predict with it must say which
        text = self.parser.dump(config)
        if goes_on and path.is_file() and path.read_text(encoding="utf-8") != text:
            rank_zero_info(f"the run goes on with other settings: those until now are in {keep_beside(path)}")
        write_text(path, text)
        data = self.config.data.init_args.as_dict()
        for logger in trainer.loggers:
            logger.log_hyperparams({"data": data})


class BestCheckpoint(ModelCheckpoint):
    """Of equal scores the later wins: a small validation split is soon perfect, and the model goes on learning.

    Where the metric has no value, as an AUC of images of one class, the smallest validation loss wins. Arguments as for
    ``ModelCheckpoint``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._key = super().state_key  # whatever it is chosen by in the end

    @property
    def state_key(self) -> str:
        return self._key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["monitor"] == _LOSS:
            self._choose_by_loss()
        super().load_state_dict(state_dict)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = trainer.callback_metrics.get(str(self.monitor))
        if not trainer.sanity_checking and value is not None and torch.isnan(value):
            rank_zero_warn(
                f"{self.monitor} has no value in the validation images, which are perhaps of one class alone: the best "
                f"epoch is chosen by {_LOSS}."
            )
            self._choose_by_loss()
        super().on_validation_end(trainer, pl_module)

    def _choose_by_loss(self) -> None:
        self.monitor, self.mode, self.kth_value = _LOSS, "min", torch.tensor(torch.inf)
        self.best_k_models, self.best_model_score, self.kth_best_model_path = {}, None, ""

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        tied = current is not None and self.best_model_score is not None and bool(current == self.best_model_score)
        return tied or super().check_monitor_top_k(trainer, current)


def checkpoint_callbacks(root: str, metric: str, mode: str) -> list[ModelCheckpoint]:
    """``best.ckpt`` (weights only) by a validation metric, ``last.ckpt`` (all that resuming needs) after each epoch."""
    best = BestCheckpoint(
        root, "best", monitor=f"val_{metric}", mode=mode, save_weights_only=True, enable_version_counter=False
    )
    last = ModelCheckpoint(root, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    return [best, last]
