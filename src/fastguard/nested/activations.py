"""A step of the activations instead of the weights, as in Vaccine (Huang et al. 2024, arXiv 2402.01109).

One forward and backward records the gradient g_l at the output of chosen modules; another forward runs with
e_l = rho * g_l / (||g|| + eps) added to these outputs, ||g|| over all of them, e_l a constant.

The recording backward stops at the lowest of the modules and computes no parameter's gradient: only the activations'
are wanted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastguard.nested.frozen import frozen
from fastguard.nested.guard import on_every_rank
from fastguard.nested.perturbation import Realised, realised
from fastguard.nested.profile import span
from fastguard.ops.multi_tensor import dot, squared_norm
from fastguard.over_ranks import several, summed
from fastguard.ranks import DataRanks
from fastguard.taps import Gate, Scope, Taps


class _Record(Scope):
    """Keeps the gradient of every site's output once the backward has passed it."""

    def __init__(self, sites: frozenset[int]) -> None:
        super().__init__()
        self.sites = sites
        self.gradients: dict[int, Tensor] = {}
        self.lowest: torch.autograd.graph.GradientEdge | None = None

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> Tensor | None:
        """See `Scope.observe`."""
        if index not in self.sites:
            return None
        frozen = not x.requires_grad  # nothing below is trained (LoRA further up)
        if frozen:
            x = x.detach().requires_grad_()
        if keep:
            if self.lowest is None:
                self.lowest = torch.autograd.graph.get_gradient_edge(x)
            x.register_hook(lambda grad: self.gradients.__setitem__(index, grad.detach()))
        return x if frozen else None

    def end(self) -> None:
        """See `Scope.end`: the gradients come later, in the backward."""


class _Shift(Scope):
    """Adds a constant to every site's output, in the forward and in its recomputation alike."""

    def __init__(self, shifts: dict[int, Tensor]) -> None:
        super().__init__()
        self.shifts = shifts
        self.sums: dict[int, Tensor] = {}

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> Tensor | None:
        """See `Scope.observe`."""
        if index not in self.shifts:
            return None
        shift = self.shifts[index]
        if shift.shape != x.shape:
            raise ValueError(
                f"activation perturbation: module {index} gives {tuple(x.shape)}, but its gradient was recorded for "
                f"{tuple(shift.shape)}; both passes need the same batch"
            )
        with span("activation perturbation", [x], 3):
            moved = x + shift.to(x.dtype)
            if keep:
                with torch.no_grad(), span("norms", [x], 4):
                    done = moved - x
                    self.sums[index] = torch.stack([squared_norm([shift]), squared_norm([done]), dot([shift], [done])])
        return moved

    def end(self) -> None:
        """See `Scope.end`: the shifts are constants, and a checkpoint's recomputation needs them."""


class ActivationPerturbation:
    """Perturbs the outputs of ``modules`` by rho along the gradient of a loss.

    Args:
        model: the model under every wrapper, in which the modules are. modules: where; Vaccine's are the attention
            blocks.
        rho: 2-norm of the whole perturbation over all modules, samples and tokens. eps: 1e-7, as published.

    Attributes:
        norms: 2-norm of each module's gradient in the last `record`, 0-dim tensors by index; T-Vaccine draws by them.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], rho: float = 2.0, eps: float = 1e-7) -> None:
        if not modules:
            raise ValueError("modules: expected at least one module to perturb")
        if not rho > 0:
            raise ValueError(f"rho: expected a number above 0, got {rho!r}")
        self.rho, self.eps = rho, eps
        self.count = len(modules)
        self.norms: dict[int, Tensor] = {}
        self._taps = Taps(model)
        for i, module in enumerate(modules):
            self._taps.output(module, "perturbed", i)

    def record(
        self, loss: Callable[[], Tensor], sites: Sequence[int] | None = None, ranks: DataRanks | None = None
    ) -> dict[int, Tensor]:
        """Run ``loss()`` and return rho * g_l / (||g|| + eps) by index of the module; no parameter gets a gradient.

        See `record_all`, of one function.
        """
        return self.record_all([loss], sites, ranks)[0]

    def record_all(
        self, losses: Sequence[Callable[[], Tensor]], sites: Sequence[int] | None = None, ranks: DataRanks | None = None
    ) -> list[dict[int, Tensor]]:
        """`record` of the sum of ``losses``, each of samples of its own: the norm is over all, the shifts of each.

        losses: each runs the forward and returns a 0-dim loss. Under DDP let it call the module that DDP wraps: its
        reducer waits for gradients of parameters. sites: indices of the modules to perturb; None for all. ranks: whose
        samples the norm is over, where the losses are of all of them (``fastguard.over_ranks``); None: this rank's.

        Raises FloatingPointError if the gradient is zero or not finite, RuntimeError if a module did not run.
        """
        wanted = frozenset(range(self.count) if sites is None else sites)
        found = [self._gradients(loss, wanted) for loss in losses]
        with span("norms", [g for gradients in found for g in gradients.values()], 1):
            own = torch.stack([squared_norm([gradients[i] for gradients in found]) for i in sorted(wanted)])
            size = ranks.divisor if ranks and several(ranks) else 1  # times the gradient that over_ranks' sums have
            squares = dict(zip(sorted(wanted), summed(own, ranks) / size**2, strict=True))
            total = torch.stack(list(squares.values())).sum().sqrt()
            norm = float(total)
        if not on_every_rank(torch.isfinite(total) & (total > 0)):
            raise FloatingPointError(
                f"activation perturbation: the gradient's norm is {norm} (on this rank); expected a finite number "
                "above 0"
            )
        self.norms = {i: s.sqrt() for i, s in squares.items()}
        return [{i: g.pop(i) * (self.rho / (norm + self.eps) / size) for i in squares} for g in found]

    def _gradients(self, loss: Callable[[], Tensor], wanted: frozenset[int]) -> dict[int, Tensor]:
        """The gradient of ``loss()`` at the output of each wanted module."""
        scope = _Record(wanted)
        with frozen(self._taps.model):
            with self._taps.on(scope):
                value = loss()
            if scope.lowest is None:
                raise RuntimeError("activation perturbation: none of the modules ran in the forward")
            if value.dim() != 0 or not value.requires_grad:
                raise ValueError("loss: expected a 0-dim tensor that depends on the modules' outputs")
            torch.autograd.grad(Gate.apply(value, self._taps, [scope]), scope.lowest)
            scope.lowest = None
        missing = wanted - scope.gradients.keys()
        if missing:
            raise RuntimeError(f"activation perturbation: no gradient reached modules {sorted(missing)}")
        return scope.gradients

    @contextlib.contextmanager
    def applied(self, shifts: dict[int, Tensor]) -> Iterator[Applied]:
        """Forwards inside run with ``shifts`` added; their backward may come later, also under checkpointing.

        Raises ValueError where an output has another shape than its shift, RuntimeError if a module did not run.
        """
        scope = _Shift(shifts)
        with self._taps.on(scope):
            yield Applied(self._taps, scope)
        missing = shifts.keys() - scope.sums.keys()
        if missing:
            raise RuntimeError(
                f"activation perturbation: modules {sorted(missing)} did not run in the perturbed forward"
            )

    def close(self) -> None:
        """Take the hooks off the model."""
        self._taps.close()


class Applied:
    """A perturbed forward."""

    def __init__(self, taps: Taps, scope: _Shift) -> None:
        self._taps, self._scope = taps, scope

    def bound(self, loss: Tensor) -> Tensor:
        """``loss``, whose backward tells a recomputation which forward it belongs to.

        Needed under a checkpointer that fastguard does not know (see ``fastguard.taps``).
        """
        bound: Tensor = Gate.apply(loss, self._taps, [self._scope])
        return bound

    def sums(self) -> Tensor:
        """[3] in float64: what `realised_of` takes, over all modules; to be summed over forwards and ranks."""
        return torch.stack([s.double() for s in self._scope.sums.values()]).sum(0)

    def realised(self) -> Realised:
        """What the activations' dtype kept of the perturbation, over all modules; waits for the device."""
        return realised_of(self.sums())


def realised_of(sums: Tensor) -> Realised:
    """From `Applied.sums`: an activation stands anywhere between its dtype's values."""
    return realised(sums.tolist(), dithered=True)
