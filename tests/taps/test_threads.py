"""Taps and threads: a tapped forward sees its own thread alone, its recomputation whichever thread runs it."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastguard import RepNoiseLoss
from tiny_models import gradients, pair, tiny


def in_a_thread(run) -> None:
    raised = []

    def target() -> None:
        try:
            run()
        except BaseException as error:  # handed to the thread that asked
            raised.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def by_transformers(model) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def by_hand(model) -> None:
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def computed(checkpointing=None, disturb: bool = False, backward=lambda loss: loss.backward()):
    model = tiny("llama", torch.float64)
    if checkpointing is not None:
        checkpointing(model)
    loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)
    harmful, harmless = pair()
    ran, here = [], threading.get_ident()

    def elsewhere() -> None:
        ran.append(model(**pair(seed=3, batch=6)[0]).logits)  # the shape of the concatenated pair: nothing would raise

    def interrupt(*_) -> None:
        if threading.get_ident() == here:
            in_a_thread(elsewhere)

    hook = model.model.layers[2].register_forward_pre_hook(interrupt) if disturb else None
    loss = loss_fn(harmful=harmful, harmless=harmless)
    if hook is not None:
        hook.remove()
        assert ran
    backward(loss)
    return loss.item(), gradients(model)


def assert_equal(found, expected) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], g) for name, g in expected[1].items())


@pytest.mark.parametrize("checkpointing", [None, by_transformers, by_hand])
def test_a_forward_in_another_thread_is_not_tapped(checkpointing):
    assert_equal(computed(checkpointing, disturb=True), computed(checkpointing))


@pytest.mark.parametrize("checkpointing", [by_transformers, by_hand])
def test_a_recomputation_in_another_thread_is_tapped(checkpointing):
    """Autograd runs a backward on a GPU in threads of its own."""
    assert_equal(computed(checkpointing, backward=lambda loss: in_a_thread(loss.backward)), computed(checkpointing))


def test_two_threads_with_backwards_at_once():
    """Under a checkpointer that is not known, a recomputation finds its scope by the backward, not by the last one."""
    model = tiny("llama", torch.float64)
    by_hand(model)
    loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)
    harmful, harmless = pair()
    normed, here = [], []
    hook = model.model.norm.register_forward_hook(lambda module, args, output: normed.append(output))
    first, second = (loss_fn(harmful=harmful, harmless=harmless) for _ in range(2))
    hook.remove()

    def between(grad) -> None:  # in the first backward, after its gate and before its recomputations
        if not here:
            here.append(True)
            in_a_thread(second.backward)

    first.backward(retain_graph=True)
    second.backward(retain_graph=True)
    expected = gradients(model)
    normed[0].register_hook(between)
    first.backward()
    assert here
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-10, atol=1e-14)
