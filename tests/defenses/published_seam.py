"""SEAM as published, written eagerly: full logits at every state, dictionaries of gradients, clones of the weights.

An independent statement of the algorithm (Wang et al. 2025, arXiv 2505.12186, with the choices of the released code)
for tests and benchmarks; it shares no code with fastguard. The loss is

    L_ul + alpha L_up + beta cos(g_a, g_b)

L_ul = -log(sum of the masked cross-entropies of all L + 1 hidden states and of the output / (L + 1) + 1), on harmful
answers, as in RepNoise; L_up the masked cross-entropy of the refusals; g_a the gradient of the masked cross-entropy of
the harmful answers, g_b that of the plain cross-entropy of a benign batch. `exact_gradient` differentiates the cosine;
`published_gradient` estimates its gradient by two differences of gradients, as the released code does.

Use float64, and for small eps a model without fp32 inside (GPT-2): Llama's norms and softmax add 1e-7 / eps of noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from losses.published import masked_ce

Batch = dict[str, Tensor]
Gradients = dict[str, Tensor]


class Figures(NamedTuple):
    """L_ul, L_up, cos(g_a, g_b), ||g_a||, ||g_b||."""

    unlearning: float
    utility: float
    cosine: float
    harmful_norm: float
    benign_norm: float


class Losses:
    """The four scalars a step differentiates, each a forward of its own.

    harmful, refusal: a paired batch of equal shape; their mask is where the ids differ. benign: with ``labels`` (-100
    ignored), else every attended token counts. norm, head: the final norm, and the head with whatever the model does
    to its output.
    """

    def __init__(
        self,
        model: nn.Module,
        harmful: Batch,
        refusal: Batch,
        benign: Batch,
        norm: nn.Module,
        head: Callable[[Tensor], Tensor],
    ) -> None:
        self.model, self.norm, self.head = model, norm, head
        self.harmful, self.refusal, self.benign = harmful, refusal, benign
        self.mask = (harmful["input_ids"] != refusal["input_ids"]).long()

    def _run(self, batch: Batch):  # type: ignore[no-untyped-def]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return self.model(**inputs, output_hidden_states=True)

    def unlearning(self) -> Tensor:
        out = self._run(self.harmful)
        total = masked_ce(out.logits, self.harmful["input_ids"], self.mask)
        for state in out.hidden_states:
            total = total + masked_ce(self.head(self.norm(state)), self.harmful["input_ids"], self.mask)
        return -torch.log(total / len(out.hidden_states) + 1)

    def utility(self) -> Tensor:
        return masked_ce(self._run(self.refusal).logits, self.refusal["input_ids"], self.mask)

    def attack(self) -> Tensor:
        return masked_ce(self._run(self.harmful).logits, self.harmful["input_ids"], self.mask)

    def fine_tuning(self) -> Tensor:
        batch = self.benign
        labels = batch.get("labels", batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
        logits = self._run(batch).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradient(model: nn.Module, loss: Tensor, create_graph: bool = False) -> Gradients:
    """Of one loss, by name; zeros where a parameter takes no part."""
    parameters = trained(model)
    found = torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def dot(a: Gradients, b: Gradients) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def _figures(unlearning: Tensor, utility: Tensor, a: Gradients, b: Gradients) -> Figures:
    norms = dot(a, a).sqrt(), dot(b, b).sqrt()
    values = unlearning, utility, dot(a, b) / (norms[0] * norms[1]), *norms
    return Figures(*(float(value.detach()) for value in values))


def _sum(*terms: tuple[float, Gradients]) -> Gradients:
    return {name: sum(factor * term[name] for factor, term in terms) for name in terms[0][1]}


def exact_gradient(
    model: nn.Module, losses: Losses, alpha: float = 1.0, beta: float = 0.01
) -> tuple[Gradients, Figures]:
    """By double backward, which the attention must support (``attn_implementation="eager"``)."""
    unlearning, utility = losses.unlearning(), losses.utility()
    direct = gradient(model, unlearning + alpha * utility)
    a = gradient(model, losses.attack(), create_graph=True)
    b = gradient(model, losses.fine_tuning(), create_graph=True)
    cosine = dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt())
    return _sum((1.0, direct), (beta, gradient(model, cosine))), _figures(unlearning, utility, a, b)


def published_gradient(
    model: nn.Module, losses: Losses, alpha: float = 1.0, beta: float = 0.01, eps: float = 1e-3
) -> tuple[Gradients, Figures]:
    """By differences over the projections of each unit gradient off the other; six forwards and backwards."""
    unlearning, utility = losses.unlearning(), losses.utility()
    terms = [(1.0, gradient(model, unlearning)), (alpha, gradient(model, utility))]
    a, b = gradient(model, losses.attack()), gradient(model, losses.fine_tuning())
    figures = _figures(unlearning, utility, a, b)
    c, norm_a, norm_b = figures.cosine, figures.harmful_norm, figures.benign_norm
    towards_b = _sum((1 / norm_b, b), (-c / norm_a, a))
    towards_a = _sum((1 / norm_a, a), (-c / norm_b, b))
    for loss, here, direction, norm in (
        (losses.attack, a, towards_b, norm_a),
        (losses.fine_tuning, b, towards_a, norm_b),
    ):
        there = _gradient_at(model, loss, direction, eps)
        terms += [(beta / (eps * norm), there), (-beta / (eps * norm), here)]
    return _sum(*terms), figures


def _gradient_at(model: nn.Module, loss: Callable[[], Tensor], direction: Gradients, eps: float) -> Gradients:
    """At w + eps direction; the weights are as before afterwards."""
    parameters = trained(model)
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                p.add_(direction[name], alpha=eps)
        return gradient(model, loss())
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(saved[name])
