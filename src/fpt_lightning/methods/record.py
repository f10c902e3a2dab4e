"""This package's part of a checkpoint, perhaps a stranger's: what it may hold, checked before anything is built."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fpt_lightning.errors import CheckpointError, FPTError, NonFiniteError, a_few
from fpt_lightning.evaluation.calibration import Calibration
from fpt_lightning.evaluation.cases import RULES, Rule
from fpt_lightning.evaluation.conformal import Nonconformity
from fpt_lightning.store.specification import FeatureSpecification

KEY = "fpt_lightning"
"""Of this package's part of a checkpoint."""


@dataclass(frozen=True)
class TrainingRecord:
    """What a checkpoint keeps of a training, beside the weights.

    Attributes:
        method: name of the class.
        classes: in the order of the outputs; empty for a model that never met a data module of this package.
        specification: of the features trained on, which says what images must be; None likewise.
        seed: of the run; None where there was none.
        split: digest of the split trained on, where it was drawn.
        seen: digests (N,) of the training and of the validation images and groups, int64.
        thresholds: by class, fitted to the validation images.
        calibration: fitted likewise.
        case_rule: by which the predictions of cases come of their images', chosen on validation; None without cases.
        case_thresholds: by class, fitted to the validation cases.
        nonconformity: of the validation images, from which prediction sets come
            (``fpt_lightning.evaluation.conformal``).
    """

    method: str
    classes: tuple[str, ...] = ()
    specification: FeatureSpecification | None = None
    seed: int | None = None
    split: str = ""
    seen: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    case_rule: Rule | None = None
    case_thresholds: dict[str, float] = field(default_factory=dict)
    nonconformity: Nonconformity = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        specification = None if self.specification is None else self.specification.to_dict()
        return {**asdict(self), "classes": list(self.classes), "specification": specification}

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> TrainingRecord:
        """What a checkpoint holds; an argument that an earlier version named otherwise gets its present name there.

        Raises:
            CheckpointError: it is not of this package, or holds what no training writes, naming it.
            NonFiniteError: weights of a training that diverged.
        """
        about = checkpoint.get(KEY)
        if not isinstance(about, dict):
            raise CheckpointError("the checkpoint was not written by a method of fpt-lightning.")
        arguments, tensors = checkpoint.get("hyper_parameters"), checkpoint.get("state_dict")
        if not isinstance(arguments, dict) or not isinstance(tensors, dict):
            raise _damaged("it has no hyper_parameters, or no state_dict.")
        about = _by_present_names(about, arguments)
        for name, value in tensors.items():
            if not isinstance(value, Tensor) or value.is_sparse or value.is_complex():
                raise _damaged(f"{name} of its state_dict is {type(value).__name__}, no plain tensor.")
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise NonFiniteError(
                    f"the checkpoint's {name} is not finite: its training diverged, or the file is damaged. Use an "
                    "earlier checkpoint."
                )
        _check(about)
        content = about["specification"]
        try:
            specification = None if content is None else FeatureSpecification.from_dict(content)
        except (FPTError, TypeError, AttributeError) as error:
            raise _damaged(str(error)) from error
        given = {name: about[name] for name in _SOUND if name in about}
        given |= {"classes": tuple(about["classes"]), "calibration": calibration_of(about["calibration"])}
        return cls(**given, specification=specification)


def _by_present_names(about: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds; its arguments are changed in place."""
    if isinstance(arguments.get("test_time_mirroring"), bool):
        arguments["test_time_orientations"] = 1 + arguments.pop("test_time_mirroring")
    if "temperature_scaling" in arguments:
        arguments["calibrate"] = arguments.pop("temperature_scaling")
    if isinstance(arguments.get("temperatures"), list):
        arguments["calibrations"] = [_of_temperature(each) for each in arguments.pop("temperatures")]
    return {"calibration": _of_temperature(about["temperature"]), **about} if "temperature" in about else about


def _of_temperature(temperature: Any) -> dict[str, Any]:
    return {"temperature": temperature, "biases": []}


def calibration_of(given: Any) -> Calibration | None:
    """The calibration that plain values hold; None where it is none."""
    if not isinstance(given, Mapping) or given.keys() != {"temperature", "biases"}:
        return None
    temperature, biases = given["temperature"], given["biases"]
    if not _is_number(temperature) or temperature <= 0:
        return None
    if not isinstance(biases, list | tuple) or not all(map(_is_number, biases)):
        return None
    return Calibration(temperature, tuple(biases))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_nonconformity(given: Any) -> bool:
    """Whether it is ascending scores from 0 on, and as many shares in (0, 1]."""
    if not isinstance(given, list) or [type(each) for each in given] != [list, list] or len(given[0]) != len(given[1]):
        return False
    scores, shares = given
    if not all(map(_is_number, (*scores, *shares))):
        return False
    return all(low <= high for low, high in pairwise([0, *scores])) and all(0 < share <= 1 for share in shares)


_SOUND: dict[str, Callable[[Any], bool]] = {
    "method": lambda method: isinstance(method, str),
    "classes": lambda names: (
        isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    ),
    "seed": lambda seed: seed is None or (type(seed) is int and 0 <= seed < 2**32),
    "split": lambda digest: isinstance(digest, str),
    "seen": lambda seen: (
        isinstance(seen, dict)
        and all(isinstance(t, Tensor) and t.dtype == torch.int64 and t.ndim == 1 for t in seen.values())
    ),
    "thresholds": lambda by_class: isinstance(by_class, dict) and all(map(_is_number, by_class.values())),
    "calibration": lambda given: calibration_of(given) is not None,
    "case_rule": lambda rule: rule in (None, *RULES),
    "case_thresholds": lambda by_class: isinstance(by_class, dict) and all(map(_is_number, by_class.values())),
    "nonconformity": lambda by_label: isinstance(by_label, dict) and all(map(_is_nonconformity, by_label.values())),
}
"""What each of a record's values must be."""
_LATER = ("seen", "case_rule", "case_thresholds", "nonconformity")  # than the first checkpoints


def _check(about: Mapping[str, Any]) -> None:
    missing = [name for name in ("specification", *_SOUND) if name not in about and name not in _LATER]
    if missing:
        raise _damaged(f"it has no {missing[0]}.")
    for name, is_sound in _SOUND.items():
        if name in about and not is_sound(about[name]):
            raise _damaged(f"its {name} is {about[name]!r:.80}.")
    for name in ("thresholds", "case_thresholds"):
        own = about.get(name, {})
        if about["classes"] and not own.keys() <= set(about["classes"]):
            raise _damaged(f"its {name} are of {a_few(sorted(map(str, own)))}, no classes of its own.")


_RESUMED: dict[str, Callable[[Any], bool]] = {
    "optimizer_states": lambda states: (
        isinstance(states, list)
        and len(states) == 1
        and isinstance(states[0], dict)
        and states[0].keys() == {"state", "param_groups"}
    ),
    "lr_schedulers": lambda states: isinstance(states, list) and len(states) == 1 and isinstance(states[0], dict),
    "loops": lambda loops: isinstance(loops, dict) and isinstance(loops.get("fit_loop"), dict),
    "callbacks": lambda states: isinstance(states, dict),
    "epoch": lambda epoch: type(epoch) is int and epoch >= 0,
    "global_step": lambda step: type(step) is int and step >= 0,
}
"""What Lightning restores of a training that goes on, and what each part must be at least: it passes over others."""


def check_resumable(checkpoint: Mapping[str, Any]) -> None:
    """Hold a checkpoint against what a training needs to go on.

    Raises:
        CheckpointError: it holds weights alone, or a part that is not what Lightning writes.
    """
    if "optimizer_states" not in checkpoint:
        raise CheckpointError("best.ckpt holds weights alone: training goes on by the run's last.ckpt.")
    for name, is_sound in _RESUMED.items():
        if not is_sound(checkpoint.get(name)):
            raise _damaged(f"{name} is not that of a training.")


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_tensors(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Hold the tensors of a checkpoint against those of the model that takes them.

    Args:
        saved: by name.
        own: likewise; they may be on the meta device.

    Raises:
        CheckpointError: other names or shapes.
    """
    if names := sorted(saved.keys() ^ own.keys()):
        raise CheckpointError(f"the checkpoint does not hold what learns here: they differ in {a_few(names, 3)}.")
    for name, value in saved.items():
        if value.shape != own[name].shape:
            raise CheckpointError(
                f"the checkpoint's {name} is {tuple(value.shape)}, this model's is {tuple(own[name].shape)}: it is "
                "damaged, or of other settings."
            )


def _damaged(why: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint is damaged, or of another version: {why}")
