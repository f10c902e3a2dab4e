"""LoRA (Hu et al., 2022) and AdaLoRA (Zhang et al., 2023) on queries and values, through peft."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fpt_lightning.errors import ConfigurationError, EncoderError
from fpt_lightning.methods.tuning import EncoderTuningModule

_TARGETS = r"blocks\.\d+\.attn\.(qkv\.)?(q|v|q_proj|v_proj)"
_ADAPTER = "default"  # peft's name of its first adapter


class LoRAModule(EncoderTuningModule):
    """Low-rank updates of the query and value projections of every block.

    Args:
        num_classes: number of classes.
        rank: of an update (16 reproduces the paper's share of learnable parameters).
        alpha: an update is scaled by ``alpha / rank`` (paper: scale factor 16).
        **kwargs: see ``EncoderTuningModule`` and ``ClassificationModule``.

    Raises:
        ConfigurationError: values that cannot work, or peft is not installed.
    """

    LABEL = "LoRA"
    ARCHITECTURE: ClassVar[tuple[str, ...]] = (*EncoderTuningModule.ARCHITECTURE, "rank", "alpha")

    def __init__(self, num_classes: int | None = None, rank: int = 16, alpha: float = 16.0, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        _check_peft()
        if rank < 1:
            raise ConfigurationError(f"rank is {rank}: give at least 1.")
        self.rank, self.alpha = rank, alpha

    def adapt(self, vit: Any) -> None:
        """Add the updates.

        Raises:
            EncoderError: an attention whose query and value projections cannot be told apart.
        """
        peft = _import_peft()
        split_projections(vit)
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=_TARGETS)
        peft.LoraModel(vit, config, _ADAPTER)
        _check_targets(vit, self.encoder_shape.depth)


class AdaLoRAModule(EncoderTuningModule):
    """LoRA as a singular value decomposition, whose ranks fall where they matter least.

    The budget of ranks is held for the first tenth of the steps, falls until half of them, and is fixed then.

    Args:
        num_classes: number of classes.
        rank: mean rank of an update in the end.
        initial_rank: of every update (12 reproduces the paper's share of learnable parameters).
        alpha: scale factor of the updates.
        orthogonality: weight of the loss that keeps the singular vectors orthogonal.
        **kwargs: see ``EncoderTuningModule`` and ``ClassificationModule``.

    Raises:
        ConfigurationError: values that cannot work, or peft is not installed.
    """

    LABEL = "AdaLoRA"
    ARCHITECTURE: ClassVar[tuple[str, ...]] = (*EncoderTuningModule.ARCHITECTURE, "initial_rank", "alpha")

    def __init__(
        self,
        num_classes: int | None = None,
        rank: int = 8,
        initial_rank: int = 12,
        alpha: float = 16.0,
        orthogonality: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        _check_peft()
        if not 1 <= rank < initial_rank:
            raise ConfigurationError(f"rank is {rank}, initial_rank {initial_rank}: give 1 <= rank < initial_rank.")
        self.rank, self.initial_rank, self.alpha, self.orthogonality = rank, initial_rank, alpha, orthogonality
        self._tuner: tuple[Any, ...] = ()  # a tuple, so that it is no submodule: it holds the encoder

    def adapt(self, vit: Any) -> None:
        """Add the updates.

        Raises:
            EncoderError: an attention whose query and value projections cannot be told apart.
        """
        peft = _import_peft()
        split_projections(vit)
        config = peft.AdaLoraConfig(
            init_r=self.initial_rank,
            target_r=self.rank,
            lora_alpha=self.alpha,
            orth_reg_weight=self.orthogonality,
            target_modules=_TARGETS,
            total_step=1,  # known when training starts
        )
        self._tuner = (peft.AdaLoraModel(vit, config, _ADAPTER),)
        _check_targets(vit, self.encoder_shape.depth)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank that each update has now, by its projection's name."""
        updates = {n: p for n, p in self.vit.named_parameters() if "lora_E" in n}
        return {name.split(".lora_E")[0]: int(p.count_nonzero()) for name, p in updates.items()}

    def orthogonal_loss(self) -> Tensor:
        """Mean over all singular matrices P of ``||P^T P - I||`` (Zhang et al., 2023, equation 4), weighted."""
        grams = [p @ p.T for n, p in self.vit.named_parameters() if "lora_A" in n]
        grams += [p.T @ p for n, p in self.vit.named_parameters() if "lora_B" in n]
        norms = [torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device)) for g in grams]
        return self.orthogonality * torch.stack(norms).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy and the orthogonal loss."""
        return super().training_step(batch, batch_idx) + self.orthogonal_loss()

    def on_train_start(self) -> None:
        """Lay out the schedule of ranks over the steps to come; a checkpoint's importance follows to the device."""
        super().on_train_start()
        for table in self._importance:
            table.update({name: tensor.to(self.device) for name, tensor in table.items()})
        config = self._tuner[0].peft_config[_ADAPTER]
        config.total_step = int(self.trainer.estimated_stepping_batches)
        config.tinit, config.tfinal = config.total_step // 10, config.total_step // 2

    def after_step(self, step: int) -> None:
        """Allocate the ranks, while the gradients are there."""
        self._allocate(step)
        super().after_step(step)

    @property
    def _importance(self) -> list[dict[str, Tensor]]:
        """peft's tables: of the last step, its mean and its spread over the steps, by parameter."""
        allocator = self._tuner[0].rankallocator
        return [allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc]

    def _allocate(self, step: int) -> None:
        """peft's ``update_and_allocate``, but that gradients which overflowed, as in ``16-mixed``, tell no importance.

        The scaler leaves their steps out; one would make the means NaN for good, and no rank would fall.
        """
        allocator, config = self._tuner[0].rankallocator, self._tuner[0].peft_config[_ADAPTER]
        last = config.total_step - config.tfinal  # at which the ranks are fixed
        if step > last:
            if config.rank_pattern:
                allocator.mask_using_rank_pattern(self.vit, config.rank_pattern)
            return
        finite = [parameter.grad.isfinite().all() for parameter in self.parameters() if parameter.grad is not None]
        if step < last and torch.stack(finite).all():
            allocator.update_ipt(self.vit)
        budget, due = allocator.budget_schedule(step)
        if (due or step == last) and allocator.ipt:
            with _SortedKthValue():
                config.rank_pattern = allocator.mask_to_budget(self.vit, budget)
        if step == last:
            allocator.reset_ipt()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint to go on from keeps what the ranks' importance has been so far."""
        super().on_save_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint:
            checkpoint["adalora"] = {
                "importance": self._importance,
                "rank_pattern": self._tuner[0].peft_config[_ADAPTER].rank_pattern,
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the importance of the ranks."""
        super().on_load_checkpoint(checkpoint)
        if "adalora" in checkpoint:
            allocator = self._tuner[0].rankallocator
            allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc = checkpoint["adalora"]["importance"]
            self._tuner[0].peft_config[_ADAPTER].rank_pattern = checkpoint["adalora"]["rank_pattern"]


class _SortedKthValue(TorchFunctionMode):
    """``torch.kthvalue(x, k)`` of x (N,) by a sort: of torch 2.6, it has no deterministic form on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _kth_value(*args, **(kwargs or {})) if func is torch.kthvalue else func(*args, **(kwargs or {}))


def _kth_value(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = x.sort()
    return values[k - 1], indices[k - 1]


class SplitProjection(nn.Module):
    """A fused projection of queries, keys and values as three, so that each can be adapted alone.

    Args:
        fused: (D -> queries + keys + values).
        queries: outputs of it that are queries; the rest is halved.
    """

    def __init__(self, fused: nn.Linear, queries: int) -> None:
        super().__init__()
        rest = (fused.out_features - queries) // 2
        self.q = _rows(fused, 0, queries)
        self.k = _rows(fused, queries, rest)
        self.v = _rows(fused, queries + rest, rest)

    def forward(self, x: Tensor) -> Tensor:
        """(..., queries + keys + values) from (..., D)."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def split_projections(vit: Any) -> None:
    """Replace every fused projection of timm's ViT by three; those that are apart already stay.

    The outputs stay the same. BEiT and EVA call ``F.linear`` with the fused weight and a bias of their own; timm's
    switch ``qkv_bias_separate`` makes them call the projection as a module, and add the bias to what it gives.
    """
    for block in vit.blocks:
        attention = block.attn
        if isinstance(getattr(attention, "qkv", None), nn.Linear):
            if getattr(attention, "q_bias", None) is not None:
                attention.qkv_bias_separate = True
            head_dim = getattr(attention, "head_dim", attention.qkv.out_features // (3 * attention.num_heads))
            attention.qkv = SplitProjection(attention.qkv, attention.num_heads * head_dim)


def _rows(fused: nn.Linear, start: int, size: int) -> nn.Linear:
    part = nn.Linear(fused.in_features, size, bias=fused.bias is not None, device="meta")
    part.weight = nn.Parameter(fused.weight[start : start + size].clone(), requires_grad=False)
    if fused.bias is not None:
        part.bias = nn.Parameter(fused.bias[start : start + size].clone(), requires_grad=False)
    return part


def _check_targets(vit: nn.Module, depth: int) -> None:
    found = sum("lora_A" in name for name, _ in vit.named_parameters())
    if found != 2 * depth:
        raise EncoderError(
            f"{type(vit).__name__} has {found} query and value projections that LoRA can reach, where its {depth} "
            f"blocks should have {2 * depth}: choose another method for this encoder."
        )


def _check_peft() -> None:
    if find_spec("peft") is None:
        raise ConfigurationError("LoRA and AdaLoRA need peft: pip install 'fpt-lightning[peft]'.")


def _import_peft() -> Any:
    import peft  # takes seconds

    return peft
