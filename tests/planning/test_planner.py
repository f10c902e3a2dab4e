"""The planner: predictions are what real passes take, and the largest that fits is the largest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fpt_lightning.cli import main
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.methods import FPTModule, FPTPlusModule, LoRAModule
from fpt_lightning.planning.memory import TrainingStep, encoding_bytes, example_batch, predict_encoding_memory
from fpt_lightning.planning.planner import CONTEXT_BYTES, Setting, largest, parse_memory, plan, shared_arguments
from small import TINY, tiny_model

SETTING = Setting(FPTPlusModule, {"num_classes": 3, **TINY}, (128, 96), batch_size=8)
LORA = Setting(LoRAModule, {"num_classes": 3, "encoder": "test_vit", "pretrained": False}, (128, 96), batch_size=8)


@pytest.mark.parametrize(
    ("name", "resolution"),
    [
        ("test_vit", (128, 96)),
        ("eva02_tiny_patch14_224", (224, 224)),
        ("vit_small_patch16_dinov3", (256, 256)),
        ("vit_tiny_patch16_224", (736, 736)),  # maps of more than a piece
    ],
)
def test_the_frozen_pass_takes_what_was_predicted(name: str, resolution: tuple[int, int]) -> None:
    config = EncoderConfig(name, pretrained=False)
    real = encoding_bytes(FrozenEncoder(config, resolution), torch.zeros(2, 3, *resolution))
    assert predict_encoding_memory(config, resolution, 2) == pytest.approx(real, rel=0.01)


def test_a_training_step_with_the_encoder_inside_takes_what_was_predicted() -> None:
    module = tiny_model()
    module.use_encoder(FrozenEncoder(module.encoder_config, (128, 96)))
    real = TrainingStep(module, example_batch(module, (128, 96), 8, live=True)).live_bytes()
    live = Setting(**{**vars(SETTING), "codec": None})
    assert live.training_bytes() == pytest.approx(real, rel=0.01)
    found = plan(live)
    assert found.sample_bytes is found.encoding_bytes is None


def test_a_2048_pixel_image_takes_less_than_4_gib() -> None:
    config = EncoderConfig("vit_base_patch16_224.augreg_in21k", pretrained=False)
    assert predict_encoding_memory(config, (2048, 2048), 1) < 1.1 * 2**30


@pytest.mark.parametrize("setting", [SETTING, LORA])
def test_the_largest_that_fit(setting: Setting) -> None:
    budget = 3 * max(setting.training_bytes(), setting.encoding_bytes())
    found = plan(setting, CONTEXT_BYTES + budget)
    assert found.largest_batch
    assert found.largest_resolution
    batches = [Setting(**{**vars(setting), "batch_size": found.largest_batch + more}) for more in (0, 1)]
    assert batches[0].training_bytes() <= budget < batches[1].training_bytes()
    sides = [found.largest_resolution + more for more in (0, 16)]
    sized = [Setting(**{**vars(setting), "resolution": (side, side)}) for side in sides]
    needed = [max(each.training_bytes(), each.encoding_bytes()) for each in sized]
    assert needed[0] <= budget < needed[1]


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("best", [0, 1, 2, 7, 8, 9, 137, 999, 1000])
def test_the_search(power: int, best: int) -> None:
    asked = []

    def needed(number: int) -> int:
        asked.append(number)
        return 1000 + 7 * number**power

    assert largest(needed, 1000 + 7 * best**power + 3, 1000) == best
    assert len(asked) <= 14


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("8", 8 * 2**30), ("24 GB", 24 * 10**9), ("512mib", 512 * 2**20), ("1.5G", 15 * 10**8)],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "8 pounds", "-8GiB", "0", "8GiBGiB"])
def test_an_amount_of_memory_that_is_none(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"gpu_memory is .*: give an amount such as 8GiB"):
        parse_memory(text)


def test_shared_arguments() -> None:
    own = {"num_classes": 3, "prompts": 4, "token_ratio": 0.3, "layers": [3, 4]}
    assert shared_arguments(FPTPlusModule, FPTPlusModule, own) == own
    assert shared_arguments(LoRAModule, FPTPlusModule, own) == {"num_classes": 3}
    assert shared_arguments(FPTModule, "FPTPlusModule", own) == {"num_classes": 3, "token_ratio": 0.3}  # taps all


# The command


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "trainer: {precision: bf16-mixed, accelerator: gpu, devices: 4}\n"  # which this machine need not have
        "model: {class_path: FPTPlusModule, init_args: {num_classes: 3, encoder: test_vit, side_resolution: 32,\n"
        "  pretrained: nowhere.safetensors}}\n"
        "data: {class_path: PreloadedFeatureDataModule, init_args: {root: nowhere, store: nowhere.zarr,\n"
        "  resolution: 64, batch_size: 8}}\n"
    )
    return path


def test_plan_without_images_weights_and_gpu(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--config", str(config), "--data.resolution", "96", "--gpu-memory", "2GiB"])
    printed = capsys.readouterr().out
    assert "test_vit at 96 x 96 pixels, batch 8, precision bf16-mixed, codec int8" in printed
    assert printed.count("FPT+") == 1
    assert "1,024 or more" in printed
    assert "The images are not counted, so the store is of 1,000: the data root 'nowhere' is not a folder." in printed


def test_plan_of_all_methods(config: Path, image_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--all-methods", "--config", str(config), "--data.root", str(image_root)])
    printed = capsys.readouterr().out
    for label in ("Full fine-tuning", "LoRA", "FPT ", "FPT+", "Query tokens, stored"):
        assert label in printed
    assert "30 images" in printed
    assert "largest batch" not in printed


def test_plan_says_what_it_cannot(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        (["--data.resolution", "100"], "ConfigurationError: data.resolution 100 x 100 is not a multiple"),
        (["--gpu-memory", "big"], "ConfigurationError: gpu_memory is 'big'"),
        (["--trainer.precision", "64-true"], "ConfigurationError: trainer.precision is '64-true'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["plan", "--config", str(config), *given])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
