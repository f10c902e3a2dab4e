"""What the codecs of the store cost: bytes, errors of keys, values, prompts and logits, and AUC after training.

    python benchmarks/store_codecs.py --data FOLDER --manifest labels.csv --out runs/codecs   # 90 minutes

For each encoder, the images go through the frozen pass once, into an fp32 store, which is then coded again: stores
differ in nothing else. FPT+ is trained on fp32 and evaluated on every codec; on the first encoder, fine-tuned on the
training images here, it is also trained on every codec, with several seeds. No encoder is published, as none is
downloaded; one has outliers put in. Writes ``results/store_codecs.json`` and ``.md``. It goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Literal

import lightning as L
import timm
import torch
from safetensors.torch import save_file

from environment import RESULTS, environment, write_result
from fpt_lightning import FPTPlusModule, ImageDataModule, PreloadedFeatureDataModule
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.errors import StoreError
from fpt_lightning.evaluation.metrics import classification_metrics
from fpt_lightning.methods import FineTuningModule
from fpt_lightning.store.codecs import CODECS, as_features, encode, relative_error
from fpt_lightning.store.index import FileRecord
from fpt_lightning.store.layout import SHARD
from fpt_lightning.store.store import FeatureStore
from fpt_lightning.store.writing import WritableStore

ENCODERS = {  # label: timm's name
    "ViT-Ti, fine-tuned": "vit_tiny_patch16_224",
    "ViT-Ti, outliers put in": "vit_tiny_patch16_224",
    "EVA02-Ti, untrained": "eva02_tiny_patch14_224",
    "DINOv3 ViT-S, untrained": "vit_small_patch16_dinov3",
}
RESOLUTION, NATIVE = 448, 224  # which patches of 14 and of 16 pixels divide
PUBLISHED_BYTES = 7_557_296  # an image of ViT-B at 512 pixels, fp32


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    root: str
    manifest: str | None
    out: Path
    epochs: int
    tuning_epochs: int
    seeds: int
    resolution: int = RESOLUTION

    def data(
        self,
        store: Path,
        codec: str,
        kind: type[PreloadedFeatureDataModule] = PreloadedFeatureDataModule,
        orientations: Literal[1, 2, 4, 8] = 1,
    ) -> PreloadedFeatureDataModule:
        return kind(
            self.root,
            str(store),
            codec=codec,  # type: ignore[arg-type]
            orientations=orientations,
            manifest=self.manifest,
            resolution=self.resolution,
            mean=[0.5],
            std=[0.25],
        )

    def fit(self, model: L.LightningModule, data: L.LightningDataModule, epochs: int) -> None:
        trainer = L.Trainer(
            max_epochs=epochs,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=self.out,
        )
        trainer.fit(model, data)


def fine_tuned(setting: Setting, name: str, path: Path) -> None:
    """Weights of an encoder that was trained from nothing on the training images at its native resolution."""
    L.seed_everything(0)
    data = ImageDataModule(
        setting.root, setting.manifest, resolution=NATIVE, mean=[0.5], std=[0.25], image_size=NATIVE, num_workers=1
    )
    classes = len(data.read_manifest().classes)
    module = FineTuningModule(classes, encoder=name, pretrained=False, learning_rate=3e-4, warmup_epochs=1)
    setting.fit(module, data, setting.tuning_epochs)
    save_file({k: v.contiguous() for k, v in module.vit.state_dict().items()}, path)


def with_outliers(name: str, path: Path) -> None:
    """Random weights with what large trained ViTs have: key channels of some 20 times the magnitude of the others."""
    torch.manual_seed(0)
    vit: Any = timm.create_model(name, pretrained=False)
    for block in vit.blocks:
        block.attn.qkv.bias.data[vit.embed_dim : 2 * vit.embed_dim : 37] = 10.0
    save_file(vit.state_dict(), path)


def weights(setting: Setting, label: str) -> bool | str:
    path = setting.out / (label.replace(", ", "-").replace(" ", "-") + ".safetensors")
    if "untrained" in label:
        return False
    if not path.is_file():
        (fine_tuned if "fine-tuned" in label else lambda _, *rest: with_outliers(*rest))(setting, ENCODERS[label], path)
    return str(path)


def coded_again(source: FeatureStore, url: Path, codec: str, root: Path) -> FeatureStore:
    """A store of the same features in another codec.

    Raises:
        StoreError: the codec would distort them.
    """
    specification = replace(source.specification, codec=codec)
    if FeatureStore.exists(str(url)):
        store = WritableStore.open(str(url))
    else:
        store = WritableStore.create(str(url), specification, source.shape, {}).extend(source.ids)
    for start in range(0, len(source.ids), SHARD):
        rows = range(start, min(start + SHARD, len(source.ids)))
        if store.done[list(rows)].all():
            continue
        content = {name: source.read(rows, name) for name in source.sample_arrays if name != "features"}
        features = torch.from_numpy(source.read(rows, "features"))
        content |= encode(features, specification, [source.ids[row] for row in rows])
        store.write(rows, content, [FileRecord.of(root / source.ids[row]) for row in rows])
    return FeatureStore.open(str(url))


@torch.no_grad()
def outputs(model: FPTPlusModule, data: PreloadedFeatureDataModule) -> Iterator[dict[str, torch.Tensor]]:
    """Labels, logits (B, classes) and fused prompts (B, L, M, d) of the test images."""
    for batch in data.test_dataloader():
        fused = torch.stack(model.fusion(as_features(batch)), 1)
        yield {"labels": batch["labels"], "logits": model(batch), "prompts": fused}


def evaluated(model: FPTPlusModule, data: PreloadedFeatureDataModule) -> dict[str, torch.Tensor]:
    """``outputs`` of all test images."""
    data.side_resolution = model.side_resolution
    data.setup("test")
    batches = list(outputs(model.eval(), data))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def auc(result: dict[str, torch.Tensor], classes: int) -> float:
    metrics = classification_metrics(classes, "")
    metrics.update(result["logits"].softmax(-1), result["labels"])
    return float(metrics.compute()["auc"])


def error(coded: torch.Tensor, exact: torch.Tensor) -> float:
    """RMS of the difference / RMS of what differs between images."""
    return float((coded - exact).square().mean().sqrt() / (exact - exact.mean(0)).square().mean().sqrt())


def trained(setting: Setting, label: str, store: Path, codec: str, seed: int) -> FPTPlusModule:
    """FPT+ after training on a store; kept in a file."""
    L.seed_everything(seed)
    data = setting.data(store, codec)
    classes = len(data.read_manifest().classes)
    path = setting.out / f"{store.stem}-{seed}.pt"
    patch = EncoderConfig(ENCODERS[label]).shape.patch_size[0]
    model = FPTPlusModule(
        classes,
        encoder=ENCODERS[label],
        pretrained=weights(setting, label),
        prompt_head=False,
        side_resolution=8 * patch,
        learning_rate=3e-3,
    )
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        setting.fit(model, data, setting.epochs)
        torch.save(model.state_dict(), path)
    return model


def codec_errors(source: FeatureStore, codec: str, samples: int = 64) -> dict[str, float]:
    """Relative errors of heads' keys and values, over images, blocks and heads."""
    rows = torch.linspace(0, len(source.ids) - 1, samples).long().tolist()
    features = torch.from_numpy(source.read(rows, "features"))
    errors = relative_error(features, CODECS[codec].encode(features))
    keys, values = (errors[:, part].flatten().tolist() for part in (0, 1))
    return {"keys": median(keys), "values": median(values), "largest": max(keys + values)}


def measured(setting: Setting, label: str, train_on_each: bool) -> list[dict[str, Any]]:
    """Every codec on one encoder."""
    name = label.replace(", ", "-").replace(" ", "-")
    stores = {codec: setting.out / f"{name}-{codec}.zarr" for codec in CODECS}
    given = EncoderConfig(ENCODERS[label], weights(setting, label))
    source = setting.data(stores["fp32"], "fp32").preload(given)
    model = trained(setting, label, stores["fp32"], "fp32", 0)
    exact = evaluated(model, setting.data(stores["fp32"], "fp32"))
    rows = []
    for codec in CODECS:
        row: dict[str, Any] = {"encoder": label, "codec": codec, **codec_errors(source, codec)}
        rows.append(row)
        try:
            store = source if codec == "fp32" else coded_again(source, stores[codec], codec, Path(setting.root))
        except StoreError as refused:
            row["refused"] = str(refused)
            continue
        result = evaluated(model, setting.data(stores[codec], codec))
        row["bytes"] = store.bytes_per_row
        row["prompts"], row["logits"] = (error(result[part], exact[part]) for part in ("prompts", "logits"))
        row["changed"] = int((result["logits"].argmax(1) != exact["logits"].argmax(1)).sum())
        row["auc"] = auc(result, model.num_classes)
        if train_on_each:
            models = [trained(setting, label, stores[codec], codec, seed) for seed in range(setting.seeds)]
            data = setting.data(stores[codec], codec)
            row["trained_auc"] = [auc(evaluated(each, data), each.num_classes) for each in models]
        print(json.dumps(row), flush=True)
    return rows


def report(rows: Sequence[dict[str, Any]], setting: Setting, images: int) -> str:
    """The table."""
    described = " ".join((__doc__ or "").split("\n\n")[2].split()).replace("``", "`")
    lines = [
        f"{described.split(' Writes')[0]} {images} test images at {setting.resolution} pixels, {setting.epochs} epochs "
        f"of FPT+; {environment()['machine']['processor']}. Errors are in percent: of keys and values the median over "
        "images, blocks and heads, and the largest of either (relative to a typical channel); of fused prompts and "
        "logits relative to what differs between images. Changed: answers, of the model trained on fp32. AUC: macro, "
        f"x 100, of that model; then of {setting.seeds} models trained on the codec (mean ± standard deviation).",
        "",
        "| Encoder | Codec | Bytes | Keys | Values | Largest | Prompts | Logits | Changed | AUC | AUC, trained |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        percent = [f"{100 * row[name]:.2g}" for name in ("keys", "values", "largest")]
        if "refused" in row:
            lines.append(f"| {row['encoder']} | {row['codec']} | refused | {' | '.join(percent)} | | | | | |")
            continue
        percent += [f"{100 * row[name]:.2g}" for name in ("prompts", "logits")]
        scores = [100 * value for value in row.get("trained_auc", [])]
        spread = f" ± {stdev(scores):.2f}" if len(scores) > 1 else ""
        lines.append(
            f"| {row['encoder']} | {row['codec']} | {row['bytes']:,} | {' | '.join(percent)} | {row['changed']} "
            f"| {100 * row['auc']:.2f} | {f'{mean(scores):.2f}{spread}' if scores else ''} |"
        )
    for row in rows:
        if "refused" in row:
            lines += ["", f"Refused: {row['refused'].replace(setting.root, 'images')}"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True, help="folder of the images")
    parser.add_argument("--manifest", help="CSV file instead of class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of weights, stores and models")
    parser.add_argument("--epochs", type=int, default=15, help="of FPT+")
    parser.add_argument("--tuning-epochs", type=int, default=8, help="of the encoder that is fine-tuned")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=RESOLUTION)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.data, args.manifest, args.out, args.epochs, args.tuning_epochs, args.seeds, args.resolution)
    rows = [row for i, label in enumerate(ENCODERS) for row in measured(setting, label, train_on_each=i == 0)]
    images = len(setting.data(args.out / "none", "fp32").read_manifest().split("test"))
    about = {name: value for name, value in asdict(setting).items() if name not in ("root", "out")}
    path = write_result("store_codecs", {**about, "images": images, "rows": rows})
    (RESULTS / "store_codecs.md").write_text(report(rows, setting, images) + "\n")
    print(f"results are in {path} and .md beside it")


if __name__ == "__main__":
    main()
