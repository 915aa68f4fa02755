"""Selection: the published loop's scores and choice, for a part of its forwards."""

from __future__ import annotations

import pytest
import torch

from directions.planted import REFUSAL, planted, prompts
from directions.published import selection
from fastguard import directions

TOKENS = [REFUSAL]


@pytest.fixture(scope="module")
def case():
    model, direction = planted()
    found = directions.estimate(model, prompts(True, 1, 64), prompts(False, 1, 64), positions=2)
    harmful, harmless = (prompts(h, 2, 4, seed=5, padding="left") for h in (True, False))
    return model, direction, found, harmful, harmless


@pytest.fixture(scope="module")
def theirs(case):
    model, _, found, harmful, harmless = case
    return selection(model, found.difference, harmful, harmless, TOKENS)


@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_same_choice_as_the_published_loop(case, theirs, rows):
    model, _, found, harmful, harmless = case
    mine = directions.select(model, found, harmful, harmless, refusal_tokens=TOKENS, rows=rows)
    best, refusal, kl, steering = theirs
    assert (found.positions.index(mine.position), mine.layer) == best
    assert torch.equal(mine.direction, found.difference[best])
    for name, a, b in (("steering", mine.steering, steering), ("kl", mine.kl, kl), ("refusal", mine.refusal, refusal)):
        asked = ~a.isnan()
        assert asked.any()
        torch.testing.assert_close(a[asked], b[asked], rtol=1e-6, atol=1e-9, msg=name)
    assert mine.steering[:, :4].isfinite().all()
    assert mine.steering[:, 4:].isnan().all()  # the layer bound
    passed = (steering >= 0) & (kl <= 0.1)
    passed[:, 4:] = False
    assert torch.equal(~mine.refusal.isnan(), passed)


def test_later_questions_are_asked_of_what_passed_alone(case, theirs):
    """8 prompts a class, 8 candidates below the layer bound; the published loop runs 3 x 10 x 8 + 16 rows."""
    model, _, found, harmful, harmless = case
    kl = theirs[2][:, :4].flatten()
    below = int((kl <= kl.median()).sum())
    assert 0 < below < 8
    mine = directions.select(
        model, found, harmful, harmless, refusal_tokens=TOKENS, min_steering=-1e9, max_kl=float(kl.median())
    )
    steering = 2 * 8 * (5 + 4 + 3 + 2) / 5
    check_of_the_prefix = 4 * 2 / 5
    assert mine.forwards == pytest.approx(8 + check_of_the_prefix + steering + 8 * 8 + below * 8 + 8)


def test_the_choice_removes_refusal(case):
    model, direction, found, harmful, harmless = case
    mine = directions.select(model, found, harmful, harmless, refusal_tokens=TOKENS)
    assert float(torch.cosine_similarity(mine.direction, direction, dim=0)) > 0.99
    at = float(mine.refusal[found.positions.index(mine.position), mine.layer])
    assert mine.harmful > mine.harmless + 3
    assert at < mine.harmless + 1


def test_layers_that_return_more_than_a_tensor_share_no_prefix(case):
    model, _, found, harmful, harmless = case
    plain = directions.select(model, found, harmful, harmless, refusal_tokens=TOKENS)
    layers = model.model.layers
    handles = [layer.register_forward_hook(lambda module, args, output: [output]) for layer in layers]

    def first(module, args):
        return (args[0][0], *args[1:]) if isinstance(args[0], list) else None

    unwrap = [module.register_forward_pre_hook(first) for module in (*layers, model.model.norm)]
    try:
        listed = directions.select(model, found, harmful, harmless, refusal_tokens=TOKENS)
    finally:
        for handle in (*handles, *unwrap):
            handle.remove()
    assert listed.forwards > plain.forwards
    assert (listed.position, listed.layer) == (plain.position, plain.layer)
    torch.testing.assert_close(listed.steering, plain.steering, equal_nan=True)


def test_an_attacker_takes_one_all_the_same(case):
    """First without the question whether it steers; without the one what else it changes only where it must."""
    model, _, found, harmful, harmless = case
    given = model, found, harmful, harmless
    plain = directions.select(*given, refusal_tokens=TOKENS)
    chosen, passed = directions.select_anyway(*given, refusal_tokens=TOKENS)
    assert passed and torch.equal(chosen.direction, plain.direction)
    chosen, passed = directions.select_anyway(*given, refusal_tokens=TOKENS, min_steering=1e9)
    asked = ~chosen.refusal.isnan()
    assert not passed and chosen.steering.isnan().all() and asked.any() and (chosen.kl[asked] <= 0.1).all()
    chosen, passed = directions.select_anyway(*given, refusal_tokens=TOKENS, min_steering=1e9, max_kl=-1.0)
    assert not passed and not chosen.kl.isnan().any() and not chosen.refusal.isnan().any()
    row, bound = found.positions.index(chosen.position), 1e-3
    while bound < float(chosen.kl.min()):
        bound *= 2
    assert torch.equal(chosen.direction, found.difference[row, chosen.layer])
    assert float(chosen.refusal[row, chosen.layer]) == float(chosen.refusal[chosen.kl <= bound].min())
    assert float(chosen.kl[row, chosen.layer]) <= 2 * max(float(chosen.kl.min()), 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(refusal_tokens=[]), "refusal_tokens: expected token ids"),
        (dict(refusal_tokens=[97]), "refusal_tokens: expected ids below 97"),
        (dict(layers=0.0), "layers: expected a share"),
        (dict(rows=0), "rows: expected at least 1"),
        (
            dict(min_steering=1e9),
            r"no candidate passed: 8 below .*, 0 with a steering score >= .* \(the highest is [-.\d]+\)$",
        ),
        (dict(max_kl=-1.0), r"0 of those with a divergence <= -1.0 \(the least is [-.\de]+\)$"),
        (dict(harmful=[]), "harmful: expected at least one batch"),
        (dict(directions=3), "directions: expected Directions"),
    ],
)
def test_errors_name_what_was_given(case, change, message):
    model, _, found, harmful, harmless = case
    given = dict(directions=found, harmful=harmful, harmless=harmless, refusal_tokens=TOKENS) | change
    with pytest.raises(ValueError, match=message):
        directions.select(model, **given)
