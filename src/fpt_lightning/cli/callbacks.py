"""What a run reports of itself: learnable parameters, peak memory, metrics and predictions."""

from __future__ import annotations

import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from fpt_lightning.cli.entry import terminate
from fpt_lightning.cli.methods_paragraph import kept_apart, methods_paragraph, split_source, split_summaries
from fpt_lightning.cli.run_folder import logged_at
from fpt_lightning.data.images import ImageReader
from fpt_lightning.data.manifest import Manifest
from fpt_lightning.data.transforms import shrunk
from fpt_lightning.datamodules.images import ImageDataModule
from fpt_lightning.deployment.card import CARD, Outcome, write_card
from fpt_lightning.encoder.execution import device_name
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.evaluation.calibration import Calibration
from fpt_lightning.evaluation.cases import RULES, by_case, evaluate_cases
from fpt_lightning.evaluation.conformal import DEFAULT_COVERAGE, Sets, shortage
from fpt_lightning.evaluation.gallery import largest_errors
from fpt_lightning.evaluation.measures import confusion_matrix
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.report import write_report
from fpt_lightning.evaluation.scores import Evaluation, evaluate
from fpt_lightning.files import keep_beside, read_rows, whole_file, without_nan, write_json, write_rows
from fpt_lightning.methods import ClassificationModule
from fpt_lightning.methods.base import from_all_processes, samples_of
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.planning.memory import LiveTensorBytes

_MIB = 2**20
_PICTURE = 320  # pixels of the longer side of a report's picture at most


class LearnableParameters(L.Callback):
    """Says at the start of fit how many parameters learn, and their share of all, the frozen encoder's included."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, ClassificationModule):
            learnable, frozen = pl_module.learnable_parameters, pl_module.frozen_parameters
            rank_zero_info(
                f"learnable parameters: {learnable:,}; {100 * pl_module.learnable_ratio:.2f}% of the total "
                f"{learnable + frozen:,} with the {pl_module.encoder_shape.name}; on {device_name(pl_module.device)}"
            )


class Stoppable(L.Callback):
    """Takes SIGTERM from Lightning, whose own handler waits for all processes, for ever if they are not at one step."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)  # until Lightning restores what was there before it

    on_validation_start = on_test_start = on_predict_start = on_train_start


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


class ShardedEncoder(L.Callback):
    """Divides a frozen encoder that is too large for one device among the processes of ``ddp``, where it runs live.

    Each process keeps its part of every block and gathers a block when it runs (``fully_shard``);
    what learns is trained by ``ddp`` as ever. Every process builds the whole encoder in its host's memory first.

    As a block is gathered from all processes, all run the encoder equally often: in validation, test and prediction, of
    which each image is in one process alone, those with fewer batches run it on images of zeros too.

    Raises:
        ConfigurationError: the method or the data module has no encoder that runs live.
    """

    def __init__(self) -> None:
        self._batches = self._most = self._passes = 0  # of this process, and of the one that has most batches

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        resolution = getattr(getattr(trainer, "datamodule", None), "resolution", None)
        if not isinstance(pl_module, FeatureModule) or resolution is None:
            raise ConfigurationError(
                f"ShardedEncoder is for methods on stored features that run without a store, with data modules of "
                f"fpt-lightning; {type(pl_module).__name__} trains the encoder itself, or the data have no resolution."
            )
        known = {encoder.resolution: encoder for encoder in pl_module.encoders}
        if resolution in known:
            self._encoder = known[resolution]
            return
        encoder = FrozenEncoder(pl_module.encoder_config, resolution).float()  # whole blocks of one dtype, for FSDP
        self._encoder = encoder
        mesh = init_device_mesh(trainer.strategy.root_device.type, (trainer.world_size,))
        for block in encoder.model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(encoder, mesh=mesh)
        pl_module.use_encoder(encoder)
        rank_zero_info(f"the frozen encoder is divided among {trainer.world_size} processes")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        sanity = trainer.sanity_checking
        self._start(trainer, pl_module, trainer.num_sanity_val_batches if sanity else trainer.num_val_batches)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module, trainer.num_test_batches)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module, trainer.num_predict_batches)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._end_batch(pl_module, batch_idx)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._end_batch(pl_module, batch_idx)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._end_batch(pl_module, batch_idx)

    def _start(self, trainer: L.Trainer, module: L.LightningModule, batches: Sequence[int | float]) -> None:
        self._batches, self._passes = int(sum(batches)), 0
        most = trainer.strategy.reduce(torch.tensor(self._batches, device=module.device), reduce_op="max")
        self._most = int(most)
        self._counting = self._encoder.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._passes += 1

    def _end_batch(self, module: L.LightningModule, batch_idx: int) -> None:
        """After the last batch, and before metrics are gathered, catch up with the process that has most."""
        if batch_idx + 1 < self._batches:
            return
        assert isinstance(module, FeatureModule)
        self._counting.remove()
        images = torch.zeros(1, 3, *self._encoder.resolution, device=module.device)
        for _ in range(self._passes // self._batches * (self._most - self._batches)):
            module.encode(images)


class ResultsWriter(L.Callback):
    """Writes what test and predict find.

    ``predictions.csv``: see ``fpt_lightning.evaluation.predictions.Predictions``. Where images are of cases, also
    ``predictions_cases.csv``, by the rule that was chosen on validation (``fpt_lightning.evaluation.cases``), and the
    metrics of cases beside those of images. After test also ``metrics.json``, the logged metrics; ``evaluation.json``
    and ``report.html``, metrics with bootstrap intervals (``fpt_lightning.evaluation.scores.evaluate``), decided by the
    thresholds that were fitted to validation; ``card.md`` (``fpt_lightning.deployment.card``); and of single-label data
    ``confusion_matrix.csv`` and ``.png``, with true classes in rows.

    Attributes:
        folder: where to write; by default ``{trainer.default_root_dir}/test/{checkpoint}``, or in place of test
            validate or predict; images of elsewhere (``data.external``) get ``{checkpoint}-{name of their folder}``.
            What is there from before is kept beside, as ``{checkpoint}-1``.
        checkpoint: the name under which the JSON files hold what was found.
        metrics: what ``metrics.json`` holds, by checkpoint.
        evaluations: of the test images, by checkpoint; ``evaluation.json`` holds them.
        cases: of the cases that they are of, where there are any, likewise.
        calibrations: by which probabilities were calibrated, likewise; none where they were not.
        told: where they are.
        fitted: the epoch that is tested, from 0, where this trainer fitted it: its validation stands beside the test,
            and a test AUC far from its AUC is pointed out.
        pictures: how many images that are predicted wrongly the report shows, with their names.
        writes: whether files are written; else what is found is kept for those of the next checkpoint.
        epoch: that is tested, from 1, where known.
        coverage: of the prediction sets that ``predictions.csv`` of a prediction has too, and that a test reports. By
            default a prediction has none, and a test reports those of ``DEFAULT_COVERAGE``, if validation gives them.
    """

    def __init__(self, folder: str | Path | None = None, checkpoint: str = "model") -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.metrics: dict[str, dict[str, float | None]] = {}
        self.evaluations: dict[str, Evaluation] = {}
        self.cases: dict[str, Evaluation] = {}
        self.calibrations: dict[str, list[Calibration]] = {}
        self.fitted: int | None = None
        self.pictures = 0
        self.writes = True
        self.epoch: int | None = None
        self.coverage: float | None = None
        self.told = ""
        self._rows: list[tuple[str, Any, Any]] = []

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._collect(outputs)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._collect(outputs)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.state.fn == "validate":
            self._collect(outputs)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._write_predictions(trainer, pl_module, "validate")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write_predictions(trainer, pl_module, "predict")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        predictions = self._predictions(trainer, pl_module)
        if predictions is None:
            return
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test_")}
        self.metrics[self.checkpoint] = without_nan(found)
        assert isinstance(pl_module, ClassificationModule)
        if predictions.known.any():
            validation_auc = None
            if self.fitted is not None:
                validation_auc = logged_at(Path(trainer.default_root_dir), "val_auc", self.fitted)
            evaluation = evaluate(
                predictions,
                pl_module.thresholds or None,
                sets=self._tested_sets(predictions, pl_module),
                validation_auc=validation_auc,
            )
            self.evaluations[self.checkpoint] = evaluation
            self.calibrations[self.checkpoint] = pl_module.calibrations if pl_module.is_calibrated else []
            cases = _evaluated_cases(predictions, pl_module)
            if cases is not None:
                self.cases[self.checkpoint] = cases
        if self.writes:
            self._write_test(self._folder(trainer, "test"), trainer, pl_module, predictions)

    def _write_test(
        self, folder: Path, trainer: L.Trainer, module: ClassificationModule, predictions: Predictions
    ) -> None:
        write_json(folder / "metrics.json", self.metrics)
        self._write(folder, predictions, module)
        if predictions.kind == "single-label":
            write_confusion(folder, predictions)
        if self.checkpoint in self.evaluations:
            write_json(folder / "evaluation.json", {name: self._content(name) for name in self.evaluations})
            evaluation, cases = self.evaluations[self.checkpoint], self.cases.get(self.checkpoint)
            self._report(folder, trainer, module, predictions, evaluation, cases)
            write_card(folder / CARD, module, self._tested(trainer, evaluation, cases))
        self.told = f"metrics, predictions and the report are in {folder}"

    def _tested(self, trainer: L.Trainer, evaluation: Evaluation, cases: Evaluation | None) -> Outcome:
        data, manifest = getattr(trainer, "datamodule", None), _manifest(trainer)
        if manifest is None:
            return Outcome(evaluation, "images", cases=cases, epoch=self.epoch)
        return Outcome(
            evaluation,
            manifest.root.name,
            bool(getattr(data, "external", False)),
            split_summaries(manifest),
            split_source(manifest),
            cases,
            self.epoch,
        )

    def _tested_sets(self, predictions: Predictions, module: ClassificationModule) -> Sets | None:
        if self.coverage is None and shortage(module.nonconformity, DEFAULT_COVERAGE):
            return None
        return module.sets(predictions, self.coverage or DEFAULT_COVERAGE)

    def _content(self, name: str) -> dict[str, Any]:
        """What ``evaluation.json`` holds of a checkpoint."""
        cases = {"cases": self.cases[name].to_dict()} if name in self.cases else {}
        return self.evaluations[name].to_dict() | cases | {"calibrations": list(map(asdict, self.calibrations[name]))}

    def _report(
        self,
        folder: Path,
        trainer: L.Trainer,
        module: ClassificationModule,
        predictions: Predictions,
        evaluation: Evaluation,
        cases: Evaluation | None,
    ) -> None:
        root = Path(trainer.default_root_dir)
        history, configuration = root / "metrics.csv", root / "config.yaml"
        manifest = _manifest(trainer)
        write_report(
            folder / "report.html",
            predictions,
            evaluation,
            cases=None if cases is None else (by_case(predictions, module.case_rule or RULES[0]), cases),
            title=f"{module.LABEL} on {'images' if manifest is None else manifest.root.name}",
            methods=methods_paragraph(trainer, module, evaluation, self.checkpoint, self.fitted),
            data=None if manifest is None else split_summaries(manifest),
            apart=[] if manifest is None else kept_apart(manifest),
            pictures=self._pictures(trainer, predictions),
            history=history if history.is_file() else None,
            epoch=self.fitted,
            memory=_peaks(trainer, history),
            configuration=configuration.read_text(encoding="utf-8") if configuration.is_file() else None,
            about={"checkpoint": self.checkpoint, **_about(module)},
        )

    def _pictures(self, trainer: L.Trainer, predictions: Predictions) -> dict[str, bytes]:
        """Of the images that the report shows, as JPEG files."""
        data = getattr(trainer, "datamodule", None)
        if not self.pictures or not isinstance(data, ImageDataModule):
            return {}
        return error_pictures(predictions, self.pictures, data.labelled.root, data.reader)

    def _write_predictions(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        predictions = self._predictions(trainer, module)
        if predictions is not None:
            assert isinstance(module, ClassificationModule)
            folder, asked = self._folder(trainer, stage), self.coverage if stage == "predict" else None
            self._write(folder, predictions, module, None if asked is None else module.sets(predictions, asked))
            rank_zero_info(f"{len(predictions.ids)} predictions are in {folder / 'predictions.csv'}")

    def _write(
        self, folder: Path, predictions: Predictions, module: ClassificationModule, sets: Sets | None = None
    ) -> None:
        predictions.write(folder / "predictions.csv", None if sets is None else sets.columns(predictions))
        if predictions.cases:
            by_case(predictions, module.case_rule or RULES[0]).write(folder / "predictions_cases.csv")

    def _collect(self, outputs: Any) -> None:
        if isinstance(outputs, Mapping) and "scores" in outputs:
            self._rows += zip(outputs["ids"], outputs["labels"].tolist(), outputs["scores"].tolist(), strict=True)

    def _predictions(self, trainer: L.Trainer, module: L.LightningModule) -> Predictions | None:
        """Of every process, on the first; None elsewhere, or where there are none."""
        rows, self._rows = from_all_processes(self._rows), []
        if not rows or not trainer.is_global_zero or not isinstance(module, ClassificationModule):
            return None
        return module.predictions(rows, samples_of(trainer))

    def _folder(self, trainer: L.Trainer, stage: str) -> Path:
        if self.folder is not None:
            return Path(self.folder)
        data, name = getattr(trainer, "datamodule", None), self.checkpoint
        if data is not None and getattr(data, "external", False):
            name += f"-{Path(data.root).resolve().name}"
        folder = Path(trainer.default_root_dir) / stage / name
        if (kept := keep_beside(folder)) is not None:
            rank_zero_info(f"earlier results are kept in {kept}")
        return folder


def _manifest(trainer: L.Trainer) -> Manifest | None:
    """Of the labelled images, where the trainer has a data module of this package."""
    manifest: Manifest | None = getattr(getattr(trainer, "datamodule", None), "manifest", None)
    return manifest


def error_pictures(predictions: Predictions, count: int, root: Path, reader: ImageReader) -> dict[str, bytes]:
    """The images below ``root`` that are predicted most wrongly (``largest_errors``), as JPEG files by id."""
    labelled = predictions.labelled()
    return {id: _jpeg(reader(root / id)) for id in (labelled.ids[i] for i in largest_errors(labelled, count))}


def _jpeg(image: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """An image as a small file, with nothing else of the file that it comes from."""
    file = BytesIO()
    Image.fromarray((shrunk(image, _PICTURE) * 255).round().astype(np.uint8)).save(file, "JPEG", quality=80)
    return file.getvalue()


def _evaluated_cases(predictions: Predictions, module: ClassificationModule) -> Evaluation | None:
    """By what was chosen on, and fitted to, validation cases; None without labelled ones."""
    rule = module.case_rule or RULES[0]
    if not predictions.cases or not by_case(predictions, rule).known.any():
        return None
    return evaluate_cases(predictions, rule, module.case_thresholds or None, chosen=module.case_rule is not None)


def _peaks(trainer: L.Trainer, history: Path) -> dict[str, float]:
    """Peak memory of training and test, in MiB, as ``PeakMemory`` logs it."""
    rows: list[Mapping[str, str]] = list(read_rows(history, "history")) if history.is_file() else []
    rows.append({name: str(float(value)) for name, value in trainer.callback_metrics.items()})
    peaks: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.endswith("_mib") and value:
                peaks[name] = max(peaks.get(name, 0.0), float(value))
    return {name.removesuffix("_mib").replace("_", " "): value for name, value in peaks.items()}


def _about(module: ClassificationModule) -> dict[str, str]:
    """What identifies a model and the software that tested it."""
    learnable = f"{module.learnable_parameters:,} ({100 * module.learnable_ratio:.2f}% of all)"
    alone = module.is_calibrated and len(module.calibrations) == 1
    fitted = {"calibration": str(module.calibration)} if alone else {}
    names = ("fpt-lightning", "torch", "lightning", "timm")
    return {
        "method": module.LABEL,
        "encoder": module.encoder_config.name,
        "learnable parameters": learnable,
        **fitted,
        **{name: version(name) for name in names},
        "Python": platform.python_version(),
        "device": device_name(module.device),
    }


def write_confusion(folder: Path, predictions: Predictions) -> None:
    """Write the confusion matrix as CSV and PNG: true classes in rows, the most probable ones in columns."""
    classes, counts = predictions.classes, confusion_matrix(predictions)
    write_rows(
        folder / "confusion_matrix.csv",
        [["true \\ predicted", *classes], *([name, *row] for name, row in zip(classes, counts, strict=True))],
    )
    with matplotlib.rc_context({"text.parse_math": False}):  # a class may be called $x_1$
        figure = Figure(figsize=(1.5 + 0.9 * len(classes), 1.2 + 0.8 * len(classes)), layout="constrained")
        axes = figure.subplots()
        shares = counts / counts.sum(1, keepdims=True).clip(1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(counts.shape):
            shade = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=shade)
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        axes.set(xlabel="predicted", ylabel="true")
        with whole_file(folder / "confusion_matrix.png") as partial:
            figure.savefig(partial, format="png", dpi=150)
