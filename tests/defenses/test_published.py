"""That the eager statements of SEAM and CRL, which other tests take as oracles, say what their formulas say."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from defenses.published_crl import ORIGINAL, PORT, divergence, published_crl
from defenses.published_seam import Losses, exact_gradient, published_gradient
from tiny_models import VOCABULARY, pair, tiny


def seam():
    """GPT-2, for Llama computes its norms and its softmax in fp32 whatever the weights are: noise of 1e-7 / eps."""
    model = tiny("gpt2", torch.float64, attn_implementation="eager", num_hidden_layers=2)
    harmful, refusal = pair(padding=True)
    benign, _ = pair(batch=2, length=7, seed=9)
    return model, Losses(model, harmful, refusal, benign, model.transformer.ln_f, model.lm_head)


def distance(a, b) -> float:
    squares = [(a[n] - b[n]).square().sum() / len(a) for n in a]
    return math.sqrt(float(torch.stack(squares).sum()))


def test_seam_differences_tend_to_the_exact_gradient():
    """The error falls with eps, and at the published eps it is small beside the cosine's own gradient."""
    model, losses = seam()
    before = copy.deepcopy(model.state_dict())
    exact, figures = exact_gradient(model, losses, beta=1.0)
    without, _ = exact_gradient(model, losses, beta=0.0)
    scale = distance(exact, without)
    errors = []
    for eps in (1e-3, 1e-4, 1e-5):
        found, same = published_gradient(model, losses, beta=1.0, eps=eps)
        assert same == pytest.approx(figures, rel=1e-12)
        errors.append(distance(found, exact) / scale)
    assert errors[0] < 0.05
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)
    assert errors[2] == pytest.approx(errors[0] / 100, rel=0.2)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_seam_cosine_gradient_is_the_slope_of_the_cosine():
    """Central differences of the reported cosine along a random direction."""
    model, losses = seam()
    with_cosine, _ = exact_gradient(model, losses, beta=1.0)
    without, _ = exact_gradient(model, losses, beta=0.0)
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    slope = sum(float(((with_cosine[n] - without[n]) * d).sum()) for n, d in direction.items())
    cosines = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.add_(direction[n], alpha=step)
        cosines.append(exact_gradient(model, losses)[1].cosine)
    assert slope == pytest.approx((cosines[0] - cosines[1]) / 2e-5, rel=1e-5)


def crl():
    model, frozen = tiny("gpt2", torch.float64), tiny("gpt2", torch.float64, seed=1)
    harmful, harmless = pair(padding=True)
    for batch in (harmful, harmless):
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, :3] = -100
    return model, frozen, harmful, harmless


def by_hand(model, frozen, harmful, harmless):
    """The port's loss at layers 1 and 3, a token at a time."""

    def states(m, batch):
        with torch.no_grad():
            out = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        rows = [(b, t) for b in range(3) for t in range(9) if batch["labels"][b, t] != -100]
        return [[out.hidden_states[i][b, t] for b, t in rows] for i in (1, 3)], [out.logits[b, t] for b, t in rows]

    def d(x, y):
        return 1 - float(x @ y / (x.norm() * y.norm()))

    (h_h, _), (h0_h, _) = states(model, harmful), states(frozen, harmful)
    (h_b, z), (h0_b, z0) = states(model, harmless), states(frozen, harmless)
    benign, hinges = [], []
    for i in range(2):
        c = sum(h_h[i]) / len(h_h[i])
        benign += [max(0.0, d(h, h0) - d(h, c) + 0.3) for h, h0 in zip(h_b[i], h0_b[i], strict=True)]
        hinges += [max(0.0, d(h, c) - d(h, h0) + 0.5) for h, h0 in zip(h_h[i], h0_h[i], strict=True)]
    kls = [float((q.softmax(0) * (q.log_softmax(0) - p.log_softmax(0))).sum()) for q, p in zip(z0, z, strict=True)]
    return [sum(x) / len(x) for x in (benign, hinges, kls)]


def test_crl_says_what_its_formula_says():
    model, frozen, harmful, harmless = crl()
    loss, parts = published_crl(model, frozen, harmful, harmless, **{**PORT, "layers": (1, 3)})
    want = by_hand(model, frozen, harmful, harmless)
    assert [float(p.detach()) for p in parts[:3]] == pytest.approx(want, rel=1e-10)
    assert float(loss.detach()) == pytest.approx(0.5 * want[0] + 0.4 * want[1] + 0.9 * want[2], rel=1e-10)


def test_crl_gradient_flows_through_the_centroids():
    """The slope of the benign hinge alone, which sees the harmful states through their mean only."""
    model, frozen, harmful, harmless = crl()
    options = {**PORT, "layers": (1, 3), "weights": (1.0, 0.0, 0.0)}
    loss, parts = published_crl(model, frozen, harmful, harmless, **options)
    assert float(loss.detach()) > 0
    for pull in torch.autograd.grad(loss, [parts.centroids[i] for i in (1, 3)], retain_graph=True):
        assert pull.shape == (32,)
        assert pull.norm() > 0
    weight = model.transformer.h[0].mlp.c_proj.weight
    slope = torch.autograd.grad(loss, weight)[0]
    direction = torch.randn_like(slope)
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            weight.add_(direction, alpha=step)
            values.append(float(published_crl(model, frozen, harmful, harmless, **options)[0]))
    assert float((slope * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


def test_crl_original_never_closes_its_harmful_hinge():
    model, frozen, harmful, harmless = crl()
    options = {**ORIGINAL, "layers": (1, 2)}
    with torch.no_grad():
        loss, parts = published_crl(model, frozen, harmful, harmless, **options)
    assert 1.0 <= float(parts.harmful) <= 5.0
    assert float(loss) == pytest.approx(0.5 * float(parts.benign) + 0.6 * float(parts.harmful) + 0.7 * float(parts.kl))
    with pytest.raises(IndexError):
        published_crl(model, frozen, harmful, harmless, **PORT)


def test_divergences_differ_by_tokens_per_sample():
    frozen, live = (torch.randn(2, 5, VOCABULARY, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    token = divergence(frozen, live, mask, "token", 1.0)
    assert float(divergence(frozen, live, mask, "batchmean", 1.0)) == pytest.approx(4.0 * float(token))
    hot = divergence(frozen / 2, live / 2, mask, "batchmean", 1.0)
    assert float(divergence(frozen, live, mask, "batchmean", 2.0)) == pytest.approx(4.0 * float(hot))
