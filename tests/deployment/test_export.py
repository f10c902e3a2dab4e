"""Export: every method, task and family of encoders as a file that computes what PyTorch does."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fpt_lightning import Predictor
from fpt_lightning.cli import main
from fpt_lightning.deployment import export as exporting
from fpt_lightning.deployment.checkpoints import load_trained
from fpt_lightning.deployment.ensemble import write_ensemble
from fpt_lightning.deployment.export import Classifier, export
from fpt_lightning.errors import CheckpointError, ConfigurationError, ExportError
from fpt_lightning.evaluation.calibration import Calibration
from fpt_lightning.methods import METHODS
from reference import FAMILIES, small
from small import SHALLOW, save_trained

onnx = pytest.importorskip("onnx", reason="comes with a torch that exports")
onnxruntime = pytest.importorskip("onnxruntime")

RESOLUTION = (64, 96)
SHALLOW_FAMILIES = {
    "siglip": small("vit_base_patch16_siglip_224", "_shallow", depth=2),
    "dinov2-registers": small("vit_small_patch14_reg4_dinov2", "_shallow", depth=2),
}
TASKS = {
    "fpt_plus": "multiclass",
    "fpt": "ordinal",
    "query_tokens": "multilabel",
    "attentive": "coral",
    "stored_linear": "regression",
    "linear": "multilabel",
    "full": "coral",
    "prompt": "regression",
    "attention": "multiclass",
    "adapter": "ordinal",
    "bitfit": "multiclass",
    "lora": "multilabel",
    "adalora": "regression",
}
SIDE = ("fpt_plus", "fpt")

Run = Callable[[NDArray[Any]], list[NDArray[Any]]]


def checkpoint(folder: Path, method: str = "fpt_plus", **changes: Any) -> Path:
    settings = {"encoder": SHALLOW, **({"side_resolution": 32} if method in SIDE else {}), **changes}
    return save_trained(METHODS[method], folder / "best.ckpt", RESOLUTION, **settings)


def exported(path: Path, **options: Any) -> Run:
    """The file of a checkpoint, ONNX unless asked, as its runtime runs it."""
    if options.get("format") == "torch":
        export(ckpt_path=str(path), out=str(out := path.with_suffix(".pt2")), **options)
        program = torch.export.load(out).module()
        return lambda images: [output.numpy() for output in program(torch.from_numpy(images))]
    export(ckpt_path=str(path), out=str(out := path.with_suffix(".onnx")), **options)
    return run_by_onnx(out)


def run_by_onnx(path: Path) -> Run:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def pictures(count: int, size: tuple[int, int] = RESOLUTION, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Smooth images (height, width, 3), at the resolution: nothing is left to resize."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((count, 3, 5, 5), np.float32))
    fine = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    return list((fine * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def as_input(images: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    return np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)


def agrees(run: Run, path: Path, method: str) -> None:
    """What a file computes with the predictor of its checkpoint."""
    predictor = Predictor(path)
    tolerance = 5e-3 if method in SIDE else 1e-4  # Predictor's low-resolution copies are rounded to 8 bits
    for count in (1, 3):
        images = pictures(count)
        expected = predictor(images).scores
        np.testing.assert_allclose(run(as_input(images))[0], expected, atol=tolerance)
    assert np.ptp(predictor(pictures(3)).scores, axis=0).max() > 2 * tolerance, "the model tells images apart"


def test_every_method_is_tested() -> None:
    assert set(TASKS) == set(METHODS)


@pytest.mark.parametrize("method", ["stored_linear", "prompt"])
def test_onnx_computes_what_the_predictor_does(method: str, tmp_path: Path) -> None:
    """FPT+ is in a test of what its file says."""
    path = checkpoint(tmp_path, method, task=TASKS[method])
    agrees(exported(path), path, method)


@pytest.mark.parametrize("format", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_ensemble_as_a_program(format: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "query_tokens", prompts=4)
    write_ensemble([path, shutil.copy(path, tmp_path / "other.ckpt")], tmp_path / "ensemble.ckpt", {})
    ensemble = tmp_path / "ensemble.ckpt"
    agrees(exported(ensemble, format=format), ensemble, "query_tokens")


@pytest.mark.parametrize("format", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_zoomed_orientations_as_a_program(format: str, tmp_path: Path) -> None:
    asked = {"orientations": 4, "zoom": 0.6}
    path = checkpoint(tmp_path, "query_tokens", prompts=4, test_time_orientations=4, specification=asked)
    agrees(exported(path, format=format), path, "query_tokens")


@pytest.mark.slow
@pytest.mark.parametrize("method", TASKS)
def test_every_method_as_onnx(method: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, method, task=TASKS[method], encoder="test_vit")
    agrees(exported(path), path, method)


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(TASKS.values())))
def test_every_task_as_onnx(task: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, task=task)
    agrees(exported(path), path, "fpt_plus")


@pytest.mark.parametrize("method", ["fpt", "query_tokens", "attentive", "linear", "adapter", "lora", "adalora"])
def test_every_kind_of_method_as_a_torch_program(method: str, tmp_path: Path) -> None:
    """Methods that change weights alone have the program of ``linear``."""
    path = checkpoint(tmp_path, method, task=TASKS[method])
    agrees(exported(path, format="torch"), path, method)


@pytest.mark.parametrize(("family", "format"), [("dinov2-registers", "onnx"), ("siglip", "torch")])
def test_attention_of_encoders_with_registers_and_without_a_class_token(
    family: str, format: str, tmp_path: Path
) -> None:
    check_attention(SHALLOW_FAMILIES[family], tmp_path, format=format)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_onnx(family: str, tmp_path: Path) -> None:
    check_attention(FAMILIES[family], tmp_path)


def check_attention(encoder: str | None, folder: Path, **options: Any) -> None:
    """The file's attention is what one gets from the features, one prompt of one head of one layer at a time."""
    assert encoder is not None
    patch = 14 if "patch14" in encoder else 16
    resolution = (4 * patch, 6 * patch)
    settings = {"encoder": encoder, "reduction": 4, "side_resolution": 2 * patch, "prompts": 3}
    path = save_trained(METHODS["fpt_plus"], folder / "best.ckpt", resolution, **settings)
    images = as_input(pictures(2, resolution))
    _, attention = exported(path, attention=True, **options)(images)
    module, specification = load_trained(path)
    classifier = Classifier(module, specification, attention=True)
    assert classifier.encoder is not None
    assert classifier.fusion is not None
    with torch.no_grad():
        encoded = classifier.encoder((torch.from_numpy(images) - 0.4) / 0.2)
        layers, heads = encoded.indices.shape[1:3]
        expected = torch.zeros(2, classifier.encoder.tokens)
        for layer, prompts in enumerate(classifier.fusion.prompts):
            for query in classifier.fusion.norm(prompts):  # type: ignore[operator]
                for head, part in enumerate(query.chunk(heads)):
                    for image in range(2):
                        scores = encoded.features[image, 0, layer, head] @ part / len(part) ** 0.5
                        tokens = encoded.indices[image, layer, head]
                        expected[image, tokens] += scores.softmax(0) / (layers * heads * len(prompts))
    assert expected.sum(1).tolist() == pytest.approx([1, 1])
    patches = expected[:, module.encoder_shape.prefix_tokens :].reshape(2, 4, 6)
    np.testing.assert_allclose(attention, patches.numpy(), atol=1e-5)
    assert attention.std() > 1e-3


def test_the_file_says_how_to_use_it_and_computes_what_the_predictor_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path)
    main(["export", "--ckpt_path", str(path), "--out", str(tmp_path / "new" / "model.onnx")])
    assert "not a medical device" in capsys.readouterr().out
    agrees(run_by_onnx(tmp_path / "new" / "model.onnx"), path, "fpt_plus")
    model = onnx.load(tmp_path / "new" / "model.onnx")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"model.card.md", "model.onnx"}
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert "not a medical device" in said["notice"]
    assert json.loads(said["classes"]) == ["a", "b", "c"]
    assert json.loads(said["thresholds"]) == {"a": 0.3, "b": 0.6}
    assert json.loads(said["calibrations"]) == [{"temperature": 1.7, "biases": [0.4, -0.1, -0.3]}]
    assert json.loads(said["input"])["shape"] == ["batch", 3, 64, 96]
    assert json.loads(said["input"])["fit"] == "letterbox"
    assert json.loads(said["inside"])["mean"] == [0.4, 0.4, 0.4]
    assert json.loads(said["outputs"]) == {"probabilities": ["batch", 3]}
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, 64, 96]
    assert str(Path(exporting.__file__).parent).encode() not in (tmp_path / "new" / "model.onnx").read_bytes()


def test_a_torch_program_says_it_too_and_nothing_of_this_machine(tmp_path: Path) -> None:
    export(ckpt_path=str(checkpoint(tmp_path)), out=str(tmp_path / "model.pt2"), format="torch")
    files = {"fpt_lightning.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=files)
    assert json.loads(files["fpt_lightning.json"])["task"] == "multiclass"
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        content = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".json"))
    assert str(Path(exporting.__file__).parent).encode() not in content
    assert "# FPT+" in (tmp_path / "model.card.md").read_text()


def test_a_program_is_told_how_to_make_prediction_sets(tmp_path: Path) -> None:
    module, specification = load_trained(checkpoint(tmp_path, task="ordinal"))
    module.nonconformity = {"": [[0.0] * 8 + [0.4], [1.0] * 9]}
    said = Classifier(module, specification).about()["prediction_sets"]
    assert said["largest"] == {"0.8": 0.0, "0.9": 0.4}  # the 8th and the 9th of nine
    assert said["rule"].startswith("the most probable grade, and each where it or one further away")


def test_a_program_is_told_of_no_calibration_where_none_was_fitted(tmp_path: Path) -> None:
    module, specification = load_trained(checkpoint(tmp_path, "linear"))
    assert len(Classifier(module, specification).about()["calibrations"]) == 1
    module.calibration = Calibration()
    assert Classifier(module, specification).about()["calibrations"] == []


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("linear", {"out": "m.onnx", "attention": True}, "Linear probing has no prompts"),
        ("fpt_plus", {"out": "m.pt2"}, r"ends in \.onnx"),
        ("fpt_plus", {"out": "m.onnx", "format": "torch"}, r"ends in \.pt2"),
    ],
)
def test_options_that_cannot_work(method: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    options["out"] = str(tmp_path / options["out"])
    with pytest.raises(ConfigurationError, match=message):
        export(ckpt_path=str(checkpoint(tmp_path, method)), **options)


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_missing_packages(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=rf"{package}: pip install 'fpt-lightning\[onnx\]'"):
        export(ckpt_path=str(checkpoint(tmp_path)), out=str(tmp_path / "m.onnx"))


def test_a_model_that_is_too_large_for_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_LARGEST_ONNX", 1000)
    with pytest.raises(ExportError, match="use --format torch"):
        export(ckpt_path=str(checkpoint(tmp_path)), out=str(tmp_path / "m.onnx"))


def test_what_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = exporting._WRITERS["torch"]

    def other(classifier: Classifier, path: Path) -> Any:
        run = write(classifier, path)
        return lambda images: [output + 2e-4 for output in run(images)]

    monkeypatch.setitem(exporting._WRITERS, "torch", other)
    with pytest.raises(ExportError, match=r"differs from PyTorch's by 0\.0002"):
        export(ckpt_path=str(checkpoint(tmp_path, "linear")), out=str(tmp_path / "m.pt2"), format="torch")
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


def test_other_encoder_weights_are_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    other = tmp_path / "other.pt"
    module, _ = load_trained(path)
    weights = exporting.FrozenEncoder(module.encoder_config, RESOLUTION).model.state_dict()
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, other)
    with pytest.raises(CheckpointError, match="other weights"):
        export(ckpt_path=str(path), out=str(tmp_path / "m.onnx"), pretrained=str(other))
