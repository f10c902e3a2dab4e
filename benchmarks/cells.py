"""The cells of a comparison: each a run of the command line, and what is read from the files that it leaves."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from fpt_lightning import cli
from fpt_lightning.cli.run_folder import is_finished, logged
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.evaluation.predictions import Predictions


@dataclass(frozen=True)
class Cell:
    """One run of the command line.

    Attributes:
        folder: of the run.
        config: what ``fit`` is given.
        preloads: whether it needs a store.
    """

    folder: Path
    config: dict[str, Any]
    preloads: bool

    def at(self, folder: Path) -> Cell:
        """The same run in another folder."""
        trainer = {**self.config["trainer"], "default_root_dir": str(folder)}
        return replace(self, folder=folder, config={**self.config, "trainer": trainer})

    @property
    def finished(self) -> bool:
        return is_finished(self.folder)

    def check(self) -> None:
        """Refuse what another configuration left in the folder.

        Raises:
            ConfigurationError: naming the folder and what differs.
        """
        if not self.finished and not (self.folder / "last.ckpt").is_file():
            return
        there, here = flat(yaml.safe_load((self.folder / "cell.yaml").read_text())), flat(self.config)
        there["trainer.default_root_dir"] = here["trainer.default_root_dir"]  # the folder may have been moved
        differences = [
            f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
            for key in sorted({*there, *here})
            if there.get(key) != here.get(key)
        ]
        if differences:
            raise ConfigurationError(
                f"{self.folder} holds a run with another configuration: give another --out, or remove the folder.\n  "
                + "\n  ".join(differences)
            )

    def run(self, keep_checkpoints: bool = False) -> None:
        """Run it, go on with it, or leave it be if it is finished."""
        if not self.finished:
            path, last = self.folder / "cell.yaml", self.folder / "last.ckpt"
            if not last.is_file():
                if self.folder.exists():
                    shutil.rmtree(self.folder)
                self.folder.mkdir(parents=True)
                path.write_text(yaml.safe_dump(self.config, sort_keys=False))
            if self.preloads:  # apart from fit, so that the encoder's memory is not in what fit measures
                cli.main(["preload", "--config", str(path)])
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            cli.main(["fit", "--config", str(path), *(["--ckpt_path", str(last)] if last.is_file() else [])])
        if not keep_checkpoints:
            for checkpoint in self.folder.glob("*.ckpt"):
                checkpoint.unlink()

    def result(self) -> dict[str, Any]:
        """Test AUC of the best and the last epoch, best validation AUC, seconds of an epoch, peak memory in MiB."""
        tested = json.loads((self.folder / "metrics.json").read_text())
        memory = {
            kind: round(max(values), 2)
            for kind in ("live", "allocated", "reserved")
            if (values := self.logged(f"train_peak_{kind}_mib"))
        }
        return {
            "seed": self.config["seed_everything"],
            "best": tested["best"]["test_auc"],
            "last": tested["last"]["test_auc"],
            "val_auc": max(self.logged("val_auc")),
            "epoch_seconds": round(median(self.logged("epoch_seconds")), 3),
            "memory_mib": memory,
        }

    def predictions(self, ids: Sequence[str]) -> NDArray[np.float64]:
        """Probabilities (N, C) of the best epoch for the test images ``ids``."""
        found = Predictions.read(self.folder / "predictions.csv")
        place = {id: row for row, id in enumerate(found.ids)}
        return found.scores[[place[id] for id in ids]]

    def logged(self, name: str) -> list[float]:
        """A metric of every epoch that has it."""
        return logged(self.folder, name)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return found
