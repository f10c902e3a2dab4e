"""Weight files: which there are, one or many shards, and what they hold, read as tensors alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fpt_lightning.errors import EncoderError, a_few, in_one_line
from fpt_lightning.files import file_digest, load_pickle

OF_FILES = "sha256:"
"""How that which identifies weights begins where they are of files: their digest follows."""
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
_INDEX = ".index.json"
_OF_A_FOLDER = ("model.safetensors", "model.safetensors" + _INDEX, "pytorch_model.bin", "pytorch_model.bin" + _INDEX)


def are_weights(pretrained: str) -> bool:
    """Whether a path is one of a weights file, of an index of shards, or of a folder."""
    path = Path(pretrained).expanduser()
    return path.suffix.lower() in WEIGHT_SUFFIXES or path.name.endswith(_INDEX) or path.is_dir()


def existing_weights(pretrained: str) -> Path:
    """The path of a weights file, of an index of shards, or of a folder with either.

    Raises:
        EncoderError: it, or a shard, is not there.
    """
    path = Path(pretrained).expanduser()
    weight_files(path)
    return path


def weight_files(path: Path) -> list[Path]:
    """The files that hold the tensors: the file itself, or the shards of an index, sorted.

    Args:
        path: of a file, of an index (``*.index.json``), or of a folder as transformers and timm save it.

    Raises:
        EncoderError: a file is not there; a folder with none or several to choose from; an index that cannot be read or
            names files outside its own folder.
    """
    path = _file_of(path)
    return sorted({_shard(path, name) for name in _weight_map(path).values()}) if _is_index(path) else [path]


def weights_file_digest(path: Path) -> str:
    """SHA-256 of a weights file; of the digests of all shards where there are several.

    Raises:
        EncoderError: as ``weight_files``.
    """
    digests = [file_digest(file) for file in weight_files(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_weights(path: Path) -> Any:
    """What a weights file holds, or the tensors of all shards; no code is run.

    Raises:
        EncoderError: as ``weight_files``; a file that cannot be read; shards that hold others than their index says.
    """
    path = _file_of(path)
    if not _is_index(path):
        return _read(path)
    shards = {file.name: _read(file) for file in weight_files(path)}
    weight_map = _weight_map(path)
    held = {(name, file) for file, content in shards.items() if isinstance(content, Mapping) for name in content}
    for named, there, missing in ((weight_map.items(), held, "not in"), (held, weight_map.items(), "only in")):
        if odd := sorted(set(named) - set(there)):
            listed = a_few([f"{name} is {missing} {file}" for name, file in odd])
            raise EncoderError(
                f"the index {path} and its shards do not agree: {listed}. Get them again, of one version."
            )
    return {name: shards[file][name] for name, file in weight_map.items()}


def read_config(path: Path) -> tuple[Path, dict[str, Any]]:
    """The ``config.json`` beside weights that are named as transformers names them, and what it holds.

    Empty where there is none.

    Raises:
        EncoderError: one that is not JSON.
    """
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    named = path.is_dir() or path.name in _OF_A_FOLDER
    return file, _read_json(file) if named and file.is_file() else {}


def _file_of(path: Path) -> Path:
    """The file itself, or the one of a folder."""
    if not path.is_dir():
        if not path.is_file():
            raise EncoderError(f"the weights file {str(path)!r} (pretrained) does not exist.")
        return path
    found = [path / name for name in _OF_A_FOLDER if (path / name).is_file()]
    if len(found) != 1:
        what = f"holds {' and '.join(file.name for file in found)}" if found else f"holds none of {a_few(_OF_A_FOLDER)}"
        raise EncoderError(f"the folder {str(path)!r} (pretrained) {what}: give the file itself as pretrained.")
    return found[0]


def _is_index(path: Path) -> bool:
    return path.name.endswith(_INDEX)


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of every tensor."""
    found = _read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise EncoderError(f"the index {index} has no weight_map of tensors and their files.")
    return found


def _shard(index: Path, name: str) -> Path:
    if PureWindowsPath(name).name != name:  # which knows the separators of all systems
        raise EncoderError(f"the index {index} names {name!r}, which is not a file of its own folder.")
    if not (index.parent / name).is_file():
        raise EncoderError(f"the shard {name!r} that the index {index} names is not beside it: get all of them.")
    return index.parent / name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path} cannot be read as JSON: {in_one_line(error)}.") from error
    if not isinstance(content, dict):
        raise EncoderError(f"{path} is not a JSON object.")
    return content


def _read(path: Path) -> Any:
    try:
        if path.suffix.lower() == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        return load_pickle(path)
    except ValueError as error:
        reason = str(error)
    except Exception as error:  # safetensors has its own for a damaged file
        reason = in_one_line(error)
    raise EncoderError(
        f"the weights file {path} cannot be read safely as tensors ({reason}). Save it as .safetensors, or as a "
        "state_dict with torch.save."
    )
