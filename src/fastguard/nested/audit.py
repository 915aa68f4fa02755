"""How far a first-order gradient is from the exact one: the meta-gradient of a simulated attack, without its graph.

TAR applies the tamper loss's gradients, read at the attacked weights, at the original ones, as if the attack had been a
constant shift. Exactly, J(w_0) = sum over reads c_k TR(w_(k+1)), where w_(k+1) follows from w_k by a step of AdamW on
the attacker's loss, has the gradient that a sweep back through these steps gives (reverse-mode hypergradients, as in
Maclaurin et al. 2015, arXiv 1502.03492, here for AdamW and with weights that are kept): adjoints of the weights and of
both moments, and for each step one product with the Hessian of the attacker's loss (``hessian_product``). There is no
graph across steps; memory is 2 K + 4 copies of the weights, and activations twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastguard.nested.attack import SimulatedAttack
from fastguard.nested.optimizers import AdamW
from fastguard.nested.tangent import hessian_product
from fastguard.nested.weights import Weights

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Audit:
    """Gradients of a sum of losses that are read in an attack, one a trainable parameter.

    Attributes:
        first_order: as if the attack were a constant shift. exact: through its steps.
        cosine: between the two. norm_ratio: of the exact one to the other.
    """

    first_order: list[Tensor]
    exact: list[Tensor]
    cosine: float
    norm_ratio: float


def audit(
    model: nn.Module, attack: Sequence[Loss], read: Loss, reads: Mapping[int, float], rule: AdamW | None = None
) -> Audit:
    """Both gradients of an attack on the current weights of ``model``, which are bit for bit as before.

    Args:
        model: one that a `hessian_product` can be had of: plain tensors of one process, weights in fp32 or fp64.
        attack: the attacker's loss at each of his steps, of torch's own operations (``methods.passes.model_loss``).
        read: the defender's loss, at whatever weights the model has.
        reads: weights of the reads, by the step after which each is made, counted from 0.
        rule: the attacker's optimizer; None: ``AdamW()``.

    Raises:
        TypeError: ``rule`` is no ``nested.AdamW``. ValueError: no reads, or after steps that there are not; as
            `hessian_product`.
    """
    rule = AdamW() if rule is None else rule
    if not isinstance(rule, AdamW):
        raise TypeError(f"rule: expected a fastguard.nested.AdamW, got a {type(rule).__name__}")
    if not reads or not set(reads) <= set(range(len(attack))):
        raise ValueError(f"reads: expected weights by steps from 0 to {len(attack) - 1}, got {dict(reads)}")
    with SimulatedAttack(model, rule).at(model):  # lends the weights, and puts them back
        weights = Weights(model)
        tensors = weights.local()
        running, points, gradients = rule.start(tensors), list[list[Tensor]](), list[list[Tensor | None]]()
        for loss in attack:
            points.append([t.clone() for t in tensors])
            gradients.append(_gradients(loss, weights))
            running.step(gradients[-1])
        del running  # and the moments
        first_order = [torch.zeros_like(t) for t in tensors]
        adjoints = [_Adjoint(*(torch.zeros_like(t) for _ in range(3))) for t in tensors]
        for k in reversed(range(len(attack))):
            for i, g in enumerate(_gradients(read, weights) if k in reads else []):
                if g is not None:
                    first_order[i] += reads[k] * g
                    adjoints[i].weight += reads[k] * g
            seen = [[g for all_of in gradients[: k + 1] if (g := all_of[i]) is not None] for i in range(len(tensors))]
            moved = [gradients[k][i] is not None for i in range(len(tensors))]
            directions = [a.back(rule, s) if m else None for a, s, m in zip(adjoints, seen, moved, strict=True)]
            with torch.no_grad():
                torch._foreach_copy_(tensors, points.pop())
            _, products = hessian_product(weights, directions, attack[k])
            for adjoint, product in zip(adjoints, products, strict=True):
                if product is not None:
                    adjoint.weight += product
        exact = [a.weight for a in adjoints]
        size, other = weights.norm(first_order), weights.norm(exact)
        return Audit(first_order, exact, float(weights.dot(first_order, exact) / (size * other)), float(other / size))


class _Adjoint:
    """Derivatives of J by a tensor's weight and moments as they are after a step; `back` makes them those before it."""

    def __init__(self, weight: Tensor, first: Tensor, second: Tensor) -> None:
        self.weight, self.first, self.second = weight, first, second

    @torch.no_grad()
    def back(self, rule: AdamW, gradients: Sequence[Tensor]) -> Tensor:
        """The derivative by the step's gradient, the last of those that the tensor has had.

        In float64: for the first step the two ways into the update, by the moments, cancel but for ``eps``.
        """
        (b1, b2), n = rule.betas, len(gradients)
        wide = [g.double() for g in gradients]
        m = torch.stack([(1 - b1) * b1 ** (n - 1 - j) * g for j, g in enumerate(wide)]).sum(0)
        v = torch.stack([(1 - b2) * b2 ** (n - 1 - j) * g.square() for j, g in enumerate(wide)]).sum(0)
        root, rate = (v / (1 - b2**n)).sqrt(), rule.lr / (1 - b1**n)
        below, weight = root + rule.eps, self.weight.double()
        by_first = self.first - rate * weight / below
        slope = rate * m * weight / below.square() / (2 * root * (1 - b2**n))
        by_second = self.second + torch.where(root > 0, slope, 0.0)  # of no gradient so far nothing depends on v
        self.first, self.second = b1 * by_first, b2 * by_second
        self.weight = self.weight * (1 - rule.lr * rule.weight_decay)
        return ((1 - b1) * by_first + 2 * (1 - b2) * wide[-1] * by_second).to(self.weight.dtype)


def _gradients(loss: Loss, weights: Weights) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss(), weights.parameters, allow_unused=True))
