"""What PyTorch refuses on a GPU under ``torch.use_deterministic_algorithms(True)``, found among what runs on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

ALWAYS = frozenset(
    (
        *("avg_pool3d_backward", "max_pool3d_with_indices_backward", "max_unpool2d", "max_unpool3d"),
        *("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
        *("adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward"),
        *("fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
        *("upsample_linear1d_backward", "upsample_trilinear3d_backward"),
        *("upsample_bilinear2d_backward", "_upsample_bilinear2d_aa_backward"),
        *("upsample_bicubic2d_backward", "_upsample_bicubic2d_aa_backward"),
        *("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward"),
        *("replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward"),
        *("nll_loss2d_forward", "nll_loss2d_backward", "_ctc_loss_backward", "put_", "put", "histc", "kthvalue"),
        *("grid_sampler_2d_backward", "grid_sampler_3d_backward"),
    )
)
"""Whatever their arguments are: the union of what the documentation of ``torch.use_deterministic_algorithms`` lists in
torch 2.6 and in 2.14, as the operations that a dispatch mode sees. ``NLLLoss`` there is that of pictures."""


Given = Mapping[str, Any]
SOMETIMES: dict[str, Callable[[Given], bool]] = {
    "median.dim": lambda given: True,  # with indices, unlike median
    "median.dim_values": lambda given: True,
    "nanmedian.dim": lambda given: True,
    "nanmedian.dim_values": lambda given: True,
    "cumsum": lambda given: bool(given["self"].is_floating_point()),
    "cumsum_": lambda given: bool(given["self"].is_floating_point()),
    "bincount": lambda given: given.get("weights") is not None,
    "scatter_reduce.two": lambda given: given["reduce"] == "prod",
    "scatter_reduce_.two": lambda given: given["reduce"] == "prod",
    "_embedding_bag_backward": lambda given: given["mode"] == MAX,
    "_embedding_bag_dense_backward": lambda given: given["mode"] == MAX,
}
"""By their arguments."""
MAX = 2  # of nn.EmbeddingBag


class Refused(TorchDispatchMode):
    """Keeps the names of the operations, backward ones included, that a GPU would refuse; of this thread alone.

    Those of ``torchmetrics`` that move to the CPU by themselves on a GPU are no such.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Given | None = None) -> Any:
        self.calls += 1
        rule = _rule(func)
        if rule is not None:
            given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | {**(kwargs or {})}
            if rule(given) and not _moves_to_the_cpu():
                self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@cache
def _rule(func: Any) -> Callable[[Given], bool] | None:
    name = func._schema.name.removeprefix("aten::")
    if name in ALWAYS:
        return lambda given: True
    return SOMETIMES.get(f"{name}.{func._overloadname}", SOMETIMES.get(name))


def _moves_to_the_cpu() -> bool:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "_cumsum" and frame.f_globals["__name__"] == "torchmetrics.utilities.data":
            return True
    return False
