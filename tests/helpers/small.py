"""Small generated data sets, and the settings of a tiny real ViT."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image

from fpt_lightning import FPTPlusModule, PreloadedFeatureDataModule
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.evaluation.calibration import Calibration
from fpt_lightning.methods import ClassificationModule
from fpt_lightning.methods.tuning import EncoderModule
from fpt_lightning.store.specification import FeatureSpecification
from reference import randomise, small

ROOT = Path(__file__).parents[2]
"""Of the repository."""

SPECIFICATION = FeatureSpecification(
    encoder="test_vit",
    weights="random",
    layers=(3, 4, 5),
    token_ratio=0.2,
    criterion="global",
    resolution=(64, 96),
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    statistics="given",
    image_size=6,
    codec="int8",
    weights_digest="0123",
)
"""Of a store that no encoder made."""

CLASSES = {"multiclass": 3, "multilabel": 3, "ordinal": 3, "coral": 3, "regression": 1}
"""``num_classes`` of each task on the images of ``write_images``, by their folder (``table``)."""

TINY = {"encoder": "test_vit", "pretrained": False, "side_resolution": 32, "prompts": 4}
"""timm's ``test_vit``: width 64, 6 blocks, 2 heads, patch 16."""

SHALLOW = small("vit_base_patch16_224", "_shallow", depth=2)
"""A ViT of two blocks (width 64, 4 heads), for what is done to each block alike; registered in this process alone."""


def write_images(root: Path, counts: dict[str, int], size: tuple[int, int] = (80, 96), seed: int = 0) -> Path:
    """``root/{class}/{number}.png``; the classes differ in colour, so that they can be learned in a few steps."""
    rng = np.random.default_rng(seed)
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 120, (*size, 3))
            pixels[..., label % 3] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:03d}.png")
    return root


def table(root: Path, task: str, name: str = "labels.csv") -> Path:
    """Labels by the folder of an image: a, b or c, whose images differ in colour."""
    rows: list[dict[str, Any]] = []
    for path in sorted(root.rglob("*.png")):
        label = "abc".index(path.parent.name)
        row: dict[str, Any] = {"image": path.relative_to(root).as_posix()}
        if task == "multilabel":
            row |= {
                "red": int(label == 0),
                "green": int(label == 1),
                "bright": -1 if path.stem == "003" else 1 - label % 2,
            }
            row["bright"] = "" if path.stem == "004" else row["bright"]
        elif task == "regression":
            row["label"] = 40 + 10 * label + int(path.stem) / 10
        else:
            row["label"] = ("low", "mid", "high")[label]
        rows.append(row)
    with (root / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root / name


def data_for(
    task: str, tiny_data: Callable[..., PreloadedFeatureDataModule], image_root: Path, **changes: Any
) -> PreloadedFeatureDataModule:
    """Of a task on ``image_root``, by the fixture ``tiny_data``."""
    settings: dict[str, Any] = {"manifest": str(table(image_root, task))}
    if task == "multilabel":
        settings["label_column"] = ["red", "green", "bright"]
    elif task in ("ordinal", "coral", "multiclass"):
        settings["classes"] = ["low", "mid", "high"]
    return tiny_data(**{**settings, **changes})


def tiny_model(**changes: Any) -> FPTPlusModule:
    """FPT+ on the tiny ViT, for 3 classes."""
    return FPTPlusModule(**{"num_classes": 3, **TINY, **changes})


def quiet_trainer(folder: Path, **changes: Any) -> L.Trainer:
    """A trainer on the CPU that writes below ``folder`` only, without bars and loggers."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "max_epochs": 1,
        "gradient_clip_val": 1.0,
    }
    return L.Trainer(**{**settings, **changes})


def save_trained(
    method: type[ClassificationModule],
    path: Path,
    resolution: tuple[int, int],
    specification: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A checkpoint of random weights, as a trainer would have written it after fitting letterboxed images."""
    settings = {"pretrained": False, "task": "multiclass", **settings}
    regression = settings["task"] == "regression"
    torch.manual_seed(0)
    module = method(1 if regression else 3, **settings)
    if isinstance(module, EncoderModule):
        module.build(resolution)
        digest = module._digest
    else:
        digest = FrozenEncoder(module.encoder_config, resolution).digest
    randomise_learnable(module)
    module.class_names = () if regression else ("a", "b", "c")
    if not regression:
        module.thresholds, module.calibration = {"a": 0.3, "b": 0.6}, Calibration(1.7, (0.4, -0.1, -0.3))
    config = module.encoder_config
    asked: dict[str, Any] = {
        "encoder": config.name,
        "weights": config.weights(),
        "layers": config.tapped_layers,
        "token_ratio": config.token_ratio,
        "criterion": config.criterion,
        "resolution": resolution,
        "mean": (0.4, 0.4, 0.4),
        "std": (0.2, 0.2, 0.2),
        "statistics": "given",
        "image_size": 48,
        "codec": "fp32",
        "weights_digest": digest,
        "fit": "letterbox",
    }
    module.specification = FeatureSpecification(**asked | (specification or {}))
    checkpoint = {"global_step": 1, "state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return path


def randomise_learnable(module: ClassificationModule) -> None:
    """Random values for what learns, so that images differ in their scores; the frozen rest stays."""
    frozen = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    randomise(module)
    module.load_state_dict(frozen, strict=False)
