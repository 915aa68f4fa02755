"""Reference: the initial model in the live one's place, and the live one bit for bit back."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch
from torch import nn

from fastguard.nested import Reference
from tiny_models import pair, tiny


def states(model: nn.Module) -> tuple[torch.Tensor, ...]:
    return model(**pair()[0], output_hidden_states=True).hidden_states


def move(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return [p.detach().clone() for p in model.parameters()]


def assert_same(found, expected) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_states_are_those_of_a_copy(name, dtype):
    model = tiny(name, dtype).eval()
    twin = copy.deepcopy(model)
    reference = Reference(model)
    assert reference.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    for _ in range(2):
        live = move(model)
        with torch.no_grad():
            mine = states(model)
        with reference.installed() as there:
            found = states(there)
            assert not found[0].requires_grad
        assert_same(found, states(twin))
        assert not torch.equal(found[-1], mine[-1])
        assert_same(model.parameters(), live)
        with torch.no_grad():
            assert_same(states(model), mine)
    assert all(p.requires_grad for p in model.parameters())


def test_autocast_does_not_mix_up_the_two():
    """It casts each weight once for all forwards in its context, whatever is written into the weight in between."""
    model = tiny("llama").eval()
    twin = copy.deepcopy(model)
    reference = Reference(model)
    move(model)
    with torch.autocast("cpu", torch.bfloat16):
        live = states(model)
        with reference.installed() as there:
            found = states(there)
        again = states(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(found, states(twin))
    assert_same(again, live)
    assert not torch.equal(found[-1], live[-1])


def test_a_graph_of_before_holds():
    model = tiny("llama").eval()
    reference = Reference(model)
    move(model)
    states(model)[-1].sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    total = states(model)[-1].sum()
    with reference.installed() as there:
        states(there)
    total.backward()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(expected, (p.grad for p in model.parameters())))


def test_only_what_moves_is_kept():
    model = tiny("llama").eval()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    twin, reference = copy.deepcopy(model), Reference(model)
    assert reference.bytes == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    live = move(model)
    with reference.installed():
        found = states(model)
    assert_same(found, states(twin))
    assert_same(model.parameters(), live)
    some = Reference(model, lambda name, p: "layers.1.mlp" in name)
    assert 0 < some.bytes < reference.bytes


class Boom(Exception):
    pass


@pytest.mark.parametrize("kind, error", [("exception", Boom), ("interrupt", KeyboardInterrupt)])
def test_whatever_is_raised_inside(kind, error):
    model = tiny("llama", torch.bfloat16)
    reference = Reference(model)
    start = [p.detach().clone() for p in model.parameters()]
    live = move(model)
    with pytest.raises(error), reference.installed():
        assert_same(model.parameters(), start)
        if kind == "exception":
            raise Boom
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
    assert_same(model.parameters(), live)
    with reference.installed():
        assert_same(model.parameters(), start)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("at", [1, 7, 30, 31, 60])
def test_an_interrupt_during_the_exchange(at, monkeypatch):
    """On the way in some are exchanged and must go back; on the way out all of them do."""
    from fastguard.nested import reference as module

    model = tiny("llama")
    reference = Reference(model)
    start = [p.detach().clone() for p in model.parameters()]
    live = move(model)
    exchange, calls = module._exchange, 0

    def interrupted(a, b):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
        exchange(a, b)

    monkeypatch.setattr(module, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt), reference.installed():
        assert at > len(live)
    assert_same(model.parameters(), live)
    monkeypatch.undo()
    with reference.installed():
        assert_same(model.parameters(), start)


def test_adapters_are_switched_off():
    from peft import LoraConfig, get_peft_model

    base = tiny("llama").eval()
    expected = states(copy.deepcopy(base))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).eval()
    reference = Reference(model)
    assert reference.bytes == 0
    live = move(model)
    with reference.installed() as there:
        found = states(there)
    assert_same(found, expected)
    assert_same(model.parameters(), live)
    assert not torch.equal(states(model)[-1], expected[-1])
    with pytest.raises(Boom), reference.installed():
        raise Boom
    assert not torch.equal(states(model)[-1], expected[-1])  # on again


def test_other_parameters_are_an_error():
    model = tiny("llama")
    reference = Reference(model)
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameters are not those"), reference.installed():
        pass
    model.model.norm.weight.requires_grad_(True)
    other = tiny("llama", hidden_size=16)
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(ValueError, match="trainable parameters are not those"), reference.installed(other):
        pass
    assert_same(other.parameters(), before)
