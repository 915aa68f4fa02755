"""added_gradients: a step of several backwards adds all of its gradients or none."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn

from fastguard.nested.gradients import added_gradients


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4)) for _ in range(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self) -> torch.Tensor:
        self.calls += 1
        return (self.a * self.b).sum() + self.a.square().sum()


def start() -> tuple[Three, dict[str, torch.Tensor]]:
    """A model with an earlier gradient on a and c."""
    model = Three()
    model.a.grad, model.c.grad = torch.randn(4), torch.randn(4)
    return model, {"a": model.a.grad.clone(), "c": model.c.grad.clone()}


def test_gradients_join_the_earlier_ones():
    model, earlier = start()
    with added_gradients(model):
        assert all(p.grad is None for p in model.parameters())
        model().backward()
        (2 * model()).backward()
    torch.testing.assert_close(model.a.grad, earlier["a"] + 3 * (model.b + 2 * model.a).detach())
    torch.testing.assert_close(model.b.grad, 3 * model.a.detach())
    assert torch.equal(model.c.grad, earlier["c"])
    assert model.calls == 2


def test_parameters_that_are_not_selected_keep_what_they_had():
    model, earlier = start()
    with added_gradients(model, lambda name, p: name == "b") as selected:
        assert selected.names == ["b"]
        model().backward()
    assert torch.equal(model.a.grad, earlier["a"])
    assert torch.equal(model.b.grad, model.a.detach())


@pytest.mark.parametrize("kind", ["exception", "interrupt"])
def test_an_exception_leaves_the_earlier_ones_alone(kind):
    model, earlier = start()
    places = model.a.grad.data_ptr()
    with pytest.raises(ZeroDivisionError if kind == "exception" else KeyboardInterrupt), added_gradients(model):
        model().backward()
        if kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
        raise ZeroDivisionError
    assert torch.equal(model.a.grad, earlier["a"]) and model.b.grad is None and torch.equal(model.c.grad, earlier["c"])
    assert model.a.grad.data_ptr() == places and model.calls == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
