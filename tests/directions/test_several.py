"""Several directions, and probes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from directions.planted import planted, prompts
from fastguard import directions


@pytest.fixture(scope="module")
def case():
    model, direction = planted(3)
    return model, direction, prompts(True, 2, 16), prompts(False, 2, 16)


def test_principal_directions_of_planted_ones():
    g = torch.Generator().manual_seed(2)
    truth = directions.orthonormalise(torch.randn(2, 24, dtype=torch.float64, generator=g))
    weights = torch.tensor([5.0, 2.0], dtype=torch.float64) + torch.randn(400, 2, generator=g).double()
    rows = weights @ truth + 0.01 * torch.randn(400, 24, generator=g).double()
    found = directions.principal(rows, 2)
    assert float((found @ found.mT - torch.eye(2)).abs().max()) < 1e-12
    assert float(torch.linalg.svdvals(found @ truth.mT).min()) > 0.999
    assert float(found[0] @ rows.mean(0)) > 0
    with pytest.raises(ValueError, match="count: expected at most 1, the rank"):
        directions.principal(rows[:1].expand(4, -1), 2)
    with pytest.raises(ValueError, match=r"differences: expected \[N, D\] with at least count = 3"):
        directions.principal(rows[:2], 3)


def test_samples_are_the_rows_that_estimation_averages(case):
    model, _, harmful, harmless = case
    found = directions.estimate(model, harmful, harmless, positions=2, last_output=True)
    for layer in (0, 2, 3):
        rows = directions.samples(model, harmful, position=-2, layer=layer)
        assert rows.shape == (32, 32)
        torch.testing.assert_close(rows.mean(0), found.harmful[0, layer])


def test_each_phase_finds_what_the_ones_before_left(case):
    model, direction, harmful, harmless = case
    chosen = []

    def choose(found: directions.Directions) -> torch.Tensor:
        chosen.append(found.at(-1, 1))
        return chosen[-1]

    basis = directions.iterate(model, harmful, harmless, 3, choose, positions=1)
    assert basis.shape == (3, 32)
    assert float((basis @ basis.mT - torch.eye(3)).abs().max()) < 1e-12
    torch.testing.assert_close(basis[0], chosen[0] / chosen[0].norm())
    assert float(torch.cosine_similarity(basis[0], direction, dim=0)) > 0.9
    for phase in (1, 2):  # estimated under the ablation of what came before
        assert float((basis[:phase] @ chosen[phase]).abs().max()) < 1e-9
        with directions.ablate(model, basis[:phase]):
            again = directions.estimate(model, harmful, harmless, positions=1)
        torch.testing.assert_close(again.at(-1, 1), chosen[phase], rtol=0, atol=1e-6)
    assert chosen[1].norm() < 0.5 * chosen[0].norm()


def test_iteration_ends_where_nothing_is_left(case):
    model, _, harmful, harmless = case
    basis = directions.iterate(model, harmful, harmless, 8, lambda found: found.at(-1, 1), positions=1, stop=0.9)
    assert len(basis) == 1
    with pytest.raises(ValueError, match="harmful: expected batches that can be gone through again"):
        directions.iterate(model, iter(harmful), harmless, 2, lambda found: found.at(-1, 1))


def test_area_under_the_curve():
    assert float(directions.auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))) == 1
    assert float(directions.auc(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))) == 0.5
    positive, negative = torch.randint(0, 5, (7, 2)).double(), torch.randint(0, 5, (9, 2)).double()
    pairs = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    torch.testing.assert_close(directions.auc(positive, negative), pairs.mean((0, 1)))


@pytest.mark.parametrize("kind", ["means", "logistic"])
def test_probes_tell_planted_classes_apart(case, kind):
    model, direction, harmful, harmless = case
    held_out = prompts(True, 2, 8, seed=9), prompts(False, 2, 8, seed=9)
    found = directions.probe(model, harmful, harmless, *held_out, kind=kind)
    assert found.auc.shape == (4,)
    assert found.directions.shape == (4, 32)
    assert float(found.auc.min()) > 0.95
    assert float(torch.cosine_similarity(found.directions[0], direction, dim=0)) > 0.9
    same = directions.probe(model, harmful, harmless, held_out[1], held_out[1], kind=kind)
    torch.testing.assert_close(same.auc, torch.full((4,), 0.5, dtype=torch.float64))
    turned = directions.probe(model, harmless, harmful, *held_out, kind=kind)
    torch.testing.assert_close(turned.auc, 1 - found.auc)


def test_separation_is_the_probes_of_all_positions_at_once(case):
    model, _, harmful, harmless = case
    held_out = prompts(True, 2, 3, seed=9, padding="left"), prompts(False, 1, 5, seed=9, padding="right")
    model.model.embed_tokens.weight.data[40:50] += 0.7 * torch.randn(10, 32, dtype=torch.float64)
    turned = directions.estimate(model, harmless, harmful, positions=3)  # and where it is not so well separated
    for found in (directions.estimate(model, harmful, harmless, positions=3, last_output=True), turned):
        measured = directions.separation(model, found, *held_out)
        assert measured.shape == found.harmful.shape[:2]
        for row, position in enumerate(found.positions):
            sets = (harmful, harmless) if found is not turned else (harmless, harmful)
            one = directions.probe(model, *sets, *held_out, position=position).auc
            assert torch.equal(measured[row], one[: measured.shape[1]])
    short = dataclasses.replace(turned, harmful=turned.harmful[:, :2], harmless=turned.harmless[:, :2])
    with pytest.raises(ValueError, match="directions: expected those of 3 layers, got 2"):
        directions.separation(model, short, *held_out)


def test_logistic_regression_meets_its_conditions():
    """The normal is X^T a with a = (t - p) / penalty at the optimum of the penalised likelihood."""
    from fastguard.directions.probe import _logistic

    g = torch.Generator().manual_seed(4)
    a, b = torch.randn(30, 5, generator=g).double() + 0.5, torch.randn(20, 5, generator=g).double()
    normal = _logistic(a, b, 1e-2)
    x = torch.cat([a, b])
    x = x - x.mean(0)
    scale, penalty = x.square().sum(1).mean(), 1e-2 * len(x)
    target = torch.cat([torch.ones(30), torch.zeros(20)]).double()
    w = (normal / scale).requires_grad_()
    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(50):  # the best offset for this normal
        with torch.no_grad():
            p = torch.sigmoid(x @ w + offset)
            offset += (target - p).sum() / (p * (1 - p)).sum()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ w + offset, target, reduction="sum")
    (loss + 0.5 * penalty * scale * w.square().sum()).backward()
    assert float(w.grad.norm()) < 1e-8 * len(x)


def test_errors_name_what_was_given(case):
    model, _, harmful, harmless = case
    with pytest.raises(ValueError, match="kind: expected one of means, logistic, got 'svm'"):
        directions.probe(model, harmful, harmless, harmful, harmless, kind="svm")
    with pytest.raises(ValueError, match="held_out_harmless: expected at least one prompt"):
        directions.probe(model, harmful, harmless, harmful, [])
    with pytest.raises(ValueError, match="layer: expected 0 to 3, got 4"):
        directions.samples(model, harmful, position=-1, layer=4)
