"""Vaccine and T-Vaccine as their authors wrote them, in plain eager PyTorch: hooks on the attention blocks' outputs.

Independent of the package; the tests' oracle in float64, and a contender in benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from defenses.published_booster import Batch, plain_loss


def blocks(model: nn.Module) -> list[nn.Module]:
    """The attention block of every layer, by the names that architectures give it."""
    return [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in ("self_attn", "attn", "attention")]


def output_gradients(model: nn.Module, batch: Batch, at: Sequence[int]) -> dict[int, Tensor]:
    """Gradients of the loss at the outputs of some blocks, by backward hooks; none is left on the parameters."""
    found: dict[int, Tensor] = {}

    def keep(index: int):
        def hook(module, grad_input, grad_output):
            found[index] = grad_output[0].clone()

        return hook

    attention = blocks(model)
    handles = [attention[i].register_full_backward_hook(keep(i)) for i in at]
    model.zero_grad()
    plain_loss(model, batch).backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    return found


def published_vaccine(
    model: nn.Module, batch: Batch, rho: float = 2.0, eps: float = 1e-7, at: Sequence[int] | None = None
) -> None:
    """Leaves the gradient of the perturbed loss on the parameters."""
    attention = blocks(model)
    at = range(len(attention)) if at is None else at
    gradients = output_gradients(model, batch, at)
    norm = torch.norm(torch.stack([g.norm() for g in gradients.values()]))

    def shift(index: int):
        def hook(module, args, output):
            output[0].data = output[0].data + rho * gradients[index] / (norm + eps)
            return output

        return hook

    handles = [attention[i].register_forward_hook(shift(i)) for i in at]
    plain_loss(model, batch).backward()
    for handle in handles:
        handle.remove()


def contender(model: nn.Module, options: Any, harmless: Batch, harmful: Batch | None = None) -> Callable[[], None]:
    """Vaccine's step for the benchmarks, which clear the gradients before."""
    return lambda: published_vaccine(model, harmless, options.rho)


def published_probabilities(model: nn.Module, sample: Batch) -> Tensor:
    """Of T-Vaccine: in proportion to the gradient norms at the blocks, on one harmful sample."""
    gradients = output_gradients(model, sample, range(len(blocks(model))))
    norms = torch.stack([gradients[i].norm() for i in range(len(gradients))])
    return norms / norms.sum()


def published_t_vaccine(model: nn.Module, batch: Batch, drawn: Sequence[int], rho: float = 3.0) -> None:
    """Vaccine on the drawn blocks; the attention of the others is frozen, as in the code.

    The code's layers that were not drawn run under reentrant checkpoints, which give nothing a gradient unless their
    input wants one: below the lowest layer drawn, adapters rest.
    """
    resting = [p for i, m in enumerate(blocks(model)) if i not in drawn for p in m.parameters() if p.requires_grad]
    if not any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        layers = next(m for name, m in model.named_modules() if name.endswith("layers"))
        below = [p for layer in layers[: min(drawn)] for p in layer.parameters() if p.requires_grad]
        resting = list({id(p): p for p in resting + below}.values())
    for p in resting:
        p.requires_grad = False
    published_vaccine(model, batch, rho, at=drawn)
    for p in resting:
        p.requires_grad, p.grad = True, None
