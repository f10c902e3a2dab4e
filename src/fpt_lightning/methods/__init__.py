"""The methods: one LightningModule each, over one base."""

from fpt_lightning.methods.adapter import AdapterModule
from fpt_lightning.methods.base import ClassificationModule
from fpt_lightning.methods.fpt import FPTModule, FPTPlusModule
from fpt_lightning.methods.lora import AdaLoRAModule, LoRAModule
from fpt_lightning.methods.probes import AttentiveProbingModule, QueryTokensModule, StoredLinearProbingModule
from fpt_lightning.methods.prompt_tuning import PromptTuningModule
from fpt_lightning.methods.tuning import (
    AttentionTuningModule,
    BitFitModule,
    FineTuningModule,
    LinearProbingModule,
)

METHODS: dict[str, type[ClassificationModule]] = {
    "full": FineTuningModule,
    "linear": LinearProbingModule,
    "prompt": PromptTuningModule,
    "attention": AttentionTuningModule,
    "adapter": AdapterModule,
    "bitfit": BitFitModule,
    "lora": LoRAModule,
    "adalora": AdaLoRAModule,
    "fpt": FPTModule,
    "fpt_plus": FPTPlusModule,
    "stored_linear": StoredLinearProbingModule,
    "attentive": AttentiveProbingModule,
    "query_tokens": QueryTokensModule,
}
"""By short name, in the order of the paper's Table 1; then the peers on stored features."""

__all__ = [
    "METHODS",
    "AdaLoRAModule",
    "AdapterModule",
    "AttentionTuningModule",
    "AttentiveProbingModule",
    "BitFitModule",
    "ClassificationModule",
    "FPTModule",
    "FPTPlusModule",
    "FineTuningModule",
    "LinearProbingModule",
    "LoRAModule",
    "PromptTuningModule",
    "QueryTokensModule",
    "StoredLinearProbingModule",
]
