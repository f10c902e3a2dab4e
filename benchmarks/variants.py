"""What ``compare_methods.py`` compares: the paper's methods, or FPT+ with one setting varied, on a run's YAML."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components import MLPTransfer, SideNetworkAlone
from fpt_lightning import methods
from fpt_lightning.datamodules.base import ManifestDataModule
from fpt_lightning.datamodules.images import ImageDataModule
from fpt_lightning.datamodules.samples import STORED
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.methods import METHODS, ClassificationModule, FPTPlusModule
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.tuning import build_on_meta
from fpt_lightning.planning.planner import shared_arguments

ABLATIONS: dict[str, tuple[Any, ...]] = {
    "prompts": (4, 8, 16, 32, 64, 128),  # Table 4
    "side_resolution": (64, 128, 256, 512),  # Table 3
    "token_ratio": (0.1, 0.2, 0.3, 0.5, 0.7, 0.9),  # Fig. 8
    "layers": (2, 4, 6, 8, 10, 12),  # Fig. 6, of 12 blocks
    "components": (),  # Fig. 7
}


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
        return shared_arguments(method, self.method, self.arguments)

    def default(self, name: str) -> float:
        """The YAML's learning rate or weight decay, or else that of its method."""
        own = getattr(methods, self.method, FPTPlusModule).defaults()
        return float({**own, **self.arguments}[name])


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
        DataError: see ``fpt_lightning.data.sources.read_manifest``.
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
    given = arguments.setdefault("encoder", ClassificationModule.defaults()["encoder"])
    if encoder not in (None, given):
        arguments["encoder"] = encoder
        if "store" in data["init_args"]:
            data["init_args"]["store"] = _beside(data["init_args"]["store"], [encoder])
    own = getattr(methods, name, FPTPlusModule)
    maker = own if issubclass(own, FeatureModule) else FPTPlusModule
    stored = build_on_meta(
        lambda: maker(**shared_arguments(maker, name, arguments)), datamodule.resolution
    ).encoder_config
    return Setting(name, arguments, trainer, data, datamodule, (stored, datamodule.image_size))


def _is_class(section: Any) -> bool:
    return isinstance(section, dict) and isinstance(section.get("class_path"), str)


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
    module = build_on_meta(lambda: method(**arguments), setting.datamodule.resolution)
    given = dict(setting.data["init_args"])
    size = max(setting.datamodule.image_size, module.side_resolution or 0)
    if size != setting.datamodule.image_size:
        given["image_size"] = size
    class_path = setting.data["class_path"]
    if live:
        class_path = f"{ImageDataModule.__module__}.{ImageDataModule.__qualname__}"
        known = {name for kind in (ImageDataModule, ManifestDataModule) for name in inspect.signature(kind).parameters}
        given = {name: value for name, value in given.items() if name in known}
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
    return [make_variant(setting, name, kind.LABEL, kind) for name, kind in METHODS.items() if name in names]


def ablation_variants(setting: Setting, ablation: str) -> list[Variant]:
    """FPT+ as published, with one setting varied or built up from its components; what cannot work is left out."""
    variants = []
    for name, label, method, live, changes in _ablated(setting, ablation):
        try:
            if "side_resolution" in changes and len(set(setting.datamodule.resolution)) > 1 and live:
                raise ConfigurationError("the encoder's images are not square, as the side network's are.")
            if name == "preloading" and "store" not in setting.data["init_args"]:
                raise ConfigurationError("data has no store.")
            changes |= {"prompt_head": False}
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
    arguments = setting.arguments_of(FPTPlusModule)
    module = build_on_meta(lambda: FPTPlusModule(**arguments), setting.datamodule.resolution)
    layers = module.encoder_config.tapped_layers
    values = {
        "prompts": module.hparams["prompts"],
        "side_resolution": module.side_resolution,
        "token_ratio": module.encoder_config.token_ratio,
        "layers": len(layers) if layers[-1] == module.encoder_shape.depth - 1 else 0,
    }
    return f"{ablation}-{values[ablation]}"
