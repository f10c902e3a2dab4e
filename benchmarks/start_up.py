"""What a run does before its first batch, by the size of its data set: seconds, memory, looks at files.

    python benchmarks/start_up.py     # 20 minutes on two CPU cores, most of it to make and remove 4 GB of small files

Images are files without content, all of one size as uncompressed DICOM files are, three a patient and folder, listed in
a CSV manifest. Their store is complete; its shards are links to one. Each step runs in a process of its own. Writes
``results/start_up.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import lightning as L
import numpy as np

from environment import RESULTS, environment, write_result
from fpt_lightning import FPTPlusModule, PreloadedFeatureDataModule
from fpt_lightning.cli.store_info import store_info
from fpt_lightning.data.manifest import Manifest, Sample
from fpt_lightning.store.index import FileRecord
from fpt_lightning.store.layout import SHARD
from fpt_lightning.store.preload import feature_shape
from fpt_lightning.store.writing import WritableStore
from training_step import exponent

COUNTS, IMAGE_BYTES, MIB = (1_000, 10_000, 100_000, 400_000), 2**20, 2**20
SPLITS = ("train", "train", "train", "train", "train", "train", "train", "val", "test", "test")


def model() -> FPTPlusModule:
    return FPTPlusModule(num_classes=2, encoder="test_vit", pretrained=False, side_resolution=32, prompts=4)


def data_module(folder: Path) -> PreloadedFeatureDataModule:
    """With every default but the sizes: mean, std and range of values are ``auto``."""
    store = str(folder / "store.zarr")
    return PreloadedFeatureDataModule(
        str(folder / "images"), store, manifest="labels.csv", resolution=64, image_size=32, batch_size=8
    )


def make(folder: Path, count: int) -> None:
    """A data set of ``count`` images, and a complete store of it."""
    root = folder / "images"
    samples = [
        Sample(f"p{i // 3:06d}/{i % 3}.png", i % 2, split=SPLITS[i // 3 % 10], group=f"p{i // 3}") for i in range(count)
    ]
    for sample in samples:
        (root / sample.id).parent.mkdir(parents=True, exist_ok=True)
        (root / sample.id).touch()
        os.truncate(root / sample.id, IMAGE_BYTES)
    manifest = Manifest(root, tuple(samples), ("a", "b"))
    manifest.write(root / "labels.csv")
    data, encoder = data_module(folder), model().encoder_config
    data.listed, data.value_range = manifest, "full"
    specification = replace(
        data.asked_store(encoder), mean=(0.5,) * 3, std=(0.25,) * 3, weights_digest="none", range_of="none"
    )
    shape = feature_shape(encoder, data.resolution)
    store = WritableStore.create(data.url, specification, shape, {}).extend([sample.id for sample in samples])
    files = [FileRecord(IMAGE_BYTES, (root / id).stat().st_mtime_ns, i) for i, id in enumerate(store.ids, 1)]
    content = {name: np.zeros((SHARD, *size), dtype) for name, (size, dtype) in store.sample_arrays.items()}
    store.write(range(SHARD), content, files[:SHARD])
    put = store._put
    with mock.patch.object(store, "_put", lambda name, *rows: None if name in content else put(name, *rows)):
        for start in range(SHARD, count, SHARD):
            rows = range(start, min(start + SHARD, count))
            own = {name: block[: len(rows)] for name, block in content.items()}
            store.write(rows, own, [files[row] for row in rows])  # whose records alone are written
    for name in content:
        for shard in range(1, -(-count // SHARD)):
            link = Path(store.url) / store.shard_path(name, shard)
            link.parent.mkdir(parents=True)
            os.link(Path(store.url) / store.shard_path(name, 0), link)


class FirstBatch(L.Callback):
    """Notes the time when the first batch is there."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.at = time.process_time(), time.perf_counter()


def fit(folder: Path) -> dict[str, tuple[float, float]]:
    """What ``fit`` does until its first batch, and then for the test: CPU and wall seconds of each part."""
    data, module, first = data_module(folder), model(), FirstBatch()
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_steps": 1}
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(**settings, **quiet, limit_val_batches=0, callbacks=[first], default_root_dir=folder)
    marks = [("", (time.process_time(), time.perf_counter()))]

    def mark(name: str) -> None:
        marks.append((name, (time.process_time(), time.perf_counter())))

    data.check("fit", module)
    mark("read the manifest, open the store")
    data.preload(module, trainer)
    mark("preload, of which nothing is left to do")
    data.labelled.write(folder / "split.csv")
    mark("write split.csv")
    trainer.fit(module, data)
    marks.append(("setup, to the first batch", first.at))
    after = time.process_time(), time.perf_counter()
    data.setup("test")
    marks += [("", after)]
    mark("setup of the test")
    return {
        name: (cpu - before[0], wall - before[1])
        for (_, before), (name, (cpu, wall)) in itertools.pairwise(marks)
        if name
    }


def preload(folder: Path) -> None:
    data_module(folder).preload(model())


def info(folder: Path) -> None:
    with redirect_stdout(sys.stderr):
        store_info(str(folder / "store.zarr"))


STEPS: dict[str, Callable[[Path], Any]] = {"fit": fit, "preload": preload, "store info": info}


@contextmanager
def counted(root: Path) -> Iterator[Counter[str]]:
    """How often files below a folder are looked at (``stat``) and opened while this is entered, by kind and path."""
    calls, within = Counter[str](), f"{root}{os.sep}"

    def counting(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(path: Any, *args: Any, **options: Any) -> Any:
            if str(path).startswith(within):
                calls[f"{kind} {path}"] += 1
            return function(path, *args, **options)

        return called

    with ExitStack() as stack:
        for name, kind, function in (
            ("os.stat", "stat", os.stat),
            ("os.open", "open", os.open),
            ("io.open", "open", open),
            ("builtins.open", "open", open),
        ):
            stack.enter_context(mock.patch(name, counting(kind, function)))
        yield calls


def measured(step: str, folder: Path) -> dict[str, Any]:
    """Seconds and memory of a step, in this process."""
    model()  # imports and first uses, which do not grow
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    cpu, wall = time.process_time(), time.perf_counter()
    parts = STEPS[step](folder)
    result: dict[str, Any] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    if parts:
        started = list(parts.values())[:-1]
        result |= {"parts": parts, "cpu": sum(cpu for cpu, _ in started), "wall": sum(wall for _, wall in started)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**result, "mib": (peak - resident) / MIB}


def looks(step: str, folder: Path) -> dict[str, float]:
    """Looks at, and openings of, image files and files of the store in a step, an image."""
    count = sum(len(files) for *_, files in os.walk(folder / "images")) - 1
    found: dict[str, float] = {}
    with counted(folder) as calls:
        STEPS[step](folder)
    for what, part in (("images", f"{folder}/images/p"), ("store", f"{folder}/store.zarr")):
        for kind in ("stat", "open"):
            total = sum(n for call, n in calls.items() if call.startswith(f"{kind} {part}"))
            found[f"{kind}, {what}"] = total / count
    return found


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives in a process of its own, which has the libraries already."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(function, *args).result()


def report(result: Mapping[str, Any]) -> str:
    """The Markdown file."""
    machine, counts = result["machine"], result["counts"]
    heads = " | ".join(f"{count:,}" for count in counts)
    lines = [
        "# Start-up",
        "",
        f"From the start of the work to the first batch, by images; {machine['processor']}, {machine['cores']} cores. "
        "The store is complete. CPU seconds (wall seconds). Exponents are of the upper half. Made by "
        "`benchmarks/start_up.py`.",
        "",
        f"| step | {heads} | exponent of the CPU time |",
        f"|---|{'---:|' * (len(counts) + 1)}",
    ]
    for step, rows in result["steps"].items():
        cells = " | ".join(f"{row['cpu']:.2f} ({row['wall']:.2f})" for row in rows)
        lines.append(f"| **{step}** | {cells} | {result['exponents'][step]:.2f} |")
        for part in rows[0].get("parts", ()):
            cells = " | ".join("{:.2f} ({:.2f})".format(*row["parts"][part]) for row in rows)
            lines.append(f"| {step}: {part} | {cells} | |")
    lines += ["", "The setup of the test comes after the training, and is not in the sum of fit.", ""]
    lines += [f"| peak, MiB beside the libraries | {heads} |", f"|---|{'---:|' * len(counts)}"]
    for step, rows in result["steps"].items():
        lines.append(f"| {step} | " + " | ".join(f"{row['mib']:.0f}" for row in rows) + " |")
    lines += ["", "| calls, an image | " + " | ".join(result["looks"]["fit"]) + " |", f"|---|{'---:|' * 4}"]
    for step, row in result["looks"].items():
        lines.append(f"| {step} | " + " | ".join(f"{calls:.2f}" for calls in row.values()) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--folder", help="where the data sets are made; the folder for temporary files by default")
    args = parser.parse_args()
    steps: dict[str, list[dict[str, Any]]] = {step: [] for step in STEPS}
    for count in args.counts:
        with TemporaryDirectory(dir=args.folder) as name:
            in_new_process(make, Path(name), count)
            for step in STEPS:
                steps[step].append(in_new_process(measured, step, Path(name)))
                print(count, step, steps[step][-1], flush=True)
            if count == args.counts[0]:
                found = {step: in_new_process(looks, step, Path(name)) for step in STEPS}
    exponents = {step: exponent(args.counts, [row["cpu"] for row in rows]) for step, rows in steps.items()}
    result = {"counts": args.counts, "steps": steps, "exponents": exponents, "looks": found}
    write_result("start_up", result)
    (RESULTS / "start_up.md").write_text(report({**environment(), **result}))


if __name__ == "__main__":
    main()
