"""perturbed: where the weights go, what the dtype keeps of it, and that everything is put back."""

from __future__ import annotations

import os
import signal
import warnings

import pytest
import torch
from torch import nn

from checks import assert_agrees
from fastguard.nested import PerturbationLostError, Weights, perturbed
from tiny_models import pair, tiny


class Vector(nn.Module):
    """Two parameters whose numbers stand at places of one's choosing."""

    def __init__(self, *values: torch.Tensor) -> None:
        super().__init__()
        self.p = nn.ParameterList(values)


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_untouched(model: nn.Module, before: list[torch.Tensor]) -> None:
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("snapshot", ["device", "host", 0, 1 << 30])
@pytest.mark.parametrize("norm", [0.3, -0.3])
def test_the_step_and_the_way_back(norm, snapshot):
    model = tiny("llama_tied", torch.float64)
    before = bits(model)
    weights = Weights(model)
    along: list[torch.Tensor | None] = [torch.randn_like(p) for p in model.parameters()]
    along[2] = None
    length = sum(float(d.square().sum()) for d in along if d is not None) ** 0.5
    with perturbed(weights, along, norm, eps=0.5, snapshot=snapshot) as realised:
        for i, (p, b, d) in enumerate(zip(model.parameters(), before, along, strict=True)):
            if d is None:
                assert torch.equal(p, b)
            else:
                assert_agrees(str(i), p.detach(), b + norm / (length + 0.5) * d)
                assert not torch.equal(p, b)
    assert abs(realised.cosine - 1) < 1e-12 and abs(realised.ratio - 1) < 1e-12
    assert_untouched(model, before)


def test_gradients_are_set_aside():
    model = tiny("llama")
    ids = pair()[0]["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    earlier = [p.grad.clone() for p in model.parameters()]
    weights = Weights(model)
    with perturbed(weights, [g.clone() for g in earlier], 0.1):
        assert all(p.grad is None for p in model.parameters())
        model(input_ids=ids, labels=ids).loss.backward()
        inside = weights.take_gradients()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), earlier, strict=True))
    assert not torch.equal(inside[0], earlier[0])


class Boom(Exception):
    pass


def raising(kind: str, model: nn.Module) -> None:
    if kind == "exception":
        raise Boom
    if kind == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
    if kind == "nan":
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(torch.nan)
        raise Boom


@pytest.mark.parametrize("kind, error", [("exception", Boom), ("interrupt", KeyboardInterrupt), ("nan", Boom)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whatever_is_raised_the_model_is_as_it_was(dtype, kind, error):
    model = tiny("llama_tied", dtype)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before, earlier = bits(model), [p.grad.clone() for p in model.parameters()]
    along = [torch.randn_like(p) for p in model.parameters()]
    with pytest.raises(error), perturbed(Weights(model), along, 10.0):
        assert not torch.equal(next(model.parameters()), before[0])
        raising(kind, model)
    assert_untouched(model, before)
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), earlier, strict=True))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("moment", ["take", "move", "restore"])
def test_an_interrupt_at_any_moment(moment, monkeypatch):
    """In the copy, in the step itself, in the restoration."""
    from fastguard.nested import perturbation

    model = tiny("llama")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before, earlier = bits(model), [p.grad.clone() for p in model.parameters()]
    owner, name = {
        "take": (perturbation.Snapshot, "take"),
        "move": (perturbation, "perturb_"),
        "restore": (perturbation.Snapshot, "restore_"),
    }[moment]
    original = getattr(owner, name)

    def interrupted(*args, **kwargs):
        result = original(*args, **kwargs) if moment != "restore" else None
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
        return original(*args, **kwargs) if moment == "restore" else result

    monkeypatch.setattr(owner, name, interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        perturbed(Weights(model), [torch.randn_like(p) for p in model.parameters()], 10.0),
    ):
        assert moment == "restore"
    assert_untouched(model, before)
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), earlier, strict=True))


def exact_figures(start: torch.Tensor, end: torch.Tensor, step: torch.Tensor) -> tuple[float, float]:
    done = end.double() - start.double()
    return float(done @ step / (done.norm() * step.norm())), float(done.norm() / step.norm())


@pytest.mark.parametrize("size", [1e-1, 3e-3, 5e-4])
def test_realised_figures(size):
    """Against the same computed here in float64: weights of the usual size, a direction of heavy tails."""
    w = (0.02 * torch.randn(200, 100)).bfloat16()
    d = torch.randn(200, 100).pow(3)
    step = size * d.double() / d.double().norm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with perturbed(Weights(Vector(w)), [d], size, eps=0, allow_lost=True) as realised:
            pass
    cosine, ratio = exact_figures(w.flatten(), (w.double() + step).bfloat16().flatten(), step.flatten())
    assert abs(realised.cosine - cosine) < 1e-4 and abs(realised.ratio - ratio) < 1e-4
    assert abs(realised.kept - cosine * ratio) < 1e-4
    assert size == 1e-1 or cosine < 0.95


def test_warns_and_refuses():
    w = (0.02 * torch.randn(100, 100)).bfloat16()
    d = torch.randn(100, 100)
    model = Vector(w.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with perturbed(Weights(model), [d], 1.0):
            pass
    with (
        pytest.warns(RuntimeWarning, match=r"perturbed: cosine 0\.\d+, norm ratio \d\.\d+ to the intended step"),
        perturbed(Weights(model), [d], 6e-3) as realised,
    ):
        assert 0.7 < realised.cosine < 0.95
    with (
        pytest.raises(PerturbationLostError, match=r"masters.*LoRA.*nested\.linearised; allow_lost=True"),
        perturbed(Weights(model), [d], 2e-4),
    ):
        raise AssertionError("entered")
    with pytest.warns(RuntimeWarning), perturbed(Weights(model), [d], 2e-4, allow_lost=True) as realised:
        assert realised.cosine < 0.7
    with pytest.raises(PerturbationLostError), perturbed(Weights(model), [d], 1e-30):
        raise AssertionError("entered")
    assert torch.equal(model.p[0], w)


def test_masters_keep_a_small_step_in_the_mean():
    """A linear function of the weights sees the whole step; written into the weights themselves it is not there."""
    size, n = 2e-3, 400
    masters = 0.02 * torch.randn(n, n)
    model = Vector(masters.bfloat16(), torch.ones(3).bfloat16())
    before = bits(model)
    d = torch.randn(n, n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a low cosine is no loss here
        with perturbed(Weights(model), [d, None], size, snapshot=[masters, torch.ones(3)]) as realised:
            moved = float(((model.p[0].detach().double() - masters.bfloat16().double()) * d).sum() / d.norm())
    assert realised.dithered and realised.cosine < 0.7 < 1 < realised.ratio
    assert abs(moved / size - 1) < 0.2 and abs(realised.kept - moved / size) < 1e-3
    assert_untouched(model, before)
    with pytest.raises(PerturbationLostError), perturbed(Weights(model), [d, None], size / 100):
        pass


def test_weights_that_are_not_their_masters_roundings_are_left_alone():
    model = Vector(torch.randn(5, 5).bfloat16())
    model.p[0].grad = torch.ones(5, 5).bfloat16()
    before = bits(model)
    with (
        pytest.raises(ValueError, match="parameter 0 is not its master rounded"),
        perturbed(Weights(model), [torch.ones(5, 5)], 1.0, snapshot=[torch.randn(5, 5)]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="snapshot: expected device, host"),
        perturbed(Weights(model), [torch.ones(5, 5)], 1.0, snapshot="gpu"),
    ):
        pass
    assert_untouched(model, before)
    assert torch.equal(model.p[0].grad, torch.ones(5, 5).bfloat16())


def test_the_dtype_of_the_forward_is_what_counts():
    w = 0.02 * torch.randn(300, 300)
    d = torch.randn(300, 300)
    with perturbed(Weights(Vector(w.clone())), [d], 2e-3) as realised:
        assert abs(realised.cosine - 1) < 1e-4
    with perturbed(Weights(Vector(w.clone())), [d], 2e-3, through=torch.bfloat16) as realised:
        assert realised.dithered and realised.cosine < 0.7 and abs(realised.kept - 1) < 0.3
