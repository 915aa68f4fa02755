"""Booster against its published form, in float64 on the same batches; and that a failing step leaves no trace."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

from defenses.published_booster import plain_loss, published_booster
from fastguard.defenses.booster.step import Booster
from tiny_models import gradients, pair, tiny

Batch = dict[str, torch.Tensor]


def batches(step: int) -> tuple[Batch, Batch]:
    """A harmful batch with labels and a harmless one with padding, of different shapes."""
    harmful, _ = pair(seed=step)
    harmful["labels"] = harmful["input_ids"].clone()
    harmful["labels"][:, :3] = -100
    _, harmless = pair(batch=2, length=7, seed=100 + step, padding=True)
    return harmful, harmless


def train(model: nn.Module, backward, steps: int = 3, scale: int = 1) -> list[torch.Tensor]:
    """Parameters after some steps of an outer optimizer on what ``backward(harmful, harmless, scale)`` leaves."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(scale):
            backward(*batches(scale * step + micro), 1 / scale)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def published(model: nn.Module, **options: float):
    """The same interface; it can only be given one batch at a time, so gradients are summed here."""

    def backward(harmful: Batch, harmless: Batch, scale: float) -> None:
        earlier = [p.grad for p in model.parameters()]
        for p in model.parameters():
            p.grad = None
        published_booster(model, harmful, harmless, **options)
        for p, e in zip(model.parameters(), earlier, strict=True):
            if p.grad is not None:
                p.grad = scale * p.grad + (0 if e is None else e)

    return backward


def ours(booster: Booster):
    return lambda harmful, harmless, scale: booster.backward(harmful=harmful, harmless=harmless, scale=scale)


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], start: list[torch.Tensor], tol: float) -> None:
    for a, b, s in zip(found, expected, start, strict=True):
        assert float((a - b).abs().max()) <= tol
    moved = sum(float((b - s).norm()) for b, s in zip(expected, start, strict=True))
    assert moved > 1e6 * tol  # the tolerance is nothing beside what three steps do


@pytest.mark.parametrize(
    "name, mode, checkpointing, scale",
    [
        ("llama", "weights", False, 1),
        ("llama", "linearised", False, 1),
        ("llama_tied", "weights", True, 2),
        ("phi", "weights", False, 1),
        ("phi", "linearised", True, 2),
        ("qwen3_moe", "weights", False, 1),
    ],
)
def test_three_steps_equal_the_published_form(name, mode, checkpointing, scale):
    model = tiny(name, torch.float64)
    twin = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = train(twin, published(twin), scale=scale)
    booster = Booster(model, mode=mode)
    found = train(model, ours(booster), scale=scale)
    assert_same(found, expected, start, 1e-8)
    assert booster.state_dict() == {"step": 3 * scale}
    booster.close()


def test_options_reach_the_algorithm():
    model = tiny("llama", torch.float64)
    twin = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    expected = train(twin, published(twin, alpha=0.7, lam=0.5, eps=0.1))
    found = train(model, ours(Booster(model, alpha=0.7, lam=0.5, eps=0.1, snapshot="host")))
    assert_same(found, expected, start, 1e-8)
    default = train(tiny("llama", torch.float64), published(twin := tiny("llama", torch.float64)))
    assert max(float((a - b).abs().max()) for a, b in zip(found, default, strict=True)) > 1e-4
    assert twin is not model


def test_published_defaults():
    defaults = {k: p.default for k, p in inspect.signature(Booster).parameters.items()}
    assert (defaults["alpha"], defaults["lam"], defaults["eps"]) == (0.1, 5.0, 1e-7)


def test_figures_are_those_of_the_objective():
    model = tiny("llama", torch.float64)
    harmful, harmless = batches(0)
    booster = Booster(model)
    figures = booster.backward(harmful=harmful, harmless=harmless)
    found = gradients(model)
    norm = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
    torch.testing.assert_close(figures["gradient_norm"].double(), norm)
    twin = copy.deepcopy(model)
    plain_loss(twin, harmful).backward()
    length = torch.stack([p.grad.square().sum() for p in twin.parameters()]).sum().sqrt()
    torch.testing.assert_close(figures["harmful_norm"].double(), length)
    at_w = float(plain_loss(twin, harmful).detach())
    with torch.no_grad():
        for p in twin.parameters():
            p -= 0.1 * p.grad / length
    after = float(plain_loss(twin, harmful).detach())
    aligned = float(plain_loss(model, harmless).detach())
    expected = {"harmless": aligned, "harmful": at_w, "harmful_perturbed": after, "loss": aligned + 5 * (at_w - after)}
    for key, value in expected.items():
        assert abs(float(figures[key]) - value) < 1e-5 * abs(value), key
    assert (
        abs(float(figures["perturbation_cosine"]) - 1) < 1e-6 and abs(float(figures["perturbation_ratio"]) - 1) < 1e-6
    )
    assert all(v.dim() == 0 and not v.requires_grad for v in figures.values())


class Boom(Exception):
    pass


@pytest.mark.parametrize("mode", ["weights", "linearised"])
@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("kind", ["exception", "interrupt", "nan"])
def test_a_failing_step_leaves_no_trace(kind, call, mode):
    model = tiny("llama", torch.float32)
    calls = 0

    def loss(m: nn.Module, batch: Batch) -> torch.Tensor:
        nonlocal calls
        calls += 1
        value = plain_loss(m, batch)
        if calls == call + 1:
            if kind == "exception":
                raise Boom
            if kind == "interrupt":
                raise KeyboardInterrupt
            value = value * torch.nan
        return value

    booster = Booster(model, mode=mode, loss=loss)
    plain_loss(model, pair(seed=9)[0]).backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    state = torch.get_rng_state()
    harmful, harmless = batches(0)
    with pytest.raises({"exception": Boom, "interrupt": KeyboardInterrupt, "nan": FloatingPointError}[kind]):
        booster.backward(harmful=harmful, harmless=harmless)
    for p, (value, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and torch.equal(p.grad, grad)
    assert torch.equal(torch.get_rng_state(), state)
    assert booster.step == 0 and calls == call + 1
    booster.backward(harmful=harmful, harmless=harmless)  # and it can be tried again
    assert any(not torch.equal(p.grad, grad) for p, (_, grad) in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(p, value) for p, (value, _) in zip(model.parameters(), before, strict=True))


def test_adapters():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny("llama", torch.float64), LoraConfig(r=2, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    expected = train(twin, published(twin))
    assert_same(train(model, ours(Booster(model))), expected, start, 1e-8)
    assert_same(train(other, ours(Booster(other, mode="linearised"))), expected, start, 1e-8)


def test_both_harmful_passes_draw_one_dropout_and_a_resumed_run_goes_on():
    model = tiny("phi", torch.float64, resid_pdrop=0.3)
    harmful, harmless = batches(0)
    booster = Booster(model, alpha=1e-6, seed=4)

    def step(b: Booster) -> tuple[dict, torch.Tensor]:
        torch.manual_seed(1)
        return b.backward(harmful=harmful, harmless=harmless), next(iter(gradients(model).values()))

    (first, _), (second, expected) = step(booster), step(booster)
    assert first["harmful"] != second["harmful"]  # another step, other dropout
    slope = float((second["harmful"] - second["harmful_perturbed"]) / 1e-6 / second["harmful_norm"])
    assert abs(slope - 1) < 0.01  # the loss falls by alpha ||g||: no other dropout came in between
    resumed = Booster(model, alpha=1e-6, seed=4)
    resumed.load_state_dict({"step": 1})
    assert torch.equal(step(resumed)[1], expected)


def test_bad_input_is_named():
    model = tiny("llama")
    for options, message in [
        ({"alpha": 0}, "alpha: expected a number > 0, got 0"),
        ({"lam": -1}, "lam: expected a number >= 0"),
        ({"mode": "exact"}, "mode: expected weights or linearised, got 'exact'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Booster(model, **options)
    harmful, harmless = batches(0)
    booster = Booster(model, mode="linearised", loss=Booster(model).loss)
    with pytest.raises(RuntimeError, match=r"shifted by nested\.linearised"):
        booster.backward(harmful=harmful, harmless=harmless)
    with pytest.raises(ValueError, match="snapshot: expected 30 masters, one a parameter, got 1"):
        Booster(model, snapshot=[torch.zeros(1)]).backward(harmful=harmful, harmless=harmless)
    assert all(p.grad is None for p in model.parameters())


def test_a_step_that_teaches_harm_is_warned_of_once():
    model = tiny("llama")
    harmful, harmless = batches(0)
    with pytest.warns(UserWarning, match=r"alpha: the step of length 20 moves the harmful loss by \d+%") as said:
        booster = Booster(model, alpha=20.0)
        for _ in range(2):
            booster.backward(harmful=harmful, harmless=harmless)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Booster(model, alpha=1e-3).backward(harmful=harmful, harmless=harmless)
