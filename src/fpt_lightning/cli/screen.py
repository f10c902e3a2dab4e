"""What the command line shows of a run: how far it has come, in images, and what came out, once."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from fpt_lightning.evaluation.scores import Evaluation
from fpt_lightning.files import align, screen_width
from fpt_lightning.progress import Progress
from fpt_lightning.store.preload import FrozenPass


class ImageProgress(ProgressBar):
    """A bar over all epochs of a fit, and one of each other stage (``fpt_lightning.progress.Progress``).

    Args:
        monitor: metric that is shown with the epoch, such as ``val_auc``.
    """

    def __init__(self, monitor: str = "") -> None:
        super().__init__()
        self.monitor = monitor
        self._progress: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        per_epoch = _images(trainer, trainer.train_dataloader, trainer.num_training_batches)
        epochs = max(trainer.max_epochs or 0, 0)
        done = trainer.current_epoch * per_epoch
        self._start(trainer, self._epoch(trainer), max(epochs, 1) * per_epoch, done)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._count(trainer, batch)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tell(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._tell(trainer)
        else:
            self._close()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._start_stage(trainer, "validate", trainer.val_dataloaders, trainer.num_val_batches)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if trainer.state.fn == "validate":
            self._count(trainer, batch)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_stage(trainer, "test", trainer.test_dataloaders, trainer.num_test_batches)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._count(trainer, batch)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        name, unit = "predict", "image"
        if isinstance(pl_module, FrozenPass):
            name, unit = "preload", "orientation" if pl_module.specification.orientations > 1 else "image"
        self._start_stage(trainer, name, trainer.predict_dataloaders, trainer.num_predict_batches, unit)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._count(trainer, batch)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """What a module prints goes beside the bar, and not into it."""
        tqdm.write(" ".join(map(str, args)))

    def _start_stage(self, trainer: L.Trainer, name: str, loaders: Any, batches: Any, unit: str = "image") -> None:
        total = int(batches[0] if isinstance(batches, list) else batches)
        self._start(trainer, name, _images(trainer, loaders, total), 0, unit)

    def _start(self, trainer: L.Trainer, label: str, total: int, done: int, unit: str = "image") -> None:
        if self._enabled and trainer.is_global_zero and total:
            self._progress = Progress(label, total, unit, done)

    def _epoch(self, trainer: L.Trainer) -> str:
        return f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"

    def _tell(self, trainer: L.Trainer) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if self._progress is not None:
            told = "" if value is None else f"{self.monitor} {float(value):.3f}"
            self._progress.tell(self._epoch(trainer), told)

    def _count(self, trainer: L.Trainer, batch: Any) -> None:
        if self._progress is not None:
            self._progress.update(_size(batch) * trainer.world_size)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None


def _size(batch: Any) -> int:
    """Images of a batch; of the frozen pass, those that could not be read included."""
    return len(batch["ids"]) if isinstance(batch, Mapping) else len(batch.rows) + len(batch.broken)


def _images(trainer: L.Trainer, loader: DataLoader[Any] | None, batches: int | float) -> int:
    """Of a pass, in all processes together."""
    assert isinstance(loader, DataLoader)
    if loader.batch_sampler is None:  # the frozen pass, by the rows of its batches
        counts = [sum(map(len, batch)) for batch in islice(loader.sampler, int(batches))]
        return sum(counts) * trainer.world_size
    sampler: Any = loader.batch_sampler
    return int(min(len(sampler.sampler), batches * sampler.batch_size)) * trainer.world_size


@dataclass(frozen=True)
class CheckpointResult:
    """A checkpoint of a run, and what it was found to be worth.

    Attributes:
        name: ``best`` or ``last``.
        epoch: after which it was written, from 1.
        chosen_by: the validation metric that chooses the best epoch.
        value: of it at that epoch; None where it was not logged.
        evaluation: of the test images.
    """

    name: str
    epoch: int
    chosen_by: str
    value: float | None
    evaluation: Evaluation


def results(tested: Sequence[CheckpointResult]) -> str:
    """What a run comes to, once: its checkpoints side by side, and the rest of what is known of the first of them."""
    first = tested[0]
    alike = all(each.epoch == first.epoch for each in tested)
    shown = tested[:1] if alike else tested
    names = " and ".join(each.name for each in tested)
    rows = [
        ["", *([names] if alike else [each.name for each in shown])],
        ["epoch", *(str(each.epoch) for each in shown)],
        [first.chosen_by, *("" if each.value is None else f"{each.value:.3f}" for each in shown)],
    ]
    labelled = [each.evaluation.overall_rows() for each in shown]
    rows += [[name, *(row[i][1] for row in labelled)] for i, (name, _) in enumerate(labelled[0])]
    about = "" if alike else f"Of the {first.name} epoch:"
    width = screen_width()
    parts = [textwrap.fill(first.evaluation.basis(), width), align(rows, width), about, *first.evaluation.details()]
    return "\n\n".join(part for part in parts if part)
