"""The paper's Table 1, and its ablations, on any data set that a run's YAML describes.

    python benchmarks/compare_methods.py --data examples/ddr.yaml --out runs/compare
    python benchmarks/compare_methods.py --data examples/ddr.yaml --out runs/prompts --ablation prompts

Every cell (method, learning rate, weight decay, seed) is one ``fpt-lightning fit``, on one device, with the files of
any run, in ``{out}/cells``. Finished cells are never run again and interrupted ones go on, so the same command
continues a comparison. ``{out}/result.json`` and ``{out}/table.md`` are written anew after each cell.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import inspect
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
import yaml
from components import MLPTransfer, SideNetworkAlone
from environment import environment, write_result
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fpt_lightning import cli, methods
from fpt_lightning.datamodules import STORED, ImageDataModule
from fpt_lightning.encoder import EncoderConfig
from fpt_lightning.errors import ConfigurationError, FPTError
from fpt_lightning.manifest import SPLITS
from fpt_lightning.methods import ClassificationModule, FPTPlusModule
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.tuning import EncoderModule
from fpt_lightning.metrics import performance_efficiency, resampled_auc

METHODS: dict[str, tuple[str, type[ClassificationModule]]] = {
    "full": ("Full fine-tuning", methods.FineTuningModule),
    "linear": ("Linear probing", methods.LinearProbingModule),
    "prompt": ("Prompt tuning", methods.PromptTuningModule),
    "attention": ("Attention tuning", methods.AttentionTuningModule),
    "adapter": ("Adapter", methods.AdapterModule),
    "bitfit": ("BitFit", methods.BitFitModule),
    "lora": ("LoRA", methods.LoRAModule),
    "adalora": ("AdaLoRA", methods.AdaLoRAModule),
    "fpt": ("FPT", methods.FPTModule),
    "fpt_plus": ("FPT+", methods.FPTPlusModule),
    "stored_linear": ("Linear probing, stored", methods.StoredLinearProbingModule),
    "attentive": ("Attentive probing, stored", methods.AttentiveProbingModule),
    "query_tokens": ("Query tokens, stored", methods.QueryTokensModule),
}
"""By short name, in the order of the paper's Table 1; then the peers on stored features."""

ABLATIONS: dict[str, tuple[Any, ...]] = {
    "prompts": (4, 8, 16, 32, 64, 128),  # Table 4
    "side_resolution": (64, 128, 256, 512),  # Table 3
    "token_ratio": (0.1, 0.2, 0.3, 0.5, 0.7, 0.9),  # Fig. 8
    "layers": (2, 4, 6, 8, 10, 12),  # Fig. 6, of 12 blocks
    "components": (),  # Fig. 7
}


# What is compared


@dataclass(frozen=True)
class Setting:
    """What a run's YAML says that all cells share.

    Attributes:
        method: the name of its model's class.
        arguments: of its model.
        trainer: its trainer's settings.
        data: its section ``data``.
        datamodule: made of that section.
        stored: what ``data.store`` holds: the encoder, its selection and the side of the low-resolution copies.
    """

    method: str
    arguments: dict[str, Any]
    trainer: dict[str, Any]
    data: dict[str, Any]
    datamodule: ImageDataModule
    stored: tuple[EncoderConfig, int]

    def arguments_of(self, method: type[ClassificationModule]) -> dict[str, Any]:
        """Those that all methods share, or all methods on features; all of them for the YAML's own method."""
        return _arguments_of(method, self.method, self.arguments)

    def default(self, name: str) -> float:
        """The YAML's learning rate or weight decay, or else that of every method."""
        return float(self.arguments.get(name, inspect.signature(ClassificationModule).parameters[name].default))


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        name: of its folder.
        label: for people.
        module: the method on the meta device, without weights.
        arguments: of the method, learning rate and weight decay apart.
        data: section of its cells.
    """

    name: str
    label: str
    module: ClassificationModule
    arguments: dict[str, Any]
    data: dict[str, Any]

    @property
    def class_path(self) -> str:
        return f"{type(self.module).__module__}.{type(self.module).__qualname__}"

    @property
    def preloads(self) -> bool:
        """Whether its cells need a store."""
        return "store" in self.data["init_args"] and bool(STORED & self.module.INPUTS)


def read_setting(path: Path, epochs: int | None = None, encoder: str | None = None) -> Setting:
    """Read a run's YAML.

    Args:
        path: of the file.
        epochs: in place of its own (20 where it has none).
        encoder: in place of its own.

    Raises:
        ConfigurationError: it is not there, or lacks ``model`` or ``data``.
        DataError: see ``fpt_lightning.manifest.read_manifest``.
    """
    content = yaml.safe_load(path.read_text()) if path.is_file() else None
    sections: dict[str, Any] = content if isinstance(content, dict) else {}
    missing = [name for name in ("model", "data") if not _is_class(sections.get(name))]
    if missing:
        raise ConfigurationError(
            f"{path} has no section {' and no section '.join(missing)} with a class_path: give the YAML of a run, such "
            "as examples/ddr.yaml."
        )
    model, data = sections["model"], {**sections["data"], "init_args": dict(sections["data"].get("init_args") or {})}
    module, _, name = data["class_path"].rpartition(".")
    datamodule = getattr(importlib.import_module(module or "fpt_lightning"), name)(**data["init_args"])
    manifest = datamodule.read_manifest()
    for split in ("val", "test"):
        if sum(count > 0 for count in manifest.class_counts(split)) < 2:
            raise ConfigurationError(f"the split {split} has images of fewer than 2 classes: there is no AUC.")
    trainer = {k: v for k, v in (sections.get("trainer") or {}).items() if k != "logger"}
    trainer["max_epochs"] = epochs or trainer.get("max_epochs", 20)
    name, arguments = model["class_path"].rpartition(".")[2], dict(model.get("init_args") or {})
    given = arguments.setdefault("encoder", inspect.signature(ClassificationModule).parameters["encoder"].default)
    if encoder not in (None, given):
        arguments["encoder"] = encoder
        if "store" in data["init_args"]:
            data["init_args"]["store"] = _beside(data["init_args"]["store"], [encoder])
    own = getattr(methods, name, FPTPlusModule)
    maker = own if issubclass(own, FeatureModule) else FPTPlusModule
    stored = _on_meta(maker, _arguments_of(maker, name, arguments), datamodule.resolution).encoder_config
    return Setting(name, arguments, trainer, data, datamodule, (stored, datamodule.image_size))


def _arguments_of(method: type[ClassificationModule], own: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    names = set(inspect.signature(ClassificationModule).parameters)
    if issubclass(method, FeatureModule):
        names |= set(inspect.signature(FeatureModule).parameters) - ({"layers"} if method.ALL_LAYERS else set())
    return {name: value for name, value in arguments.items() if name in names or method.__name__ == own}


def _is_class(section: Any) -> bool:
    return isinstance(section, dict) and isinstance(section.get("class_path"), str)


def _on_meta(
    method: type[ClassificationModule], arguments: Mapping[str, Any], resolution: tuple[int, int]
) -> ClassificationModule:
    """The method as it trains, without memory or weights."""
    with torch.device("meta"):
        module = method(**{**arguments, "pretrained": False})
        if isinstance(module, EncoderModule):
            module.build(resolution)
    return module


def make_variant(
    setting: Setting, name: str, label: str, method: type[ClassificationModule], live: bool = False, **changes: Any
) -> Variant:
    """A method with the setting's arguments and changes to them, and with the data that it needs.

    Args:
        setting: see ``read_setting``.
        name: of its folder.
        label: for people.
        method: its class; the components of FPT+ take the arguments of FPT+.
        live: whether the encoder runs in every step.
        **changes: of the arguments.

    Raises:
        ConfigurationError: values that cannot work.
    """
    own = FPTPlusModule if issubclass(method, SideNetworkAlone | MLPTransfer) else method
    arguments = {**setting.arguments_of(own), **changes}
    module = _on_meta(method, arguments, setting.datamodule.resolution)
    given = dict(setting.data["init_args"])
    size = max(setting.datamodule.image_size, module.side_resolution or 0)
    if size != setting.datamodule.image_size:
        given["image_size"] = size
    class_path = setting.data["class_path"]
    if live:
        class_path = f"{ImageDataModule.__module__}.{ImageDataModule.__qualname__}"
        given = {k: v for k, v in given.items() if k in inspect.signature(ImageDataModule).parameters}
    if "store" in given and isinstance(module, FeatureModule):
        given["store"] = _store(given["store"], setting.stored, (module.encoder_config, size))
    arguments = {k: v for k, v in arguments.items() if k not in ("learning_rate", "weight_decay")}
    return Variant(name, label, module, arguments, {"class_path": class_path, "init_args": given})


def _store(url: str, given: tuple[EncoderConfig, int], needed: tuple[EncoderConfig, int]) -> str:
    """The given store where it holds what is needed, or one beside it that is named by what differs."""
    (theirs, size), (ours, our_size) = given, needed
    layers = ours.tapped_layers
    differences = {
        f"layers{layers[0]}-{layers[-1]}": theirs.tapped_layers != layers,
        f"tokens{ours.token_ratio:g}": theirs.token_ratio != ours.token_ratio,
        f"image{our_size}": size != our_size,
    }
    return _beside(url, [name for name, differs in differences.items() if differs])


def _beside(url: str, names: Sequence[str]) -> str:
    return "-".join([url.removesuffix(".zarr"), *names]) + ".zarr" if names else url


def method_variants(setting: Setting, names: Sequence[str]) -> list[Variant]:
    """The methods named, in the order of ``METHODS``."""
    return [make_variant(setting, name, *METHODS[name]) for name in METHODS if name in names]


def ablation_variants(setting: Setting, ablation: str) -> list[Variant]:
    """FPT+ with one setting varied (or built up from its components); what cannot work is left out, and said."""
    variants = []
    for name, label, method, live, changes in _ablated(setting, ablation):
        try:
            if "side_resolution" in changes and len(set(setting.datamodule.resolution)) > 1 and live:
                raise ConfigurationError("the encoder's images are not square, as the side network's are.")
            if name == "preloading" and "store" not in setting.data["init_args"]:
                raise ConfigurationError("data has no store.")
            variants.append(make_variant(setting, f"{ablation}-{name}", label, method, live, **changes))
        except ConfigurationError as error:
            print(f"{ablation} {label} is left out: {error}")
    if not variants:
        raise ConfigurationError(f"no value of {ablation} works with {setting.arguments['encoder']}.")
    return variants


def _ablated(
    setting: Setting, ablation: str
) -> Iterator[tuple[str, str, type[ClassificationModule], bool, dict[str, Any]]]:
    """Name, label, method, whether live, and changes."""
    if ablation == "components":
        side = {"side_resolution": setting.datamodule.resolution[0]}
        every = {"token_ratio": 1.0}
        yield "side", "side network alone", SideNetworkAlone, True, side
        yield "mlp", "+ encoder through an MLP", MLPTransfer, True, {**side, **every}
        yield "fusion", "MLP → fusion modules", FPTPlusModule, True, {**side, **every}
        yield "asymmetric", "+ asymmetric input", FPTPlusModule, True, every
        yield "selection", "+ important tokens selection", FPTPlusModule, True, {}
        yield "preloading", "+ preloading", FPTPlusModule, False, {}
        return
    values, depth = ABLATIONS[ablation], EncoderConfig(setting.arguments["encoder"]).shape.depth
    if ablation == "layers":
        values = tuple(sorted({max(1, round(depth * value / 12)) for value in values}))
    for value in values:
        change = list(range(depth - value, depth)) if ablation == "layers" else value
        yield f"{value}", f"{value}", FPTPlusModule, False, {ablation: change}


def published(setting: Setting, ablation: str) -> str:
    """The name of the ablation's variant that is FPT+ as the YAML has it."""
    if ablation == "components":
        return "components-preloading"
    module = _on_meta(FPTPlusModule, setting.arguments_of(FPTPlusModule), setting.datamodule.resolution)
    layers = module.encoder_config.tapped_layers
    values = {
        "prompts": module.hparams["prompts"],
        "side_resolution": module.side_resolution,
        "token_ratio": module.encoder_config.token_ratio,
        "layers": len(layers) if layers[-1] == module.encoder_shape.depth - 1 else 0,
    }
    return f"{ablation}-{values[ablation]}"


# Cells


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

    @property
    def finished(self) -> bool:
        path = self.folder / "metrics.json"
        return path.is_file() and {"best", "last"} <= set(json.loads(path.read_text()))

    def check(self) -> None:
        """Refuse what another configuration left in the folder.

        Raises:
            ConfigurationError: naming the folder and what differs.
        """
        if not self.finished and not (self.folder / "last.ckpt").is_file():
            return
        there, here = _flat(yaml.safe_load((self.folder / "cell.yaml").read_text())), _flat(self.config)
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
            if (values := self._logged(f"train_peak_{kind}_mib"))
        }
        return {
            "seed": self.config["seed_everything"],
            "best": tested["best"]["test_auc"],
            "last": tested["last"]["test_auc"],
            "val_auc": max(self._logged("val_auc")),
            "epoch_seconds": round(median(self._logged("epoch_seconds")), 3),
            "memory_mib": memory,
        }

    def predictions(self, ids: Sequence[str]) -> NDArray[np.float64]:
        """Probabilities (N, C) of the best epoch for the test images ``ids``."""
        with (self.folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
            rows = {row[0]: [float(p) for p in row[2:]] for row in list(csv.reader(file))[1:]}
        return np.array([rows[id] for id in ids])

    def _logged(self, name: str) -> list[float]:
        with (self.folder / "metrics.csv").open(newline="") as file:
            return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


# The difference to the reference


def resample(groups: Sequence[str], count: int) -> NDArray[np.int64]:
    """How often each of N cases is in each of ``count`` resamples (count, N); whole groups are drawn."""
    _, members = np.unique(groups, return_inverse=True)
    number = int(members.max()) + 1
    drawn = np.random.default_rng(0).multinomial(number, [1 / number] * number, size=count)
    return drawn[:, members]


def interval(differences: NDArray[np.float64]) -> dict[str, float]:
    """The 95% interval of resampled differences, and the two-sided p of none (at least 1 / (resamples + 1))."""
    differences = differences[~np.isnan(differences)]
    p = 2 * min((differences <= 0).mean(), (differences >= 0).mean())
    low, high = np.percentile(differences, [2.5, 97.5])
    return {"low": float(low), "high": float(high), "p": float(np.clip(p, 1 / (len(differences) + 1), 1))}


# The comparison


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
    ) -> None:
        self.setting, self.variants, self.out, self.seeds = setting, variants, out, seeds
        self.grid, self.rates, self.reference = grid, rates, reference
        self.ablation, self.environment = ablation, environment()
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
        return text

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
            f"{row['epoch_seconds']:.1f}",
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
            setting, variants, args.out, args.seeds, grid, dict(args.rate), reference, args.bootstrap, args.ablation
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
