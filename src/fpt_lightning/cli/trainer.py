"""Lightning's trainer with what else a configuration serves: the frozen pass, the planner, the audit, explanations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
from lightning.pytorch.accelerators import CPUAccelerator

from fpt_lightning.cli.callbacks import ResultsWriter
from fpt_lightning.data.manifest import Kind
from fpt_lightning.datamodules.images import ImageDataModule
from fpt_lightning.datamodules.preloaded import PreloadedFeatureDataModule
from fpt_lightning.errors import ConfigurationError, DataError
from fpt_lightning.explanation.writer import ExplanationWriter
from fpt_lightning.files import screen_width
from fpt_lightning.methods import METHODS, ClassificationModule
from fpt_lightning.planning.planner import CONTEXT_BYTES, Setting, parse_memory, plan, shared_arguments, table


class Trainer(L.Trainer):
    """Lightning's trainer with the frozen pass, the planner, the audit and explanations as four more things it does.

    ``test`` and ``predict`` take the coverage of prediction sets too.

    Args:
        limit_train_batches: batches of an epoch (a whole number), or a share of them (0.0 to 1.0). The command line
            tries types in their order, which in Lightning's own annotations depends on what was imported before:
            ``typing`` keeps one ``Optional`` of int and float, in either order, and 1 may become 1.0, which is all.
        limit_val_batches: likewise, of validation.
        limit_test_batches: likewise, of test.
        limit_predict_batches: likewise, of prediction.
        **kwargs: see ``lightning.Trainer``.
    """

    def __init__(
        self,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            **kwargs,
        )

    def test(
        self,
        model: L.LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: L.LightningDataModule | None = None,
        weights_only: bool | None = None,
        coverage: float | None = None,
    ) -> list[Mapping[str, float]]:
        """Test a model.

        Args:
            model: to test.
            dataloaders: of the images, or a data module.
            ckpt_path: of the checkpoint.
            verbose: whether Lightning prints its table.
            datamodule: of the images.
            weights_only: whether the checkpoint is read as tensors and plain values alone.
            coverage: of the prediction sets that are reported; by default 0.9, where validation gives them.
        """
        self._report(coverage)
        return super().test(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def predict(
        self,
        model: L.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        coverage: float | None = None,
    ) -> list[Any] | list[list[Any]] | None:
        """Predict images.

        Args:
            model: that predicts.
            dataloaders: of the images, or a data module.
            datamodule: of the images.
            return_predictions: whether they are returned too.
            ckpt_path: of the checkpoint.
            weights_only: whether the checkpoint is read as tensors and plain values alone.
            coverage: share of images whose set of classes shall hold the true one: predictions.csv gets such sets.
        """
        self._report(coverage)
        return super().predict(model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only)

    def _report(self, coverage: float | None) -> None:
        for callback in cast(Any, self).callbacks:
            if isinstance(callback, ResultsWriter):
                callback.coverage = coverage

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
        _with_store(datamodule, "preload").preload(model, self, overwrite, repair)

    def plan(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        gpu_memory: str | None = None,
        all_methods: bool = False,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Print memory by stage, parameters and store that a run will need; nothing is loaded, encoded or trained.

        Args:
            model: the method.
            datamodule: its data; without its images, the store is of 1,000.
            gpu_memory: of the GPU, such as 8GiB: the largest batch and resolution that fit are looked for.
            all_methods: a row for every method, with the arguments that it shares with the model.
            device: that memory is predicted for, here or not; by default the trainer's, or a GPU with ``gpu_memory``.
            ckpt_path: not used; a configuration saved by fit holds it.
            weights_only: not used; a configuration saved by fit holds it.
        """
        assert isinstance(model, ClassificationModule)
        assert isinstance(datamodule, ImageDataModule)
        datamodule.take_encoder(model.encoder_config)
        if device == "auto":
            on_cpu = gpu_memory is None and isinstance(self.accelerator, CPUAccelerator)
            device = "cpu" if on_cpu else "cuda"
        setting = replace(_setting(model, datamodule, str(self.precision)), device=device)
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
            f"{setting.precision}, {'no store' if setting.codec is None else f'codec {setting.codec}'}, "
            f"on {device}\n\n"
            f"{table(plans, images, memory)}\n\n"
            f"Memory: predicted peaks of live tensors on {device}; a frozen encoder takes {setting.preload_batch_size} "
            "images at a time.\nBatches that fit prepares ahead of the one in use are in the host's memory.\n"
            "A GPU adds its context and the allocator's reserve, for which "
            f"{CONTEXT_BYTES / 2**30:g} GiB of --gpu-memory is set aside\n(an assumption, not a measurement)."
        )
        print("\n".join([*uncounted, *left_out]))

    def audit(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        out: str | None = None,
        by: list[str] | None = None,
        map: Literal["pca", "umap"] = "pca",
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Look in the stored features for near-duplicates, wrong labels, outliers and shortcuts; nothing is trained.

        Args:
            model: whose encoder made the store.
            datamodule: its data.
            out: folder of the tables and the page; by default ``audit`` in the run's folder. What an earlier audit left
                there is kept as ``audit-1``.
            by: columns of data.manifest, such as site or sex, that are held against the labels too.
            map: how images are placed: pca, or umap with umap-learn.
            ckpt_path: not used; a configuration saved by fit holds it.
            weights_only: not used; a configuration saved by fit holds it.
        """
        from fpt_lightning.audit.writer import PAGE, audit_store  # SciPy's filters take long

        folder = Path(self.default_root_dir) / "audit" if out is None else Path(out)
        audit = audit_store(_with_store(datamodule, "audit"), model, folder, by or (), map)
        print(f"{audit.table(screen_width())}\n\nThe page is {folder / PAGE}, its tables are beside it.")

    def explain(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        out: str,
        layer: int | None = None,
        head: int | None = None,
        images: int = 16,
        split: Literal["val", "test"] | None = None,
        deletion: bool = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Show what a trained model looked at: pictures of images, and if asked for how far to trust these.

        Args:
            model: FPT+ or FPT.
            datamodule: its data.
            out: folder of the pictures and numbers (``fpt_lightning.explanation.writer.ExplanationWriter``).
            layer: tapped block of the encoder, counted from 0, that is drawn; the last one by default.
            head: whose tokens and attention are drawn; all of them by default.
            images: how many are drawn, evenly spread over all; no others are read.
            split: of the data set, from the store where the data module has one; by default every image below
                data.root, through the encoder.
            deletion: whether tokens are taken out of every image, drawn or not, to see whether scores fall with those
                that the pictures show; takes tens of times as long as prediction.
            ckpt_path: the trained model's checkpoint.
            weights_only: not used; only tensors and plain values are read.
        """
        assert isinstance(datamodule, ImageDataModule)
        datamodule.explained, datamodule.drawn = split, None if deletion else images
        cast(Any, self).callbacks.append(ExplanationWriter(out, model, layer, head, images, deletion))
        self.predict(model, datamodule=datamodule, return_predictions=False, ckpt_path=ckpt_path, weights_only=True)


def _with_store(data: L.LightningDataModule, command: str) -> PreloadedFeatureDataModule:
    if not isinstance(data, PreloadedFeatureDataModule):
        raise ConfigurationError(
            f"data is {type(data).__name__}, which has no store: {command} needs PreloadedFeatureDataModule."
        )
    return data


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
        orientations=1 if stored is None else stored.orientations,
        image_size=data.image_size,
        preload_batch_size=data.preload_batch_size,
    )


def _count_images(data: ImageDataModule, kind: Kind) -> tuple[int | None, list[str]]:
    try:
        return len(data.read_manifest(kind).samples), []
    except DataError:  # with which the command ends
        return None, ["The images are not counted, so the store is of 1,000."]
