"""The training optimizer's states, out of the way of an attack."""

from __future__ import annotations

import copy

import pytest
import torch

from defenses.test_tar import SMALL, SOURCES, held_out
from fastguard.defenses.tar.step import TAR
from fastguard.nested.waiting import Waiting
from tiny_models import tiny


def states(optimizer):
    return [t for state in optimizer.state.values() for t in state.values() if t.dim()]


def on_device(optimizer):
    return sum(t.untyped_storage().nbytes() for t in states(optimizer))


def trained(budget, seen=None):
    """Weights and states after three steps of AdamW on TAR's gradients."""
    model = tiny("llama", num_hidden_layers=1)
    tar = TAR(model, **SMALL, outer_states=budget)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tar.trained_by(optimizer)
    if seen is not None:
        model.model.layers[0].register_forward_hook(lambda *_: seen.append((on_device(optimizer), tar.step)))
    for _ in range(3):
        adversaries = tar.adversaries(SOURCES)
        tar.backward(retain=SOURCES["retain"](tar.step), tamper=held_out("", tar.step), adversaries=adversaries)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()], copy.deepcopy(states(optimizer)), on_device(optimizer)


def test_a_run_whose_states_wait_on_the_host_has_the_same_bits():
    weights, moments, size = trained(None)
    for budget in (0, size // 2, size):
        seen = []
        found, theirs, back = trained(budget, seen)
        assert all(map(torch.equal, found, weights)) and all(map(torch.equal, theirs, moments)) and back == size
        attacked = [held for held, step in seen if step]
        assert max(attacked) == size, "the retain batch has all of them"
        assert min(attacked) <= budget and (min(attacked) > 0 or budget < size // 2)


def test_states_are_back_whatever_is_raised_and_keep_their_objects():
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    before, bits = states(optimizer), copy.deepcopy(states(optimizer))
    waiting = Waiting(optimizer, budget=3 * 4)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), waiting.away() as moved:
            assert moved == 2 * 12 * 4 + 3 * 4, "of four moments the smallest fits"
            assert on_device(optimizer) == 3 * 4
            raise KeyboardInterrupt
        assert all(a is b for a, b in zip(states(optimizer), before, strict=True))
        assert all(map(torch.equal, states(optimizer), bits))


def test_what_shares_its_memory_stays():
    flat = torch.arange(10.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(5))], lr=1.0)
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {"a": flat[:5], "b": flat[5:], "step": torch.ones(())}
    with Waiting(optimizer).away() as moved:
        assert moved == 0 and torch.equal(flat, torch.arange(10.0))


def test_bad_input_is_refused():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    for budget in (-1, 1.5, True):
        with pytest.raises(ValueError, match="budget: expected bytes"):
            Waiting(optimizer, budget)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(ValueError, match="capturable=False"):
        Waiting(optimizer)
    model = tiny("llama", num_hidden_layers=1)
    tar = TAR(model, **SMALL, outer_states=0)
    with pytest.raises(ValueError, match=r"outer_states: expected None, or TAR.trained_by\(optimizer\) first, got 0"):
        tar.backward(retain=SOURCES["retain"](0), tamper=held_out("", 0), adversaries=tar.adversaries(SOURCES))
