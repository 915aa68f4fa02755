"""Mixins that put fastguard before a trainer class: HF ``Trainer``, TRL ``SFTTrainer``, or another subclass.

    class Immunizer(NestedMixin, SFTTrainer): ...
    Immunizer(model, args, ..., data_collator=PairedCollator(tokenizer), defense=Booster(model)).train()

The trainer keeps its optimizer, schedule, clipping, logging, wrapping and checkpoints. Construct the loss or the
defense on the model that is handed to the trainer, after PEFT and before the trainer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastguard.trainers.checkpoint import Counted, packed, unpacked, write_atomically

if TYPE_CHECKING:
    from transformers import Trainer as _Base

    from fastguard.losses.repnoise import RepNoiseLoss
else:
    _Base = object

STATE_FILE = "fastguard_state.pt"
"""Beside the trainer's own state, in each of its checkpoints."""

Source = Callable[[int], Mapping[str, Tensor]]


class _Counting(_Base):
    """Checks, figures in the log, and the state of ``self._counted`` in the trainer's checkpoints."""

    loss_is_scaled_for_ga = False  # a mean a micro-batch, which the trainer divides by their number

    def __init__(self, counted: Counted, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counted = counted
        self._figures: dict[str, Tensor] = {}
        self._figured = 0
        if self.args.remove_unused_columns:
            raise ValueError(
                "args.remove_unused_columns: expected False, got True; it drops the columns that the collator pairs"
            )
        if self.args.n_gpu > 1:
            raise ValueError(f"args.n_gpu: expected 1, got {self.args.n_gpu}; start one process a GPU (torchrun)")

    def _note(self, figures: Mapping[str, Tensor]) -> None:
        """Add 0-dim figures to what the next log says; no wait for the device."""
        self._figured += 1
        for name, value in figures.items():
            if value.dim() == 0 and name != "loss":
                before = self._figures.get(name)
                self._figures[name] = value.detach().float() if before is None else before + value.detach().float()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's log, with the mean of each figure since the last one, of this process."""
        if self._figured and "loss" in logs:
            logs = {**logs, **{name: float(value) / self._figured for name, value in self._figures.items()}}
            self._figures, self._figured = {}, 0
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Counters first: the trainer's own state comes last in its checkpoint, and says that it is whole."""
        if self.args.should_save and not self.args.save_only_model:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / STATE_FILE, packed(dict(self._counted.state_dict())))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What a resumed run loads once the model is there; the counters with it."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: the checkpoint has no counters of {type(self._counted).__name__}; to start from another "
                "run's weights, load them as the model"
            )
        self._counted.load_state_dict(unpacked(path.read_bytes()))


class RepNoiseMixin(_Counting):
    """Trains with ``RepNoiseLoss`` on batches ``{"harmful": ..., "harmless": ...}``, optionally ``"retain"``.

    Batches without ``harmful`` (an evaluation set's) get the trainer's own loss.

    Args:
        loss_fn: constructed on the model that the trainer gets. Everything else: the trainer's.

    Raises:
        ValueError: ``args.remove_unused_columns``, or several GPUs in one process.
    """

    def __init__(self, *args: Any, loss_fn: RepNoiseLoss, **kwargs: Any) -> None:
        super().__init__(loss_fn, *args, **kwargs)
        self.loss_fn = loss_fn

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See ``Trainer.compute_loss``."""
        if "harmful" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self.loss_fn(**inputs, model=model)
        self._note(self.loss_fn.components)
        return (loss, dict(self.loss_fn.components)) if return_outputs else loss


class NestedMixin(_Counting):
    """Trains with a nested defense: its ``backward`` is the trainer's training step.

    Booster, Vaccine and T-Vaccine take batches ``{"harmful": ..., "harmless": ...}``; TAR takes ``{"retain": ...,
    "tamper": ...}`` and ``sources``. Every micro-batch synchronises its gradients: a simulated attack needs them at
    once, and a trainer's ``no_sync`` is overruled.

    Args:
        defense: constructed on the model that the trainer gets. sources: by name, from a number to an attacker's batch
            (``TAR.adversaries``), each rank its own. Everything else: the trainer's.

    Raises:
        ValueError: fp16 with a gradient scaler, DeepSpeed, ``args.remove_unused_columns``, several GPUs in one process.
    """

    def __init__(self, *args: Any, defense: Any, sources: Mapping[str, Source] | None = None, **kwargs: Any) -> None:
        super().__init__(defense, *args, **kwargs)
        self.defense, self.sources = defense, sources
        if getattr(self.accelerator, "scaler", None) is not None:
            raise ValueError("args.fp16: expected False, since inner steps know no gradient scaler; use bf16")
        if self.is_deepspeed_enabled:
            raise ValueError("args.deepspeed: expected None; shard with FSDP2 (args.fsdp)")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """See ``Trainer.training_step``: leaves gradients, returns this micro-batch's share of the loss."""
        model.train()
        switch = getattr(self.optimizer, "train", None)
        if callable(switch):  # schedule-free optimizers
            switch()
        offload = getattr(self, "maybe_activation_offload_context", contextlib.nullcontext())  # TRL's
        scale = 1 / self.current_gradient_accumulation_steps
        with offload, self.compute_loss_context_manager():
            arguments = dict(self._prepare_inputs(inputs))
            if self.sources is not None:
                arguments["adversaries"] = self.defense.adversaries(
                    {name: self._on_device(source) for name, source in self.sources.items()}
                )
            figures: dict[str, Tensor] = self.defense.backward(**arguments, model=model, scale=scale)
        self._note(figures)
        return (figures["loss"].detach() * scale).to(device=self.args.device, dtype=torch.float32)

    def _on_device(self, source: Source) -> Source:
        return lambda number: self._prepare_inputs(dict(source(number)))  # type: ignore[arg-type]
