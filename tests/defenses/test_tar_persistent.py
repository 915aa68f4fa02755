"""TAR with attackers who are kept: beside cold ones, by hand, and over interruptions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from defenses.published_tar import cross_entropy, inputs, labels_of, negative_entropy
from defenses.test_tar import SMALL, SOURCES, batch, float64_norms, largest_difference, outer, run  # noqa: F401
from fastguard.defenses.tar.options import Options
from fastguard.defenses.tar.step import TAR
from fastguard.settings import SettingError
from fastguard.trainers import load, save
from tiny_models import gradients, tiny


def persistent(fresh: int, **changes) -> tuple[nn.Module, TAR]:
    model = tiny("llama", changes.pop("dtype", torch.float32), num_hidden_layers=2)
    return model, TAR(model, persistent=True, fresh=fresh, **{**SMALL, **changes})


def test_attackers_who_go_all_steps_at_once_are_cold_ones():
    kept, cold = persistent(4), persistent(4)
    cold[1].persistent = False
    figures = [run(tar, model, outer(model), range(2)) for model, tar in (kept, cold)]
    assert figures[0] == figures[1] and largest_difference(kept[0], cold[0]) == 0
    assert [a["taken"] for a in kept[1].state_dict()["attackers"].values()] == [4, 4]
    assert "attackers" not in cold[1].state_dict()


def by_hand(model: nn.Module, legs: list[list], held_out: list, lr: float) -> list[dict[str, torch.Tensor]]:
    """The tamper gradient of each outer step, the defender's own step being w -= 0.1 times it: one attacker, kept."""
    attacker = copy.deepcopy(model)
    optimizer, taken, found = torch.optim.AdamW(attacker.parameters(), lr=lr, weight_decay=0.01), 0, []
    for leg, tamper in zip(legs, held_out, strict=True):
        for one in leg:
            optimizer.zero_grad()
            cross_entropy(attacker(**inputs(one)).logits, labels_of(one)).backward()
            optimizer.step()
        taken += len(leg)
        optimizer.zero_grad()
        (4 * math.exp(0.0625 * (taken - 8)) * negative_entropy(attacker(**inputs(tamper)).logits)).backward()
        found.append(gradients(attacker))
        with torch.no_grad():
            for (name, p), q in zip(attacker.named_parameters(), model.parameters(), strict=True):
                q.sub_(0.1 * found[-1][name])
                p.sub_(0.1 * found[-1][name])
    return found


def test_two_outer_steps_by_hand(float64_norms):  # noqa: F811
    """Reads after steps 3 and 6 of 8, weighed as such; between them the attacker moves along with the defender."""
    model, tar = persistent(
        3, dtype=torch.float64, steps=8, every=4, count=1, lrs=(5e-3,), representations=False, retain_weight=0.0
    )
    twin, held_out, ahead = copy.deepcopy(model), [batch("held out", i) for i in range(2)], []
    for tar.step in range(2):
        ahead.append(list(tar.adversaries(SOURCES)[0].batches))
    tar.step = 0
    expected = by_hand(twin, ahead, held_out, 5e-3)
    for step in range(2):
        theta = [p.detach().clone() for p in model.parameters()]
        tar.backward(retain=batch("r", step), tamper=held_out[step], adversaries=tar.adversaries(SOURCES))
        assert all(torch.equal(p, t) for p, t in zip(model.parameters(), theta, strict=True))
        found = gradients(model)
        assert found.keys() == expected[step].keys()
        for name, g in found.items():
            assert float((g - expected[step][name]).norm() / expected[step][name].norm()) < 1e-12, (step, name)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.sub_(0.1 * found[name])


def test_lives_of_attackers():
    """Who attacks is drawn at the beginning of a life; batches come once each; what is left of K is the last leg."""
    _, tar = persistent(3, steps=8, kinds=(("retain", "harmful"), ("other",)), count=2)
    numbers: list[int] = []
    sources = {name: lambda n, name=name: numbers.append(n) or name for name in SOURCES}
    lives = []
    for life in range(12):
        legs = []
        for tar.step in range(3 * life, 3 * life + 3):
            legs.append([(a.name, a.lr, list(a.batches)) for a in tar.adversaries(sources)])
        for attacker in zip(*legs, strict=True):
            assert len({(name, lr) for name, lr, _ in attacker}) == 1
            drawn = [corpus for _, _, batches in attacker for corpus in batches]
            assert [len(batches) for *_, batches in attacker] == [3, 3, 2]
            assert drawn == sorted(drawn, reverse=True)  # retain before harmful, over all legs
            lives.append((attacker[0][:2], drawn.index("harmful") if "harmful" in drawn else None))
    assert len(set(lives)) > 6 and len(numbers) == len(set(numbers)) == 12 * 2 * 8


def test_a_run_that_was_killed_goes_on_with_the_same_bits(tmp_path):
    """Also after a step that failed when its attacks were over: the attackers are then where they were."""
    model, tar = persistent(2)
    optimizer = outer(model)
    run(tar, model, optimizer, range(1))
    save(tmp_path, 1, model, optimizer, {"tar": tar})
    kept = copy.deepcopy(tar.state_dict())
    spoiled = {**batch("r", 1), "labels": torch.full((3, 7), -100)}
    with pytest.raises(ValueError, match="no token carries loss"):
        tar.backward(retain=spoiled, tamper=batch("t", 1), adversaries=tar.adversaries(SOURCES))
    for index, attacker in tar.state_dict()["attackers"].items():
        assert attacker["taken"] == 2
        for own, before in zip(attacker["numbers"], kept["attackers"][index]["numbers"], strict=True):
            assert all(torch.equal(own[name], before[name]) for name in ("delta", "first", "second"))
    figures = run(tar, model, optimizer, range(1, 3))

    other, again = persistent(2)
    its = outer(other)
    assert load(tmp_path, other, its, {"tar": again}) == 1
    assert run(again, other, its, range(1, 3)) == figures and largest_difference(model, other) == 0
    assert [a["taken"] for a in again.state_dict()["attackers"].values()] == [2, 2]  # renewed after K = 4


def test_fresh_is_at_most_the_attackers_steps():
    with pytest.raises(ValueError, match=r"fresh: expected 1 to steps \(4\), got 5"):
        persistent(5)
    with pytest.raises(SettingError, match=r"fresh: expected at most inner_steps \(4\), got 8"):
        Options(inner_steps=4, persistent=True)
