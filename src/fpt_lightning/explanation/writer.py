"""Pictures and numbers of what FPT+ or FPT looked at, written while it predicts (paper, sections 4.5 and 4.7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor

from fpt_lightning.data.manifest import Manifest, Sample
from fpt_lightning.data.transforms import shrunk
from fpt_lightning.datamodules.images import ImageDataModule
from fpt_lightning.encoder.config import EncoderShape
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.explanation import attention as looking
from fpt_lightning.explanation.pictures import (
    LARGEST,
    Explanation,
    shortened,
    write_deletion,
    write_pictures,
    write_side_attention,
)
from fpt_lightning.files import without_nan, write_json
from fpt_lightning.methods import ClassificationModule, FPTPlusModule
from fpt_lightning.methods.base import from_all_processes

Floats = NDArray[np.float64]


class ExplanationWriter(L.Callback):
    """Writes what FPT+ or FPT looked at, while it predicts (paper, sections 4.5 and 4.7).

    Pictures of some images: see ``fpt_lightning.explanation.pictures.write_pictures``. Over all that are predicted:
    ``side_attention.png``, the attention that the side network pays to the prompts by block; where it is asked for,
    ``deletion.png``, how fast the score of the predicted class falls as tokens are taken out
    (``fpt_lightning.explanation.attention.deletion_curves``); both in ``explanation.json``, with 95% bootstrap
    intervals that keep groups whole.

    Args:
        folder: where to write.
        model: that is to be explained.
        layer: tapped block, counted from 0, of the tokens and attention that are drawn; the last by default.
        head: whose; all heads by default.
        images: how many are drawn, evenly spread over all.
        deletion: whether tokens are taken out of all images to see what the pictures are worth.

    Raises:
        ConfigurationError: a model without fine-grained prompts, or an argument that cannot be.
    """

    def __init__(
        self,
        folder: str | Path,
        model: L.LightningModule,
        layer: int | None = None,
        head: int | None = None,
        images: int = 16,
        deletion: bool = False,
    ) -> None:
        if not isinstance(model, FPTPlusModule):
            name = model.LABEL if isinstance(model, ClassificationModule) else type(model).__name__
            raise ConfigurationError(
                f"{name} has no fine-grained prompts whose attention could be shown: use FPTPlusModule or FPTModule."
            )
        layers, heads = model.encoder_config.tapped_layers, model.encoder_shape.heads
        self.folder, self.head, self.images, self.deletion = Path(folder), head, images, deletion
        self.layer = layers[-1] if layer is None else layer
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigurationError(f"out is {str(folder)!r}, which is a file: give a folder for the pictures.")
        if self.layer not in layers:
            raise ConfigurationError(f"layer is {layer}: choose one of the tapped blocks {list(layers)}.")
        if head is not None and not 0 <= head < heads:
            raise ConfigurationError(f"head is {head}: {model.encoder_shape.name} has heads 0 to {heads - 1}.")
        if images < 0:
            raise ConfigurationError(f"images is {images}: give the number of images to draw, 0 or more.")
        if images == 0 and not deletion:
            raise ConfigurationError(
                "images is 0: give how many to draw, or ask for the deletion test (deletion true)."
            )
        if deletion and model.task.KIND == "regression":
            raise ConfigurationError("deletion is true, but a regression has no class whose score could fall.")
        self._heads = slice(None) if head is None else slice(head, head + 1)
        self._found: list[tuple[str, Floats, Floats]] = []  # id, curves (3, S), attention to prompts (L,)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = _image_data(trainer)
        self._samples = {sample.id: sample for sample in data.predicted.samples}
        self._drawn = {sample.id for sample in data.predicted.spread(self.images).samples}

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if "features" not in batch:
            assert isinstance(pl_module, FPTPlusModule)
            encoded = pl_module.encode(batch["images"], batch["ids"])
            batch |= {"features": encoded.features, "indices": encoded.indices}  # once, for prediction too

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(pl_module, FPTPlusModule)
        scores = outputs["scores"]
        seeds = [crc32(id.encode()) for id in batch["ids"]] if self.deletion else None  # an image has one, everywhere
        attention, side, deletion = looking.look(pl_module, batch, scores, seeds)
        shares = _numbers(side)
        curves: Floats = np.empty((len(shares), 0, 0))
        if deletion is not None:
            curves = _numbers(torch.stack([*deletion.values()], 1))
        self._found += zip(batch["ids"], curves, shares, strict=True)
        for i, id in enumerate(batch["ids"]):
            if id in self._drawn:
                self._draw(trainer, pl_module, self._samples[id], batch["indices"][i], attention[i], scores[i])

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found, self._found = from_all_processes(self._found), []
        if not found or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, FPTPlusModule)
        ids, curves, shares = zip(*found, strict=True)
        groups = [self._samples[id].group or id for id in ids]
        side = self._side_attention(pl_module, np.stack(shares), groups)
        deletion = self._deletion(np.stack(curves), groups) if self.deletion else None
        content = {"images": len(ids), "groups": len(set(groups)), "side_attention": side, "deletion": deletion}
        write_json(self.folder / "explanation.json", without_nan(content))
        of = f" of {len(ids)}" if self.deletion else ""
        rank_zero_info(f"pictures of {len(self._drawn)}{of} images and explanation.json are in {self.folder}")

    def _draw(
        self,
        trainer: L.Trainer,
        module: FPTPlusModule,
        sample: Sample,
        indices: Tensor,
        attention: Tensor,
        scores: Tensor,
    ) -> None:
        data, shape = _image_data(trainer), module.encoder_shape
        here = module.encoder_config.tapped_layers.index(self.layer), self._heads
        selected = looking.token_maps(indices[here], shape, data.resolution)
        attended = looking.overlay(attention[here], indices[here], shape, data.resolution)
        everywhere = looking.overlay(attention, indices, shape, data.resolution).patches.mean(0)
        prefix = ""
        if shape.prefix_tokens:
            prefix = (
                f"{_prefix_name(shape)}: {float(attended.prefix.sum()):.1%} of the attention, "
                f"{int(selected.prefix.sum())} of {indices[here].numel():,} selected"
            )
        write_pictures(
            self.folder,
            sample.id,
            Explanation(
                pixels=shrunk(data.reader(data.predicted.path(sample)), LARGEST),
                selected=selected.patches.sum(0).cpu().numpy(),
                heads=len(selected.patches),
                attention=_numbers(attended.patches),
                overlay=_numbers(everywhere),
                caption=_caption(module, data.predicted, sample, scores.tolist()),
                right=is_right(module, data.predicted, sample, scores),
                where=f"block {self.layer}, " + ("all heads" if self.head is None else f"head {self.head}"),
                prefix=prefix,
            ),
        )

    def _side_attention(self, module: FPTPlusModule, shares: Floats, groups: Sequence[str]) -> dict[str, Any]:
        blocks = module.encoder_config.tapped_layers
        means = looking.mean_with_interval(shares, groups)
        prompts = module.fusion.prompts.shape[1]
        uniform = prompts / (prompts + module.side.positions.shape[1])
        write_side_attention(self.folder / "side_attention.png", blocks, means, uniform)
        by_block = {str(block): asdict(mean) for block, mean in zip(blocks, means, strict=True)}
        return {"by_block": by_block, "if_uniform": uniform}

    def _deletion(self, curves: Floats, groups: Sequence[str]) -> dict[str, Any]:
        """Of curves (N, 3, S), in the order that ``deletion_curves`` gives."""
        means = {name: looking.mean_with_interval(curves[:, i], groups) for i, name in enumerate(looking.ORDERS)}
        most, random, least = (curves[:, i] for i in range(3))
        areas = {
            "random - most attended": looking.area_between(random, most),
            "least - most attended": looking.area_between(least, most),
        }
        estimates = {name: looking.mean_with_interval(area[:, None], groups)[0] for name, area in areas.items()}
        note = f"area between random and most attended: {estimates['random - most attended']}, {len(curves)} images"
        write_deletion(self.folder / "deletion.png", looking.FRACTIONS, means, note)
        rank_zero_info("deletion, " + note)
        return {
            "fractions": looking.FRACTIONS,
            "scores": {name: [asdict(mean) for mean in of] for name, of in means.items()},
            "areas": {name: asdict(estimate) for name, estimate in estimates.items()},
        }


def _numbers(tensor: Tensor) -> Floats:
    """In float64, which not every device has."""
    return tensor.float().cpu().numpy().astype(np.float64)


def _image_data(trainer: L.Trainer) -> ImageDataModule:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        raise ConfigurationError(f"data is {type(data).__name__}: explain needs a data module of this package.")
    return data


def _prefix_name(shape: EncoderShape) -> str:
    if not shape.class_token:
        return "registers"
    return "class token" if shape.prefix_tokens == 1 else "class token and registers"


def is_right(module: ClassificationModule, manifest: Manifest, sample: Sample, scores: Tensor) -> bool | None:
    """Whether the most probable class is the image's; None where that is not known, or there is more than one."""
    if manifest.kind != "single-label" or sample.label < 0:
        return None
    return module.output_names[int(scores.argmax())] == manifest.classes[sample.label]


def _caption(module: ClassificationModule, manifest: Manifest, sample: Sample, scores: Any) -> str:
    """Which image, what is predicted of it, and what is known."""
    known: list[str] = []
    if manifest.kind == "single-label" and sample.label >= 0:
        known = [manifest.classes[sample.label]]
    elif manifest.kind == "multi-label":
        known = [name for name, target in zip(manifest.classes, sample.targets, strict=False) if target == 1]
    elif manifest.kind == "regression" and sample.targets[0] == sample.targets[0]:
        known = [f"{sample.targets[0]:.4g}"]
    if manifest.kind == "regression":
        predicted = f"{scores:.4g}"
    else:
        ranked = sorted(zip(scores, module.output_names, strict=True), reverse=True)
        predicted = ", ".join(f"{name} {score:.3f}" for score, name in ranked[:4])
    return f"{shortened(sample.id)}\npredicted: {predicted}" + (f"     true: {', '.join(known)}" if known else "")
