"""A trained model as one file for other programs, by ``torch.export``: image in, probabilities out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpt_lightning.data.images import FULL_RANGE
from fpt_lightning.data.transforms import normalise
from fpt_lightning.deployment.card import card_beside, encoder_licence, shared_card
from fpt_lightning.deployment.checkpoints import as_checkpoint, load_trained
from fpt_lightning.deployment.hub import check_empty, write_folder
from fpt_lightning.deployment.predictor import NOTICE
from fpt_lightning.encoder.frozen import Encoded, FrozenEncoder, build_encoder
from fpt_lightning.encoder.weights import fit_weights, weights_digest, without_head
from fpt_lightning.errors import ConfigurationError, ExportError
from fpt_lightning.evaluation.conformal import quantiles, shortage
from fpt_lightning.explanation.attention import overlay, prompt_attention
from fpt_lightning.files import whole_file, write_text
from fpt_lightning.methods import ClassificationModule
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.fusion import Fusion
from fpt_lightning.methods.record import tensors_digest
from fpt_lightning.methods.tuning import EncoderModule
from fpt_lightning.store.codecs import Features
from fpt_lightning.store.specification import FeatureSpecification

TOLERANCE = 1e-4
"""Largest difference of an exported model's scores from PyTorch's; of predicted numbers above 1, relative to them."""

_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
_LARGEST_ONNX = 2 * 2**30  # bytes: what a file of Protocol Buffers can hold
_COVERAGES = (0.8, 0.9, 0.95, 0.99)
_SIDE_IMAGES = "as a low-resolution copy of the input, then resized; bicubic, antialiased"


class Classifier(nn.Module):
    """A trained model with its encoder as one function of images.

    Args:
        module: in evaluation mode; where its encoder is frozen, that runs in fp32 here.
        specification: of its images.
        attention: whether the prompts' attention is given too.

    Raises:
        ConfigurationError: ``attention`` of a method without prompts over the encoder's tokens.
        CheckpointError: other encoder weights than in training.
        EncoderError: weights that are out of reach or do not fit.
    """

    def __init__(
        self, module: ClassificationModule, specification: FeatureSpecification, attention: bool = False
    ) -> None:
        super().__init__()
        self.module, self.specification = module, specification
        self.fusion: Fusion | None = getattr(module, "fusion", None) if attention else None
        if attention and self.fusion is None:
            raise ConfigurationError(f"attention is true, but {module.LABEL} has no prompts whose attention to show.")
        self.encoder: FrozenEncoder | None = None
        if isinstance(module, FeatureModule):
            self.encoder = FrozenEncoder(replace(module.encoder_config, precision="fp32"), specification.resolution)
            module.use_encoder(self.encoder)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Classify.

        Args:
            images: (B, 3, height, width), fp32 in [0, 1], at the resolution of training, not normalised.

        Returns:
            Probabilities (B, classes), or predicted numbers (B,); and, if asked for, the attention that the prompts pay
            to each patch (B, rows, columns), averaged over heads, prompts and layers. With the prefix tokens, which lie
            nowhere, it sums to 1.
        """
        asked = self.specification
        normal = normalise(images, asked.mean, asked.std)
        batch = {"images": normal}
        if self.module.side_resolution is not None:
            copy = _resized(images, asked.image_size)
            batch["side_images"] = normalise(_resized(copy, self.module.side_resolution), asked.mean, asked.std)
        if self.encoder is None or self.fusion is None:
            return (self._scores(batch),)
        encoded = self.encoder(normal)
        return self._scores({**batch, "features": encoded.features}), self._attention(self.fusion, encoded)

    def _scores(self, batch: dict[str, Tensor]) -> Tensor:
        return self.module.scores(self.module.evaluated(batch))

    def _attention(self, fusion: Fusion, encoded: Encoded) -> Tensor:
        paid = prompt_attention(fusion, Features(encoded.features))
        found = overlay(paid, encoded.indices, self.module.encoder_shape, self.specification.resolution)
        return found.patches.mean(1)

    @property
    def output_names(self) -> list[str]:
        scores = "predictions" if self.module.task.KIND == "regression" else "probabilities"
        return [scores] if self.fusion is None else [scores, "attention"]

    def about(self) -> dict[str, Any]:
        """What a program needs to know to use the exported model, as plain values."""
        asked, module = self.specification, self.module
        regression = module.task.KIND == "regression"
        patches = zip(asked.resolution, module.encoder_shape.patch_size, strict=True)
        shapes = {"attention": ["batch", *(side // patch for side, patch in patches)]}
        return {
            "notice": NOTICE,
            "task": module.hparams["task"],
            "kind": module.task.KIND,
            "classes": [] if regression else list(module.output_names),
            "thresholds": module.thresholds,
            "prediction_sets": _sets_about(module),
            "calibrations": [asdict(each) for each in module.calibrations] if module.is_calibrated else [],
            "input": {
                "name": "images",
                "shape": ["batch", 3, *asked.resolution],
                "dtype": "float32",
                "pixels": "RGB in [0, 1]: the full scale (255, or 65535 of 16 bits) is 1; not normalised",
                "crop_border": asked.crop_border,
                "window": asked.window,
                "value_range": list(asked.value_range or FULL_RANGE),
                "fit": asked.fit,
                "resize": asked.interpolation,
            },
            "outputs": {
                name: shapes.get(name, ["batch"] if regression else ["batch", module.num_classes])
                for name in self.output_names
            },
            "inside": {
                "mean": list(asked.mean),
                "std": list(asked.std),
                **({} if module.side_resolution is None else {"side_images": self._side_images()}),
            },
            "method": type(module).__name__,
            "encoder": asked.encoder,
            "weights": asked.weights,
            "weights_digest": asked.weights_digest,
            "versions": {name: version(name) for name in ("fpt-lightning", "torch", "timm")},
        }

    def _side_images(self) -> dict[str, Any]:
        return {"copy": self.specification.image_size, "size": self.module.side_resolution, "made": _SIDE_IMAGES}


def _sets_about(module: ClassificationModule) -> dict[str, Any]:
    """How a program makes the sets of a few coverages, of those that validation gives."""
    rules = {
        "single-label": "the most probable class, and each whose probability is at least 1 - largest",
        "multi-label": "of each label, present (p) or absent (1 - p), the more probable and each of at least 1 - its "
        "largest",
        "regression": "the prediction - largest to the prediction + largest",
    }
    rule = rules[module.task.KIND]
    if module.task.ORDERED:
        rule = (
            "the most probable grade, and each where it or one further away has a probability of at least 1 - largest"
        )
    return {"rule": rule, "largest": {f"{coverage:g}": found for coverage, found in _largest(module).items()}}


def _largest(module: ClassificationModule) -> dict[float, Any]:
    known = [each for each in _COVERAGES if not shortage(module.nonconformity, each)]
    found = {coverage: quantiles(module.nonconformity, coverage) for coverage in known}
    return {coverage: own.get("", own) for coverage, own in found.items()}


def _resized(images: Tensor, size: int) -> Tensor:
    resized = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    return resized.clamp(0, 1)


def export(
    *,
    ckpt_path: str,
    out: str,
    format: Literal["onnx", "torch", "hub"] = "onnx",
    attention: bool = False,
    pretrained: str | None = None,
    with_encoder: bool = False,
) -> None:
    """Write a trained model as one file, encoder included: images (B, 3, height, width) in, probabilities out.

    With ``--format hub`` it is a folder to share, which ``Predictor.from_pretrained`` reads
    (``fpt_lightning.deployment.hub``); what follows is of files. The model card comes with each.

    The batch may be of any size. Normalisation, the side network's image and the calibration are inside;
    decoding, cropping, padding and resizing to the resolution are not, and are described in the file's metadata with
    classes and thresholds. Before it appears, the file's outputs are held against PyTorch's. For research only: this is
    not a medical device.

    Args:
        ckpt_path: the checkpoint, such as runs/run/best.ckpt.
        out: the file to write: .onnx, or .pt2 for torch; or a new folder.
        format: onnx, or torch for ``torch.export``, whose file holds the metadata as fpt_lightning.json; or hub.
        attention: whether the prompts' attention over the patches is a second output (B, rows, columns).
        pretrained: the encoder's weights, where the file that the checkpoint names has moved.
        with_encoder: whether a folder has the encoder's weights too, under their own licence.

    Raises:
        CheckpointError: no such checkpoint, or encoder weights that are gone or others than in training.
        ConfigurationError: arguments that do not fit each other or the method, or packages that are missing or too old.
        EncoderError: weights that are out of reach or do not fit.
        ExportError: a model that cannot be exported, or whose export computes something else.
    """
    path = Path(out)
    if format == "hub":
        _export_folder(path, ckpt_path, pretrained, with_encoder, attention)
        return
    if with_encoder:
        raise ConfigurationError(f"with_encoder is true, which is for --format hub: {format} always has the encoder.")
    if path.suffix != _SUFFIXES[format]:
        raise ConfigurationError(f"out is {out}: a file of format {format} ends in {_SUFFIXES[format]}.")
    _check_packages(format)
    module, specification = load_trained(ckpt_path, pretrained)
    card = card_beside(ckpt_path, module)  # while it is known what learned
    classifier = Classifier(module, specification, attention)
    size = sum(p.numel() * p.element_size() for p in classifier.parameters())
    if format == "onnx" and size >= _LARGEST_ONNX:
        raise ExportError(f"the model has {size / 2**30:.1f} GiB, an ONNX file at most 2: use --format torch.")
    with whole_file(path) as partial:
        run = _WRITERS[format](classifier, partial)
        difference = _difference(classifier, run)
    write_text(path.with_suffix(".card.md"), card)
    print(
        f"{path} ({path.stat().st_size / 2**20:.1f} MiB): {', '.join(classifier.output_names)} of images "
        f"{'batch x 3 x {} x {}'.format(*classifier.specification.resolution)}, within {difference:.1g} of PyTorch's.\n"
        f"{NOTICE}"
    )


def _export_folder(path: Path, ckpt_path: str, pretrained: str | None, with_encoder: bool, attention: bool) -> None:
    if attention:
        raise ConfigurationError("attention is true, which is for files: leave it out of --format hub.")
    check_empty(path)
    module, specification = load_trained(ckpt_path, pretrained)
    card = shared_card(card_beside(ckpt_path, module), module, with_encoder)
    encoder = _encoder_tensors(module, specification) if with_encoder else None
    write_folder(path, as_checkpoint(module), card, encoder)
    what = f"{', '.join(sorted(file.name for file in path.iterdir()))}"
    licence = f" The encoder's licence: {encoder_licence(specification)}." if with_encoder else ""
    print(f"{path} has {what}.{licence}\n{NOTICE}")


def _encoder_tensors(module: ClassificationModule, specification: FeatureSpecification) -> dict[str, Tensor]:
    """The encoder's weights as they were before training, at its resolution, by timm's names.

    Raises:
        CheckpointError: other weights than in training.
        ExportError: they would be read as others.
    """
    pooling = isinstance(module, EncoderModule)
    model = build_encoder(module.encoder_config, specification.resolution, pooling)
    module.check_weights(weights_digest(model))
    tensors = without_head(model)
    again = build_encoder(replace(module.encoder_config, pretrained=False), specification.resolution, pooling)
    fit_weights(again, tensors, "the encoder's weights", pooling)
    if tensors_digest(without_head(again)) != tensors_digest(tensors):
        raise ExportError(
            f"the weights of {specification.encoder} at {specification.resolution} are read as others than they are: "
            "leave --with_encoder out, and give them as pretrained where the model is used."
        )
    return tensors


def _check_packages(format: str) -> None:
    if not hasattr(torch.compiler, "is_exporting"):
        raise ConfigurationError(f"export needs torch 2.9 or later, this is {torch.__version__}: update it.")
    if format == "onnx":
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"export to ONNX needs {error.name}: pip install 'fpt-lightning[onnx]', or use --format torch."
            ) from error


def _example(classifier: Classifier, count: int) -> Tensor:
    """Images of noise, the same every time: (count, 3, height, width)."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, *classifier.specification.resolution, generator=generator)


def _traced(classifier: Classifier) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch", min=1)}
    with torch.no_grad():
        program = torch.export.export(
            classifier, (_example(classifier, 2),), dynamic_shapes={"images": batch}, strict=False
        )
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it holds this machine's paths
    return program


def _write_torch(classifier: Classifier, path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Write, and give what the file computes."""
    content = BytesIO()  # PyTorch, writing itself, ends the process where the disk is full
    torch.export.save(_traced(classifier), content, extra_files={"fpt_lightning.json": _as_json(classifier.about())})
    path.write_bytes(content.getvalue())
    content.seek(0)
    exported = torch.export.load(content).module()
    return lambda images: list(exported(images))


def _write_onnx(classifier: Classifier, path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Write, and give what the file computes."""
    import onnxruntime

    program = torch.onnx.export(
        _traced(classifier),
        dynamo=True,
        dynamic_shapes={"images": {0: "batch"}},
        input_names=["images"],
        output_names=classifier.output_names,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update({name: _as_json(value) for name, value in classifier.about().items()})
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


_WRITERS = {"onnx": _write_onnx, "torch": _write_torch}


def _as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _difference(classifier: Classifier, run: Callable[[Tensor], list[Tensor]]) -> float:
    """The largest one between what a file computes and what PyTorch does, for another batch than it was traced with.

    Raises:
        ExportError: it is above ``TOLERANCE``.
    """
    images = _example(classifier, 3)
    with torch.no_grad():
        expected = classifier(images)
    found = run(images)
    worst = (found[0] - expected[0]).abs().max() / expected[0].abs().max().clamp(min=1)
    # Of attention the mean: where two tokens tie for the last place of a head within rounding, either may be taken
    means = [(a - b).abs().mean() for a, b in zip(found[1:], expected[1:], strict=True)]
    difference = float(torch.stack([worst, *means]).max())
    if not math.isfinite(difference) or difference > TOLERANCE:
        raise ExportError(
            f"the exported model differs from PyTorch's by {difference:.2g}, more than {TOLERANCE:g}: it is not "
            "written. Try other versions of torch, onnxscript and onnxruntime, or --format torch."
        )
    return difference
