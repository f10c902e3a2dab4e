"""The short help of what trains or uses a trained model: the options that people change, without importing PyTorch."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

_WIDTH = 80


class Option(NamedTuple):
    """An option of the table.

    Attributes:
        name: as it is typed, without ``--``.
        default: as a YAML has it; empty where one must be given.
        help: with its unit.
    """

    name: str
    default: str
    help: str


OPTIONS: dict[str, list[Option]] = {
    "Data": [
        Option("data.root", "", "folder of the images"),
        Option("data.manifest", "null", "CSV with a row an image; without one, folders are classes"),
        Option("data.store", "", "path or URL of the feature store"),
        Option("data.resolution", "null", "of the encoder's images, in pixels; null: about 512, by its patches"),
        Option("data.fit", "squash", "to the encoder's aspect: squash or letterbox"),
        Option("data.crop_border", "false", "whether dark borders are cut off (fundus, mammograms)"),
        Option("data.codec", "int8", "of stored keys and values: int8, int4, fp16 or fp32"),
        Option("data.orientations", "1", "of each image in the store: 1, 2, 4 or 8 flips and turns"),
        Option("data.augmentation", "default", "default, strong or none"),
        Option("data.batch_size", "16", "images of a training step"),
        Option("data.preload_batch_size", "4", "images that the frozen encoder takes at once"),
        Option("data.fold", "null", "of a cross-validation, from 1"),
        Option("data.folds", "5", "how many folds"),
        Option("data.on_error", "stop", "of images that cannot be read: stop or skip"),
        Option("data.num_workers", "0", "processes that prepare batches; 0 is the fastest with a store"),
    ],
    "Model": [
        Option("model", "", "method: FPTPlusModule or another of fpt_lightning.methods; auto tries four"),
        Option("model.encoder", "vit_base_patch16_224.augreg_in21k", "a plain ViT of timm"),
        Option("model.pretrained", "true", "true downloads weights; a path reads a file; false is untrained"),
        Option("model.num_classes", "null", "or labels of multilabel; null: those of the data"),
        Option("model.task", "multiclass", "multiclass, multilabel, ordinal, coral or regression"),
        Option("model.class_weights", "null", "balanced weighs classes by their rarity"),
        Option("model.learning_rate", "1.0e-3", "highest, of a cosine; other methods have their own"),
        Option("model.weight_decay", "0.1", "of AdamW"),
        Option("model.side_resolution", "null", "of the side network's images, in pixels; null: about 128"),
        Option("model.gradient_checkpointing", "false", "less memory for more time"),
        Option("model.encoder_precision", "fp32", "of the frozen pass: fp32, bf16 or fp16"),
    ],
    "Run": [
        Option("trainer.default_root_dir", "runs/run", "folder of the run"),
        Option("trainer.max_epochs", "20", "passes over the training images"),
        Option("trainer.accelerator", "auto", "auto, cpu, gpu or mps"),
        Option("trainer.devices", "auto", "how many of them"),
        Option("trainer.precision", "32-true", "of training: 32-true, bf16-mixed or 16-mixed"),
        Option("report_pictures", "0", "of the most confident errors, shown with their names in report.html"),
        Option("seed_everything", "0", "of initialisation, order and augmentation"),
        Option("ckpt_path", "null", "checkpoint that fit goes on from, or that others use; best and last"),
    ],
}
"""By section, in the order of use."""

_COVERAGE = "share of images whose prediction set shall hold the truth"
OWN: dict[str, dict[str, list[Option]]] = {
    "crossval": {"Folds": [Option("seeds", "1", "of every fold, counted from seed_everything")]},
    "test": {"Prediction sets": [Option("coverage", "null", f"{_COVERAGE}; null: 0.9")]},
    "predict": {"Prediction sets": [Option("coverage", "null", f"{_COVERAGE}; null: without sets")]},
    "audit": {
        "Audit": [
            Option("out", "null", "folder of the page and tables; null: audit in the run's folder"),
            Option("by", "null", "column of the manifest, such as site, held against labels; may be repeated"),
            Option("map", "pca", "of the images: pca, or umap with umap-learn"),
        ]
    },
}
"""Of one command alone."""


def short_help(command: str, purpose: str) -> str:
    """The page of ``fpt-lightning {command} --help``.

    Args:
        command: of the table of commands.
        purpose: of it, in a line.
    """
    lines = [f"usage: fpt-lightning {command} --config FILE [...] [--OPTION VALUE ...]", ""]
    told = f"{purpose[0].upper()}{purpose[1:]}. Options stand in the YAML or on the command line."
    lines += textwrap.wrap(told, _WIDTH)
    for section, options in {**OWN.get(command, {}), **OPTIONS}.items():
        lines += ["", f"{section}:"]
        for option in options:
            default = f" [{option.default}]" if option.default else ""
            lines.append(f"  --{option.name}{default}")
            lines += textwrap.wrap(option.help, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    rest = (
        f"All options, of the trainer too: fpt-lightning {command} --help all. All settings of a configuration as they "
        "are: --print_config. Of one class: --model.help FPTPlusModule, --data.help PreloadedFeatureDataModule."
    )
    return "\n".join([*lines, "", *textwrap.wrap(rest, _WIDTH)])
