"""The data set of a run: its manifest and splits, and the loaders over it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from fpt_lightning.data.image_files import ImageFiles
from fpt_lightning.data.images import OnError
from fpt_lightning.data.manifest import Kind, Manifest
from fpt_lightning.data.prefetch import PrefetchingLoader, usable_threads
from fpt_lightning.data.sources import Fill, read_manifest
from fpt_lightning.data.splits import OVERLAPS
from fpt_lightning.datamodules.samples import EpochSampler, Samples, collated, labels_of, start_worker
from fpt_lightning.errors import DataError, check_at_least


def is_first_process() -> bool:
    """Whether this process is the one that writes: rank 0, or one that has no rank yet."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


class ManifestDataModule(L.LightningDataModule):
    """Images that a manifest lists, with their labels and splits.

    Args:
        root: folder of the images: ``{train,val,test}/{class}/image``, or ``{class}/image`` (split 70/10/20).
        manifest: CSV file, or XLSX file whose first sheet is read, instead of class folders; absolute or relative to
            ``root``. Prediction does not read it.
        image_column: its column of image paths, relative to ``root``.
        label_column: its column of class names or numbers; its columns of a multi-label task, or of which one is true.
        label_separator: of the names of a multi-label task, where one column holds them: ``|`` of ``Mass|Nodule``.
        split_column: its column of ``train``, ``val``, ``test``; by default ``split``, if there is one.
        split_lists: in its place, files that list the images of each split, one a line, by split.
        group_column: its column of groups that a split keeps whole, such as patients; by default ``group``, if any.
        case_column: its column of cases, such as exams or eyes: test and predict give each case's prediction too, from
            those of its images; prediction reads this column alone, where it is given.
        classes: class names in the order wanted, such as grades from low to high; sorted by default.
        missing_labels: what an empty field of a multi-label task stands for: ``ignore``, ``zeros`` or ``ones``.
        uncertain_labels: what -1 stands for in training, likewise; validation and test ignore it.
        split_seed: seed of a random split; apart from the run's seed, so that runs share a split.
        fold: of a cross-validation, from 1 (``fpt_lightning.data.sources.read_manifest``); none by default.
        folds: number of folds.
        external: whether all images are test images of a model that was trained on others.
        allow_overlap: whether groups and identical files may be in several splits, with a warning. Allowed or not, all
            are listed in ``overlaps.csv`` in the run's folder, where there is a trainer or a command.
        batch_size: of every stage; of predict, for a method that trains the encoder.
        num_workers: processes that prepare batches; with none, threads do (``decoding_threads``).
        decoding_threads: threads that read, decode, resize and augment
            (``fpt_lightning.data.prefetch.usable_threads``); for stored features two at most.
        on_error: of images that cannot be read: ``stop``, or ``skip`` to leave them out of every stage, with a warning
            and a list: ``left_out.csv`` in the run's folder, for which all images are read once before the first batch;
            of a store ``{store}.left_out.csv``.

    Raises:
        ConfigurationError: numbers that cannot be.
        DataError: a data set that cannot be used, at ``setup``.
    """

    def __init__(
        self,
        root: str,
        manifest: str | None = None,
        image_column: str = "image",
        label_column: str | list[str] = "label",
        label_separator: str | None = None,
        split_column: str | None = None,
        split_lists: dict[str, str] | None = None,
        group_column: str | None = None,
        case_column: str | None = None,
        classes: list[str] | None = None,
        missing_labels: Fill = "ignore",
        uncertain_labels: Fill = "ignore",
        split_seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
        external: bool = False,
        allow_overlap: bool = False,
        batch_size: int = 16,
        num_workers: int = 0,
        decoding_threads: int | None = None,
        on_error: OnError = "stop",
    ) -> None:
        super().__init__()
        check_at_least("data.batch_size", batch_size, 1)
        check_at_least("data.num_workers", num_workers, 0)
        if decoding_threads is not None:
            check_at_least("data.decoding_threads", decoding_threads, 1)
        self.root, self.table = root, manifest
        self.reading: dict[str, Any] = {  # arguments of ``read_manifest``
            "image_column": image_column,
            "label_column": label_column,
            "label_separator": label_separator,
            "split_column": split_column,
            "split_lists": split_lists,
            "group_column": group_column,
            "case_column": case_column,
            "classes": classes,
            "missing_labels": missing_labels,
            "uncertain_labels": uncertain_labels,
            "split_seed": split_seed,
            "fold": fold,
            "folds": folds,
            "external": external,
            "allow_overlap": allow_overlap,
        }
        self.external = external
        self.batch_size, self.num_workers, self.decoding_threads = batch_size, num_workers, decoding_threads
        self.on_error: OnError = on_error
        self.folder: Path | None = None  # where a command lists what is wrong with the data; else the trainer's
        self.model: Any = None  # that is met without a trainer; else the trainer's
        self.seed: int | None = None
        self._sampler: EpochSampler | None = None  # of the last training loader without a trainer
        self.explained: str | None = None  # the split that predict takes, with its labels, in place of all images
        self.drawn: int | None = None  # how many of these predict takes; all by default
        self.listed: Manifest | None = None  # the whole data set
        self.manifest: Manifest | None = None  # without what is left out
        self.unlabelled: Manifest | None = None

    def read_manifest(self, kind: Kind = "single-label") -> Manifest:
        """The labelled data set, read once.

        Args:
            kind: of the labels; a model's is ``model.task.KIND``.

        Raises:
            DataError: see ``fpt_lightning.data.sources.read_manifest``.
        """
        if self.listed is None or self.listed.kind != kind:
            told: dict[str, Any] = {"digests": self._digests, "overlaps": self._overlaps()}
            self.manifest = self.listed = read_manifest(self.root, self.table, kind=kind, **told, **self.reading)
        return self.listed

    def _digests(self, files: ImageFiles) -> NDArray[np.int64]:
        """What is known of the files' content without reading them (``fpt_lightning.data.splits.Digests``)."""
        return np.zeros(len(files.ids), np.int64)

    def _overlaps(self) -> Path | None:
        """The list of what is in several splits; None where there is no folder for it, or another process writes it."""
        folder = self.folder
        if folder is None and self.trainer is not None:
            folder = Path(self.trainer.default_root_dir)
        return folder / OVERLAPS if is_first_process() and folder is not None else None

    @property
    def labelled(self) -> Manifest:
        """The manifest after ``setup``, without what is left out."""
        if self.manifest is None:
            raise DataError(f"{type(self).__name__} has not read its manifest: call setup('fit') first.")
        return self.manifest

    @property
    def predicted(self) -> Manifest:
        """What predict takes, after ``setup``: every image below ``root``, or of the split that is explained."""
        if self.explained is not None:
            return self._drawn(replace(self.labelled, samples=self.labelled.split(self.explained)))
        assert self.unlabelled is not None
        return self.unlabelled

    def _drawn(self, manifest: Manifest) -> Manifest:
        """Those of the images that predict takes which are drawn."""
        return manifest if self.drawn is None else manifest.spread(self.drawn)

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the label indices."""
        return self.labelled.classes

    @property
    def training_labels(self) -> Tensor:
        """Labels of all training images, as in batches."""
        return labels_of(self.labelled, self.labelled.split("train"))

    def state_dict(self) -> dict[str, Any]:
        """The seed that orders and augments, so that a resumed run goes on as it would have."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]

    def _declared(self, name: str) -> Any:
        """What the model declares that it needs, such as ``side_resolution``; None without one."""
        return getattr(self._model(), name, None)

    def _model(self) -> Any:
        """The model that takes the data; None where none is known."""
        return self.trainer.lightning_module if self.model is None and self.trainer is not None else self.model

    def _dataloader(self, dataset: Samples, shuffle: bool, batch_size: int) -> DataLoader[Any]:
        rank, world, epoch = 0, 1, 0 if self._sampler is None else self._sampler.epoch
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            epoch = progress.processed  # as ``current_epoch`` lags behind in a run that goes on
        sampler = EpochSampler(len(dataset), rank, world, shuffle, self.seed or 0)
        sampler.set_epoch(epoch)
        if shuffle and self.trainer is None:
            self._sampler = sampler
        processes = 1 if self.trainer is None else self.trainer.num_devices
        return PrefetchingLoader(
            dataset,
            threads=usable_threads(self.decoding_threads, processes),
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collated,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
            worker_init_fn=start_worker,
            generator=torch.Generator().manual_seed(0),  # else each loader draws from, and so changes, the global RNG
        )
