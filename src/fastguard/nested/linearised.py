"""A forward and backward at w + s d that write no weight: base product plus scaled product with the direction.

Weights in bf16 cannot hold a step far below their spacing, but the step's effect on the activations need not be small:
for a gradient d it is coherent. So each linear map computes W x + (s D) x as *one* product of twice the inner length,
and its backward likewise: the two parts are summed in the product's accumulator, before anything is rounded. (Added to
an output already rounded, a part below half its spacing would vanish again.) Norms and the like, whose parameters are
vectors, run in fp32 at w + s d. Only an embedding's output is rounded as its weight would be. The perturbed model and
its gradients are then those of exact weights, up to the rounding of activations that every pass has.

Cost: two thirds more products than a plain forward and backward, and a transient copy of one weight at a time (by
blocks); no snapshot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.nested.guard import Restoring
from fastguard.nested.perturbation import directed
from fastguard.nested.weights import Weights
from fastguard.ops.precision import accumulation_dtype
from fastguard.taps.lens import SHIFTED

BLOCK = 2**26
"""Elements of a weight that are copied at a time."""


@contextlib.contextmanager
def linearised(
    weights: Weights, directions: Sequence[Tensor | None], norm: float, *, eps: float = 1e-7
) -> Iterator[None]:
    """The model computes as at w + norm * d / (||d|| + eps), and gives the gradients of that point; w is not touched.

    Forward and backward both belong inside: a checkpoint recomputes what it finds there. What reads the head's weight
    instead of calling the head (``LanguageModelLoss``) would miss the step, and raises; use the model's own logits.

    Args:
        weights: as for ``nested.perturbed``, but not sharded.
        directions: one tensor a parameter, None for one that stays; kept, not copied.
        norm, eps: as for ``nested.perturbed``.

    Raises:
        ValueError: shards; a module with matrices that is no linear map and no embedding (experts of a mixture).
        RuntimeError: in the backward, a parameter was used by something other than its module's forward.
        FloatingPointError: the direction is zero or not finite.
    """
    if weights.sharded:
        raise ValueError(
            "weights: expected plain tensors, got shards; under FSDP2 keep fp32 masters and use nested.perturbed"
        )
    moved, given, length = directed(weights, directions)
    by_parameter = {id(p): d for p, d in zip(moved.parameters, given, strict=True)}
    steps = []
    for name, module in weights.model.named_modules():
        own = {k: by_parameter[id(p)] for k, p in module.named_parameters(recurse=False) if id(p) in by_parameter}
        if own:
            steps.append(_Step(name, module, own, norm / (length + eps)))
    handles: list[Any] = []

    def restore(finished: bool) -> None:
        for handle in handles:
            handle.remove()
        for step in steps:
            step.module.__dict__.pop("forward", None)
            step.module.__dict__.pop(SHIFTED, None)

    with Restoring() as guard:
        guard.on_exit(restore)
        for step in steps:
            step.module.forward = step  # hooks, taps and checkpoints then see the moved module's output
            setattr(step.module, SHIFTED, "nested.linearised")
        for name, p in zip(moved.names, moved.parameters, strict=True):
            handles.append(p.register_hook(_Used(name, [step for step in steps if step.moves(p)])))
        guard.release()
        yield


class _Used:
    """A hook on a parameter's gradient: raises where the parameter had an effect that was not moved."""

    def __init__(self, name: str, steps: Sequence[_Step]) -> None:
        self.name, self.steps = name, steps

    def __call__(self, grad: Tensor) -> None:
        for step in self.steps:
            if not step.ran:
                raise RuntimeError(
                    f"linearised: {self.name} was used, but not by calling {step.name} "
                    f"({type(step.module).__name__}), or the model was compiled before; use nested.perturbed"
                )


class _Step:
    """Stands in for a module's forward."""

    def __init__(self, name: str, module: nn.Module, directions: dict[str, Tensor], scale: float) -> None:
        self.name, self.module, self.directions, self.scale = name, module, directions, scale
        self.ran = False
        self._run = self._choose()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.ran = True
        return self._run(*args, **kwargs)

    def moves(self, parameter: nn.Parameter) -> bool:
        """Whether ``parameter`` is one of those that move here."""
        return any(self.module._parameters[k] is parameter for k in self.directions)

    def _choose(self) -> Callable[..., Any]:
        module, kind = self.module, type(self.module)
        if "forward" not in module.__dict__:
            if kind.forward is nn.Linear.forward:
                return self._linear
            if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
                return self._linear
            if isinstance(module, nn.Embedding) and module.max_norm is None:
                return self._embedding
            vectors = all(p.dim() <= 1 for p in module.parameters())
            if vectors and next(module.children(), None) is None and kind.forward is not nn.Module.forward:
                return self._small
        raise ValueError(
            f"linearised: {self.name} ({kind.__name__}), which holds {', '.join(self.directions)}, is neither a linear "
            "map nor an embedding nor a module of vectors alone; leave it out of the weights, or use nested.perturbed"
        )

    def _linear(self, x: Tensor) -> Tensor:
        turned = not isinstance(self.module, nn.Linear)  # Conv1D keeps [inputs, outputs]
        w: Tensor = self.module.weight  # type: ignore[assignment]
        d, b, e = self.directions.get("weight"), self.module._parameters.get("bias"), self.directions.get("bias")
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, w = x.to(dtype), w.to(dtype)
        if turned:
            w, d = w.t(), None if d is None else d.t()
        y: Tensor = _Linear.apply(x, w, b, d, e, self.scale)
        return y

    def _embedding(self, *args: Any, **kwargs: Any) -> Tensor:
        forward = type(self.module).forward
        base: Tensor = forward(self.module, *args, **kwargs)
        with _instead(self.module, self.directions):
            step: Tensor = forward(self.module, *args, **kwargs)
        return base.add(step.to(base.dtype), alpha=self.scale)

    def _small(self, *args: Any, **kwargs: Any) -> Any:
        own = self.module._parameters
        wide = accumulation_dtype(next(p.dtype for p in own.values() if p is not None))
        moved = {k: p.to(wide) for k, p in own.items() if p is not None}
        for k, d in self.directions.items():
            moved[k] = moved[k] + self.scale * d.to(wide)
        floating = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()]
        with _instead(self.module, moved):
            y = type(self.module).forward(
                self.module, *(_to(a, wide) for a in args), **{k: _to(a, wide) for k, a in kwargs.items()}
            )
        return _to(y, floating[0].dtype) if floating else y


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextlib.contextmanager
def _instead(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """``values`` in the place of the module's parameters."""
    saved = dict(module._parameters)
    try:
        module._parameters.update(values)  # type: ignore[arg-type]
        yield
    finally:
        module._parameters.update(saved)


class _Linear(torch.autograd.Function):
    """x [..., I] -> x (W + s D)^T + b + s e with W, D [O, I] and b, e [O], rounded once, in forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, d: Tensor | None, e: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, w, d)
        ctx.scale = scale
        rows = x.reshape(-1, x.shape[-1])
        left = [rows] if d is None else [rows, rows]
        if b is not None:  # two more columns, in eight: products want their sizes even
            ones = rows.new_zeros(rows.shape[0], 8)
            ones[:, :2] = 1
            left.append(ones)
            b = nn.functional.pad(
                torch.stack([b, torch.zeros_like(b) if e is None else scale * e.to(b.dtype)], 1), (0, 6)
            )
        wide, y = torch.cat(left, 1), rows.new_empty(rows.shape[0], w.shape[0])
        for at in _blocks(w.shape[0], wide.shape[1]):
            parts = [w[at], *_scaled(d, at, scale, w), *([] if b is None else [b[at].to(w.dtype)])]
            torch.mm(wide, torch.cat(parts, 1).t(), out=y[:, at])
        return y.view(*x.shape[:-1], w.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, d = ctx.saved_tensors
        g = grads[0].reshape(-1, w.shape[0])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            wide = g if d is None else torch.cat([g, g], 1)
            dx = g.new_empty(g.shape[0], w.shape[1])
            for at in _blocks(w.shape[1], wide.shape[1]):
                columns = (slice(None), at)
                torch.mm(wide, torch.cat([w[columns], *_scaled(d, columns, ctx.scale, w)], 0), out=dx[columns])
            dx = dx.view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = g.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            db = g.sum(0)
        return dx, dw, db, None, None, None


def _scaled(d: Tensor | None, at: Any, scale: float, like: Tensor) -> list[Tensor]:
    return [] if d is None else [(scale * d[at]).to(like.dtype)]


def _blocks(count: int, width: int) -> list[slice]:
    """Slices of ``count`` rows of which none holds more than BLOCK elements, if it can."""
    size = max(BLOCK // width, 1)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
