"""What an audit finds in data sets as they are, and how many labels it finds that were exchanged on purpose.

    python benchmarks/audit.py chest.yaml fundus.yaml   # configurations whose stores are there; a minute each

Of the exchanged labels each is another one of the data set's, drawn at random. Counted is how many of the first images
in the list of likely wrong labels, as many as were exchanged, are such. Writes ``results/audit.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np

from environment import write_result
from fpt_lightning.audit.findings import FOLDS, NEIGHBOURS
from fpt_lightning.audit.labels import doubtful_labels
from fpt_lightning.audit.neighbours import directions, nearest
from fpt_lightning.audit.writer import audit_store
from fpt_lightning.data.splits import deal_folds
from fpt_lightning.datamodules.preloaded import PreloadedFeatureDataModule
from fpt_lightning.methods import METHODS
from variants import read_setting


def exchanged(data: PreloadedFeatureDataModule, ordered: bool, share: float) -> dict[str, int]:
    """How many labels were exchanged, how long the list is, and how many of as many first ones are such."""
    manifest, store = data.labelled, data.store
    assert store is not None
    rng, samples = np.random.default_rng(0), list(manifest.samples)
    chosen = rng.choice(len(samples), round(share * len(samples)), replace=False)
    for row in chosen:
        others = [label for label in range(len(manifest.classes)) if label != samples[row].label]
        samples[row] = replace(samples[row], label=int(rng.choice(others)))
    pooled = np.array(store.read([store.rows[sample.id] for sample in samples], "pooled"))
    groups = np.unique([sample.group or sample.id for sample in samples], return_inverse=True)[1].astype(np.int64)
    folds = np.array(deal_folds(samples, FOLDS, 0, manifest.kind))
    near = nearest(directions(pooled), NEIGHBOURS, groups).rows
    doubts = doubtful_labels(samples, manifest.kind, manifest.classes, ordered, pooled, near, folds)
    first = [doubt.row for doubt in doubts[: len(chosen)]]
    return {"exchanged": len(chosen), "listed": len(doubts), "first": len(first), "found": len({*first} & {*chosen})}


def audited(path: Path, share: float) -> dict[str, Any]:
    """One data set."""
    setting = read_setting(path)
    method = next(kind for kind in METHODS.values() if kind.__name__ == setting.method)
    model, data = method(**setting.arguments_of(method)), cast(PreloadedFeatureDataModule, setting.datamodule)
    with TemporaryDirectory() as folder:
        found = audit_store(data, model, Path(folder) / "audit")
    return {
        "data": found.manifest.root.name,
        "basis": found.basis(),
        "near_duplicates": len(found.pairs),
        "leaks": found.leaks,
        "doubtful_labels": len(found.doubts),
        "outliers": len(found.outliers),
        "verdict": found.verdict(),
        "exchanged_labels": exchanged(data, model.task.ORDERED, share),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("configurations", type=Path, nargs="+", help="YAML files of runs")
    parser.add_argument("--share", type=float, default=0.05, help="of the labels that are exchanged")
    args = parser.parse_args(arguments)
    found = [audited(path, args.share) for path in args.configurations]
    print(f"results are in {write_result('audit', {'share': args.share, 'data_sets': found})}")


if __name__ == "__main__":
    main()
