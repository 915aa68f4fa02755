"""Vaccine and T-Vaccine against their published forms, in float64 on the same batches."""

from __future__ import annotations

import copy
import inspect
from collections import Counter

import pytest
import torch
from torch import nn

from defenses.published_booster import plain_loss
from defenses.published_vaccine import blocks, published_probabilities, published_t_vaccine, published_vaccine
from fastguard.defenses.t_vaccine.step import TVaccine
from fastguard.defenses.vaccine.step import Vaccine
from tiny_models import gradients, pair, tiny

Batch = dict[str, torch.Tensor]


def batches(step: int) -> tuple[Batch, Batch]:
    """A harmful batch with labels and a harmless one with padding."""
    harmful, _ = pair(seed=step)
    harmful["labels"] = harmful["input_ids"].clone()
    harmful["labels"][:, :3] = -100
    _, harmless = pair(batch=2, length=7, seed=100 + step, padding=True)
    return harmful, harmless


def train(model: nn.Module, backward, steps: int = 3, scale: int = 1) -> list[torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(scale):
            backward(*batches(scale * step + micro), 1 / scale)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def summed(model: nn.Module, published):
    """Gradients of a published step, scaled and added to the earlier ones."""

    def backward(harmful: Batch, harmless: Batch, scale: float) -> None:
        earlier = [p.grad for p in model.parameters()]
        model.zero_grad()
        published(harmful, harmless)
        for p, e in zip(model.parameters(), earlier, strict=True):
            if p.grad is not None:
                p.grad = scale * p.grad
            if e is not None:
                p.grad = e if p.grad is None else p.grad + e

    return backward


def ours(vaccine: Vaccine):
    return lambda harmful, harmless, scale: vaccine.backward(harmful=harmful, harmless=harmless, scale=scale)


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], start: list[torch.Tensor], tol: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= tol
    assert sum(float((b - s).norm()) for b, s in zip(expected, start, strict=True)) > 1e6 * tol


@pytest.mark.parametrize(
    "name, checkpointing, scale",
    [("llama", False, 1), ("llama_tied", True, 2), ("phi", False, 2), ("gpt2", True, 1), ("gpt_neox", False, 1)],
)
def test_three_steps_equal_the_published_form(name, checkpointing, scale):
    model = tiny(name, torch.float64)
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = train(twin, summed(twin, lambda harmful, harmless: published_vaccine(twin, harmless)), scale=scale)
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    vaccine = Vaccine(model)
    assert sum(len(m._forward_hooks) for m in model.modules()) > hooks
    found = train(model, ours(vaccine), scale=scale)
    assert_same(found, expected, start, 1e-8)
    without = train(plain, summed(plain, lambda harmful, harmless: plain_loss(plain, harmless).backward()), scale=scale)
    assert max(float((a - b).abs().max()) for a, b in zip(found, without, strict=True)) > 1e-3
    vaccine.close()
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks


def adapted(seed: int = 0, layers: int = 3, targets: object = "all-linear") -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = tiny("llama", torch.float64, num_hidden_layers=layers)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"]])  # with MLP adapters, no gradient asks for block 0
def test_adapters(targets):
    model = adapted(targets=targets)
    twin = copy.deepcopy(model)
    if targets != "all-linear":
        for p in twin.model.model.embed_tokens.parameters():
            p.requires_grad = True  # the oracle's hooks need a gradient there
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    vaccine = Vaccine(model)
    for step in range(3):
        published_vaccine(twin, batches(step)[1])
        vaccine.backward(harmless=batches(step)[1])
        theirs, found = dict(twin.named_parameters()), gradients(model)
        assert found.keys() == names
        for name, g in found.items():
            assert float((g - theirs[name].grad).abs().max()) < 1e-8
        assert max(float(g.abs().max()) for g in found.values()) > 1e-2


def test_published_defaults():
    defaults = {k: p.default for k, p in inspect.signature(Vaccine).parameters.items()}
    assert (defaults["rho"], defaults["eps"]) == (2.0, 1e-7)
    defaults = {k: p.default for k, p in inspect.signature(TVaccine).parameters.items()}
    assert [defaults[k] for k in ("rho", "layers", "every", "probe_every", "eps")] == [3.0, 8, 20, 200, 1e-7]
    assert defaults["trains"] == "published"


def test_figures():
    model = tiny("llama", torch.float64)
    _, harmless = batches(0)
    figures = Vaccine(model).backward(harmless=harmless)
    norm = torch.stack([g.square().sum() for g in gradients(model).values()]).sum().sqrt()
    assert abs(float(figures["gradient_norm"]) - float(norm)) < 1e-6 * float(norm)
    assert float(figures["loss"]) > float(plain_loss(model, harmless).detach())  # a step up the loss
    assert abs(float(figures["perturbation_cosine"]) - 1) < 1e-6
    assert all(v.dim() == 0 and not v.requires_grad for v in figures.values())


def test_t_vaccine_measures_as_published():
    model = adapted(layers=5)
    harmful, harmless = batches(0)
    vaccine = TVaccine(model, layers=2)
    vaccine.backward(harmful=harmful, harmless=harmless)
    expected = published_probabilities(copy.deepcopy(model), {k: v[:1] for k, v in harmful.items()})
    torch.testing.assert_close(torch.tensor(vaccine.probabilities).double(), expected, rtol=1e-6, atol=0)
    assert abs(sum(vaccine.probabilities) - 1) < 1e-12 and len(vaccine.drawn) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_t_vaccine_steps_equal_the_published_form(checkpointing):
    model = adapted(layers=5)
    twin = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    vaccine = TVaccine(model, layers=2, every=2, probe_every=4, seed=1)
    drawn: list[list[int]] = []

    def backward(harmful: Batch, harmless: Batch, scale: float) -> None:
        vaccine.backward(harmful=harmful, harmless=harmless, scale=scale)
        drawn.append(list(vaccine.drawn))

    found = train(model, backward, steps=6)
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3] and len({tuple(d) for d in drawn}) > 1
    turn = iter(drawn)
    expected = train(twin, summed(twin, lambda harmful, harmless: published_t_vaccine(twin, harmless, next(turn))), 6)
    assert_same(found, expected, start, 1e-8)


@pytest.mark.parametrize("trains", ["published", "drawn", "all"])
def test_what_t_vaccine_trains(trains):
    model = adapted(layers=4)
    harmful, harmless = batches(0)
    vaccine = TVaccine(model, layers=2, trains=trains)
    vaccine.backward(harmful=harmful, harmless=harmless)
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            assert p.grad is None
            continue
        layer = int(name.split(".layers.")[1].split(".")[0])
        below = layer < min(vaccine.drawn)
        published = trains == "published" and ("self_attn" in name or below)
        resting = layer not in vaccine.drawn and (trains == "drawn" or published)
        assert (p.grad is None) == resting, name
    if trains == "drawn":  # what is trained is trained as ever: on the same perturbed loss
        found = gradients(model)
        everything = TVaccine(model, layers=2, trains="all")
        everything.backward(harmful=harmful, harmless=harmless)
        assert everything.drawn == vaccine.drawn
        for name, g in gradients(model).items():
            if name in found:
                assert float((g - found[name]).abs().max()) < 1e-10


def test_draws_follow_the_probabilities_without_repetition():
    vaccine = TVaccine(tiny("llama", torch.float64, num_hidden_layers=4), layers=2)
    vaccine.probabilities = [0.55, 0.25, 0.15, 0.05]
    counts: Counter[tuple[int, ...]] = Counter()
    draws = 3000
    for step in range(draws):
        vaccine.step = step
        counts[tuple(vaccine._draw())] += 1
    p = vaccine.probabilities
    for i in range(4):
        for j in range(i + 1, 4):
            expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
            assert abs(counts[i, j] / draws - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5
    vaccine.probabilities = [1.0, 0.0, 0.0, 0.0]
    assert 0 in vaccine._draw()


def test_a_resumed_run_equals_an_unbroken_one():
    def run(resume_at: int | None) -> tuple[list[list[int]], list[torch.Tensor]]:
        model = adapted(layers=5)
        vaccine = TVaccine(model, layers=2, every=3, probe_every=5, seed=3)
        drawn = []

        def backward(harmful: Batch, harmless: Batch, scale: float) -> None:
            nonlocal vaccine
            if vaccine.step == resume_at:  # in the middle of a draw's life, after a newer measurement
                state = vaccine.state_dict()
                vaccine.close()
                vaccine = TVaccine(model, layers=2, every=3, probe_every=5, seed=3)
                vaccine.load_state_dict(state)
            vaccine.backward(harmful=harmful, harmless=harmless, scale=scale)
            drawn.append(list(vaccine.drawn))

        return drawn, train(model, backward, steps=8)

    (drawn, unbroken), (again, resumed) = run(None), run(5)
    assert drawn == again
    assert all(torch.equal(a, b) for a, b in zip(unbroken, resumed, strict=True))


class Boom(Exception):
    pass


@pytest.mark.parametrize(
    "make", [lambda m, loss: Vaccine(m, loss=loss), lambda m, loss: TVaccine(m, layers=2, loss=loss)]
)
@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("kind", ["exception", "interrupt", "nan"])
def test_a_failing_step_leaves_no_trace(kind, call, make):
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

    vaccine = make(model, loss)
    if type(vaccine) is Vaccine and call == 2:
        pytest.skip("two passes")
    plain_loss(model, pair(seed=9)[0]).backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    state = vaccine.state_dict()
    harmful, harmless = batches(0)
    with pytest.raises({"exception": Boom, "interrupt": KeyboardInterrupt, "nan": FloatingPointError}[kind]):
        vaccine.backward(harmful=harmful, harmless=harmless)
    for p, (value, grad) in zip(model.parameters(), before, strict=True):
        assert p.requires_grad and torch.equal(p, value) and torch.equal(p.grad, grad)
    assert vaccine.state_dict() == state and calls == call + 1
    vaccine.backward(harmful=harmful, harmless=harmless)  # and it can be tried again
    assert vaccine.state_dict()["step"] == 1


def test_both_passes_need_one_batch():
    model = tiny("llama", torch.float64)
    shapes = iter([batches(0)[0], batches(0)[1]])
    vaccine = Vaccine(model, loss=lambda m, batch: plain_loss(m, next(shapes)))
    with pytest.raises(
        ValueError, match=r"module 0 gives \(2, 7, 32\), but its gradient was recorded for \(3, 9, 32\)"
    ):
        vaccine.backward(harmless=batches(0)[0])


def test_bad_input_is_named():
    model = tiny("llama")
    for make, options, message in [
        (Vaccine, {"rho": 0}, "rho: expected a number > 0, got 0"),
        (TVaccine, {}, "layers: expected 1 to 3, the model's layers, got 8"),
        (TVaccine, {"layers": 2, "every": 0}, "every: expected an integer >= 1, got 0"),
        (TVaccine, {"layers": 2, "trains": "mlp"}, "trains: expected published or drawn or all, got 'mlp'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(model, **options)
    with pytest.raises(ValueError, match="harmful: step 0 measures the layers on a harmful sample, got None"):
        TVaccine(model, layers=2).backward(harmless=batches(0)[1])
    assert len(blocks(model)) == 3
