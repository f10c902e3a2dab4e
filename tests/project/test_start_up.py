"""What a run does before its first batch: one look at each image and shard, and no image is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

import start_up
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.store.preload import feature_shape
from fpt_lightning.store.store import bytes_per_row
from small import ROOT

COUNT = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with its complete store."""
    folder = tmp_path_factory.mktemp("start_up")
    start_up.make(folder, COUNT)
    return folder


@pytest.mark.parametrize(("step", "looks"), [("fit", 1.0), ("preload", 1.0), ("store info", 0.0)])
def test_each_image_is_looked_at_once_and_none_is_opened(folder: Path, step: str, looks: float) -> None:
    found = start_up.looks(step, folder)
    assert found["stat, images"] == looks
    assert found["open, images"] == 0
    assert found["open, store"] > 0


def test_a_shard_is_looked_at_once(folder: Path) -> None:
    """By fit and test together, but for those of the first batch, which are opened."""
    with start_up.counted(folder / "store.zarr") as calls:
        start_up.fit(folder)
    shards = {call: count for call, count in calls.items() if "/c/" in call and "records" not in call}
    looks = {call: count for call, count in shards.items() if call.startswith("stat")}
    assert len(looks) == 6 * COUNT / 16
    assert set(looks.values()) == {1}


@pytest.mark.parametrize(
    ("encoder", "side", "column"), [("vit_base_patch16_224", 512, 0), ("vit_small_patch14_dinov2", 448, 1)]
)
def test_what_the_documentation_says_of_large_sets(encoder: str, side: int, column: int) -> None:
    shape = feature_shape(EncoderConfig(encoder, pretrained=False), (side, side))
    text = (ROOT / "docs" / "cost.md").read_text()
    for name, count in {"CheXpert": 224_316, "MIMIC-CXR": 377_110}.items():
        eight, four = (count * bytes_per_row(codec, shape, 256) / 1e9 for codec in ("int8", "int4"))
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} | {count:,} |"))
        assert row.split("|")[3 + column].strip() == f"{eight:.0f} ({four:.0f}) GB"


def test_the_report(folder: Path) -> None:
    steps = {step: [start_up.measured(step, folder)] * 2 for step in start_up.STEPS}
    looks = {step: start_up.looks(step, folder) for step in start_up.STEPS}
    machine = {"processor": "p", "cores": 2}
    result = {"machine": machine, "counts": [48, 96], "steps": steps, "looks": looks}
    text = start_up.report({**result, "exponents": dict.fromkeys(steps, 1.0)})
    assert "| **fit** | " in text
    assert "| fit | 1.00 | 0.00 | " in text
