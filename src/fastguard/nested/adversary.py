"""An attacker that trains LoRA adapters: fresh ones for every attack, on top of whatever the defender trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastguard.nested.guard import derived_seed


class LoRAAdversary:
    """Adapters for a simulated attacker, put into ``model`` by PEFT.

    They start, and between attacks remain, at zero effect (B = 0), so that the model computes what it computed before.
    Construct it before FSDP2 shards the model and before a compiled model's first call.

        adversary = LoRAAdversary(model, rank=8)
        attack = SimulatedAttack(model, trains=adversary.trains, reads=adversary.reads)

    Args:
        model: a transformers model, or a PEFT model whose own adapters the defender trains.
        rank, alpha, target_modules: as in ``peft.LoraConfig``.
        seed: of the adapters' initial A; one start for all attacks, as the snapshot restores it.

    Raises:
        ImportError: peft is not installed. ValueError: the model holds such adapters already.
    """

    NAME = "adversary"

    def __init__(
        self,
        model: nn.Module,
        rank: int = 8,
        alpha: int = 16,
        target_modules: Any = "all-linear",
        seed: int = 0,
    ) -> None:
        from peft import LoraConfig, PeftModel, inject_adapter_in_model

        if any(self.trains(name, p) for name, p in model.named_parameters()):
            raise ValueError(f"model: it has an adapter named {self.NAME!r} already")
        self.model = model
        self._on_peft = isinstance(model, PeftModel)
        self._trained = {id(p) for p in model.parameters() if p.requires_grad}
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=target_modules, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(derived_seed("adversary", seed))
            if self._on_peft:
                own = list(model.active_adapters)  # type: ignore[arg-type]
                model.add_adapter(self.NAME, config)  # type: ignore[operator]
                model.base_model.set_adapter([*own, self.NAME])  # type: ignore[union-attr, operator]
            else:
                inject_adapter_in_model(config, model, adapter_name=self.NAME)
        for name, p in model.named_parameters():
            p.requires_grad_(id(p) in self._trained or self.trains(name, p))

    def trains(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the attacker moves the parameter."""
        return ".lora_" in name and f".{self.NAME}." in name

    def reads(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the parameter is one that the defender trained before there was an adversary."""
        return parameter.requires_grad and not self.trains(name, parameter)

    def remove(self) -> None:
        """Take the adapters out of the model."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        if self._on_peft:
            self.model.delete_adapter(self.NAME)  # type: ignore[operator]
            return
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, BaseTunerLayer):
                    setattr(module, name, child.get_base_layer())
        del self.model.peft_config
