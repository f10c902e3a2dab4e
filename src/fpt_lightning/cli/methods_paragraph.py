"""What papers say of a run: how the model was trained and tested, and what is in more than one split."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L

from fpt_lightning.cli.run_folder import logged_at
from fpt_lightning.data.manifest import SPLITS, Manifest
from fpt_lightning.data.orientations import parts_shown
from fpt_lightning.datamodules.images import ImageDataModule
from fpt_lightning.encoder.weight_files import OF_FILES
from fpt_lightning.evaluation.estimates import label, number
from fpt_lightning.evaluation.folds import CrossValidation
from fpt_lightning.evaluation.report import SplitSummary
from fpt_lightning.evaluation.scores import Evaluation
from fpt_lightning.methods import ClassificationModule

_SPLITS = dict(zip(SPLITS, ("training", "validation", "test"), strict=True))
_PACKAGES = {"fpt-lightning": "fpt-lightning", "torch": "PyTorch", "lightning": "Lightning", "timm": "timm"}
_NAMED = ("num_classes", "encoder", "pretrained", "learning_rate", "weight_decay")
"""Options that have sentences of their own."""


def methods_paragraph(
    trainer: L.Trainer, module: ClassificationModule, evaluation: Evaluation, checkpoint: str, epoch: int | None
) -> str:
    """How a model was trained and tested, in one paragraph.

    Args:
        trainer: that tested it.
        module: the model.
        evaluation: of the test images.
        checkpoint: that was tested, such as ``best``.
        epoch: after which it was written, from 0; None where this trainer did not train it.
    """
    data = getattr(trainer, "datamodule", None)
    data = data if isinstance(data, ImageDataModule) else None
    told = [_model(module)]
    if data is not None:
        told.append(_images(data.labelled))
    if epoch is not None:
        told += [_training(trainer, module, data), _choice(trainer, module, checkpoint, epoch)]
    told += [_intervals(evaluation), *_calibration(module)]
    if evaluation.thresholds:
        told.append("Thresholds were fitted to the validation images by Youden's index.")
    return " ".join([*told, _versions()])


def folds_paragraph(
    module: ClassificationModule,
    settings: Mapping[str, Any],
    found: CrossValidation,
    epochs: Sequence[int],
) -> str:
    """How the models of a cross-validation were trained and tested, in one paragraph.

    Args:
        module: one of them, trained.
        settings: that all of them share, as ``crossval`` takes them.
        found: what all came to.
        epochs: from 0, after which each model's best checkpoint was written.
    """
    trainer, data = settings["trainer"], settings["data"]["init_args"]
    evaluation, seeds = found.evaluation, list(found.by_seed)
    groups = "" if evaluation.groups is None else f" of {evaluation.groups:,} groups"
    with_seeds = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    options = [
        *_optimiser(module),
        f"batch size {data['batch_size']} a process",
        f"augmentation {data['augmentation']}",
        f"precision {trainer['precision'] or '32-true'}",
        with_seeds,
    ]
    length = f" for {trainer['max_epochs']} epochs at most" if (trainer["max_epochs"] or 0) > 0 else ""
    told = [
        _model(module),
        f"{evaluation.images:,} images{groups} of the data set {Path(data['root']).name} were tested, "
        + (
            f"in {found.count} folds, of which each tests once and the next one validates."
            if found.held_out
            else f"by the models of {found.count} folds of the other images, of which each validates once."
        ),
        f"Each of the {len(epochs)} models was trained{length} with AdamW ({', '.join(options)}), and tested after the "
        f"epoch with the best validation {label(module.task.MONITOR[0], 0)} ({min(epochs) + 1} to {max(epochs) + 1}, "
        f"median {median(epochs) + 1:g}).",
    ]
    if len(seeds) > 1 or not found.held_out:
        told.append(f"Scores of {'several seeds' if found.held_out else 'all models'} are averaged.")
    if found.held_out:
        told.append("The folds' predictions are pooled.")
    told += [_intervals(evaluation), *_calibration(module)]
    if evaluation.thresholds:
        of_which = "the other folds' predictions" if found.held_out else "the validation images"
        told.append(f"Images were decided for by thresholds that were fitted to {of_which} by Youden's index.")
    return " ".join([*told, _versions()])


def kept_apart(manifest: Manifest) -> list[str]:
    """Sentences on the patients, cases and files in more than one split: how many of how many."""
    if manifest.overlaps is None:
        return []
    samples, overlaps = manifest.samples, manifest.overlaps
    groups = {sample.group for sample in samples if sample.group not in ("", sample.case)}
    cases = {sample.case for sample in samples if sample.case}
    told = []
    if groups:
        told.append(_crossing(overlaps["group"], len(groups), "groups, such as patients, have images"))
    if cases:
        told.append(_crossing(overlaps["case"], len(cases), "cases have images"))
    alone = sum(not sample.group for sample in samples)
    if alone == len(samples):
        told.append("No groups, such as patients, are known: one may have images in several splits.")
    elif alone:
        told.append(f"{alone:,} of {len(samples):,} images have no group.")
    told.append(_crossing(overlaps["file"], len(samples), "image files are, by their bytes,"))
    return told


def split_source(manifest: Manifest) -> str:
    """How images came to their splits, and what is in more than one of them."""
    return " ".join([f"Split: {manifest.origin}.", *kept_apart(manifest)])


def split_summaries(manifest: Manifest) -> dict[str, SplitSummary]:
    """What each split holds that has images."""
    summaries = {}
    for split in SPLITS:
        samples = manifest.split(split)
        groups = {sample.group for sample in samples}
        counts = dict(zip(manifest.classes, manifest.class_counts(split), strict=True))
        if samples:
            summaries[split] = SplitSummary(
                len(samples), {} if manifest.kind == "regression" else counts, None if "" in groups else len(groups)
            )
    return summaries


def _crossing(found: int, total: int, what: str) -> str:
    counted, matters = (f"{found:,}", ": test figures are too good") if found else ("None", "")
    return f"{counted} of {total:,} {what} in more than one split{matters}."


def _intervals(evaluation: Evaluation) -> str:
    unit = f"{evaluation.unit}s" if evaluation.groups is None else "groups"
    return f"Intervals are 95% percentile intervals of {evaluation.resamples:,} bootstrap resamples of {unit}."


def _calibration(module: ClassificationModule) -> list[str]:
    weighted = " with the class weights of the training" if module.hparams["class_weights"] else ""
    how = f"a temperature and a bias of each class, fitted to the validation images{weighted}"
    return [f"Probabilities were calibrated by {how}."] if module.is_calibrated else []


def _versions() -> str:
    versions = ", ".join(f"{said} {version(name)}" for name, said in _PACKAGES.items())
    return f"Tested on {datetime.now(UTC):%d %B %Y} with {versions} and Python {platform.python_version()}."


def _model(module: ClassificationModule) -> str:
    encoder, asked = module.encoder_config, module.specification
    weights = encoder.weights() if asked is None else asked.weights
    size = "" if asked is None else f" at {asked.resolution[0]} x {asked.resolution[1]} pixels"
    learnable = f"{module.learnable_parameters:,} learnable parameters ({100 * module.learnable_ratio:.2f}% of all)"
    if weights.startswith(OF_FILES):
        weights = f"SHA-256 {weights.removeprefix(OF_FILES)[:16]}..."
    told = [f"{module.LABEL}, with {learnable}, was trained on the encoder {encoder.name} (weights: {weights}){size}."]
    if asked is not None and asked.orientations > 1:
        parts = [f"{part:.0%}" for part in parts_shown(asked.orientations, asked.zoom)]
        shown = " to ".join(dict.fromkeys((parts[0], parts[-1])))
        part = f", each but the first of which shows {shown} of each side of the image" if asked.zoom < 1 else ""
        told.append(f"Features are of {asked.orientations} orientations of every image{part}.")
    if changed := _changed(module):
        told.append(f"Options of {type(module).__name__} that are not its defaults: {', '.join(changed)}.")
    return " ".join(told)


def _changed(module: ClassificationModule) -> list[str]:
    """Options that are not the default and that no other sentence names."""
    own = module.defaults()
    given = {name: value for name, value in module.hparams.items() if name in own and name not in _NAMED}
    return [f"{name} {value}" for name, value in sorted(given.items()) if _listed(value) != _listed(own[name])]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # YAML has no tuples


def _images(manifest: Manifest) -> str:
    parts = [
        f"{split.images:,} {_SPLITS[name]} images" + ("" if split.groups is None else f" of {split.groups:,} groups")
        for name, split in split_summaries(manifest).items()
    ]
    return f"The data set {manifest.root.name} has {', '.join(parts)} (split: {manifest.origin})."


def _training(trainer: L.Trainer, module: ClassificationModule, data: ImageDataModule | None) -> str:
    settings = _optimiser(module)
    if data is not None:
        size = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        settings += [f"batch size {size}", f"augmentation {data.augmentation}"]
    settings += [f"precision {trainer.precision}", f"seed {module._seed}"]
    return f"Training took {trainer.current_epoch} epochs of AdamW ({', '.join(settings)})."


def _optimiser(module: ClassificationModule) -> list[str]:
    return [f"learning rate {module.learning_rate:g}", f"weight decay {module.weight_decay:g}"]


def _choice(trainer: L.Trainer, module: ClassificationModule, checkpoint: str, epoch: int) -> str:
    if checkpoint != "best":
        return f"Tested is epoch {epoch + 1}, the last."
    metric, _ = module.task.MONITOR
    value = logged_at(Path(trainer.default_root_dir), f"val_{metric}", epoch)
    chosen = "validation loss" if value is None else f"validation {label(metric, 0)} ({number(value)})"
    return f"Tested is epoch {epoch + 1}, which had the best {chosen}."
