"""The paper's Table 1, and its ablations, on any data set that a run's YAML describes.

    python benchmarks/compare_methods.py --data examples/ddr.yaml --out runs/compare
    python benchmarks/compare_methods.py --data examples/ddr.yaml --out runs/prompts --ablation prompts

Every cell (method, learning rate, weight decay, seed) is one ``fpt-lightning fit``, on one device, with the files of
any run, in ``{out}/cells``. Finished cells are never run again and interrupted ones go on, so the same command
continues a comparison. ``{out}/result.json`` and ``{out}/table.md`` are written anew after each cell.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cells import Cell
from environment import environment, write_result
from fpt_lightning.data.manifest import SPLITS
from fpt_lightning.errors import ConfigurationError, FPTError
from fpt_lightning.evaluation.metrics import performance_efficiency
from fpt_lightning.evaluation.resampling import interval, resample, resampled_auc
from fpt_lightning.methods import METHODS
from fpt_lightning.progress import significant
from variants import ABLATIONS, Setting, Variant, ablation_variants, method_variants, published, read_setting


class Comparison:
    """All cells of a comparison, and what they come to.

    Args:
        setting: see ``read_setting``.
        variants: the rows.
        out: folder of the cells, the result and the table.
        seeds: of each row, counted from 0.
        grid: pairs of learning rate and weight decay; of several, seed 0 decides by validation AUC.
        rates: learning rates of variants that are not searched, by name.
        reference: name of the variant that others are compared with.
        resamples: of the test cases.
        ablation: what the variants differ in, if they are one method.
        note: what a reader of the table should know besides.
    """

    def __init__(
        self,
        setting: Setting,
        variants: Sequence[Variant],
        out: Path,
        seeds: int,
        grid: Sequence[tuple[float, float]],
        rates: Mapping[str, float],
        reference: str | None,
        resamples: int,
        ablation: str | None = None,
        note: str = "",
    ) -> None:
        self.setting, self.variants, self.out, self.seeds = setting, variants, out, seeds
        self.grid, self.rates, self.reference = grid, rates, reference
        self.ablation, self.note, self.environment = ablation, note, environment()
        test = setting.datamodule.read_manifest().split("test")
        self.ids = [sample.id for sample in test]
        self.labels = np.array([sample.label for sample in test])
        self.grouped = any(sample.group for sample in test)
        self.weights = resample([sample.group or sample.id for sample in test], resamples)
        self._resampled: dict[str, NDArray[np.float64]] = {}

    def pairs(self, variant: Variant) -> list[tuple[float, float]]:
        """Learning rates and weight decays that are tried."""
        if variant.name in self.rates:
            return [(self.rates[variant.name], self.setting.default("weight_decay"))]
        return list(self.grid)

    def cell(self, variant: Variant, pair: tuple[float, float], seed: int) -> Cell:
        folder = self.out / "cells" / variant.name / f"lr{pair[0]:g}-wd{pair[1]:g}" / f"seed{seed}"
        config = {
            "seed_everything": seed,
            "trainer": {
                **self.setting.trainer,
                "devices": 1,
                "enable_progress_bar": False,
                "default_root_dir": str(folder),
            },
            "model": {
                "class_path": variant.class_path,
                "init_args": {**variant.arguments, "learning_rate": pair[0], "weight_decay": pair[1]},
            },
            "data": variant.data,
        }
        return Cell(folder, config, variant.preloads)

    def chosen(self, variant: Variant) -> tuple[float, float] | None:
        """The pair of the best validation AUC with seed 0, of equal ones the first; None while one is missing."""
        pairs = self.pairs(variant)
        if len(pairs) == 1:
            return pairs[0]
        cells = {pair: self.cell(variant, pair, 0) for pair in pairs}
        if not all(cell.finished for cell in cells.values()):
            return None
        return max(pairs, key=lambda pair: float(cells[pair].result()["val_auc"]))

    def run(self, keep_checkpoints: bool = False) -> None:
        """Run every cell that is not finished, and write the table after each.

        Raises:
            ConfigurationError: a cell was run with another configuration.
        """
        for variant in self.variants:
            for pair, seed in product(self.pairs(variant), range(self.seeds)):
                self.cell(variant, pair, seed).check()
        for variant in self.variants:
            if len(self.pairs(variant)) > 1:
                self._run([self.cell(variant, pair, 0) for pair in self.pairs(variant)], keep_checkpoints)
            best = self.chosen(variant)
            assert best is not None
            self._run([self.cell(variant, best, seed) for seed in range(self.seeds)], keep_checkpoints)
        self.write()

    def _run(self, cells: Sequence[Cell], keep_checkpoints: bool) -> None:
        for cell in cells:
            news = not cell.finished
            if news:
                print(f"running {cell.folder}", flush=True)
            cell.run(keep_checkpoints)
            if news:
                self.write()

    def write(self) -> None:
        """Write ``result.json``, ``table.md`` and the ablation's plot of the cells that are finished."""
        result = self.result()
        if not result["variants"]:  # a search has only begun
            return
        (self.out / "result.json").write_text(json.dumps({**self.environment, **result}, indent=2) + "\n")
        (self.out / "table.md").write_text(self.table(result["variants"]), encoding="utf-8")
        if self.ablation is not None:
            draw(self.out / f"{self.ablation}.png", self.ablation, result["variants"])

    # Results

    def result(self) -> dict[str, Any]:
        """What the comparison is of, and the numbers of every variant with a finished cell, by name."""
        rows = {variant.name: row for variant in self.variants if (row := self._row(variant)) is not None}
        for name, row in rows.items():
            self._relate(name, row, rows)
        return {
            "encoder": self.setting.arguments["encoder"],
            "pretrained": self.setting.arguments.get("pretrained", True),
            "resolution": list(self.setting.datamodule.resolution),
            "images": self._images(),
            "epochs": self.setting.trainer["max_epochs"],
            "batch_size": self.setting.datamodule.batch_size,
            "seeds": self.seeds,
            "resamples": len(self.weights),
            "reference": self.reference,
            "note": self.note,
            "variants": rows,
        }

    def _row(self, variant: Variant) -> dict[str, Any] | None:
        pair = self.chosen(variant)
        cells = [] if pair is None else [self.cell(variant, pair, seed) for seed in range(self.seeds)]
        cells = [cell for cell in cells if cell.finished]
        if pair is None or not cells:
            return None
        if len(cells) == self.seeds and variant.name not in self._resampled:
            self._resampled[variant.name] = self._resample(cells)
        runs = [cell.result() for cell in cells]
        return {
            "label": variant.label,
            "method": variant.class_path,
            "learnable_parameters": variant.module.learnable_parameters,
            "learnable_ratio": variant.module.learnable_ratio,
            "learning_rate": pair[0],
            "weight_decay": pair[1],
            "search": [
                {"learning_rate": p[0], "weight_decay": p[1], "val_auc": self.cell(variant, p, 0).result()["val_auc"]}
                for p in self.pairs(variant)
                if len(self.pairs(variant)) > 1
            ],
            "runs": runs,
            "test_auc": {which: _spread([run[which] for run in runs]) for which in ("best", "last")},
            "memory_mib": {kind: max(run["memory_mib"][kind] for run in runs) for kind in runs[0]["memory_mib"]},
            "epoch_seconds": mean(run["epoch_seconds"] for run in runs),
        }

    def _resample(self, cells: Sequence[Cell]) -> NDArray[np.float64]:
        """AUC of each resample (R,), mean over the seeds."""
        pieces = np.array_split(self.weights, max(1, self.weights.size // 10**7))  # a few hundred MB at once
        probabilities = [cell.predictions(self.ids) for cell in cells]
        aucs = [np.concatenate([resampled_auc(p, self.labels, piece) for piece in pieces]) for p in probabilities]
        averaged: NDArray[np.float64] = np.mean(aucs, 0)
        return averaged

    def _relate(self, name: str, row: dict[str, Any], rows: Mapping[str, Any]) -> None:
        """Add what needs other rows: the difference to the reference, PPE and PME (from the AUC in percent)."""
        score = 100 * row["test_auc"]["best"]["mean"]
        row["ppe"], row["pme"], row["difference"] = performance_efficiency(score, row["learnable_ratio"]), None, None
        if "full" in rows:
            ratio = _first(row["memory_mib"]) / _first(rows["full"]["memory_mib"])
            row["pme"] = performance_efficiency(score, ratio)
        both = {name, self.reference} <= set(self._resampled)
        if both and self.reference is not None and name != self.reference:
            reference = rows[self.reference]["test_auc"]["best"]["mean"]
            differences = self._resampled[name] - self._resampled[self.reference]
            row["difference"] = {"mean": row["test_auc"]["best"]["mean"] - reference, **interval(differences)}

    def _images(self) -> dict[str, int]:
        manifest = self.setting.datamodule.read_manifest()
        return {split: len(manifest.split(split)) for split in SPLITS}

    # The table

    def table(self, rows: Mapping[str, Any]) -> str:
        """Markdown: what was compared, the paper's Table 1, and what a search chose."""
        kinds = " / ".join({"live": "live tensors"}.get(kind, kind) for kind in _kinds(rows))
        labels = {variant.name: variant.label for variant in self.variants if not self.ablation}
        reference = labels.get(str(self.reference), self.reference or "a reference")
        lines = [
            self._introduction(),
            "",
            f"| {self.ablation or 'Method'} | Learnable, % | Peak memory, MiB ({kinds}) | Test AUC, best epoch | "
            f"Last epoch | Difference to {reference} [95% CI], p | PPE | PME | s/epoch |",
            "|---|" + "---:|" * 8,
            *(self._line(name, row) for name, row in rows.items()),
        ]
        used = {row["label"]: f"{row['learning_rate']:g} and {row['weight_decay']:g}" for row in rows.values()}
        same = len(set(used.values())) == 1
        each = next(iter(used.values())) if same else "; ".join(f"{label} {pair}" for label, pair in used.items())
        why = f" (best validation AUC with seed 0 among {len(self.grid)} pairs)" if len(self.grid) > 1 else ""
        lines += ["", f"Learning rate and weight decay{why}: {each}."]
        return "\n".join(lines) + "\n"

    def _introduction(self) -> str:
        setting, machine = self.setting, self.environment["machine"]
        pretrained = setting.arguments.get("pretrained", True)
        weights = {True: "published weights", False: "untrained"}.get(pretrained, f"weights of {pretrained}")
        images = ", ".join(f"{count} {split}" for split, count in self._images().items())
        text = (
            f"{setting.arguments['encoder']} ({weights}) at {' x '.join(map(str, setting.datamodule.resolution))} "
            f"pixels; images: {images}; {setting.trainer['max_epochs']} epochs in batches of "
            f"{setting.datamodule.batch_size}; {self.seeds} seeds; {machine['gpu'] or machine['processor']}, "
            f"{machine['threads']} CPU threads. Test AUC is macro one-vs-rest, x 100, mean ± standard deviation over "
            "the seeds, of the epoch with the best validation AUC and of the last. The difference is of the best "
            f"epochs, over {len(self.weights)} paired resamples of the test {'groups' if self.grouped else 'images'}. "
            "Peak memory is that of training, seconds those of an epoch's training steps, data included. PPE and PME "
            "weigh the AUC by the share of learnable parameters and by memory relative to full fine-tuning (paper, "
            "equations 9 and 10)."
        )
        if pretrained is False:
            text += (
                "\n\n**The encoder is untrained: this compares cost, and shows that the comparison runs; it says "
                "nothing about which method transfers better.**"
            )
        return f"{text}\n\n{self.note}" if self.note else text

    def _line(self, name: str, row: Mapping[str, Any]) -> str:
        label, done, difference = row["label"], len(row["runs"]), row["difference"]
        compared = "reference" if name == self.reference else "-"
        if difference is not None:
            bounds = f"[{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}]"
            compared = f"{100 * difference['mean']:+.2f} {bounds}, {difference['p']:.4f}"
        cells = [
            label if done == self.seeds else f"{label} ({done} of {self.seeds} seeds)",
            f"{100 * row['learnable_ratio']:.2f}",
            " / ".join(f"{value:,.{int(value < 100)}f}" for value in row["memory_mib"].values()),
            *(
                f"{100 * auc['mean']:.2f}" + ("" if auc["std"] is None else f" ± {100 * auc['std']:.2f}")
                for auc in row["test_auc"].values()
            ),
            compared,
            f"{row['ppe']:.2f}",
            "-" if row["pme"] is None else f"{row['pme']:.2f}",
            significant(row["epoch_seconds"], 3),
        ]
        return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}


def _first(memory: Mapping[str, float]) -> float:
    """Live bytes on the CPU, allocated ones on CUDA."""
    return next(iter(memory.values()))


def _kinds(rows: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(kind for row in rows.values() for kind in row["memory_mib"]))


def draw(path: Path, ablation: str, rows: Mapping[str, Any]) -> None:
    """Plot AUC (mean and standard deviation over the seeds) and peak memory of each value."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    places, labels = range(len(rows)), [row["label"] for row in rows.values()]
    aucs = [row["test_auc"]["best"] for row in rows.values()]
    errors = [100 * (auc["std"] or 0) for auc in aucs]
    axes.errorbar(places, [100 * auc["mean"] for auc in aucs], errors, marker="o", capsize=3, color="tab:blue")
    axes.set_ylabel("test AUC, %", color="tab:blue")
    words = ablation == "components"
    axes.set_xticks(places, labels, rotation=30 if words else 0, ha="right" if words else "center")
    axes.set_xlabel(ablation)
    memory = axes.twinx()
    memory.plot(places, [_first(row["memory_mib"]) for row in rows.values()], "s--", color="tab:orange")
    memory.set_ylabel(f"peak training memory, MiB ({next(iter(_kinds(rows)), '')})", color="tab:orange")
    memory.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)


# The command line


def _rate(text: str) -> tuple[str, float]:
    name, _, rate = text.partition("=")
    return name, float(rate)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="YAML of a run: its data, and what all methods share of its model")
    add("--out", type=Path, required=True, help="folder of the cells, the result and the table")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="all by default")
    what.add_argument("--ablation", choices=ABLATIONS, help="vary FPT+ in place of the method")
    add("--seeds", type=int, default=5, help="runs of each row")
    add("--epochs", type=int, help="in place of the YAML's (20 where it has none)")
    add("--learning-rates", type=float, nargs="+", help="searched with seed 0; the YAML's by default")
    add("--weight-decays", type=float, nargs="+", help="searched with seed 0; the YAML's by default")
    add("--rate", type=_rate, action="append", default=[], metavar="METHOD=RATE", help="fixed, not searched")
    add("--encoder", help="in place of the YAML's")
    add("--reference", help="row that others are compared with; FPT+ by default")
    add("--bootstrap", type=int, default=2000, help="resamples of the test cases")
    add("--keep-checkpoints", action="store_true", help="of finished cells")
    add("--name", help="write benchmarks/results/NAME.json and .md too")
    add("--note", default="", help="what a reader of the table should know besides, such as what else the machine did")
    args = parser.parse_args(arguments)
    try:
        setting = read_setting(args.data, args.epochs, args.encoder)
        rates = args.learning_rates or [setting.default("learning_rate")]
        decays = args.weight_decays or [setting.default("weight_decay")]
        variants = (
            ablation_variants(setting, args.ablation) if args.ablation else method_variants(setting, args.methods)
        )
        names = [variant.name for variant in variants]
        default = published(setting, args.ablation) if args.ablation else "fpt_plus"
        for name in [*dict(args.rate), *([args.reference] if args.reference else [])]:
            if name not in names:
                raise ConfigurationError(f"{name!r} is not compared here: choose of {', '.join(names)}.")
        reference = args.reference or (default if default in names else None)
        grid = list(product(rates, decays))
        comparison = Comparison(
            setting,
            variants,
            args.out,
            args.seeds,
            grid,
            dict(args.rate),
            reference,
            args.bootstrap,
            args.ablation,
            args.note,
        )
        comparison.run(args.keep_checkpoints)
    except FPTError as error:
        raise SystemExit(f"compare_methods: {type(error).__name__}: {error}") from None
    if args.name:
        result = comparison.result()
        path = write_result(args.name, result)
        path.with_suffix(".md").write_text(comparison.table(result["variants"]), encoding="utf-8")
    print((args.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
