"""A forward at w + s d that writes no weight: base product plus scaled product with the direction.

Weights in bf16 cannot hold a step far below their spacing, but the step's effect on the activations need not be
small: for a gradient d it is coherent, s (d x), and is added to the output of each module where it is far above that
spacing. A module that is affine in its own parameters satisfies f(w + s d) = f(w) + s (f(d) - f(0)) exactly, so that
linear maps, embeddings and norms compute the perturbed model, and its gradients, as it would be in exact arithmetic
up to the rounding of activations. Cost: one more forward product a module and one more backward product for its
input; no snapshot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.nested.weights import Weights

SHIFTED = "_fastguard_linearised"
"""Set on modules whose forward is not their weight's alone; what reads a weight directly must refuse them."""


@contextlib.contextmanager
def linearised(weights: Weights, directions: Sequence[Tensor], norm: float, *, eps: float = 1e-7) -> Iterator[None]:
    """The model computes as at w + norm * d / (||d|| + eps), and gives the gradients of that point; w is not touched.

    Forward and backward both belong inside. Modules run through their own forward: a loss that reads the head's weight
    directly (``LanguageModelLoss``) would miss the shift, and raises; use the model's own logits.

    Args:
        weights: as for ``nested.perturbed``, but not sharded. directions: one tensor a parameter; kept, not copied.

    Raises:
        ValueError: shards, or a parameter of a module that is not affine in its own parameters.
        FloatingPointError: the direction is zero or not finite.
    """
    if weights.sharded:
        raise ValueError(
            "weights: expected plain tensors, got shards; under FSDP2 keep fp32 masters and use nested.perturbed"
        )
    length = weights.norm(directions)
    if not (torch.isfinite(length) and length > 0):
        raise FloatingPointError(
            f"linearised: the direction has norm {float(length)}; expected a finite number above 0"
        )
    scale = norm / (length + eps)
    by_parameter = {id(p): d for p, d in zip(weights.parameters, directions, strict=True)}
    shifts = []
    for name, module in weights.model.named_modules():
        own = {k: by_parameter[id(p)] for k, p in module.named_parameters(recurse=False) if id(p) in by_parameter}
        if own:
            shifts.append(_Shift(name, module, own, scale))
    handles = [shift.module.register_forward_hook(shift, with_kwargs=True) for shift in shifts]
    for shift in shifts:
        setattr(shift.module, SHIFTED, True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for shift in shifts:
            delattr(shift.module, SHIFTED)


class _Shift:
    """A forward hook: output + scale * (f(direction) - f(0))."""

    def __init__(self, name: str, module: nn.Module, directions: dict[str, Tensor], scale: Tensor) -> None:
        self.name, self.module, self.directions, self.scale = name, module, directions, scale
        self.affine = isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm))

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(f"linearised: {self.name} ({type(module).__name__}) returns {type(output).__name__}")
        if not self.affine:
            self._probe(args, kwargs)
        shift = self._linear_part(self.directions, args, kwargs)
        return (output + self.scale * shift).to(output.dtype)

    def _linear_part(self, directions: dict[str, Tensor], args: Any, kwargs: Any) -> Tensor:
        zero = {k: torch.zeros_like(d) for k, d in self.directions.items()}
        own = {k: p.detach() for k, p in self.module.named_parameters(recurse=False)}
        forward = self.module.forward

        def at(values: dict[str, Tensor]) -> Tensor:
            saved = {k: self.module._parameters[k] for k in values}
            try:
                for k, v in values.items():
                    self.module._parameters[k] = v  # type: ignore[assignment]
                result: Tensor = forward(*args, **kwargs)
                return result
            finally:
                self.module._parameters.update(saved)

        rest = {k: torch.zeros_like(p) for k, p in own.items() if k not in directions}
        moved = {k: d.to(own[k].dtype) for k, d in directions.items()}
        value = at({**rest, **moved})
        if isinstance(self.module, (nn.Linear, nn.Embedding)):
            return value.float() if value.dtype != torch.float64 else value
        origin = at({**rest, **zero})
        return value.float() - origin.float() if value.dtype != torch.float64 else value - origin

    @torch.no_grad()
    def _probe(self, args: Any, kwargs: Any) -> None:
        """Raise unless the module is affine in its parameters: twice the direction must give twice the shift."""
        once = self._linear_part(self.directions, args, kwargs)
        twice = self._linear_part({k: 2 * d for k, d in self.directions.items()}, args, kwargs)
        error = (twice - 2 * once).abs().max()
        if not error <= 1e-2 * once.abs().max():
            raise ValueError(
                f"linearised: {self.name} ({type(self.module).__name__}) is not affine in its own parameters; leave it "
                "out of the weights, or use nested.perturbed"
            )
        self.affine = True
