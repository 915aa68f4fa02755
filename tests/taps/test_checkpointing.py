"""Taps under activation checkpointing: the scope of the right forward, memory, and what must be refused."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fastguard import RepNoiseLoss
from tiny_models import assert_same_gradients, gradients, pair, tiny

TOLERANCE = 1e-9


def two_calls(model: nn.Module, loss_fn: RepNoiseLoss) -> tuple[float, dict]:
    """Two calls on different batches and one backward through both."""
    loss_fn.call.zero_()
    (a, b), (c, d) = pair(seed=1), pair(seed=2, length=11, batch=2)
    loss = loss_fn(harmful=a, harmless=b) + 2 * loss_fn(harmful=c, harmless=d)
    loss.backward()
    return loss.item(), gradients(model)


def wrap_with_torch(model: nn.Module) -> None:
    layer = type(model.model.layers[0])
    apply_activation_checkpointing(model, checkpoint_wrapper, check_fn=lambda m: isinstance(m, layer))


def by_hand(model: nn.Module) -> None:
    """A checkpointer that fastguard does not know."""
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def by_transformers(model: nn.Module, reentrant: bool = False) -> None:
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("switch_on", [by_transformers, wrap_with_torch])
@pytest.mark.parametrize("when", ["before", "after"])
def test_two_calls_before_one_backward(switch_on, early_stop, when):
    model = tiny("llama", torch.float64)
    expected = two_calls(model, RepNoiseLoss(model, beta=0.5, filter_tol=0.0))
    model = tiny("llama", torch.float64)
    if when == "before":
        switch_on(model)
    loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)
    if when == "after":
        switch_on(model)
    with set_checkpoint_early_stop(early_stop):
        loss, found = two_calls(model, loss_fn)
    assert loss == expected[0]
    assert_same_gradients(found, expected[1], TOLERANCE)


def test_a_plain_forward_between_call_and_backward():
    """A forward without taps, recomputed in the same backward, stays without taps."""
    plain = {"input_ids": torch.randint(1, 97, (2, 6))}
    plain["labels"] = plain["input_ids"]
    results = []
    for checkpointing in (False, True):
        model = tiny("llama", torch.float64)
        if checkpointing:
            by_transformers(model)
        loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)
        harmful, harmless = pair()
        (loss_fn(harmful=harmful, harmless=harmless) + model(**plain).loss).backward()
        results.append(gradients(model))
    assert_same_gradients(results[1], results[0], TOLERANCE)


@pytest.mark.parametrize("early_stop", [True, False])
def test_an_unknown_checkpointer(early_stop):
    """One call a backward is right; two are refused, not mixed up."""
    harmful, harmless = pair()
    results = []
    for checkpointing in (False, True):
        model = tiny("llama", torch.float64)
        if checkpointing:
            by_hand(model)
        loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)
        with set_checkpoint_early_stop(early_stop):
            first, second = (loss_fn(harmful=harmful, harmless=harmless) for _ in range(2))
            first.backward()
            second.backward()
        results.append(gradients(model))
    assert_same_gradients(results[1], results[0], TOLERANCE)
    with set_checkpoint_early_stop(early_stop), pytest.raises(RuntimeError, match="backward of 2 tapped forwards"):
        two_calls(model, loss_fn)


def test_retain_batch_under_checkpointing():
    results = []
    for checkpointing in (False, True):
        model = tiny("llama", torch.float64)
        if checkpointing:
            by_transformers(model)
        loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)
        harmful, harmless = pair()
        loss_fn(harmful=harmful, harmless=harmless, retain=pair(seed=5, length=7)[0]).backward()
        results.append(gradients(model))
    assert_same_gradients(results[1], results[0], TOLERANCE)


def test_reentrant_checkpointing_is_refused():
    model = tiny("llama")
    loss_fn = RepNoiseLoss(model)
    harmful, harmless = pair()
    by_transformers(model, reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="reentrant"):
        loss_fn(harmful=harmful, harmless=harmless)
    by_transformers(model)
    loss_fn(harmful=harmful, harmless=harmless).backward()


def test_a_forward_that_raises_leaves_nothing_behind():
    model = tiny("llama", torch.float64)
    by_transformers(model)
    loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)
    harmful, harmless = pair()
    loss_fn(harmful=harmful, harmless=harmless).backward()
    expected = gradients(model)

    def explode(*_):
        raise RuntimeError("layer 2 is out")

    hook = model.model.layers[2].register_forward_pre_hook(explode)
    with pytest.raises(RuntimeError, match="layer 2 is out"):
        loss_fn(harmful=harmful, harmless=harmless)
    hook.remove()
    assert loss_fn._tapped.taps.scope is None
    assert int(loss_fn.call) == 1
    loss_fn.call.zero_()
    loss_fn(harmful=harmful, harmless=harmless).backward()
    assert_same_gradients(gradients(model), expected, TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_graph_is_freed(checkpointing):
    """No cycle runs through a checkpoint and its scope: activations go when the loss goes, without the collector."""
    model = tiny("llama")
    if checkpointing:
        by_transformers(model)
    loss_fn = RepNoiseLoss(model)
    harmful, harmless = pair()
    seen = []
    hook = model.model.layers[1].register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        loss = loss_fn(harmful=harmful, harmless=harmless)
        del loss
        assert seen[0]() is None
        loss = loss_fn(harmful=harmful, harmless=harmless)
        loss.backward()
        del loss
        assert seen[1]() is None
    finally:
        gc.enable()
        hook.remove()


# --- memory ---------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes of all storages that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf.untyped_storage())
        return out

    def add(self, storage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_bytes(layers: int, tapped: bool, hoard: bool = False) -> int:
    model = tiny("llama", num_hidden_layers=layers, hidden_size=64, intermediate_size=96)
    by_transformers(model)
    harmful, harmless = pair(batch=4, length=64, prompt=32)
    both = {k: torch.cat([harmful[k], harmless[k]]) for k in harmful}
    loss_fn = RepNoiseLoss(model)
    held = []
    if hoard:
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda m, a, out: held.append(out))
    with LiveBytes() as meter:
        if tapped:
            loss = loss_fn(harmful=harmful, harmless=harmless)
        else:
            loss = model(**both, labels=both["input_ids"], use_cache=False).loss
        loss.backward()
    return meter.peak


def test_peak_memory_per_layer():
    """Each layer adds what its checkpoint keeps, one layer input, and taps add at most a tenth to that.

    The parameters' gradients grow with the layers too, alike in all runs.
    """
    layer_input = 8 * 64 * 64 * 4
    counts = (2, 4, 8, 16)

    def per_layer(**how: bool) -> list[float]:
        peaks = {n: peak_bytes(n, **how) for n in counts}
        return [(peaks[b] - peaks[a]) / (b - a) / layer_input for a, b in itertools.pairwise(counts)]

    plain, tapped = per_layer(tapped=False), per_layer(tapped=True)
    extra = [a - b for a, b in zip(tapped, plain, strict=True)]
    assert all(e <= 0.10 for e in extra), (extra, plain)
    hoarded = [a - b for a, b in zip(per_layer(tapped=True, hoard=True), plain, strict=True)]
    assert all(e > 0.9 for e in hoarded), "the meter does not see activations that a tap would keep"
