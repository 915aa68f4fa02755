"""Directions and cones refined by gradient, on a model whose refusal is one planted direction."""

from __future__ import annotations

import pytest
import torch

from directions.planted import HARMFUL_FROM, planted, prompts
from fastguard.directions import ablate, orthonormalise, refine
from fastguard.directions.cone import _frozen, _prompts, _Refining
from fastguard.directions.stream import Stream
from tiny_models import tiny

TOKENS = 2


@pytest.fixture(scope="module")
def case():
    """The model, its direction, and batches of prompts; harmless answers hold no harmful token."""
    model, direction = planted(2)
    with torch.no_grad():
        model.lm_head.weight[HARMFUL_FROM:] = 0
    return model, direction, prompts(True, 4, 16), prompts(False, 4, 16)


def off(direction, much=0.6):
    """The direction, pushed aside."""
    g = torch.Generator().manual_seed(1)
    aside = torch.randn(direction.shape, dtype=direction.dtype, generator=g)
    aside -= (aside @ direction) * direction
    return direction + much * aside / aside.norm()


def test_a_direction_pushed_aside_comes_back(case):
    model, direction, harmful, harmless = case
    start = off(direction)
    assert float(torch.cosine_similarity(start, direction, dim=0)) < 0.86
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = refine(
        model, 2 * direction, harmful, harmless, 1, start=start, tokens=TOKENS, epochs=6, lr=3e-2, rows=16
    )  # fmt: skip
    assert found.basis.shape == (1, 32) and found.basis.dtype == torch.float64
    assert float(found.basis[0] @ direction) > 0.98
    losses = found.losses[:, 0]
    assert float(losses[found.step]) == float(losses.min()) < float(losses[0]) - 0.4
    assert torch.allclose(losses, found.losses[:, 1:] @ torch.tensor([1.0, 0.2, 1.0], dtype=torch.float64))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def plain_losses(stream, direction, length, layer, pairs):
    """The three losses of one direction, a prompt at a time and through the public contexts."""
    model = stream.model

    def logits(sample):
        text, count = sample
        return model(input_ids=torch.tensor([text])).logits[0, -count - 1 : -1].log_softmax(-1), text[-count:]

    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for pair in pairs:
            with stream.ablated(direction, fused=False):
                found, target = logits(pair.ablation)
            sums[0] -= found[range(len(target)), target].mean()
            with stream.added(direction / direction.norm(), layer, length):
                found, target = logits(pair.addition)
            sums[1] -= found[range(len(target)), target].mean()
            own, _ = logits(pair.retain)
            with stream.ablated(direction, fused=False):
                found, _ = logits(pair.retain)
            sums[2] += (found.exp() * (found - own)).sum()
    return sums / len(pairs)


@pytest.fixture(scope="module")
def job(case):
    """Six pairs of prompts of different lengths with their targets, and one that ends early."""
    model, direction, _, _ = case
    stream = Stream(model)
    weights = {"ablation": 1.0, "addition": 0.2, "retain": 1.0}
    with _frozen(model, stream):
        made = _Refining(stream, 2 * direction, 1, weights, 3, 4)
        kinds = (prompts(True, 1, 6, padding="left"), "harmful"), (prompts(False, 1, 6, padding="right"), "harmless")
        pairs = made.targets(*(_prompts(*kind) for kind in kinds))
        ids, count = pairs[2].addition
        object.__setattr__(pairs[2], "addition", (ids[:-2], count - 2))
        yield made, pairs
    stream.close()


def test_losses_and_their_gradient_are_those_of_a_prompt_and_direction_at_a_time(case, job):
    _, direction, *_ = case
    made, pairs = job
    basis = orthonormalise(torch.stack([off(direction), torch.linspace(-1, 1, 32, dtype=torch.float64)]))
    drawn = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.28, 0.96]], dtype=torch.float64)
    theta = basis.clone().requires_grad_()
    parts = made._gradient(theta, drawn, pairs)

    def whole(at):
        rows = [*at, *(drawn @ at)]
        each = torch.stack([plain_losses(made.stream, row, made.length, made.layer, pairs) for row in rows])
        return each[:2].mean(0) + each[2:].mean(0)

    expected = whole(basis)
    torch.testing.assert_close(parts[1:], expected, rtol=1e-6, atol=1e-9)
    weights = torch.tensor([1.0, 0.2, 1.0], dtype=torch.float64)
    torch.testing.assert_close(parts[0], expected @ weights, rtol=1e-6, atol=1e-9)
    g = torch.Generator().manual_seed(5)
    way = torch.randn(basis.shape, dtype=torch.float64, generator=g)
    way -= (way * basis).sum(-1, keepdim=True) * basis  # the gradient's part along each direction is left out
    h = 1e-4
    slope = float((whole(basis + h * way) - whole(basis - h * way)) @ weights) / (2 * h)
    assert float((theta.grad * way).sum()) == pytest.approx(slope, rel=1e-3)
    assert float((theta.grad * basis).sum(-1).abs().max()) < 1e-12


def test_targets_are_the_models_own_answers(case, job):
    model, direction, *_ = case
    _, pairs = job
    pair = pairs[0]
    with torch.no_grad(), ablate(model, direction):
        ids = torch.tensor([pair.ablation[0][:-3]])
        for token in pair.ablation[0][-3:]:
            assert int(model(input_ids=ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert pair.retain[0][:-3] == pair.addition[0][:-3]


def test_a_cone_has_an_orthonormal_basis_and_falls(case):
    model, direction, harmful, harmless = case
    found = refine(
        model, 2 * direction, harmful, harmless, 1, start=off(direction), dimension=2, samples=3, tokens=TOKENS,
        epochs=2, lr=3e-2, rows=64,
    )  # fmt: skip
    assert found.basis.shape == (2, 32)
    assert float((found.basis @ found.basis.mT - torch.eye(2)).abs().max()) < 1e-12
    assert float(found.losses[:, 0].min()) < float(found.losses[0, 0]) - 0.2
    drawn = found.draw(50, torch.Generator().manual_seed(0))
    assert float((drawn @ found.basis.mT).min()) >= 0
    torch.testing.assert_close(drawn.norm(dim=-1), torch.ones(50, dtype=torch.float64))


def test_a_loss_that_does_not_fall_ends_the_run(case):
    """Waits of 1, and two reductions of the rate: three steps without a new least loss, and no more."""
    model, direction, harmful, harmless = case
    found = refine(model, 2 * direction, harmful, harmless, 1, tokens=1, epochs=50, patience=1, lr=0.5, batch=64)
    losses = found.losses[:, 0]
    misses = [i for i in range(1, len(losses)) if losses[i] >= losses[:i].min()]
    assert len(misses) == 3 and misses[-1] == len(losses) - 1


def test_what_does_not_fit_is_named(case):
    model, direction, harmful, harmless = case

    def refused(match, *args, **kwargs):
        with pytest.raises(ValueError, match=match):
            refine(model, *args, **kwargs)

    refused(r"direction: expected \[D\] with D = 32", direction[:5], harmful, harmless, 1)
    refused("direction: expected one that is not zero", 0 * direction, harmful, harmless, 1)
    refused("layer: expected 0 to 1, got 2", direction, harmful, harmless, 2)
    refused("harmful: expected at least one prompt", direction, [], harmless, 1)
    refused("start: expected at most dimension = 1", direction, harmful, harmless, 1, start=torch.eye(32)[:2].double())
    refused("samples: expected an integer, at least 1, got 0", direction, harmful, harmless, 1, samples=0)
    refused("expected weights >= 0", direction, harmful, harmless, 1, retain=-1.0)
    refused("lr: expected a number above 0", direction, harmful, harmless, 1, lr=0.0)
    model = tiny("llama", num_hidden_layers=1)
    model.generation_config = None
    refused("model: expected one with generate", direction.float(), harmful, harmless, 0)
