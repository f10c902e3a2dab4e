"""The planner: predictions are what real passes take, and the largest that fits is the largest."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from fpt_lightning.cli import main
from fpt_lightning.data.prefetch import AHEAD
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.encoder.selection import piece_of_maps
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.methods import (
    ClassificationModule,
    FineTuningModule,
    FPTModule,
    FPTPlusModule,
    LoRAModule,
    QueryTokensModule,
)
from fpt_lightning.methods.fusion import piece_bytes
from fpt_lightning.planning.memory import (
    Device,
    TrainingStep,
    encoding_bytes,
    evaluation_bytes,
    example_batch,
    explanation_bytes,
    predict_encoding_memory,
    predict_explanation_memory,
)
from fpt_lightning.planning.planner import (
    Plan,
    Setting,
    largest,
    largest_of_all,
    parse_memory,
    plan,
    shared_arguments,
)
from small import SHALLOW, TINY, tiny_model

SETTING = Setting(FPTPlusModule, {"num_classes": 3, **TINY}, (128, 96), batch_size=8)
LORA = Setting(LoRAModule, {"num_classes": 3, "encoder": SHALLOW, "pretrained": False}, (128, 96), batch_size=8)


@cache
def planned() -> Plan:
    """Of ``SETTING``."""
    return plan(SETTING)


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
    live = replace(SETTING, codec=None)
    assert live.fit_bytes() == pytest.approx(real, rel=0.01)
    found = plan(live)
    assert found.sample_bytes is None
    assert found.peaks["preload"] == 0
    assert found.peaks["predict"] < found.peaks["test"] < found.peaks["fit"]


def test_the_peak_of_every_stage() -> None:
    peaks = planned().peaks
    assert peaks["test"] < peaks["fit"] < peaks["preload"] < peaks["predict"] <= peaks["explain"]
    turned = {**SETTING.arguments, "test_time_orientations": 8}
    many = replace(SETTING, arguments=turned, resolution=(1024, 1024), batch_size=64)
    few = replace(many, batch_size=2)  # of which one is evaluated at once, in 8 orientations
    state = 8 * tiny_model().learnable_parameters
    assert few.fit_bytes() == few.test_bytes() + state > replace(few, arguments=SETTING.arguments).fit_bytes()
    assert few.explain_bytes() > state
    assert many.fit_bytes() == replace(many, arguments=SETTING.arguments).fit_bytes() > many.test_bytes() + state
    lora = plan(LORA).peaks
    assert lora["preload"] == lora["explain"] == 0
    assert lora["predict"] == lora["test"] < lora["fit"]


def test_batches_that_wait_are_counted() -> None:
    batch = example_batch(tiny_model(), (128, 96), 8)
    size = sum(part.nbytes for part in batch.values() if isinstance(part, torch.Tensor))
    assert planned().waiting_bytes == (AHEAD + 1) * size


@pytest.mark.parametrize("batch_size", [2, 11])
def test_a_frozen_encoder_takes_as_many_images_at_once_as_it_is_told(batch_size: int) -> None:
    """However large the batch: what it gives is the same, and what that takes is predicted."""
    module, images = tiny_model().eval(), torch.randn(batch_size, 3, 128, 96)
    module.use_encoder(encoder := FrozenEncoder(module.encoder_config, (128, 96)))
    sizes: list[int] = []
    encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    module.images_at_once = 3
    found = module.encode(images)
    assert max(sizes) == min(3, batch_size)
    assert sum(sizes) == batch_size
    for actual, whole in zip(found, encoder(images), strict=True):
        torch.testing.assert_close(actual, whole, rtol=1e-4, atol=1e-4)
    real = evaluation_bytes(module, example_batch(module, (128, 96), batch_size, live=True))
    asked = replace(SETTING, codec=None, batch_size=batch_size, preload_batch_size=3)
    assert asked.test_bytes() == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("live", [False, True])
def test_explaining_takes_what_was_predicted(live: bool) -> None:
    module, resolution = tiny_model(), (512, 512)
    if live:
        module.use_encoder(FrozenEncoder(module.encoder_config, resolution))
    real = explanation_bytes(module, example_batch(module, resolution, 4, live=live))
    predicted = predict_explanation_memory(tiny_model, resolution, 4, live=live)
    assert predicted == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_device_has_its_own_pieces(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real pass and step in the pieces of a GPU stand in for one there; where memory is saved, both are alike."""
    there, size = torch.device(device), (1024, 1024)
    monkeypatch.setattr("fpt_lightning.methods.fusion.piece_bytes", lambda _, saving: piece_bytes(there, saving))
    monkeypatch.setattr(
        "fpt_lightning.encoder.selection.piece_of_maps", lambda heads, tokens, _: piece_of_maps(heads, tokens, there)
    )
    taken = {}
    for saving in (False, True):
        module = tiny_model(gradient_checkpointing=saving)
        taken[saving] = TrainingStep(module, example_batch(module, size, 16, codec="int4")).live_bytes()
        arguments = {**SETTING.arguments, "gradient_checkpointing": saving}
        asked = replace(SETTING, arguments=arguments, resolution=size, batch_size=16, codec="int4", device=device)
        assert asked.fit_bytes() == pytest.approx(taken[saving], rel=0.01)
    assert (taken[False] - taken[True] > 2 * 2**20) == (device == "cuda")
    encoder = FrozenEncoder(tiny_model().encoder_config, size)
    asked = replace(asked, preload_batch_size=1)
    assert asked.preload_bytes() == pytest.approx(encoding_bytes(encoder, torch.zeros(1, 3, *size)), rel=0.01)


def test_the_optimiser_of_a_gpu_takes_all_parameters_at_once() -> None:
    """Which is the peak of a step whose activations are few."""
    arguments = {"num_classes": 3, "encoder": "vit_tiny_patch16_224", "pretrained": False}
    module = FineTuningModule(**arguments)
    module.build((32, 32))
    batch = example_batch(module, (32, 32), 1)
    for device, foreach in (("cpu", False), ("cuda", True)):
        real = TrainingStep(module, batch, foreach=foreach).live_bytes()
        asked = Setting(FineTuningModule, arguments, (32, 32), batch_size=1, device=device)  # type: ignore[arg-type]
        assert asked.fit_bytes() == pytest.approx(real, rel=0.01)
    parameters = 4 * module.learnable_parameters
    assert real > 4.9 * parameters


def test_a_2048_pixel_image_takes_less_than_4_gib() -> None:
    config = EncoderConfig("vit_base_patch16_224.augreg_in21k", pretrained=False)
    assert predict_encoding_memory(config, (2048, 2048), 1) < 1.1 * 2**30


@pytest.mark.parametrize("method", [FPTPlusModule, QueryTokensModule, LoRAModule])
@pytest.mark.parametrize("fixed", [0, 600, 1001])  # of a frozen pass, whatever the batch
def test_the_largest_with_which_every_stage_fits(
    method: type[ClassificationModule], fixed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    explains, stored = method is FPTPlusModule, method is not LoRAModule
    monkeypatch.setattr(Setting, "fit_bytes", lambda asked: 10 * asked.batch_size + 99)
    monkeypatch.setattr(Setting, "explain_bytes", lambda asked: max(fixed, 7 * asked.batch_size + 400))
    monkeypatch.setattr(Setting, "predict_bytes", lambda asked: fixed if stored else asked.batch_size)
    found = largest_of_all(lambda size: Setting(method, {}, (64, 64), batch_size=size), 1000, 500)
    assert found == (0 if fixed > 1000 and stored else 85 if explains else 90)


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
        "model: {class_path: FPTPlusModule, init_args: {num_classes: 3, side_resolution: 32,\n"
        f"  encoder: {SHALLOW}, pretrained: nowhere.safetensors}}}}\n"
        "data: {class_path: PreloadedFeatureDataModule, init_args: {root: nowhere, store: nowhere.zarr,\n"
        "  resolution: 64, batch_size: 8}}\n"
    )
    return path


def test_plan_without_images_weights_and_gpu(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpt_lightning.planning.planner.largest_of_all", lambda make, budget, limit: limit)
    with pytest.raises(SystemExit) as stopped:  # as fit would, but after what can be said
        main(["plan", "--config", str(config), "--data.resolution", "96", "--gpu-memory", "2GiB"])
    assert stopped.value.code == 2
    printed, said = capsys.readouterr()
    assert said.endswith("fpt-lightning: DataError: the data root 'nowhere' is not a folder.\n")
    assert f"{SHALLOW} at 96 x 96 pixels, batch 8, precision bf16-mixed, codec int8, on cuda" in printed
    assert printed.count("FPT+") == 2  # memory by stage, and the rest
    assert "1,024 or more" in printed
    assert "The images are not counted, so the store is of 1,000." in printed


@pytest.mark.parametrize(
    ("given", "device"),
    [
        ([], "cuda"),  # what the configuration's trainer asks for
        (["--trainer.accelerator", "cpu"], "cpu"),
        (["--trainer.accelerator", "auto"], "cuda" if torch.cuda.is_available() else "cpu"),
        (["--trainer.accelerator", "cpu", "--device", "cuda"], "cuda"),
        (["--device", "cpu"], "cpu"),
    ],
)
def test_plan_says_for_which_device(
    config: Path, given: list[str], device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpt_lightning.cli.trainer.plan", lambda setting, memory: asked.append(setting.device))
    monkeypatch.setattr("fpt_lightning.cli.trainer.table", lambda *_: "")
    monkeypatch.setattr("fpt_lightning.cli.training.CommandLine.after_plan", lambda _: None)
    asked: list[str] = []
    main(["plan", "--config", str(config), *given])
    assert asked == [device]
    assert f"on {device}" in capsys.readouterr().out


def test_plan_of_all_methods(config: Path, image_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--all-methods", "--config", str(config), "--data.root", str(image_root)])
    printed, said = capsys.readouterr()
    assert "EncoderError: the weights file 'nowhere.safetensors' (pretrained) does not exist." in said
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
