"""The first half hour on a GPU: everything that a CPU cannot prove, in one command.

    python benchmarks/gpu_check.py --out runs/gpu_check
    python benchmarks/gpu_check.py --out runs/gpu_check --pretrained dinov2_small.safetensors \
        --encoder vit_small_patch14_dinov2 --side-resolution 126

On generated photographs, with random weights unless some are given. A check that fails stops no other; it and what this
machine cannot do are said, and a failure ends with status 1. Writes ``{out}/gpu_check.json`` and ``.md``; checks of a
GPU belong to ``results``, with the commit that ran. Without a GPU the checks that need none run on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import lightning as L
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from encoder_precision import compared
from environment import environment
from fpt_lightning import PreloadedFeatureDataModule, cli
from fpt_lightning.cli.run_folder import logged
from fpt_lightning.data.images import read_image
from fpt_lightning.data.transforms import normalise, unit_pixels
from fpt_lightning.datamodules.synthetic import write_fundus_images
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.encoder.precision import PRECISIONS
from fpt_lightning.methods import METHODS, ClassificationModule, FPTPlusModule
from fpt_lightning.methods.features import FeatureModule

ROOT, MIB = Path(__file__).parent.parent, 2**20
LIMIT = 8 * 2**30  # bytes of the small GPU that is played


class NotPossibleError(Exception):
    """What this machine cannot do."""


@dataclass(frozen=True)
class Bench:
    """What all checks share.

    Attributes:
        out: folder of everything that is made.
        encoder: of all checks but the large one.
        pretrained: its weights, as a file; random ones without.
        resolution: of its images in pixels.
        side_resolution: of FPT+'s side images.
        images: how many are drawn.
        steps: of training, where a check needs some.
        large: encoder and resolution that have to fit into ``LIMIT``.
        quickstart: its command's further options.
    """

    out: Path
    encoder: str = "vit_base_patch16_224.augreg_in21k"
    pretrained: str | None = None
    resolution: int = 512
    side_resolution: int = 128
    images: int = 240
    steps: int = 100
    large: tuple[str, int] = ("vit_large_patch16_224.augreg_in21k", 1024)
    quickstart: tuple[str, ...] = ()

    @property
    def config(self) -> EncoderConfig:
        return EncoderConfig(self.encoder, self.pretrained or False)

    def model(self, method: str = "fpt_plus", **changes: Any) -> ClassificationModule:
        side = {"side_resolution": self.side_resolution} if issubclass(METHODS[method], FPTPlusModule) else {}
        given = {"num_classes": 3, "encoder": self.encoder, "pretrained": self.pretrained or False, **side, **changes}
        return METHODS[method](**given)

    def data(self, store: str = "features", **changes: Any) -> PreloadedFeatureDataModule:
        given = {"resolution": self.resolution, "mean": [0.5], "std": [0.25], **changes}
        return PreloadedFeatureDataModule(str(self.photographs()), str(self.out / f"{store}.zarr"), **given)

    def photographs(self) -> Path:
        root = self.out / "images"
        write_fundus_images(root, self.images, size=max(320, self.resolution))
        return root

    def trainer(self, **changes: Any) -> L.Trainer:
        given = {
            "accelerator": "auto",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": self.out,
            **changes,
        }
        return L.Trainer(**given)

    def config_file(self, name: str, **trainer: Any) -> Path:
        """A configuration of FPT+ on these images; its run is beside it."""
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        model = {"num_classes": 3, "encoder": self.encoder, "pretrained": self.pretrained or False}
        data = {"root": str(self.photographs()), "store": str(self.out / "features.zarr")}
        content = {
            "seed_everything": 0,
            "trainer": {"default_root_dir": str(folder), "devices": 1, "enable_progress_bar": False, **trainer},
            "model": {
                "class_path": "FPTPlusModule",
                "init_args": {**model, "side_resolution": self.side_resolution},
            },
            "data": {
                "class_path": "PreloadedFeatureDataModule",
                "init_args": {**data, "resolution": self.resolution, "mean": [0.5], "std": [0.25]},
            },
        }
        path = folder / "check.yaml"
        path.write_text(yaml.safe_dump(content))
        return path


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def needs_gpu() -> None:
    if not torch.cuda.is_available():
        raise NotPossibleError("needs a GPU")


def must(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


@contextmanager
def peak() -> Iterator[dict[str, float]]:
    """Allocated and reserved MiB of a GPU within."""
    found: dict[str, float] = {}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if torch.cuda.is_available():
        found["allocated_mib"] = torch.cuda.max_memory_allocated() / MIB
        found["reserved_mib"] = torch.cuda.max_memory_reserved() / MIB


# Checks


def marked_tests(bench: Bench) -> dict[str, Any]:
    """The tests marked ``gpu``."""
    needs_gpu()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    must(done.returncode == 0, done.stdout[-2000:])
    return {"tests": done.stdout.splitlines()[-1]}


def quickstart(bench: Bench) -> dict[str, Any]:
    """The README's command on the CPU and on the GPU: test AUC, seconds of an epoch, peak memory."""
    found: dict[str, Any] = {}
    for accelerator in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        folder = bench.out / f"quickstart-{accelerator}"
        options = {"trainer.accelerator": accelerator, "trainer.default_root_dir": str(folder)}
        for name in ("root", "store"):
            options[f"data.{name}"] = str(bench.out / "quickstart-data" / name)
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        config = str(ROOT / "examples" / "quickstart.yaml")
        cli.main(["fit", "--config", config, *arguments, "--trainer.enable_progress_bar", "false", *bench.quickstart])
        found[accelerator] = {
            "test_auc": json.loads((folder / "metrics.json").read_text())["best"]["test_auc"],
            "epoch_seconds": median(logged(folder, "epoch_seconds")),
            **{
                f"{kind}_mib": max(values)
                for kind in ("live", "allocated", "reserved")
                if (values := logged(folder, f"train_peak_{kind}_mib"))
            },
        }
    if "cuda" in found:
        must(abs(found["cpu"]["test_auc"] - found["cuda"]["test_auc"]) < 0.05, f"the two differ: {found}")
    return found


@torch.no_grad()
def frozen_pass(bench: Bench) -> dict[str, Any]:
    """Tokens selected otherwise than by the CPU in fp32, errors of their keys and values, and seconds an image."""
    size = (bench.resolution, bench.resolution)
    data = bench.data()
    manifest = data.read_manifest()
    paths = [manifest.path(sample) for sample in manifest.samples[:4]]
    pixels = torch.stack([_pixels(path, size) for path in paths])
    exact, found = FrozenEncoder(bench.config, size)(pixels), dict[str, Any]()
    for precision in PRECISIONS:
        encoder = FrozenEncoder(replace(bench.config, precision=precision), size).to(device())
        with peak() as memory:
            given = encoder(pixels.to(device()))
        start = time.perf_counter()
        encoder(pixels.to(device())).pooled.cpu()
        seconds = (time.perf_counter() - start) / len(pixels)
        there = type(given)(*(part.cpu() for part in given))
        found[precision] = {**compared(exact, there, encoder.tokens), "seconds": seconds, **memory}
    others = found["fp32"]["other_tokens"]
    must(max(others) < 0.001, f"in fp32 {max(others):.2%} of a layer's tokens are others than on the CPU")
    return found


def _pixels(path: Path, size: tuple[int, int]) -> Tensor:
    return normalise(unit_pixels(read_image(path), size), [0.5] * 3, [0.25] * 3)


def determinism(bench: Bench) -> dict[str, Any]:
    """Two runs of one seed under ``trainer.deterministic``, from preload to test, are the same to the last bit."""
    config = bench.config_file("determinism", max_epochs=2, deterministic=True)
    ended = []
    for turn in range(2):
        folder = bench.out / "determinism" / f"run{turn}"
        store = str(bench.out / "determinism" / f"store{turn}.zarr")
        options = ["--trainer.default_root_dir", str(folder), "--data.store", store]
        cli.main(["fit", "--config", str(config), *options])
        weights = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
        ended.append((weights, (folder / "predictions.csv").read_text()))
    (first, scores), (second, again) = ended
    other = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    must(not other, f"{len(other)} of {len(first)} tensors differ: {other[:3]}")
    must(scores == again, "the predictions differ")
    return {"tensors": len(first)}


def precisions(bench: Bench) -> dict[str, Any]:
    """Every method trains some steps in mixed precision, to a loss and weights that are finite."""
    found: dict[str, Any] = {}
    halves = ("bf16-mixed", "16-mixed") if torch.cuda.is_available() else ("bf16-mixed",)
    for method, precision in itertools.product(METHODS, halves):
        stored = issubclass(METHODS[method], FeatureModule)
        layers = "all-layers" if method == "fpt" else "features"
        data = bench.data(layers, batch_size=16 if stored else 2)
        module = bench.model(method)
        if stored:
            data.preload(module, bench.trainer())
        losses = _Losses()
        steps = bench.steps if stored else max(4, bench.steps // 10)
        trainer = bench.trainer(precision=precision, max_steps=steps, limit_val_batches=0, callbacks=[losses])
        with peak() as memory:
            trainer.fit(module, data)
        finite = all(parameter.isfinite().all() for parameter in module.parameters())
        must(finite and math.isfinite(losses.all[-1]), f"{method} in {precision}: not finite, losses {losses.all[-5:]}")
        found[f"{method}, {precision}"] = {"first_loss": losses.all[0], "last_loss": losses.all[-1], **memory}
    return found


class _Losses(L.Callback):
    def __init__(self) -> None:
        self.all: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.all.append(float(outputs["loss"]))


def resuming(bench: Bench) -> dict[str, Any]:
    """A run that is interrupted after half of its epochs and goes on ends as one that is not."""
    ended = {}
    for name in ("whole", "parts"):
        config = bench.config_file(f"resuming-{name}", max_epochs=4, deterministic=True)
        folder = config.parent
        going_on: list[str] = []
        if name == "parts":
            with mock.patch.object(FPTPlusModule, "on_train_epoch_start", _interrupted), suppress(SystemExit):
                cli.main(["fit", "--config", str(config)])
            going_on = ["--ckpt_path", str(folder / "last.ckpt")]
        cli.main(["fit", "--config", str(config), *going_on])
        ended[name] = logged(folder, "val_loss")
    must(ended["whole"] == ended["parts"], f"validation losses differ: {ended}")
    return ended


_starts_epoch = FPTPlusModule.on_train_epoch_start


def _interrupted(module: FPTPlusModule) -> None:
    _starts_epoch(module)
    if module.current_epoch == 2:
        raise KeyboardInterrupt


def attention(bench: Bench) -> dict[str, Any]:
    """Each attention backend with few queries and odd head sizes, against fp64 without any."""
    found: dict[str, Any] = {}
    backends = (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    types = (torch.float32, torch.bfloat16, *([torch.float16] if torch.cuda.is_available() else []))
    for backend, dtype in itertools.product(backends, types):
        worst, refused = 0.0, []
        for queries, size in itertools.product((1, 4, 16), (4, 8, 64, 72)):
            drawn = torch.Generator().manual_seed(0)
            q, k, v = (torch.randn(2, 3, n, size, generator=drawn).to(dtype) for n in (queries, 205, 205))
            exact = (q.double() @ k.double().mT / size**0.5).softmax(-1) @ v.double()
            try:
                with sdpa_kernel(backend):
                    given = F.scaled_dot_product_attention(q.to(device()), k.to(device()), v.to(device()))
            except RuntimeError:
                refused.append([queries, size])
                continue
            worst = max(worst, float((given.cpu().double() - exact).abs().max()))
        must(worst < (1e-4 if dtype == torch.float32 else 0.03), f"{backend.name} in {dtype} is {worst:.3g} off")
        found[f"{backend.name.lower()}, {str(dtype)[6:]}"] = {"largest_error": worst, "refused": refused}
    return found


def pinned_memory(bench: Bench) -> dict[str, Any]:
    """Batches that are copied from pinned memory beside a slow consumer arrive as they are on the CPU."""
    needs_gpu()
    data, module = bench.data(), bench.model()
    data.preload(module, bench.trainer())
    data.model, busy = module, torch.randn(4096, 4096, device="cuda")
    data.setup("fit")
    plain = [{n: v.clone() for n, v in b.items() if isinstance(v, Tensor)} for b in data.val_dataloader()]
    data.trainer = bench.trainer()
    arrived = []
    for batch in data.val_dataloader():
        for _ in range(50):  # the copies wait behind it, while the loader goes on
            busy = (busy @ busy).clamp(-1, 1)
        arrived.append({n: v.to("cuda", non_blocking=True) for n, v in batch.items() if isinstance(v, Tensor)})
        del batch
    same = all(torch.equal(a[n].cpu(), p[n]) for a, p in zip(arrived, plain, strict=True) for n in p)
    must(same, "a batch was overwritten before it arrived")
    return {"batches": len(plain)}


def small_gpu(bench: Bench) -> dict[str, Any]:
    """The large encoder's frozen pass and FPT+'s training within ``LIMIT``."""
    encoder, resolution = bench.large
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        must(total >= LIMIT, f"the GPU has {total / 2**30:.1f} GiB")
        torch.cuda.set_per_process_memory_fraction(LIMIT / total)
    try:
        large = replace(bench, encoder=encoder, pretrained=None, resolution=resolution, images=60)
        large = replace(large, out=bench.out / "large")
        module, data = large.model(gradient_checkpointing=True), large.data(preload_batch_size=1)
        with peak() as preload:
            data.preload(module, bench.trainer())
        with peak() as training:
            bench.trainer(precision="bf16-mixed", max_steps=3, limit_val_batches=0).fit(module, data)
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0)
    return {"limited": torch.cuda.is_available(), "preload": preload, "training": training}


def rates(bench: Bench) -> dict[str, Any]:
    """Images a second of the frozen pass, of the loader and of training, and the share that waits for input."""
    module, data = bench.model(), bench.data("rates", image_size=2 * bench.side_resolution)
    start = time.perf_counter()
    data.preload(module, bench.trainer(), overwrite=True)
    stored = len(data.read_manifest().samples) / (time.perf_counter() - start)
    trainer = bench.trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(module, data)  # warms up, and leaves the loader's data set up
    found = {"preload": stored, "steps_alone": _steps(bench.model().to(device()), next(iter(data.train_dataloader())))}
    for where in ("loader", "device"):
        data.augment_on = where
        loader = data.train_dataloader()
        start = time.perf_counter()
        images = sum(len(batch["labels"]) for batch in loader)
        found[f"loader, augmented on the {where}"] = images / (time.perf_counter() - start)
        clock = _Clock()
        bench.trainer(max_epochs=3, limit_val_batches=0, callbacks=[clock]).fit(bench.model(), data)
        trained = images / clock.seconds
        found[f"training, augmented on the {where}"] = trained
        found[f"input_bound, augmented on the {where}"] = max(0.0, 1 - trained / found["steps_alone"])
    return found


def compiled(bench: Bench) -> dict[str, Any]:
    """Images a second of training steps, and of those with ``torch.compile`` of the side network; no input."""
    module, data = bench.model(), bench.data()
    data.preload(module, bench.trainer())
    data.model = module
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    eager = _steps(module.to(device()), batch)
    assert isinstance(module, FPTPlusModule)
    module.side.compile()
    return {"eager": eager, "compiled": _steps(module, batch)}


class _Clock(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _synchronise()
        self.seconds = time.perf_counter() - self._start  # of the last epoch


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _steps(module: ClassificationModule, batch: Any) -> float:
    """Images a second of steps on a batch that is there."""
    there = {name: part.to(device()) if isinstance(part, Tensor) else part for name, part in batch.items()}
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning)
    for step in range(12):
        if step == 2:
            _synchronise()
            start = time.perf_counter()
        torch.autograd.backward(F.cross_entropy(module(there), there["labels"]))
        optimizer.step()
        optimizer.zero_grad()
    _synchronise()
    return 10 * len(there["labels"]) / (time.perf_counter() - start)


CHECKS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    check.__name__: check
    for check in (
        marked_tests,
        attention,
        frozen_pass,
        quickstart,
        determinism,
        resuming,
        pinned_memory,
        rates,
        compiled,
        precisions,
        small_gpu,
    )
}
"""In the order in which they run: what tells most in the least time first."""


def outcome(check: Callable[[Bench], dict[str, Any]], bench: Bench) -> dict[str, Any]:
    """What a check came to, whatever it was."""
    start = time.perf_counter()
    try:
        told: dict[str, Any] = {"outcome": "passed", "found": check(bench)}
    except NotPossibleError as why:
        told = {"outcome": "not done", "why": str(why)}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        told = {"outcome": "failed", "why": f"{type(error).__name__}: {error}"}
    return {**told, "seconds": round(time.perf_counter() - start, 1)}


def report(result: Mapping[str, Any]) -> str:
    """A row a check."""
    machine, versions = result["machine"], result["versions"]
    lines = [
        f"{machine['gpu'] or 'No GPU; ' + machine['processor']}, PyTorch {versions['torch']}, commit "
        f"{result['commit'][:7]}. Made by `benchmarks/gpu_check.py`.",
        "",
        "| check | outcome | s | |",
        "|---|---|---:|---|",
    ]
    for name, told in result["checks"].items():
        said = told.get("why", "").splitlines()[:1] or [(CHECKS[name].__doc__ or "").splitlines()[0]]
        lines.append(f"| {name.replace('_', ' ')} | {told['outcome']} | {told['seconds']:.0f} | {said[0]} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=list(CHECKS))
    parser.add_argument("--encoder", default=Bench.encoder)
    parser.add_argument("--pretrained", help="its weights, as a file; random ones by default")
    for name in ("resolution", "side_resolution", "images", "steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Bench, name))
    args = vars(parser.parse_args(arguments))
    checks = args.pop("checks")
    return run(Bench(**args), checks)


def run(bench: Bench, checks: Sequence[str]) -> int:
    """Run the checks, write what they came to after each, and say whether one failed."""
    bench.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {**environment(), "checks": {}}
    for name in checks:
        print(f"== {name}", flush=True)
        result["checks"][name] = outcome(CHECKS[name], bench)
        (bench.out / "gpu_check.json").write_text(json.dumps(result, indent=2) + "\n")
        (bench.out / "gpu_check.md").write_text(report(result))
    print(report(result))
    return int(any(told["outcome"] == "failed" for told in result["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
