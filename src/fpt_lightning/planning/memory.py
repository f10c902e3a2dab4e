"""Memory of training and of the frozen pass: counted exactly while they run, or predicted where they never do."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast

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
from fpt_lightning.methods import ClassificationModule
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.tuning import build_on_meta
from fpt_lightning.store.codecs import CODECS, check_codec
from fpt_lightning.store.preload import feature_shape

Precision = Literal["32-true", "bf16-mixed"]
Attention = Literal["fused", "eager"]
_Module = TypeVar("_Module", bound=nn.Module)


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
    """

    def __init__(
        self,
        module: ClassificationModule,
        batch: Mapping[str, Any],
        precision: Precision = "32-true",
        attention: Attention = "fused",
    ) -> None:
        self.module, self.batch = module.train(), batch
        self.precision, self.attention = precision, attention
        self.learnable = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learnable, lr=1e-4, fused=True)

    def __call__(self) -> None:
        with self._context():
            loss = self.module.training_step(self.batch, 0)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.learnable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        device = next(self.module.parameters()).device
        bf16 = autocast(device, torch.bfloat16 if self.precision == "bf16-mixed" else None)
        eager = sdpa_kernel(SDPBackend.MATH) if self.attention == "eager" else contextlib.nullcontext()
        with bf16, eager, warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*self.log.*")  # there is no trainer to log to
            yield

    def live_bytes(self) -> int:
        """Peak live tensor bytes of a step, when the optimiser's state exists: parameters and batch included."""
        self()
        with LiveTensorBytes() as live:
            for part in (self.module, *getattr(self.module, "encoders", ())):
                live.count([list(part.parameters()), list(part.buffers())])
            live.count([self.batch, [p.grad for p in self.learnable], list(self.optimizer.state.values())])
            self()
        peak: int = live.peak
        return peak


def predict_training_memory(
    method: Callable[[], ClassificationModule],
    resolution: tuple[int, int],
    batch_size: int,
    *,
    precision: Precision = "32-true",
    attention: Attention = "fused",
    codec: str = "int8",
    live: bool = False,
) -> int:
    """Predict the peak live tensor bytes of a training step, on fake tensors: no weights, no memory, about a second.

    Args:
        method: makes the method, such as ``lambda: LoRAModule(5)``.
        resolution: (height, width) of the encoder's images in pixels.
        batch_size: B.
        precision: Lightning's ``32-true`` or ``bf16-mixed``.
        attention: see ``TrainingStep``.
        codec: of stored keys and values.
        live: whether the frozen encoder runs in every step, where there is no store.

    Returns:
        What ``TrainingStep.live_bytes`` would measure on the CPU.

    Raises:
        ConfigurationError: settings that cannot work.
    """
    module = build_on_meta(method, resolution)
    encoder = None
    if live and isinstance(module, FeatureModule):
        encoder = _encoder_on_meta(module.encoder_config, resolution)
    with _fake():
        _allocate(module)
        if encoder is not None:
            cast(FeatureModule, module).use_encoder(_allocate(encoder))
        batch = example_batch(module, resolution, batch_size, codec=codec, live=encoder is not None)
        return TrainingStep(module, batch, precision, attention).live_bytes()


def encoding_bytes(encoder: nn.Module, images: Tensor) -> int:
    """Peak live tensor bytes of the frozen pass over a batch, weights and images included.

    Args:
        encoder: the frozen encoder, or another one, frozen too.
        images: (B, 3, height, width), fp32, normalised.
    """
    with LiveTensorBytes() as live:
        live.count([list(encoder.parameters()), list(encoder.buffers()), images])
        encoder(images)
    peak: int = live.peak
    return peak


def predict_encoding_memory(encoder: EncoderConfig, resolution: tuple[int, int], batch_size: int) -> int:
    """Predict the peak live tensor bytes of the frozen pass, on fake tensors: no weights, no memory, about a second.

    Args:
        encoder: the frozen encoder and its selection.
        resolution: (height, width) of its images in pixels.
        batch_size: images encoded at once.

    Returns:
        What ``encoding_bytes`` would measure on the CPU.

    Raises:
        ConfigurationError: the resolution is not a multiple of the patch size.
    """
    frozen = _encoder_on_meta(encoder, resolution)
    with _fake():
        return encoding_bytes(_allocate(frozen), torch.zeros(batch_size, 3, *resolution))


@contextlib.contextmanager
def _fake() -> Iterator[None]:
    """Fake tensors; of what is done piece by piece in the same memory (attention maps, fusion), the first alone."""
    with sketched(), FakeTensorMode(allow_non_fake_inputs=True):  # shapes of the tensors on "meta"
        yield


def _allocate(module: _Module) -> _Module:
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
    return module


def _encoder_on_meta(config: EncoderConfig, resolution: tuple[int, int]) -> FrozenEncoder:
    with torch.device("meta"):
        return FrozenEncoder(replace(config, pretrained=False), resolution)
