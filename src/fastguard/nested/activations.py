"""A step of the activations instead of the weights, as in Vaccine (Huang et al. 2024, arXiv 2402.01109).

One forward and backward records the gradient g_l at the output of chosen modules; another forward runs with
e_l = rho * g_l / (||g|| + eps) added to these outputs, ||g|| over all of them, e_l a constant.

The recording backward stops at the lowest of the modules and computes no parameter's gradient: only the activations'
are wanted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.ops.multi_tensor import squared_norm
from fastguard.taps import Gate, Scope, Taps
from fastguard.taps.structure import reshard


class _Record(Scope):
    """Keeps the gradient of every site's output once the backward has passed it."""

    def __init__(self, sites: frozenset[int]) -> None:
        super().__init__()
        self.sites = sites
        self.gradients: dict[int, Tensor] = {}
        self.lowest: Any = None

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> None:
        """See `Scope.observe`."""
        if not keep or index not in self.sites or not x.requires_grad:
            return
        if self.lowest is None:
            self.lowest = torch.autograd.graph.get_gradient_edge(x)
        x.register_hook(lambda grad: self.gradients.__setitem__(index, grad.detach()))

    def end(self) -> None:
        """See `Scope.end`: the gradients come later, in the backward."""


class _Shift(Scope):
    """Adds a constant to every site's output, in the forward and in its recomputation alike."""

    def __init__(self, shifts: dict[int, Tensor]) -> None:
        super().__init__()
        self.shifts = shifts
        self.seen: set[int] = set()

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> Tensor | None:
        """See `Scope.observe`."""
        if index not in self.shifts:
            return None
        self.seen.add(index)
        shift = self.shifts[index]
        if shift.shape != x.shape:
            raise ValueError(
                f"activation perturbation: site {index} gives {tuple(x.shape)}, but its gradient was recorded for "
                f"{tuple(shift.shape)}; both passes need the same batch"
            )
        return x + shift.to(x.dtype)

    def end(self) -> None:
        """See `Scope.end`: the shifts are constants, and a checkpoint's recomputation needs them."""


class ActivationPerturbation:
    """Perturbs the outputs of ``modules`` by rho along the gradient of a loss.

    Args:
        model: the model under every wrapper, in which the modules are. modules: where; Vaccine's are the attention
            blocks.
        rho: 2-norm of the whole perturbation over all modules, samples and tokens. eps: 1e-7, as published.

    Attributes:
        norms: 2-norm of each module's gradient in the last `record`, 0-dim tensors by index (T-Vaccine samples by
            them).
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], rho: float = 2.0, eps: float = 1e-7) -> None:
        if not modules:
            raise ValueError("modules: expected at least one module to perturb")
        if not rho >= 0:
            raise ValueError(f"rho: expected a number >= 0, got {rho!r}")
        self.rho, self.eps = rho, eps
        self.count = len(modules)
        self.norms: dict[int, Tensor] = {}
        self._taps = Taps(model)
        for i, module in enumerate(modules):
            self._taps.output(module, "perturbed", i)

    def record(self, loss: Callable[[], Tensor], sites: Sequence[int] | None = None) -> dict[int, Tensor]:
        """Run ``loss()`` and return rho * g_l / (||g|| + eps) by index of the module; no parameter gets a gradient.

        loss: runs the forward and returns a 0-dim loss. Under DDP let it call the module that DDP wraps: its reducer
        waits for gradients of parameters. sites: indices of the modules to perturb; None for all.

        Raises FloatingPointError if the gradient is not finite, RuntimeError if a module did not run.
        """
        wanted = frozenset(range(self.count) if sites is None else sites)
        scope = _Record(wanted)
        with self._taps.on(scope):
            value = loss()
        if scope.lowest is None:
            raise RuntimeError(
                "activation perturbation: no module's output requires a gradient; did the forward run them?"
            )
        torch.autograd.grad(value, scope.lowest)
        reshard(self._taps.model)
        missing = wanted - scope.gradients.keys()
        if missing:
            raise RuntimeError(f"activation perturbation: no gradient reached modules {sorted(missing)}")
        gradients = {i: scope.gradients[i] for i in sorted(wanted)}
        squares = {i: squared_norm([g]) for i, g in gradients.items()}
        norm = torch.stack(list(squares.values())).sum().sqrt()
        if not torch.isfinite(norm):
            raise FloatingPointError(f"activation perturbation: the gradient's norm is {float(norm)}")
        self.norms = {i: s.sqrt() for i, s in squares.items()}
        scale = self.rho / (norm + self.eps)
        return {
            i: g.mul_(scale.to(g.dtype)) if g._base is None else g * scale.to(g.dtype) for i, g in gradients.items()
        }

    @contextlib.contextmanager
    def applied(self, shifts: dict[int, Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
        """Forwards inside run with ``shifts`` added; their backward may come later, also under checkpointing.

        Yields a function to pass the loss through: it tells a recomputation, under a checkpointer that fastguard does
            not know, what it belongs to.
        """
        scope = _Shift(shifts)
        with self._taps.on(scope):
            yield lambda loss: Gate.apply(loss, self._taps, [scope])
            missing = shifts.keys() - scope.seen
        if missing:
            raise RuntimeError(
                f"activation perturbation: modules {sorted(missing)} did not run in the perturbed forward"
            )

    def close(self) -> None:
        """Take the hooks off the model."""
        self._taps.close()
