"""SN-Tune (Zhao et al., ICLR 2025): fine-tuning, on refusals, of the neurons alone that all safety data excite.

Neurons are found once, before the first step; from then on the gradient of every other weight is 0, or none. That the
weights beside them stay also needs an optimizer without weight decay.

Not as published: neurons of query and key maps, by what the softmax changes without one, are not looked for. Values
that several heads share count by the root of the squares over these heads. Padding, which published code scores, is
left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastguard.defenses.sn_tune.neurons import find_places, least_excitation, strongest
from fastguard.defenses.sn_tune.options import Options
from fastguard.methods.passes import Batch, Loss
from fastguard.methods.training import Data, Figures, Role, Step, Stream, Training
from fastguard.nested.weights import Select
from fastguard.saliency.freeze import shard_of
from fastguard.saliency.places import clean
from fastguard.taps import find_structure

Detection = Mapping[str, Iterable[Batch]]


class SNTune(Training):
    """Cross-entropy of refusals, of which only safety neurons feel the gradient.

    A neuron counts where every sample excites it, by at least ``threshold``: the least over samples of ||x_k|| ||W_k||,
    with its activations x_k at the sample's tokens and the weights W_k that read it. Trained are the rows of an MLP's
    up map and the columns of its down map, and the rows of attention's value map.

    Args:
        model: a causal language model, plain, DDP or FSDP2, whose layers' weights are trained.
        threshold: see above; published: 1. most: neurons of each matrix at most, those excited most.
        parts: ``ffn``, ``value`` or both. samples: that neurons are found by, of each kind.
        loss, seed: see ``methods.training.Training``.

    Attributes:
        chosen: weight -> (0, its rows) or (1, its columns) that are trained; None before the first step. With
            ``fastguard.saliency.neurons`` an optimizer keeps state of these alone.

    Raises ValueError for a model whose layers do not have such maps.
    """

    roles: ClassVar[Mapping[str, Role]] = {"safety": Role("refusal")}  # type: ignore[misc]
    found_by: ClassVar[tuple[str, ...]] = ("safety",)

    def __init__(
        self, model: nn.Module, *, threshold: float = Options.threshold, most: int = Options.most,
        parts: Sequence[str] = Options.parts, samples: int = Options.samples, loss: Loss | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        Options(threshold, most, tuple(parts), samples)
        self.threshold, self.most, self.parts, self.samples = threshold, most, tuple(parts), samples
        self.structure = find_structure(model)
        super().__init__(model, loss=loss, seed=seed, structure=self.structure)
        self.places = find_places(model, self.structure, self.parts)
        self.chosen: dict[str, tuple[int, Tensor]] | None = None

    def optional(self) -> tuple[str, ...]:
        """See `Training.optional`."""
        return (*super().optional(), "detection")

    def complete(self, batches: Mapping[str, Any], data: Data) -> dict[str, Any]:
        """With ``detection`` before the first step: as many samples of each kind as neurons are found by."""
        given = {name: batch for name, batch in super().complete(batches, data).items() if name in self.arguments()}
        if self.chosen is None and all(name in data for name in self.found_by):
            given["detection"] = {name: self._drawn(data[name]) for name in self.found_by}
        return given

    def _drawn(self, stream: Stream) -> list[Batch]:
        found: list[Batch] = []
        while sum(len(batch["input_ids"]) for batch in found) < self.samples:
            found.append(stream(len(found)))
        return found

    def prepare(self, model: nn.Module, *, detection: Detection | None = None, **batches: Any) -> Select:
        """Find the neurons, if that is still to be done; their weights alone get gradients."""
        if self.chosen is None:
            if detection is None:
                raise ValueError(
                    f"{type(self).__name__}.backward: detection: expected batches {', '.join(self.found_by)} at the "
                    "first step, {name: [batch, ...]}, or `detect` before it; got none"
                )
            self.detect(detection, model)
        assert self.chosen is not None
        named = {clean(name): p for name, p in self.structure.model.named_parameters()}
        frozen = [name for name in self.chosen if not named[name].requires_grad]
        if frozen:
            raise ValueError(
                f"model: expected {frozen[0]} to be trained (requires_grad); its neurons are what is tuned"
            )
        return [named[name] for name in self.chosen]

    def detect(self, detection: Detection, model: nn.Module | None = None) -> None:
        """Find the neurons by these batches (on the model's device), kinds by name; every rank gives its own.

        Raises ValueError where no neuron passes the threshold, and what the forwards raise.
        """
        missing = [name for name in self.found_by if name not in detection]
        if missing:
            raise ValueError(f"detection: expected {', '.join(self.found_by)}, got {', '.join(detection) or 'none'}")
        model = self.model if model is None else model
        excitation = {
            name: least_excitation(model, self.structure, self.places, detection[name], f"detection: {name}")
            for name in self.found_by
        }
        chosen: dict[str, tuple[int, Tensor]] = {}
        for at, place in enumerate(self.places):
            index = self.select({name: values[at] for name, values in excitation.items()})
            if len(index):
                chosen |= dict.fromkeys(place.rows, (0, index)) | dict.fromkeys(place.columns, (1, index))
        if not chosen:
            highest = max(float(values.max()) for values in excitation["safety"])
            raise ValueError(
                f"threshold: expected one that leaves neurons to tune, got {self.threshold:g}; the highest least "
                f"excitation by safety data is {highest:.3g}"
            )
        self.chosen = chosen

    def select(self, excitation: Mapping[str, Tensor]) -> Tensor:
        """Which neurons of a matrix, by their least excitation [count] by each kind of data: indices, ascending."""
        safety = excitation["safety"]
        return strongest(safety, safety >= self.threshold, self.most)

    def gradient(self, step: Step, *, safety: Batch, **read: Any) -> Figures:  # type: ignore[override]
        """One step on a batch of refusals. Returns ``loss`` and ``neurons``, how many are tuned."""
        assert self.chosen is not None
        alone = not (step.weights.sharded or step.weights.replicated)
        value = step.differentiate(step.loss(safety), "", only=step.weights.parameters if alone else ())
        named = {id(p): clean(name) for name, p in self.structure.model.named_parameters()}
        gradients = step.take()
        for p, gradient in zip(step.weights.parameters, gradients, strict=True):
            if gradient is not None:
                _cut(p, gradient, *self.chosen[named[id(p)]])
        step.put(gradients)
        rows = {place.rows[0] for place in self.places}
        count = sum(len(index) for name, (_, index) in self.chosen.items() if name in rows)
        return {"loss": value, "neurons": torch.tensor(float(count), device=value.device)}

    def state_dict(self) -> dict[str, Any]:
        """See `Training.state_dict`: the step, and the neurons."""
        chosen = None if self.chosen is None else {n: (dim, at.cpu()) for n, (dim, at) in self.chosen.items()}
        return {"step": self.step, "chosen": chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Training.load_state_dict`."""
        super().load_state_dict(state)
        self.chosen = None if state["chosen"] is None else {n: (int(d), at) for n, (d, at) in state["chosen"].items()}


def _cut(parameter: nn.Parameter, gradient: Tensor, dim: int, index: Tensor) -> None:
    """Leave of this rank's gradient the chosen rows or columns, in place."""
    keep = torch.zeros(parameter.shape[dim], dtype=torch.bool, device=gradient.device)
    keep[index.to(gradient.device)] = True
    if dim == 0:
        gradient.masked_fill_(~shard_of(keep, parameter)[:, None], 0)
    else:
        gradient.masked_fill_(~keep, 0)
