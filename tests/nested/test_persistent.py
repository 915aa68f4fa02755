"""An attacker who is kept between attacks: against the same attack by hand, and what an attack that fails leaves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastguard.nested import SGD, AdamW, PersistentAttacker, SimulatedAttack
from tiny_models import gradients, pair, tiny


def loss(model: nn.Module, seed: int) -> Tensor:
    ids = pair(seed=seed)[0]["input_ids"]
    return model(input_ids=ids, labels=ids).loss


def attacked(attack: SimulatedAttack, attacker: PersistentAttacker, first: int, steps: int = 2) -> dict[str, Tensor]:
    """The gradient that is read after these steps; the attacker's batches are numbered from ``first``."""
    model = attack.model
    with attack.at(attacker=attacker) as tampered:
        for i in range(first, first + steps):
            tampered.step(lambda i=i: loss(model, i))
        tampered.accumulate(lambda: loss(model, 100))
    return gradients(model)


def by_hand(
    model: nn.Module, theta: list[Tensor], moved: int, steps: int = 2
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The gradient of the second of two such attacks, the defender having stepped from theta to theta + 0.01 between
    them, and where the attacker then stands beside him; by torch's own optimizer, on a copy.
    """
    twin = copy.deepcopy(model)
    parameters = list(twin.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    with torch.no_grad():
        for p, t in zip(parameters, theta, strict=True):
            p.copy_(t)
    for i in range(2 * steps):
        if i == steps:
            with torch.no_grad():
                for p in parameters:
                    p.add_(0.01)
        optimizer.zero_grad()
        loss(twin, moved + i).backward()
        optimizer.step()
    twin.zero_grad()
    loss(twin, 100).backward()
    return gradients(twin), [p.detach() - (t + 0.01) for p, t in zip(parameters, theta, strict=True)]


def farthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in a)


def deltas(attacker: PersistentAttacker) -> list[Tensor]:
    return [own["delta"] for own in attacker.state_dict()["numbers"]]


@pytest.mark.parametrize("where", ["device", "host"])
def test_an_attacker_goes_on_beside_a_defender_who_moved(where):
    model = tiny("llama_tied", torch.float64, num_hidden_layers=2)
    theta = [p.detach().clone() for p in model.parameters()]
    attack = SimulatedAttack(model, AdamW(lr=1e-2, weight_decay=0.1), snapshot=where)
    attacker = PersistentAttacker()
    attacked(attack, attacker, 0)
    assert all(torch.equal(p, t) for p, t in zip(model.parameters(), theta, strict=True))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    kept = copy.deepcopy(attacker.state_dict())
    moved = [p.detach().clone() for p in model.parameters()]
    found = attacked(attack, attacker, 2)
    assert all(torch.equal(p, t) for p, t in zip(model.parameters(), moved, strict=True))
    expected, apart = by_hand(model, theta, 0)
    assert farthest(found, expected) < 1e-12 and attacker.taken == 4
    for delta, other in zip(deltas(attacker), apart, strict=True):
        torch.testing.assert_close(delta, other, rtol=0, atol=1e-14)
        assert delta.norm() > 1e-3

    for name in ("delta", "first", "second"):  # each of what is kept is used
        spoiled = copy.deepcopy(kept)
        for own in spoiled["numbers"]:
            own[name].mul_(0.5)
        attacker.load_state_dict(spoiled)
        assert farthest(attacked(attack, attacker, 2), expected) > 1e-4, name
    attacker.renew()
    cold = attacked(attack, attacker, 2)
    assert farthest(cold, attacked(attack, PersistentAttacker(), 2)) == 0
    assert farthest(cold, expected) > 1e-4 and attacker.taken == 2


def test_an_attack_that_fails_leaves_the_attacker_where_he_was():
    model = tiny("llama", torch.float32, num_hidden_layers=2)
    attack, attacker = SimulatedAttack(model, AdamW(lr=1e-2)), PersistentAttacker()
    attacked(attack, attacker, 0)
    before, bits = copy.deepcopy(attacker.state_dict()), [p.detach().clone() for p in model.parameters()]
    for error in (KeyError, FloatingPointError):
        with pytest.raises(error), attack.at(attacker=attacker) as tampered:
            tampered.step(lambda: loss(model, 7))
            if error is KeyError:
                raise KeyError
            tampered.accumulate(lambda: loss(model, 8) * torch.inf)
    assert all(torch.equal(p, t) for p, t in zip(model.parameters(), bits, strict=True))
    after = attacker.state_dict()
    assert (after["taken"], after["part"]) == (before["taken"], before["part"])
    for own, kept in zip(after["numbers"], before["numbers"], strict=True):
        assert own["steps"] == kept["steps"] and all(torch.equal(own[n], kept[n]) for n in ("delta", "first", "second"))


@pytest.mark.parametrize("given", [False, True])
def test_masters_keep_what_bf16_would_round_away(given):
    """Steps a tenth of the weights' spacing: of two attacks the second starts where the first one's masters were."""
    model = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    masters = [model.weight.detach().float()] if given else "device"
    attack = SimulatedAttack(model, SGD(lr=1e-5), masters="fp32", snapshot=masters)
    attacker, weight = PersistentAttacker(), model.weight.detach().clone()
    for attacks in (1, 2, 3):
        with attack.at(attacker=attacker) as tampered:
            tampered.step(lambda: model.weight.float().sum())
        torch.testing.assert_close(deltas(attacker)[0], torch.full((64, 64), -1e-5 * attacks), rtol=0, atol=2e-8)
    assert torch.equal(model.weight, weight)


def test_what_cannot_be_kept_is_refused():
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    refused = pytest.raises(ValueError, match=r"attacker: expected weights in fp32, or masters='fp32'.*got .*bfloat16")
    with refused, SimulatedAttack(model).at(attacker=PersistentAttacker()):
        pass

    class Stateless:
        def start(self, tensors):
            return type("Going", (), {"step": lambda self, gradients: None})()

    model = nn.Linear(4, 4)
    refused = pytest.raises(TypeError, match=r"optimizer: expected one that a persistent attacker can go on with.*Go")
    with refused, SimulatedAttack(model, Stateless()).at(attacker=PersistentAttacker()):
        pass


def test_the_attacker_of_another_model_begins_anew_and_says_so():
    attacker = PersistentAttacker()
    attacked(SimulatedAttack(tiny("llama", num_hidden_layers=2)), attacker, 0)
    other = SimulatedAttack(tiny("llama", num_hidden_layers=1))
    with pytest.warns(RuntimeWarning, match="persistent attacker: begun anew"):
        found = attacked(other, attacker, 2)
    assert attacker.taken == 2 and farthest(found, attacked(other, PersistentAttacker(), 2)) == 0
