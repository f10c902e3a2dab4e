"""Memory of training and of the frozen pass: counted exactly while they run, or predicted where they never do."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fpt_lightning.datamodules.samples import STORED
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.execution import autocast, sketched
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.methods import ClassificationModule, FPTPlusModule
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.tuning import build_on_meta
from fpt_lightning.store.codecs import CODECS, Features, check_codec
from fpt_lightning.store.preload import feature_shape

Precision = Literal["32-true", "bf16-mixed"]
Attention = Literal["fused", "eager"]
Device = Literal["cpu", "cuda"]
DEVICES: tuple[str, ...] = get_args(Device)


class LiveTensorBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live tensors while it is active: every storage once, until it is freed. Exact, any device.

    Attributes:
        current: bytes alive now.
        peak: most bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._sizes: dict[int, int] = {}

    def count(self, tensors: Any) -> None:
        """Count tensors (of any nesting) that were made before."""
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.current += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.current)

    def _freed(self, key: int) -> None:
        self.current -= self._sizes.pop(key, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(result)
        return result


def example_batch(
    module: ClassificationModule,
    resolution: tuple[int, int],
    batch_size: int,
    *,
    codec: str = "int8",
    live: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """A batch of zeros with what a method takes (its ``INPUTS``).

    Args:
        module: the method.
        resolution: (height, width) of the encoder's images in pixels.
        batch_size: B.
        codec: of stored keys and values.
        live: whether images stand in for what a store would hold.
        device: of the tensors.

    Raises:
        ConfigurationError: the resolution is not a multiple of the patch size, or an unknown codec.
    """
    check_codec(codec, module.encoder_shape.head_dim)
    shape, stored = module.encoder_shape, feature_shape(module.encoder_config, resolution)
    side = module.side_resolution or 0
    arrays: dict[str, dict[str, tuple[tuple[int, ...], Any]]] = {
        "images": {"images": ((3, *resolution), np.float32)},
        "side_images": {"side_images": ((3, side, side), np.float32)},
        "pooled": {"pooled": ((shape.width,), np.float32)},
        "features": dict(CODECS[codec].arrays(stored)),
    }
    tensors = {
        name: torch.zeros(batch_size, *size, dtype=getattr(torch, np.dtype(dtype).name), device=device)
        for given in sorted({"images" if live and name in STORED else name for name in module.INPUTS})
        for name, (size, dtype) in arrays[given].items()
    }
    labels = module.task.example_labels(batch_size).to(device)
    return {"ids": [""] * batch_size, "labels": labels, **tensors}


class TrainingStep:
    """A training step as Lightning's loop runs it, without the loop: forward, backward, clip to 1, AdamW, clear.

    Args:
        module: the method, built.
        batch: see ``example_batch``.
        precision: Lightning's ``32-true`` or ``bf16-mixed``.
        attention: ``fused``, or ``eager``, which keeps every attention map for the backward pass, as code that predates
            fused attention does.
        foreach: whether AdamW takes all parameters at once; by default as PyTorch does, on a GPU.
    """

    def __init__(
        self,
        module: ClassificationModule,
        batch: Mapping[str, Any],
        precision: Precision = "32-true",
        attention: Attention = "fused",
        foreach: bool | None = None,
    ) -> None:
        self.module, self.batch = module.train(), batch
        self.precision, self.attention = precision, attention
        self.learnable = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learnable, lr=1e-4, foreach=foreach)

    def __call__(self) -> None:
        with _arithmetic(self.module, self.precision, self.attention):
            loss = self.module.training_step(self.batch, 0)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.learnable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def live_bytes(self) -> int:
        """Peak live tensor bytes of a step, when the optimiser's state exists: parameters and batch included."""
        for parameter in self.learnable:  # as AdamW makes it in its first step, of which nothing else is needed
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        with _counting(self.module, self.batch, list(self.optimizer.state.values())) as live:
            self()
        peak: int = live.peak
        return peak


def evaluation_bytes(module: ClassificationModule, batch: Mapping[str, Any], precision: Precision = "32-true") -> int:
    """Peak live tensor bytes of evaluating a batch, as in validation, test and prediction, parameters included."""
    with _counting(module.eval(), batch) as live, _arithmetic(module, precision), torch.no_grad():
        module.scores(module.evaluated(batch))
    peak: int = live.peak
    return peak


def explanation_bytes(module: ClassificationModule, batch: Mapping[str, Any], **deletion: Any) -> int:
    """Peak live tensor bytes of explaining a batch (``fpt_lightning.explanation.attention.look``), parameters included.

    The deletion test, which takes the most, is counted.

    Args:
        module: FPT+ or FPT.
        batch: with ``features``, or with ``images`` that are encoded first.
        **deletion: arguments of ``deletion_curves``.
    """
    from fpt_lightning.explanation.attention import look  # which takes SciPy

    assert isinstance(module, FPTPlusModule)
    with _counting(module.eval(), batch) as live, torch.no_grad():
        if "features" not in batch:
            encoded = module.encode(batch["images"])
            batch = {**batch, "features": encoded.features, "indices": encoded.indices}
            del encoded
        scores = module.scores(module.evaluated(batch))
        look(module, batch, scores, range(len(scores)), **deletion)
    peak: int = live.peak
    return peak


def encoding_bytes(encoder: nn.Module, images: Tensor) -> int:
    """Peak live tensor bytes of the frozen pass over a batch, weights and images included.

    Args:
        encoder: the frozen encoder, or another one, frozen too.
        images: (B, 3, height, width), fp32, normalised.
    """
    with _counting(encoder, images) as live:
        encoder(images)
    peak: int = live.peak
    return peak


@contextlib.contextmanager
def _counting(module: nn.Module, *others: Any) -> Iterator[LiveTensorBytes]:
    """Count what is made from now on, and a module, its frozen encoders and others that are there before."""
    with LiveTensorBytes() as live:
        for part in (module, *getattr(module, "encoders", ())):
            live.count([list(part.parameters()), list(part.buffers())])
        live.count(others)
        yield live


@contextlib.contextmanager
def _arithmetic(module: nn.Module, precision: Precision, attention: Attention = "fused") -> Iterator[None]:
    device = next(module.parameters()).device
    bf16 = autocast(device, torch.bfloat16 if precision == "bf16-mixed" else None)
    eager = sdpa_kernel(SDPBackend.MATH) if attention == "eager" else contextlib.nullcontext()
    with bf16, eager, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*self.log.*")  # there is no trainer to log to
        yield


# Predictions, on fake tensors: no weights, no memory, about a second each


def predict_training_memory(
    method: Callable[[], ClassificationModule],
    resolution: tuple[int, int],
    batch_size: int,
    *,
    precision: Precision = "32-true",
    attention: Attention = "fused",
    codec: str = "int8",
    live: bool = False,
    images_at_once: int = 4,
    device: Device = "cpu",
) -> int:
    """Predict the peak live tensor bytes of a training step.

    Args:
        method: makes the method, such as ``lambda: LoRAModule(5)``.
        resolution: (height, width) of the encoder's images in pixels.
        batch_size: B.
        precision: Lightning's ``32-true`` or ``bf16-mixed``.
        attention: see ``TrainingStep``.
        codec: of stored keys and values.
        live: whether the frozen encoder runs in every step, where there is no store.
        images_at_once: that it encodes.
        device: that the step runs on; on ``cuda`` stored tokens and attention maps are held in larger pieces, and AdamW
            takes all parameters at once.

    Returns:
        What ``TrainingStep.live_bytes`` would measure.

    Raises:
        ConfigurationError: settings that cannot work.
    """
    with _built(method, resolution, live, images_at_once, device) as module:
        batch = example_batch(module, resolution, batch_size, codec=codec, live=live)
        return TrainingStep(module, batch, precision, attention, foreach=device == "cuda").live_bytes()


def predict_evaluation_memory(
    method: Callable[[], ClassificationModule],
    resolution: tuple[int, int],
    batch_size: int,
    *,
    precision: Precision = "32-true",
    codec: str = "int8",
    live: bool = False,
    images_at_once: int = 4,
    device: Device = "cpu",
) -> int:
    """Predict the peak live tensor bytes of a batch in validation, test or prediction (``evaluation_bytes``).

    Arguments and errors as of ``predict_training_memory``.
    """
    with _built(method, resolution, live, images_at_once, device) as module:
        batch = _with_orientations(module, example_batch(module, resolution, batch_size, codec=codec, live=live))
        return evaluation_bytes(module, batch, precision)


def predict_explanation_memory(
    method: Callable[[], ClassificationModule],
    resolution: tuple[int, int],
    batch_size: int,
    *,
    codec: str = "int8",
    live: bool = False,
    images_at_once: int = 4,
    device: Device = "cpu",
) -> int:
    """Predict the peak live tensor bytes of explaining a batch with FPT+ or FPT (``explanation_bytes``).

    Arguments and errors as of ``predict_training_memory``.
    """
    with _built(method, resolution, live, images_at_once, device) as module:
        batch = _with_orientations(module, example_batch(module, resolution, batch_size, codec=codec, live=live))
        return explanation_bytes(module, batch, draws=1, fractions=[0.1])  # where the least goes, most is copied


def _with_orientations(module: ClassificationModule, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with what a store gives of the other orientations that are evaluated."""
    count = module.test_time_orientations
    if count == 1 or "images" in batch:
        return batch
    stored = {name: batch[name] for name in (*Features._fields, "pooled") if name in batch}
    return batch | {name: value.new_zeros(count * len(value), *value.shape[1:]) for name, value in stored.items()}


def predict_encoding_memory(
    encoder: EncoderConfig, resolution: tuple[int, int], batch_size: int, device: Device = "cpu"
) -> int:
    """Predict the peak live tensor bytes of the frozen pass.

    Args:
        encoder: the frozen encoder and its selection.
        resolution: (height, width) of its images in pixels.
        batch_size: images encoded at once.
        device: that it runs on, as of ``predict_training_memory``.

    Returns:
        What ``encoding_bytes`` would measure.

    Raises:
        ConfigurationError: the resolution is not a multiple of the patch size.
    """
    frozen = _encoder_on_meta(encoder, resolution)
    with _fake(device):
        _allocate(frozen)
        return encoding_bytes(frozen, torch.zeros(batch_size, 3, *resolution))


@contextlib.contextmanager
def _built(
    method: Callable[[], ClassificationModule],
    resolution: tuple[int, int],
    live: bool,
    images_at_once: int,
    device: Device,
) -> Iterator[ClassificationModule]:
    """The method, with its frozen encoder if that runs, of fake tensors."""
    module, encoder = build_on_meta(method, resolution), None
    if live and isinstance(module, FeatureModule):
        encoder, module.images_at_once = _encoder_on_meta(module.encoder_config, resolution), images_at_once
    with _fake(device):
        _allocate(module)
        if encoder is not None:
            _allocate(encoder)
            cast(FeatureModule, module).use_encoder(encoder)
        yield module


@contextlib.contextmanager
def _fake(device: Device) -> Iterator[None]:
    """Fake tensors on the CPU, in pieces as on a device, of which few are made."""
    with sketched(torch.device(device)), FakeTensorMode(allow_non_fake_inputs=True):  # shapes of those on "meta"
        yield


def _allocate(module: nn.Module) -> None:
    """Put tensors on the CPU, fake within ``_fake``, in place of those on "meta"; ``Module.to_empty`` may fail to."""
    made: dict[int, Tensor] = {}  # what is shared stays shared
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    learnable = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if learnable else empty
                if tensor is not None:
                    cast(dict[str, Any], tensors)[name] = made[id(tensor)]


def _encoder_on_meta(config: EncoderConfig, resolution: tuple[int, int]) -> FrozenEncoder:
    with torch.device("meta"):
        return FrozenEncoder(replace(config, pretrained=False), resolution)
