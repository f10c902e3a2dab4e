"""Checkpoints as files: read safely, and turned into the trained model that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fpt_lightning.deployment.hub import read_folder
from fpt_lightning.errors import CheckpointError, FPTError, in_one_line
from fpt_lightning.files import load_pickle
from fpt_lightning.methods import METHODS, ClassificationModule
from fpt_lightning.methods.ensemble import EnsembleModule
from fpt_lightning.methods.record import KEY, TrainingRecord
from fpt_lightning.methods.tuning import build_on_meta
from fpt_lightning.store.specification import FeatureSpecification


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds; only tensors and plain values are read, no code is run.

    Raises:
        CheckpointError: no such file, or one that cannot be read.
    """
    if not Path(path).is_file():
        is_what = "is a folder: give a file in it, such as best.ckpt" if Path(path).is_dir() else "does not exist"
        raise CheckpointError(f"the checkpoint {path} (ckpt_path) {is_what}.")
    try:
        content: Any = load_pickle(path)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("global_step"), int):
        raise CheckpointError(f"the file {path} (ckpt_path) is not a checkpoint of Lightning: give a run's best.ckpt.")
    return content


def read_trained(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, or a model's folder (``fpt_lightning.deployment.hub``), which is one without training.

    Raises:
        CheckpointError: see ``read_checkpoint`` and ``read_folder``.
    """
    return read_folder(path) if Path(path).is_dir() else read_checkpoint(path)


def as_checkpoint(module: ClassificationModule) -> dict[str, Any]:
    """What a checkpoint holds of a trained model: what learned, its arguments and its record."""
    content: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": _arguments(module.hparams)}
    module.on_save_checkpoint(content)
    return content


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model, without LightningCLI's own."""
    return {str(name): value for name, value in given.items() if not str(name).startswith("_")}


def load_trained(
    path: str | Path, pretrained: str | bool | None = None
) -> tuple[ClassificationModule, FeatureSpecification]:
    """The model that a checkpoint holds, in evaluation mode on the CPU, and what its images must be.

    An encoder that trains is built; a frozen one is not yet loaded.

    Args:
        path: of the checkpoint, written by a method of this package, or of a model's folder
            (``fpt_lightning.deployment.hub``).
        pretrained: the encoder's weights in place of the checkpoint's ``pretrained``, where that file has moved. They
            are held against the digest of those trained with.

    Raises:
        CheckpointError: a file that is no such checkpoint, does not say what its images are, or whose encoder weights
            are gone or others.
        EncoderError: weights that are out of reach or do not fit.
    """
    checkpoint = read_trained(path)
    methods: dict[str, type[ClassificationModule]] = {method.__name__: method for method in METHODS.values()}
    methods[EnsembleModule.__name__] = EnsembleModule
    about = checkpoint.get(KEY)
    if not isinstance(about, dict) or about.get("method") not in methods:
        raise CheckpointError(
            f"the checkpoint {path} was not written by a method of fpt-lightning ({', '.join(methods)}): give one that "
            "`fpt-lightning fit` wrote, such as best.ckpt."
        )
    record = TrainingRecord.of(checkpoint)
    method = methods[record.method]
    given = _arguments(checkpoint["hyper_parameters"])
    arguments: dict[str, Any] = dict.fromkeys(method.ARCHITECTURE) | given  # earlier versions lack some: they were off
    if pretrained is not None:
        checkpoint["hyper_parameters"]["pretrained"] = arguments["pretrained"] = pretrained
    weights = arguments.get("pretrained")
    if weights is None and Path(path).is_dir():
        asked = record.specification
        which = "" if asked is None else f" of {asked.encoder} ({asked.weights})"
        raise CheckpointError(
            f"the folder {path} is without the encoder's weights{which}: give their file as pretrained, or have the "
            "folder written with them (export --format hub --with_encoder true)."
        )
    if isinstance(weights, str) and not Path(weights).expanduser().exists():
        raise CheckpointError(
            f"the encoder's weights {weights!r} (pretrained), with which {path} was trained, are not there: give their "
            "place now as pretrained."
        )
    _check_size(method, arguments, record, checkpoint["state_dict"])
    module = method(**arguments)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    if module.specification is None or not module.specification.mean:
        raise CheckpointError(
            f"the checkpoint {path} does not say the resolution, mean and std of its images, as it was trained without "
            "a data module of fpt-lightning: call the module itself on images prepared as in training."
        )
    return module.eval(), module.specification


def _check_size(
    method: type[ClassificationModule],
    arguments: dict[str, Any],
    record: TrainingRecord,
    tensors: dict[str, Tensor],
) -> None:
    """Build the model without memory, and hold the checkpoint's tensors against it: it may ask for any size.

    Raises:
        CheckpointError: arguments that make no such model, or tensors of other shapes.
    """
    resolution = None if record.specification is None else record.specification.resolution
    try:
        sketch = build_on_meta(lambda: method(**arguments), resolution)
    except FPTError:
        raise
    except Exception as error:  # whatever the first odd argument provokes
        raise CheckpointError(
            f"the checkpoint is damaged: its hyper_parameters make no {method.__name__} ({in_one_line(error)})."
        ) from error
    own = sketch.state_dict()
    for name, value in tensors.items():
        if name not in own or own[name].shape != value.shape:
            there = tuple(own[name].shape) if name in own else "not there"
            raise CheckpointError(
                f"the checkpoint is damaged: its {name} is {tuple(value.shape)}, by its own hyper_parameters {there}."
            )
