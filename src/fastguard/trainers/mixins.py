"""Mixins that put fastguard before a trainer class: HF ``Trainer``, TRL ``SFTTrainer``, or another subclass.

    class Immunizer(MethodMixin, SFTTrainer): ...
    Immunizer(model, args, ..., data_collator=PairedCollator(tokenizer), method=Booster(model)).train()

The trainer keeps its optimizer, schedule, clipping, logging, wrapping and checkpoints. Construct the loss or the
method on the model that is handed to the trainer, after PEFT and before the trainer. An evaluation set of the same
kind of batches is measured without touching the training: its figures are logged as ``eval_...``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastguard.losses.figures import evaluated, figures_of
from fastguard.machine import write_atomically
from fastguard.trainers.checkpoint import Counted, packed, unpacked

if TYPE_CHECKING:
    from transformers import Trainer as _Base

    from fastguard.losses.repnoise import RepNoiseLoss
    from fastguard.methods.training import Training
else:
    _Base = object

STATE_FILE = "fastguard_state.pt"
"""Beside the trainer's own state, in each of its checkpoints."""

Source = Callable[[int], Mapping[str, Tensor]]


class _Means:
    """Means of 0-dim figures since they were last taken, without a wait for the device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Note what a step found; its ``loss`` is the trainer's to log."""
        for name, value in figures.items():
            if value.dim() == 0 and name != "loss":
                value = value.detach().float()
                self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
                self._counts[name] = self._counts.get(name, 0) + 1

    def taken(self) -> dict[str, float]:
        """The means, and a new start."""
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


class _Counting(_Base):
    """Checks, figures in the log, and the state of ``self._counted`` in the trainer's checkpoints."""

    loss_is_scaled_for_ga = False  # a mean a micro-batch, which the trainer divides by their number

    def __init__(self, counted: Counted, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counted = counted
        self._training, self._evaluation = _Means(), _Means()
        if self.args.remove_unused_columns:
            raise ValueError(
                "args.remove_unused_columns: expected False, got True; it drops the columns that the collator pairs"
            )
        if self.args.n_gpu > 1:
            raise ValueError(f"args.n_gpu: expected 1, got {self.args.n_gpu}; start one process a GPU (torchrun)")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's log, with the mean of each figure since the last one, of this process."""
        if "loss" in logs:
            logs = {**logs, **self._training.taken()}
        super().log(logs, *args, **kwargs)

    def _measured(self, model: nn.Module, inputs: dict[str, Any]) -> Mapping[str, Tensor] | None:
        """The figures of an evaluation batch, ``loss`` among them; None where it is one of the trainer's own kind."""
        raise NotImplementedError

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See ``Trainer.prediction_step``: of batches by name the loss alone, and figures for the log."""
        prepared = dict(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            figures = self._measured(model, prepared)
        if figures is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._evaluation.add(figures)
        return figures["loss"].detach().float().mean(), None, None

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> Any:  # fmt: skip
        """See ``Trainer.evaluation_loop``; its metrics have the mean of each figure, of this process.

        Random numbers are put back after it: a data loader draws one when it starts, and dropout would notice.
        """
        self._evaluation = _Means()
        with torch.random.fork_rng():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        figures = {f"{metric_key_prefix}_{name}": value for name, value in self._evaluation.taken().items()}
        if output.metrics is not None:
            output.metrics.update(figures)
        return output

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
        self._training.add(figures_of(self.loss_fn.components))
        return (loss, dict(self.loss_fn.components)) if return_outputs else loss

    def _measured(self, model: nn.Module, inputs: dict[str, Any]) -> Mapping[str, Tensor] | None:
        if "harmful" not in inputs:
            return None
        return evaluated(self.loss_fn, inputs, model)


class MethodMixin(_Counting):
    """Trains with a method of the registry: its ``backward`` is the trainer's training step.

    Batches are those that the method's ``roles`` name: ``{"harmful": ..., "harmless": ...}`` for most; TAR takes
    ``{"retain": ..., "tamper": ...}`` and ``sources``. Every micro-batch synchronises its gradients: a simulated attack
    needs them at once, and a trainer's ``no_sync`` is overruled.

    Args:
        method: constructed on the model that the trainer gets. sources: what the method draws beside the trainer's
            batches, by name, from a number to a batch (``TAR.adversaries``), each rank its own. Everything else: the
            trainer's.

    Raises:
        ValueError: fp16 with a gradient scaler, DeepSpeed, ``args.remove_unused_columns``, several GPUs in one process.
    """

    def __init__(
        self, *args: Any, method: Training, sources: Mapping[str, Source] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(method, *args, **kwargs)
        self.method, self.sources = method, sources or {}
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
            batches = dict(self._prepare_inputs(inputs))
            sources = {name: self._on_device(source) for name, source in self.sources.items()}
            given = self.method.complete(batches, sources)
            known = {*self.method.arguments(), *self.method.optional()}
            if given.keys() >= set(self.method.arguments()):  # a collator of pairs has more than some methods read
                given = {name: batch for name, batch in given.items() if name in known}
            self.method.trained_by(self.optimizer)
            figures: dict[str, Tensor] = self.method.backward(**given, model=model, scale=scale)
        self._training.add(figures)
        return (figures["loss"].detach() * scale).to(device=self.args.device, dtype=torch.float32)

    def _measured(self, model: nn.Module, inputs: dict[str, Any]) -> Mapping[str, Tensor] | None:
        batches = {name: batch for name, batch in inputs.items() if isinstance(batch, Mapping)}
        return self.method.evaluate(batches, model) if batches else None

    def _on_device(self, source: Source) -> Source:
        return lambda number: self._prepare_inputs(dict(source(number)))  # type: ignore[arg-type]


class NestedMixin(MethodMixin):
    """`MethodMixin` whose method is called ``defense``."""

    def __init__(self, *args: Any, defense: Training, **kwargs: Any) -> None:
        super().__init__(*args, method=defense, **kwargs)
        self.defense = defense
