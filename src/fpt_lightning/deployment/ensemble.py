"""Checkpoints of trained models put together as one, which predicts the mean of their scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fpt_lightning.deployment.checkpoints import read_checkpoint
from fpt_lightning.errors import CheckpointError
from fpt_lightning.evaluation.cases import Rule
from fpt_lightning.evaluation.conformal import Nonconformity
from fpt_lightning.files import write_pickle
from fpt_lightning.methods.ensemble import EnsembleModule

_OF_LIGHTNING = ("epoch", "global_step", "pytorch-lightning_version")


def write_ensemble(
    paths: Sequence[str | Path],
    out: str | Path,
    thresholds: Mapping[str, float],
    nonconformity: Nonconformity | None = None,
    case_rule: Rule | None = None,
    case_thresholds: Mapping[str, float] | None = None,
) -> None:
    """Write the checkpoint of an ensemble, whole or not at all; it is used as that of any other model.

    Args:
        paths: of the members' checkpoints: one method on a frozen encoder's features, trained with the same arguments
            on images of the same kind.
        out: of the ensemble's.
        thresholds: by class, which the ensemble decides by, such as those fitted to out-of-fold predictions.
        nonconformity: of such predictions (``fpt_lightning.evaluation.conformal.fit_nonconformity``); without, it has
            no prediction sets.
        case_rule: by which the ensemble's predictions of cases come of their images'.
        case_thresholds: by class, which it decides for cases by.

    Raises:
        CheckpointError: no such checkpoint, or members that do not belong together, naming them.
        OutputError: a place that cannot be written.
    """
    names = [str(path) for path in paths]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise CheckpointError(f"the checkpoint {twice[0]} is given more than once: a member has one voice.")
    members = {name: read_checkpoint(name) for name in names}
    ensemble = EnsembleModule.of(members, thresholds, nonconformity)
    ensemble.case_rule, ensemble.case_thresholds = case_rule, dict(case_thresholds or {})
    first = next(iter(members.values()))
    checkpoint: dict[str, Any] = {name: first[name] for name in _OF_LIGHTNING if name in first}
    checkpoint |= {"state_dict": ensemble.state_dict(), "hyper_parameters": dict(ensemble.hparams)}
    ensemble.on_save_checkpoint(checkpoint)
    write_pickle(Path(out), checkpoint)
