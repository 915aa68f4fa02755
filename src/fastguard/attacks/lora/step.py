"""Harmful fine-tuning of low-rank adapters on all linear maps (Lermen et al. 2023, arXiv 2310.20624)."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastguard.attacks.harmful_finetuning.step import HarmfulFinetuning
from fastguard.attacks.lora.options import Options


class LoRA(HarmfulFinetuning):
    """`HarmfulFinetuning` of adapters, which this puts on the model (PEFT); `model` is the wrapped one.

    Args:
        model: a plain model; `close` takes the adapters off again. rank, alpha, dropout: as in PEFT's ``LoraConfig``.
    """

    def __init__(
        self, model: nn.Module, *, rank: int = Options.rank, alpha: float = Options.alpha,
        dropout: float = Options.dropout, seed: int = 0,
    ) -> None:  # fmt: skip
        import torch
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear")  # type: ignore[arg-type]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped: Any = get_peft_model(model, config)  # type: ignore[arg-type]
        super().__init__(wrapped, seed=seed)

    def close(self) -> None:
        """Take the adapters off the model, whose own weights are as they were."""
        super().close()
        unload: Any = self.model.unload
        unload()
