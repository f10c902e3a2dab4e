"""Every method with what must be true of it, on timm's ``test_vit``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fpt_lightning.methods import (
    AdaLoRAModule,
    AdapterModule,
    AttentionTuningModule,
    AttentiveProbingModule,
    BitFitModule,
    ClassificationModule,
    FineTuningModule,
    FPTModule,
    FPTPlusModule,
    LinearProbingModule,
    LoRAModule,
    PromptTuningModule,
    QueryTokensModule,
    StoredLinearProbingModule,
)
from fpt_lightning.methods.tuning import EncoderModule


@dataclass(frozen=True)
class Case:
    """A method, and what must be true of it on ``test_vit`` (width 64, 6 blocks, 2 heads)."""

    method: type[ClassificationModule]
    learns: Callable[[str], bool]  # which of timm's parameters (by name) learn; ignored where the encoder is outside
    added: tuple[str, ...] = ()  # parts of the names of what the method adds
    options: dict[str, Any] = field(default_factory=dict)
    rate: float = 3e-3


def nothing(name: str) -> bool:
    return False


SIDE = {"side_resolution": 32, "prompts": 4}
CASES = {
    "fpt_plus": Case(FPTPlusModule, nothing, options=SIDE),
    "fpt": Case(FPTModule, nothing, options=SIDE),
    "full": Case(FineTuningModule, lambda name: True, rate=3e-4),
    "linear": Case(LinearProbingModule, nothing, rate=1e-2),
    "prompt": Case(PromptTuningModule, nothing, ("prompts",), rate=1e-2),
    "attention": Case(AttentionTuningModule, lambda name: ".attn." in name, rate=1e-3),
    "adapter": Case(AdapterModule, nothing, (".mlp.down", ".mlp.up"), rate=1e-2),
    "bitfit": Case(BitFitModule, lambda name: name.endswith("bias"), rate=1e-2),
    "lora": Case(LoRAModule, nothing, ("lora_A", "lora_B")),
    "adalora": Case(AdaLoRAModule, nothing, ("lora_A", "lora_B", "lora_E"), {"rank": 2, "initial_rank": 4}, 1e-2),
    "stored_linear": Case(StoredLinearProbingModule, nothing, rate=1e-2),
    "attentive": Case(AttentiveProbingModule, nothing, rate=1e-2),
    "query_tokens": Case(QueryTokensModule, nothing, options={"prompts": 4}),
}
TUNING = [name for name, case in CASES.items() if issubclass(case.method, EncoderModule)]
STORED = [name for name in CASES if name not in TUNING]


def make(name: str, **changes: Any) -> ClassificationModule:
    case = CASES[name]
    settings = {"encoder": "test_vit", "pretrained": False, "learning_rate": case.rate, **case.options}
    return case.method(num_classes=3, **{**settings, **changes})
