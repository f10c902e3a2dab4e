"""What the finished cells of a comparison came to, in one small file: enough to make its tables again without a run.

The file names neither images nor labels: it holds test scores by row of the manifest in ascending order of ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from cells import Cell, flat
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.files import write_text
from fpt_lightning.methods.record import calibration_of

PLACES = ("root", "manifest", "store", "pretrained", "default_root_dir")
"""Settings that say where something lies, not what is run."""


@dataclass(frozen=True)
class Record:
    """A finished cell.

    Attributes:
        config: digest of its settings, places left out.
        learning_rate: it was trained with.
        weight_decay: it was trained with.
        validation: the best of all epochs.
        epoch_seconds: median.
        memory_mib: peak of live tensors, or of allocated ones on CUDA.
        stored_bytes: of an image in its store; 0 without one.
        test: rows of the manifest and their scores; empty of cells that no table needs.
        calibration: by which the scores were calibrated; None where they were not.
    """

    config: str
    learning_rate: float
    weight_decay: float
    validation: float
    epoch_seconds: float
    memory_mib: float
    stored_bytes: int
    test: Mapping[str, Sequence[float]]
    calibration: Mapping[str, Any] | None = None

    def uncalibrated(self) -> Record:
        """With scores as the model had them."""
        if self.calibration is None:
            return self
        found, calibration = np.array([*self.test.values()]), calibration_of(self.calibration)
        assert calibration is not None
        biases = np.array(calibration.biases or (0.0,))
        raw = softmax((np.log(found.clip(min=np.finfo(float).tiny)) - biases) * calibration.temperature, axis=1)
        return replace(self, test=dict(zip(self.test, raw.tolist(), strict=True)), calibration=None)


def record(cell: Cell, monitor: str, rows: Mapping[str, int], stored_bytes: int) -> Record:
    """Of a finished cell.

    Args:
        cell: it.
        monitor: the metric whose largest value counts.
        rows: of the manifest, by image.
        stored_bytes: of an image.
    """
    result, model = cell.result(), cell.config["model"]["init_args"]
    predictions = Predictions.read(cell.folder / "predictions.csv")
    scores = [[float(f"{score:.8g}") for score in each] for each in predictions.scores]
    calibrations = json.loads((cell.folder / "evaluation.json").read_text())["best"]["calibrations"]
    return Record(
        digest(cell),
        model["learning_rate"],
        model["weight_decay"],
        max(cell.logged(f"val_{monitor}")),
        result["epoch_seconds"],
        max(result["memory_mib"].values()),
        stored_bytes,
        {str(rows[id]): each for id, each in zip(predictions.ids, scores, strict=True)},
        calibrations[0] if calibrations else None,
    )


def digest(cell: Cell) -> str:
    """Of all settings but places."""
    settings = {key: value for key, value in flat(cell.config).items() if key.rsplit(".", 1)[-1] not in PLACES}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Records:
    """The records of a task and a method, by cell; one process at a time writes them.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path.is_file() else {}
        self._found = {key: Record(**each) for key, each in found.items()}

    def get(self, key: str, cell: Cell) -> Record | None:
        """That of a cell, or None.

        Raises:
            ConfigurationError: the cell that was recorded had other settings.
        """
        found = self._found.get(key)
        if found is not None and found.config != digest(cell):
            raise ConfigurationError(
                f"{self.path} has a record of {key} with other settings: give another --out, or remove the file"
            )
        return found

    def add(self, key: str, found: Record) -> Record:
        self._found[key] = found
        self._write()
        return found

    def forget_tests(self, prefix: str, but: tuple[str, ...]) -> None:
        """Drop the scores of the cells below ``prefix`` that no table needs: all but those below one of ``but``."""
        unused = [key for key in self._found if key.startswith(prefix) and not key.startswith(but)]
        if any(self._found[key].test for key in unused):
            self._found |= {key: replace(self._found[key], test={}) for key in unused}
            self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = (f"{json.dumps(key)}: {json.dumps(asdict(each))}" for key, each in sorted(self._found.items()))
        write_text(self.path, "{\n" + ",\n".join(lines) + "\n}\n")
