"""A method that is one drop-in loss of two batches or more: the loss's own counters and figures are the method's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from fastguard.losses.figures import figures_of
from fastguard.methods.passes import Loss
from fastguard.methods.training import Figures, Passes, Step, Training
from fastguard.taps.structure import Structure


class LossModule(Protocol):
    """A loss whose state_dict holds all that its next call depends on beside model and batches."""

    components: dict[str, Tensor]
    structure: Structure

    def __call__(self, *, model: nn.Module | None, **batches: Any) -> Tensor: ...  # noqa: D102

    def state_dict(self) -> dict[str, Tensor]: ...  # noqa: D102

    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


class AroundLoss(Training):
    """Gradients of one step of a loss; a subclass constructs it and says in `roles` what it reads.

    Args:
        model: as the loss was given it. loss_fn: the loss. loss: of a plain batch, in `evaluate`. seed, micro: see
            `Training`; who has ``micro`` says in `losses` what it divides.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Any, *, loss: Loss | None = None, micro: int | None = None, seed: int = 0
    ) -> None:
        self.loss_fn: LossModule = loss_fn
        super().__init__(model, loss=loss, seed=seed, structure=self.loss_fn.structure, micro=micro)

    def inspect(self, **batches: Any) -> None:
        """See `Training.inspect`; the loss knows."""
        if check := getattr(self.loss_fn, "check", None):
            check(**batches)

    def gradient(self, step: Step, **batches: Any) -> Figures:
        """One step: batches as the loss takes them. Returns its 0-dim components; errors as there."""
        losses = self.losses(step, **batches)
        try:
            value = step.differentiate(losses, "")
        except FloatingPointError:
            if named := getattr(self.loss_fn, "check_components", None):  # where it was, if it was on this rank
                named()
            raise
        return {**figures_of(self.loss_fn.components), "loss": value}

    def losses(self, step: Step, **batches: Any) -> Tensor | Passes:
        """What is differentiated."""
        return self.loss_fn(**batches, model=step.model)

    def state_dict(self) -> dict[str, Any]:
        """See `Training.state_dict`: the counter of steps, and what the loss counts and keeps."""
        return {"step": self.step, "loss": {k: v.clone() for k, v in self.loss_fn.state_dict().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Training.load_state_dict`."""
        super().load_state_dict(state)
        self.loss_fn.load_state_dict(state["loss"])

    def close(self) -> None:
        """See `Training.close`."""
        super().close()
        self.loss_fn.close()
