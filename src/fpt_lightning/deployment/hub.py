"""A trained model as a folder in the layout of Hugging Face's hub: a card, plain JSON and safetensors, no pickle.

``README.md`` is the model card, ``config.json`` the model's arguments and training record, ``model.safetensors`` what
learned, and ``encoder.safetensors``, where it is wanted, the encoder's weights. The record goes without the digests of
names of training images and groups, as short names could be found out from them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from fpt_lightning.errors import CheckpointError, ConfigurationError, OutputError, in_one_line
from fpt_lightning.files import PARTIAL, make_folder, write_json, write_text
from fpt_lightning.methods.record import KEY, tensors_digest

CONFIG, WEIGHTS, ENCODER, README = "config.json", "model.safetensors", "encoder.safetensors", "README.md"
FORMAT = 1
_LARGEST_CONFIG = 2**26  # bytes
_PARTS = ("hyper_parameters", KEY)


def write_folder(
    folder: str | Path, checkpoint: Mapping[str, Any], card: str, encoder: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model's folder, whole or not at all.

    Args:
        folder: a new or an empty one.
        checkpoint: as ``fpt_lightning.deployment.checkpoints.as_checkpoint`` gives it.
        card: Markdown.
        encoder: its weights by timm's names, at the resolution of training.

    Raises:
        ConfigurationError: the folder holds something.
        OutputError: it cannot be written.
    """
    folder = Path(folder).absolute()
    check_empty(folder)
    arguments, record = dict(checkpoint["hyper_parameters"]), {**checkpoint[KEY], "seen": {}}
    if encoder is not None or isinstance(arguments.get("pretrained"), str):
        arguments["pretrained"] = None  # a file of the machine that it was trained on
    config = {
        "library_name": "fpt-lightning",
        "format": FORMAT,
        "versions": {name: version(name) for name in ("fpt-lightning", "torch", "timm")},
        "weights_digest": tensors_digest(checkpoint["state_dict"]),
        "encoder_digest": None if encoder is None else tensors_digest(encoder),
        **dict(zip(_PARTS, (arguments, record), strict=True)),
    }
    partial = folder.with_name(f"{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    try:
        _save(checkpoint["state_dict"], partial / WEIGHTS)
        if encoder is not None:
            _save(encoder, partial / ENCODER)
        write_text(partial / README, card)
        write_json(partial / CONFIG, config)
        os.replace(partial, folder)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}. Give another place.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds something, or a file of that name.

    Raises:
        ConfigurationError: naming it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"out is {folder}, which is there already: give another folder, or remove it.")


def read_folder(folder: str | Path) -> dict[str, Any]:
    """A model's folder as a checkpoint, to be checked as any other; no code is run.

    ``pretrained`` is the file of the encoder's weights where the folder has them, and None where it neither has them
    nor names weights that timm knows.

    Raises:
        CheckpointError: files that are missing, damaged or of other contents than the configuration says.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    tensors = _read_tensors(folder / WEIGHTS, config["weights_digest"])
    arguments = config["hyper_parameters"]
    if config["encoder_digest"] is not None:
        _read_tensors(folder / ENCODER, config["encoder_digest"])
        arguments["pretrained"] = str(folder / ENCODER)
    elif not isinstance(arguments.get("pretrained"), bool):
        arguments["pretrained"] = None
    return {"state_dict": tensors, **{name: config[name] for name in _PARTS}}


def download(source: str, revision: str | None = None) -> Path:
    """The folder of a repository of the hub, in ``huggingface_hub``'s cache, from which it comes without a network.

    Args:
        source: ``organisation/name``.
        revision: branch, tag or commit.

    Raises:
        CheckpointError: no such repository, or one that is out of reach.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[CONFIG, WEIGHTS, ENCODER, README]))
    except Exception as error:  # no such name, no access, no network: each has its own
        raise CheckpointError(
            f"{source!r} is no folder here, and cannot be had from the hub ({in_one_line(error)}): give a folder, or "
            "organisation/name of a repository that is within reach or in the cache."
        ) from error


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}  # none shares memory
    path.write_bytes(save(own))  # save_file would let nobody else read it


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"the folder {path.parent} has no {path.name}: it holds no model of fpt-lightning.")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, which no configuration has.")
    try:
        config = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {in_one_line(error)}.") from error
    if not isinstance(config, dict) or config.get("library_name") != "fpt-lightning":
        raise CheckpointError(f"{path} is not the configuration of a model of fpt-lightning.")
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has the format {config.get('format')!r:.40}, this version reads {FORMAT}: update fpt-lightning."
        )
    if not all(isinstance(config.get(name), dict) for name in _PARTS):
        raise CheckpointError(f"{path} is damaged: it lacks {' or '.join(_PARTS)}.")
    if not isinstance(config.get("weights_digest"), str) or "encoder_digest" not in config:
        raise CheckpointError(f"{path} is damaged: it lacks the digests of the weights.")
    return config


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _read_tensors(path: Path, digest: Any) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(
            f"the folder {path.parent} has no {path.name}, of which its {CONFIG} speaks: get it whole."
        )
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors has its own for a damaged file
        raise CheckpointError(f"{path} cannot be read as safetensors: {in_one_line(error)}.") from error
    if tensors_digest(tensors) != digest:
        raise CheckpointError(f"{path} is not the file that {CONFIG} speaks of: its digest is another. Get both again.")
    return tensors
