"""The quickstart over several seeds: FPT+ against the same side network without stored tokens.

Writes ``results/quickstart.json``: test AUC of the best and the last epoch for each seed, and seconds of each part.
Run from the repository's root: ``python benchmarks/quickstart.py``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import yaml

from components import SideNetworkAlone
from environment import write_result
from fpt_lightning import FPTPlusModule
from fpt_lightning.cli.run_folder import BestCheckpoint
from fpt_lightning.datamodules.synthetic import SyntheticFundusDataModule, write_fundus_images

CONFIG = Path(__file__).parent.parent / "examples" / "quickstart.yaml"


def train(method: type[FPTPlusModule], config: dict[str, Any], data: dict[str, Any], seed: int) -> dict[str, float]:
    """Test AUC of the best and last epoch, and seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        L.seed_everything(seed)
        module = method(**config["model"]["init_args"])
        best = BestCheckpoint(folder, "best", monitor="val_auc", mode="max", save_weights_only=True)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=config["trainer"]["max_epochs"],
            gradient_clip_val=1.0,
            logger=False,
            callbacks=[best],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        datamodule = SyntheticFundusDataModule(**data)
        start = time.perf_counter()
        trainer.fit(module, datamodule)
        seconds = time.perf_counter() - start
        last = trainer.test(module, datamodule, verbose=False)[0]["test_auc"]
        kept = trainer.test(module, datamodule, ckpt_path=best.best_model_path, verbose=False)[0]["test_auc"]
    return {"seed": seed, "best": round(kept, 4), "last": round(last, 4), "fit_seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    config = yaml.safe_load(CONFIG.read_text())
    with tempfile.TemporaryDirectory() as folder:
        data = {**config["data"]["init_args"], "root": f"{folder}/images", "store": f"{folder}/features.zarr"}
        start = time.perf_counter()
        write_fundus_images(data["root"], data["count"], size=data["size"])
        drawn = time.perf_counter()
        SyntheticFundusDataModule(**data).preload(FPTPlusModule(**config["model"]["init_args"]))
        preloaded = time.perf_counter()
        results = {
            name: [train(method, config, data, seed) for seed in range(seeds)]
            for name, method in (("fpt_plus", FPTPlusModule), ("side_network_alone", SideNetworkAlone))
        }
        store_bytes = sum(path.stat().st_size for path in Path(data["store"]).rglob("*") if path.is_file())
    path = write_result(
        "quickstart",
        {
            "images": data["count"],
            "drawing_seconds": round(drawn - start, 1),
            "preload_seconds": round(preloaded - drawn, 1),
            "store_bytes": store_bytes,
            "test_auc": results,
            "mean_test_auc": {
                name: {which: round(mean(run[which] for run in runs), 4) for which in ("best", "last")}
                for name, runs in results.items()
            },
        },
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
