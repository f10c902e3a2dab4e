"""The command ``init``: a configuration for a folder or a table of images, with a reason for every line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm

from fpt_lightning.data.inspection import Inspection, inspect_data
from fpt_lightning.data.manifest import SPLITS, numbers_of
from fpt_lightning.datamodules.preloaded import PreloadedFeatureDataModule
from fpt_lightning.encoder.config import encoder_shape, nearest_side
from fpt_lightning.encoder.weights import encoder_of_weights
from fpt_lightning.errors import ConfigurationError, a_few
from fpt_lightning.files import write_rows, write_text
from fpt_lightning.methods import QueryTokensModule
from fpt_lightning.planning.planner import CONTEXT_BYTES, STAGES, Setting, parse_memory

SIDES = (224, 384, 512, 768, 1024)
"""Resolutions that are chosen from, in pixels; without ``--gpu-memory`` up to the published 512."""

_PUBLISHED_SIDE = 512
_FEW_IMAGES, _FOLDS = 2000, 5  # below which one split of them says little
_IMBALANCE = 3  # images of the largest class / the smallest, from which rare ones weigh more
_BORDER = 0.1  # of the area, from which a dark border is cut off
_ASPECT = 1.15  # long side / short side, from which squashing distorts


class _Encoder(NamedTuple):
    """An encoder whose weights come by name, and one that has seen such images and comes as a file."""

    name: str
    special: str = ""


_GENERAL = "vit_base_patch14_reg4_dinov2.lvd142m"
_RETFOUND = "RETFound (CC BY-NC 4.0, conditions to accept)"
_ENCODERS = {
    "fundus photographs": _Encoder(_GENERAL, _RETFOUND),
    "OCT scans": _Encoder(_GENERAL, _RETFOUND),
    "chest X-rays": _Encoder("vit_base_patch14_dinov2.lvd142m", "RAD-DINO (MIT)"),
    "pathology": _Encoder(_GENERAL, "UNI (CC BY-NC-ND 4.0, academic research only)"),
}
"""By what images are of; licences as docs/encoders.md has them."""


_ORIENTATIONS = {"fundus photographs": 8, "pathology": 8, "skin photographs": 8, "chest X-rays": 2}
"""That are stored where images are few: all where a finding is the same from every side, of films the mirror image."""
_ZOOMED = ("fundus photographs", "chest X-rays")
"""On which closer views were tried."""


class Line(NamedTuple):
    """A setting, its value and the reason for it."""

    name: str
    value: Any
    why: str


def init(data: str, out: str = "my.yaml", gpu_memory: str | None = None, weights: str | None = None) -> None:
    """Write a configuration for images with labels, and say what was found and what is left to decide.

    Args:
        data: folder of the images, or a CSV file with their labels in it.
        out: the YAML file that is written.
        gpu_memory: of the GPU, such as 8GiB: the resolution may rise above 512 pixels where every stage fits.
        weights: file or folder of the encoder's weights; by default those that timm has by name.

    Raises:
        ConfigurationError: the file is there already, or nothing fits the memory.
        DataError: images or labels that cannot be used (``fpt_lightning.data.inspection.inspect_data``).
        EncoderError: weights that fit no encoder that is known.
    """
    path = Path(out)
    _check_free(path)
    memory = None if gpu_memory is None else parse_memory(gpu_memory)
    found = inspect_data(Path(data).expanduser())
    sections = choose(found, path, memory, weights)
    settings = {name: {line.name: line.value for line in lines} for name, lines in sections.items()}
    table = _patients_table(found, path)
    if table is not None:
        _check_free(table)
        write_rows(table, _patient_rows(found))
    try:
        checked = PreloadedFeatureDataModule(**settings["data"])
        checked.check("fit", QueryTokensModule(**settings["model"]))
    except Exception:
        if table is not None:
            table.unlink()
        raise
    write_text(path, _yaml(found, path, sections))
    print(_told(found, checked.labelled.notes))
    if table is not None:
        print(f"\n{table} has the patients of the DICOM headers, so that the images of one stay in one split.")
    print(f"\n{path} is written; every line says why. Next:")
    print(f"  fpt-lightning plan --config {path}   # memory and disk, and whether fit would start")
    print(f"  fpt-lightning fit --config {path}")
    if "folds" in settings["data"]:
        print(f"  fpt-lightning crossval --config {path}   # all folds, from one store where mean and std are numbers")


def choose(
    found: Inspection, out: Path, memory: int | None = None, weights: str | None = None
) -> dict[str, list[Line]]:
    """The settings for a data set, by section, in the order of the file.

    Args:
        found: the data set.
        out: the file, whose name the run and the store get.
        memory: bytes of the GPU.
        weights: file or folder of the encoder's.

    Raises:
        ConfigurationError: nothing fits the memory.
        EncoderError: weights that fit no encoder that is known.
    """
    model = [
        *_task(found),
        *_encoder(found, weights),
        Line("learning_rate", 1e-3, "the best of four, or near it, on each task that was tried (docs/evidence.md)"),
    ]
    if turned := _orientations(found):
        model.append(Line("test_time_orientations", turned[0].value, "validation, test and prediction take the mean"))
    arguments = {line.name: line.value for line in model}
    return {
        "trainer": [
            Line("default_root_dir", f"runs/{out.stem}", "the run's folder, after this file"),
            Line("max_epochs", 20, "the paper's"),
        ],
        "model": model,
        "data": [
            *_reading(found, out),
            *_folds(found),
            Line("store", f"features/{out.stem}.zarr", "what the encoder gives; another encoder needs another one"),
            *_resolution(found, arguments, memory),
            *_framing(found),
            *turned,
            *_normalisation(found, arguments),
        ],
    }


def _check_free(path: Path) -> None:
    if path.exists():
        raise ConfigurationError(f"{path} is there already: give another --out, or remove it.")


# Choices


def _task(found: Inspection) -> list[Line]:
    manifest = found.manifest
    counts = _counts(found)
    told = ", ".join(f"{name} ({count:,})" for name, count in counts.items())
    number = len(manifest.classes)
    if manifest.kind == "regression":
        return [
            Line("num_classes", 1, "a number"),
            Line("task", "regression", f"{manifest.classes[0]} has many different numbers"),
        ]
    if manifest.kind == "multi-label":
        lines = [Line("num_classes", number, told), Line("task", "multilabel", "an image may have several of these")]
    elif found.grades:
        lines = [Line("num_classes", number, told), Line("task", "ordinal", "grades from low to high")]
    else:
        lines = [Line("num_classes", number, told), Line("task", "multiclass", "one class an image")]
    trained = manifest.class_counts("train")
    absent = [len(manifest.split("train")) - count for count in trained] if manifest.kind == "multi-label" else [1]
    if max(trained) >= _IMBALANCE * min(trained) > 0 and min(absent) > 0:
        ratio = f"{max(trained) / min(trained):.0f} images of the most frequent class to 1 of the rarest"
        lines.append(Line("class_weights", "balanced", ratio))
    return lines


def _encoder(found: Inspection, weights: str | None) -> list[Line]:
    if weights is not None:
        name = encoder_of_weights(Path(weights).expanduser())
        return [
            Line("encoder", name, "the shape that the weights fit; heads are not in a file: hold it against its page"),
            Line("pretrained", weights, "its licence is its owners'"),
        ]
    chosen = _ENCODERS.get(found.topic, _Encoder(_GENERAL))
    if chosen.special:
        why = f"{chosen.special} has seen {found.topic}, and comes as a file: init --weights FILE"
    else:
        why = "none is known that has seen more such images"
    return [
        Line("encoder", chosen.name, f"DINOv2 (Apache-2.0), of photographs; {why} (docs/encoders.md)"),
        Line("pretrained", True, "by name, once, through timm; without a network, the path of a file"),
    ]


def _reading(found: Inspection, out: Path) -> list[Line]:
    why = {
        "manifest": "the table of the labels, from root",
        "image_column": "its paths of images",
        "label_column": "its labels",
        "label_separator": "of several names in a field",
        "group_column": "what one split keeps whole",
        "case_column": "some have several images: predictions and metrics of each as one, too",
        "split_column": "train, val and test are given",
        "classes": "from low to high",
        "allow_overlap": "the same are in several splits: test figures are too good until they are taken out",
    }
    lines = [Line("root", str(found.root), "the folder of the images")]
    table, reading = _patients_table(found, out), found.reading
    if table is not None:
        lines.append(Line("manifest", str(table), "the classes of the folders, with the patients of the DICOM headers"))
        lines.append(Line("group_column", "patient", why["group_column"]))
    return [*lines, *(Line(name, value, why[name]) for name, value in reading.items())]


def _folds(found: Inspection) -> list[Line]:
    count = len(found.manifest.samples)
    if count >= _FEW_IMAGES or (found.manifest.kind != "regression" and min(_counts(found).values()) < _FOLDS):
        return []
    says = "validates each but the test images once" if found.given else "tests each image once"
    why = f"{count:,} images are few for one split: --data.fold 1 to {_FOLDS} {says}"
    return [Line("folds", _FOLDS, why)]


def _resolution(found: Inspection, model: Mapping[str, Any], memory: int | None) -> list[Line]:
    height, width = found.pictures.bright
    patch = encoder_shape(model["encoder"]).patch_size
    fits = [side for side in SIDES if side <= max(height, width)] or [SIDES[0]]
    of_images = f"images have {found.pictures.size[0]} x {found.pictures.size[1]} pixels"
    if memory is None:
        side = min(_PUBLISHED_SIDE, fits[-1])
        published = f"the published {side}" if side == _PUBLISHED_SIDE else f"{side}, as they have no more"
        return [Line("resolution", nearest_side(side, patch), f"{of_images}: {published}, to patches of {patch[0]}")]
    for side in reversed(fits):
        nearest = nearest_side(side, patch)
        for at_once in (4, 1):
            setting = Setting(QueryTokensModule, model, (nearest, nearest), preload_batch_size=at_once, device="cuda")
            needed = max(peak(setting) for peak in STAGES.values())
            if needed <= memory - CONTEXT_BYTES:
                why = f"{of_images}; every stage fits, {needed / 2**20:,.0f} MiB at most"
                at_a_time = [] if at_once == 4 else [Line("preload_batch_size", 1, "four at once do not fit")]
                return [Line("resolution", nearest, why), *at_a_time]
    raise ConfigurationError(
        f"gpu_memory is {memory / 2**30:.1f} GiB, of which {CONTEXT_BYTES / 2**30:g} GiB is set aside: not even "
        f"{nearest} pixels fit ({needed / 2**20:,.0f} MiB). Give weights of a smaller encoder, or leave it out."
    )


def _orientations(found: Inspection) -> list[Line]:
    images, count = len(found.manifest.samples), _ORIENTATIONS.get(found.topic, 1)
    if count == 1 or images >= _FEW_IMAGES:
        return []
    same = f"{found.topic} show the same {'turned' if count == 8 else 'mirrored'}"
    why = f"{images:,} images are few, and {same}; the frozen pass takes {count} times as long"
    closer = Line("zoom", 0.55, "parts of an image, closer, are worth as much again; tried on such images")
    return [Line("orientations", count, why), *([closer] if found.topic in _ZOOMED else [])]


def _framing(found: Inspection) -> list[Line]:
    pictures, lines = found.pictures, list[Line]()
    if pictures.border >= _BORDER:
        lines.append(Line("crop_border", True, f"a dark border takes {pictures.border:.0%} of the area"))
    if pictures.aspect >= _ASPECT:
        why = f"long sides are {pictures.aspect:.2f} x short ones: padded, not squashed"
        lines.append(Line("fit", "letterbox", why))
    if pictures.deep:
        why = "16 bits: the smallest to the largest value of the training images; by numbers, folds share a store"
        lines.append(Line("value_range", "auto", why))
    if pictures.broken:
        why = f"{len(pictures.broken)} of those that were opened cannot be read: fit leaves such out, and lists them"
        lines.append(Line("on_error", "skip", why))
    return lines


def _normalisation(found: Inspection, model: Mapping[str, Any]) -> list[Line]:
    by_file = model["pretrained"] is not True
    if by_file and "dino" not in model["encoder"]:
        why = "measured over the training images; numbers, if its page gives any, let all folds share a store"
        return [Line("mean", "auto", why), Line("std", "auto", "likewise")]
    known = timm.get_pretrained_cfg(model["encoder"])
    assert known is not None
    why = "RAD-DINO's are [0.5307] and [0.2583]" if by_file else "so that all folds share a store"
    return [
        Line("mean", list(known.mean), f"of the encoder's training; {why}"),
        Line("std", list(known.std), "likewise"),
    ]


def _counts(found: Inspection) -> dict[str, int]:
    """Images of each class, in all splits."""
    by_split = [found.manifest.class_counts(split) for split in SPLITS]
    return dict(zip(found.manifest.classes, map(sum, zip(*by_split, strict=True)), strict=True))


# The patients of DICOM headers


def _patients_table(found: Inspection, out: Path) -> Path | None:
    """Where they are written; None where there are none."""
    return out.absolute().with_suffix(".csv") if found.patients else None


def _patient_rows(found: Inspection) -> list[list[str]]:
    """A table of the images with the splits that are given; validation images are drawn anew, patients whole."""
    manifest = found.manifest
    rows = [["image", "label", "patient", *(["split"] if found.given else [])]]
    for sample in manifest.samples:
        split = "train" if manifest.random and sample.split == "val" else sample.split
        patient = found.patients.get(sample.id, "")
        rows.append([sample.id, manifest.classes[sample.label], patient, *([split] if found.given else [])])
    return rows


# Text


def _told(found: Inspection, notes: Sequence[str]) -> str:
    """What was found, and what is left to decide."""
    manifest, pictures = found.manifest, found.pictures
    files = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in pictures.suffixes.items())
    sizes = sorted({look.size for look in pictures.looks}, key=lambda size: size[0] * size[1])
    several = f"{sizes[0][0]} x {sizes[0][1]} to {sizes[-1][0]} x {sizes[-1][1]}, median " if len(sizes) > 1 else ""
    colour = "grey" if all(look.grey for look in pictures.looks) else "colour"
    bits = " and ".join(str(bits) for bits in sorted({look.bits for look in pictures.looks}))
    rows = {
        "images": f"{len(manifest.samples):,} below {found.root}: {files}"
        + (f"; {found.unnamed:,} more are in no row of the table" if found.unnamed else ""),
        "pixels": f"{several}{pictures.size[0]} x {pictures.size[1]} (height x width); {colour}, {bits} bits; dark "
        f"border {pictures.border:.0%}; of {len(pictures.looks)} that were opened",
    }
    for keyword in ("Modality", "BodyPartExamined"):
        if said := pictures.of_header(keyword):
            rows[keyword] = ", ".join(f"{name} ({count:,})" for name, count in said.most_common())
    if found.topic:
        rows["of"] = f"{found.topic}, as names say"
    source = f"column {a_few(found.labels)} of {found.table}" if found.labels else "folders"
    rows["labels"] = f"{source}: " + ", ".join(f"{name} ({count:,})" for name, count in _counts(found).items())
    groups = {sample.group for sample in manifest.samples if sample.group} or {*found.patients.values()} - {""}
    if groups:
        rows["patients"] = f"{len(groups):,}, " + (
            "PatientID of the headers" if found.patients else f"column {found.reading.get('group_column', 'group')}"
        )
    if cases := {sample.case for sample in manifest.samples if sample.case}:
        rows["cases"] = f"{len(cases):,}, column {found.reading['case_column']}"
    counts = ", ".join(f"{name} {len(manifest.split(name)):,}" for name in SPLITS)
    rows["splits"] = f"given: {counts}" if found.given else "none given: 70/10/20 is drawn, patients whole"
    lines = [f"{name:<17}{said}" for name, said in rows.items()]
    lines += [f"{'note':<17}{note}" for note in notes]
    if undecided := [*found.undecided, *pictures.broken.values()]:
        lines += ["", "left to decide:", *(f"  - {question}" for question in undecided)]
    return "\n".join(lines)


def _yaml(found: Inspection, path: Path, sections: Mapping[str, Sequence[Line]]) -> str:
    classes = {"model": "QueryTokensModule", "data": "PreloadedFeatureDataModule"}
    why = {
        "model": "FPT+ without its side network, which added nothing (docs/evidence.md); fit --model auto tries both",
        "data": "each image is encoded once, into a store",
    }
    lines = [
        f"# {found.root}, as fpt-lightning init found it. Every line may be changed; what is not here has its default.",
        "#",
        f"#   fpt-lightning plan --config {path}",
        f"#   fpt-lightning fit --config {path}",
        *(
            ["#", "# Left to decide:", *(f"# - {' '.join(each.split())}" for each in found.undecided)]
            if found.undecided
            else []
        ),
        "",
        "seed_everything: 0 # the same run again",
    ]
    for name, settings in sections.items():
        lines += ["", f"{name}:"]
        indent = "  "
        if name in classes:
            lines += [f"  class_path: {classes[name]} # {why[name]}", "  init_args:"]
            indent = "    "
        lines += [f"{indent}{line.name}: {_value(line.value)} # {' '.join(line.why.split())}" for line in settings]
    return "\n".join([*lines, ""])


def _value(value: Any) -> str:
    """In YAML, on one line."""
    plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _RESERVED
    if plain and numbers_of([value]) is None:
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return f"{value:.1e}" if value < 0.01 else f"{value:g}"
    return json.dumps(value, ensure_ascii=False)


_PLAIN = re.compile(r"[A-Za-z./][\w./-]*")
_RESERVED = {"true", "false", "yes", "no", "on", "off", "null", "none", "y", "n", "."}
"""What YAML does not read as text."""
