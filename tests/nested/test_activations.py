"""ActivationPerturbation: gradients at modules' outputs, and forwards with them added, without any on parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from checks import assert_agrees, assert_catches_spoiled
from fastguard.nested import ActivationPerturbation
from tiny_models import gradients, pair, tiny


def loss(model: nn.Module, seed: int = 0, **shape: int) -> torch.Tensor:
    ids = pair(seed=seed, **shape)[0]["input_ids"]
    return model(input_ids=ids, labels=ids).loss


def attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def captured(model: nn.Module, sites: list[int], seed: int = 0) -> dict[int, torch.Tensor]:
    """Gradients at the outputs, by retained outputs of a copy."""
    outputs: dict[int, torch.Tensor] = {}
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.requires_grad_(True)
    for i in sites:
        attentions(twin)[i].register_forward_hook(lambda m, a, out, i=i: outputs.__setitem__(i, out[0]))
    value = loss(twin, seed)
    return dict(zip(outputs, torch.autograd.grad(value, list(outputs.values())), strict=True))


def shifted(model: nn.Module, shifts: dict[int, torch.Tensor], seed: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients with the shifts added, by hooks of a copy."""
    twin = copy.deepcopy(model)
    for i, s in shifts.items():
        attentions(twin)[i].register_forward_hook(lambda m, a, out, s=s: (out[0] + s, *out[1:]))
    value = loss(twin, seed)
    value.backward()
    return float(value.detach()), gradients(twin)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sites", [None, [1], [0, 2]])
def test_record_and_apply(sites, checkpointing):
    model = tiny("llama", torch.float64)
    expected = captured(model, [0, 1, 2] if sites is None else sites)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    perturbation = ActivationPerturbation(model, attentions(model), rho=2.0)
    shifts = perturbation.record(lambda: loss(model), sites)
    assert not gradients(model) and all(p.requires_grad for p in model.parameters())
    norm = torch.stack([g.square().sum() for g in expected.values()]).sum().sqrt()
    assert shifts.keys() == expected.keys() == perturbation.norms.keys()
    for i, g in expected.items():
        assert_agrees(f"shift {i}", shifts[i], 2.0 * g / (norm + 1e-7))
        assert_agrees(f"norm {i}", perturbation.norms[i], g.norm())
    one = next(iter(expected))
    assert_catches_spoiled(lambda x: assert_agrees("shift", x, 2.0 * expected[one] / (norm + 1e-7)), shifts[one])
    value, reference = shifted(copy.deepcopy(model), shifts)
    with perturbation.applied(shifts) as applied:
        ours = applied.bound(loss(model))
    realised = applied.realised()
    assert abs(realised.cosine - 1) < 1e-9 and abs(realised.ratio - 1) < 1e-9
    ours.backward()  # after the block
    assert abs(float(ours.detach()) - value) < 1e-12
    found = gradients(model)
    for key, theirs in reference.items():
        assert_agrees(key, found[key], theirs, ulps=1e9)
    plain = loss(model)  # switched off again
    assert abs(float(plain.detach()) - value) > 1e-3
    perturbation.close()
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


def test_two_perturbed_forwards_before_their_backward():
    model = tiny("llama", torch.float64)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    perturbation = ActivationPerturbation(model, attentions(model))
    first = perturbation.record(lambda: loss(model, 1))
    second = perturbation.record(lambda: loss(model, 2))
    total: dict[str, torch.Tensor] = {}
    for seed, shifts in ((1, first), (2, second)):
        for key, g in shifted(model, shifts, seed)[1].items():
            total[key] = total.get(key, 0) + g
    with perturbation.applied(first):
        a = loss(model, 1)
    with perturbation.applied(second):
        b = loss(model, 2)
    (a + b).backward()
    for key, g in gradients(model).items():
        assert_agrees(key, g, total[key], ulps=1e9)


@pytest.mark.parametrize("trained", ["layers.2.mlp", "lm_head"])
def test_modules_below_everything_that_is_trained(trained):
    model = tiny("llama", torch.float64)
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    expected = captured(model, [0, 1, 2])
    perturbation = ActivationPerturbation(model, attentions(model), rho=1.0)
    shifts = perturbation.record(lambda: loss(model))
    norm = torch.stack([g.square().sum() for g in expected.values()]).sum().sqrt()
    for i, g in expected.items():
        assert_agrees(f"shift {i}", shifts[i], g / norm, ulps=1e9)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if trained in n
    }


def test_recording_computes_nothing_for_parameters():
    """No product for a weight's gradient in the backward, and none below the lowest module."""
    model = tiny("llama")
    perturbation = ActivationPerturbation(model, attentions(model))
    value = loss(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as plain:
        value.backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as forward, torch.no_grad():
        loss(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        perturbation.record(lambda: loss(model))

    def products(profile) -> int:
        return sum(event.count for event in profile.key_averages() if event.key == "aten::mm")

    backward = products(recorded) - products(forward)
    linears = 3 * 7 + 1
    assert products(plain) == 2 * linears
    assert backward == linears - 4  # the first block's own lie below its output
    model.zero_grad()


class Boom(Exception):
    pass


def test_whatever_is_raised():
    model = tiny("llama")
    perturbation = ActivationPerturbation(model, attentions(model))

    def fails() -> torch.Tensor:
        loss(model)
        raise Boom

    with pytest.raises(Boom):
        perturbation.record(fails)
    shifts = perturbation.record(lambda: loss(model))
    plain = float(loss(model).detach())
    with pytest.raises(Boom), perturbation.applied(shifts):
        fails()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert float(loss(model).detach()) == plain


def test_bad_input_is_named():
    model = tiny("llama")
    with pytest.raises(ValueError, match="modules: expected at least one"):
        ActivationPerturbation(model, [])
    with pytest.raises(ValueError, match="rho: expected a number above 0, got -1"):
        ActivationPerturbation(model, attentions(model), rho=-1)
    perturbation = ActivationPerturbation(model, [*attentions(model), nn.Linear(2, 2)])
    with pytest.raises(RuntimeError, match=r"no gradient reached modules \[3\]"):
        perturbation.record(lambda: loss(model))
    with pytest.raises(RuntimeError, match="none of the modules ran"):
        perturbation.record(lambda: loss(model), sites=[3])
    with pytest.raises(ValueError, match="a 0-dim tensor that depends on the modules"):
        perturbation.record(lambda: loss(model)[None], sites=[0])
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan"):
        perturbation.record(lambda: loss(model) * torch.nan, sites=[0])
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is 0\.0"):
        perturbation.record(lambda: loss(model) * 0, sites=[0])
    shifts = perturbation.record(lambda: loss(model), sites=[0, 1])
    with (
        pytest.raises(ValueError, match=r"module 0 gives \(2, 9, 32\), but its gradient was recorded for \(3, 9, 32\)"),
        perturbation.applied(shifts),
    ):
        loss(model, batch=2)
    with (
        pytest.raises(RuntimeError, match=r"modules \[3\] did not run in the perturbed forward"),
        perturbation.applied({**shifts, 3: shifts[0]}),
    ):
        loss(model)


def test_bf16_keeps_the_shift_in_the_mean():
    model = tiny("llama", torch.bfloat16, hidden_size=64)
    perturbation = ActivationPerturbation(model, attentions(model), rho=0.02)
    shifts = perturbation.record(lambda: loss(model, batch=8, length=32).float())
    outputs: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for i, m in enumerate(attentions(model)):
            m.register_forward_hook(lambda m, a, out, i=i: outputs.__setitem__(i, out[0].detach()))
        with perturbation.applied({0: shifts[0]}) as applied:
            loss(model, batch=8, length=32)
        moved = outputs[0].double()
        loss(model, batch=8, length=32)
    done, intended = moved - outputs[0].double(), shifts[0].double()
    realised = applied.realised()
    cosine = float((done * intended).sum() / done.norm() / intended.norm())
    assert abs(realised.cosine - cosine) < 1e-3 and realised.cosine < 0.9
    assert abs(realised.ratio - float(done.norm() / intended.norm())) < 1e-2
