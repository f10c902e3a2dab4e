"""What a run reports of itself: learnable parameters, peak memory, metrics and predictions."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor

from fpt_lightning.manifest import UNLABELLED
from fpt_lightning.memory import LiveTensorBytes
from fpt_lightning.methods import ClassificationModule
from fpt_lightning.methods.features import FeatureModule

_MIB = 2**20


class LearnableParameters(L.Callback):
    """Says at the start of fit how many parameters learn, and their share of all, the frozen encoder's included."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, ClassificationModule):
            learnable, frozen = pl_module.learnable_parameters, pl_module.frozen_parameters
            rank_zero_info(
                f"learnable parameters: {learnable:,}; {100 * pl_module.learnable_ratio:.2f}% of the total "
                f"{learnable + frozen:,} with the {pl_module.encoder_shape.name}"
            )


class EpochSeconds(L.Callback):
    """Logs ``epoch_seconds``, the time of an epoch's training steps, data included and validation not."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()
        self._paused = 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._paused += time.perf_counter() - self._validation

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("epoch_seconds", time.perf_counter() - self._start - self._paused, sync_dist=True)


class PeakMemory(L.Callback):
    """Logs the peak memory of each stage like a metric, in MiB.

    On CUDA ``{stage}_peak_allocated_mib`` and ``{stage}_peak_reserved_mib`` over the whole stage, from PyTorch's
    allocator. On the CPU ``{stage}_peak_live_mib``, the peak bytes of live tensors in one batch (the second of
    training, when the optimiser's state exists; the first elsewhere), exact; and ``peak_resident_mib``, the largest
    resident size of the process so far, which includes libraries and caches.
    """

    def __init__(self) -> None:
        self._live: LiveTensorBytes | None = None
        self._peaks: dict[str, int] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_stage(pl_module)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_stage(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == min(1, int(trainer.num_training_batches) - 1):
            self._start_batch("train", trainer, pl_module, batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._end_batch("train")

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._start_batch("test", trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._end_batch("test")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log("train", pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log("test", pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end_batch("interrupted")

    def _start_stage(self, pl_module: L.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def _start_batch(self, stage: str, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        if pl_module.device.type != "cpu" or stage in self._peaks:
            return
        self._live = LiveTensorBytes()
        self._live.count([list(pl_module.parameters()), list(pl_module.buffers()), batch])
        if isinstance(pl_module, FeatureModule):
            self._live.count([list(encoder.parameters()) for encoder in pl_module.encoders])
        self._live.count([p.grad for p in pl_module.parameters()])
        self._live.count([list(o.state.values()) for o in trainer.optimizers])
        self._live.__enter__()  # type: ignore[no-untyped-call]

    def _end_batch(self, stage: str) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._peaks[stage], self._live = self._live.peak, None

    def _log(self, stage: str, pl_module: L.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            values = {
                f"{stage}_peak_allocated_mib": torch.cuda.max_memory_allocated(pl_module.device) / _MIB,
                f"{stage}_peak_reserved_mib": torch.cuda.max_memory_reserved(pl_module.device) / _MIB,
            }
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss in bytes
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            values = {"peak_resident_mib": resident / _MIB}
            if stage in self._peaks:
                values[f"{stage}_peak_live_mib"] = self._peaks[stage] / _MIB
        pl_module.log_dict(values, sync_dist=True, reduce_fx="max")


class ResultsWriter(L.Callback):
    """Writes what test and predict find: ``metrics.json``, ``predictions.csv``, the confusion matrix.

    ``predictions.csv`` has a row an image: its path below the data root, its label (empty where unknown) and
    ``prob_{class}`` for each class. ``confusion_matrix.csv`` and ``.png`` have true classes in rows.

    Attributes:
        folder: where to write; ``{trainer.default_root_dir}/test`` or ``/predict`` by default.
        checkpoint: the name under which ``metrics.json`` holds the metrics.
        metrics: what ``metrics.json`` holds, by checkpoint.
    """

    def __init__(self, folder: str | Path | None = None, checkpoint: str = "model") -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.metrics: dict[str, dict[str, float | None]] = {}
        self._outputs: list[Mapping[str, Any]] = []

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._collect(outputs)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._collect(outputs)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rows = self._gather()
        if rows and trainer.is_global_zero and isinstance(pl_module, ClassificationModule):
            folder = self._folder(trainer, "test")
            found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test_")}
            self.metrics[self.checkpoint] = {k: v if v == v else None for k, v in found.items()}  # NaN is no JSON
            _write_text(folder / "metrics.json", json.dumps(self.metrics, indent=2) + "\n")
            write_predictions(folder / "predictions.csv", rows, _class_names(pl_module))
            write_confusion(folder, rows, _class_names(pl_module))
            rank_zero_info(f"metrics, predictions and confusion matrix are in {folder}")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rows = self._gather()
        if rows and trainer.is_global_zero and isinstance(pl_module, ClassificationModule):
            folder = self._folder(trainer, "predict")
            write_predictions(folder / "predictions.csv", rows, _class_names(pl_module))
            rank_zero_info(f"{len(rows)} predictions are in {folder / 'predictions.csv'}")

    def _collect(self, outputs: Any) -> None:
        if isinstance(outputs, Mapping) and "scores" in outputs:
            self._outputs.append({k: v.cpu() if isinstance(v, Tensor) else v for k, v in outputs.items()})

    def _gather(self) -> list[tuple[str, int, list[float]]]:
        """(id, label, probabilities) of every sample of every process, in ascending order of ids."""
        rows = [
            row
            for out in self._outputs
            for row in zip(out["ids"], out["labels"].tolist(), out["scores"].tolist(), strict=True)
        ]
        self._outputs = []
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, rows)
            rows = [row for process in everyone for row in process]
        return sorted(rows)

    def _folder(self, trainer: L.Trainer, stage: str) -> Path:
        folder = Path(self.folder) if self.folder is not None else Path(trainer.default_root_dir) / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _class_names(module: ClassificationModule) -> tuple[str, ...]:
    """A model that never met a data module of this package has numbers for names."""
    return module.class_names or tuple(f"class_{label}" for label in range(module.num_classes))


def write_predictions(path: Path, rows: Sequence[tuple[str, int, list[float]]], classes: Sequence[str]) -> None:
    """Write (id, label index or -1, probabilities) as CSV."""
    lines = [["path", "label", *(f"prob_{name}" for name in classes)]]
    for id, label, probabilities in rows:
        lines.append([id, "" if label == UNLABELLED else classes[label], *(f"{p:.6f}" for p in probabilities)])
    _write_csv(path, lines)


def write_confusion(folder: Path, rows: Sequence[tuple[str, int, list[float]]], classes: Sequence[str]) -> None:
    """Write the confusion matrix as CSV and PNG: true classes in rows, predicted ones in columns."""
    counts = [[0] * len(classes) for _ in classes]
    for _, label, probabilities in rows:
        counts[label][probabilities.index(max(probabilities))] += 1
    table: list[list[Any]] = [["true \\ predicted", *classes]]
    table += [[name, *row] for name, row in zip(classes, counts, strict=True)]
    _write_csv(folder / "confusion_matrix.csv", table)
    figure = Figure(figsize=(1.5 + 0.9 * len(classes), 1.2 + 0.8 * len(classes)), layout="constrained")
    axes = figure.subplots()
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i][j] > 0.5 else "black")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true")
    figure.savefig(folder / "confusion_matrix.png", dpi=150)


def _write_csv(path: Path, lines: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    _write_text(path, text.getvalue())


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
