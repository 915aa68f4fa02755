"""The exact meta-gradient of an attack against autograd through its unrolled steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastguard.nested import SGD, AdamW, audit
from tiny_models import pair, tiny

RULE, READS = AdamW(lr=3e-3, weight_decay=0.1, eps=1e-6), {1: 0.7, 2: 1.3}


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """In float64, which the models' own loss is not."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def unrolled(model: nn.Module, ids: list[Tensor], held_out: Tensor) -> list[Tensor]:
    """J's gradient by create_graph: three steps of AdamW as functions of the initial weights."""

    def loss(w: dict[str, Tensor], one: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, w, kwargs={"input_ids": one}).logits, one)

    start = dict(model.named_parameters())
    w, total = start, 0.0
    m, v = ({n: torch.zeros_like(p) for n, p in w.items()} for _ in range(2))
    for k, one in enumerate(ids):
        gradients = dict(zip(w, torch.autograd.grad(loss(w, one), list(w.values()), create_graph=True), strict=True))
        m = {n: 0.9 * m[n] + 0.1 * g for n, g in gradients.items()}
        v = {n: 0.999 * v[n] + 0.001 * g**2 for n, g in gradients.items()}
        root = {n: torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0) for n, x in v.items()}
        below = {n: x / math.sqrt(1 - 0.999 ** (k + 1)) + RULE.eps for n, x in root.items()}
        rate = RULE.lr / (1 - 0.9 ** (k + 1))
        w = {n: p * (1 - RULE.lr * RULE.weight_decay) - rate * m[n] / below[n] for n, p in w.items()}
        total = total + READS.get(k, 0.0) * loss(w, held_out)
    return list(torch.autograd.grad(total, list(start.values())))


def test_the_exact_gradient_is_that_of_the_unrolled_attack():
    model = tiny("gpt_neox", torch.float64, num_hidden_layers=2)  # whose norms, unlike Llama's, compute in float64
    before = [p.detach().clone() for p in model.parameters()]
    ids = [pair(seed=i)[0]["input_ids"] for i in range(4)]
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones can be differentiated once
        expected = unrolled(model, ids[:3], ids[3])

    def loss(one: Tensor) -> Tensor:
        return cross_entropy(model(input_ids=one).logits, one)

    found = audit(model, [lambda one=one: loss(one) for one in ids[:3]], lambda: loss(ids[3]), READS, RULE)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.parameters(), before, strict=True))
    for mine, first, other in zip(found.exact, found.first_order, expected, strict=True):
        assert float((mine - other).norm() / other.norm()) < 1e-8
        assert float((first - other).norm() / other.norm()) > 1e-3
    flat = [torch.cat([t.flatten() for t in g]) for g in (found.first_order, expected)]
    assert found.cosine == pytest.approx(float(nn.functional.cosine_similarity(*flat, dim=0)), abs=1e-9)
    assert found.norm_ratio == pytest.approx(float(flat[1].norm() / flat[0].norm()), rel=1e-8)


def test_bad_input_is_named():
    model = nn.Linear(2, 2)
    loss = lambda: model(torch.ones(2)).sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"reads: expected weights by steps from 0 to 1, got \{2: 1.0\}"):
        audit(model, [loss, loss], loss, {2: 1.0})
    with pytest.raises(TypeError, match=r"rule: expected a fastguard.nested.AdamW, got a SGD"):
        audit(model, [loss], loss, {0: 1.0}, SGD())
