"""Hooks that stay: copies, pickles, saved models, several losses on one model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from fastguard import LanguageModelLoss, RepNoiseLoss
from fastguard.taps.taps import CHECKPOINT_FUNCTIONS, BoundCheckpoint, Inert, Site
from tiny_models import gradients, pair, tiny


def hooks(model) -> list:
    return [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_a_deep_copy_does_not_fire_into_the_original():
    model = tiny("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_fn = RepNoiseLoss(model)
    harmful, harmless = pair()
    loss_fn(harmful=harmful, harmless=harmless)  # wraps the checkpoint functions as well
    twin = copy.deepcopy(model)
    assert not any(isinstance(h, Site) for h in hooks(twin)) and any(isinstance(h, Inert) for h in hooks(twin))
    assert not any(isinstance(m.__dict__.get(n), BoundCheckpoint) for m in twin.modules() for n in CHECKPOINT_FUNCTIONS)
    twin(**harmful, labels=harmful["input_ids"]).loss.backward()
    assert gradients(twin) and not gradients(model)
    with pytest.raises(RuntimeError, match="did not pass its taps"):
        loss_fn(harmful=harmful, harmless=harmless, model=twin)
    own = RepNoiseLoss(twin)
    for each in (loss_fn, own):
        each.call.zero_()
    assert own(harmful=harmful, harmless=harmless).item() == loss_fn(harmful=harmful, harmless=harmless).item()


def test_pickle_and_save_pretrained(tmp_path):
    model = tiny("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_fn = RepNoiseLoss(model)
    harmful, harmless = pair()
    loss_fn(harmful=harmful, harmless=harmless)
    model.disable_input_require_grads()  # transformers' own hook, which does not pickle
    expected = model(**harmful).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(twin(**harmful).logits, expected)
    model.save_pretrained(tmp_path)
    assert not any("call" in key for key in model.state_dict())
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.train()(**harmful).logits, expected)


def test_close_and_collection_remove_every_trace():
    model = tiny("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    functions = [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]
    harmful, harmless = pair()
    loss_fn = RepNoiseLoss(model)
    second = RepNoiseLoss(model)
    for each in (loss_fn, second):
        each(harmful=harmful, harmless=harmless).backward()
    loss_fn.close()
    loss_fn.close()
    assert any(isinstance(h, Site) for h in hooks(model))
    with pytest.raises(RuntimeError, match="was closed and its hooks are off the model"):
        loss_fn(harmful=harmful, harmless=harmless)
    second(harmful=harmful, harmless=harmless).backward()
    del second, each
    assert not any(isinstance(h, Site) for h in hooks(model))
    assert [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()] == functions


def test_a_loss_cannot_be_copied():
    """Its copy would have no taps, and its own would stay on the original."""
    model = tiny("llama")
    for loss_fn in (RepNoiseLoss(model), LanguageModelLoss(model)):
        for take in (copy.copy, copy.deepcopy, pickle.dumps, lambda made: torch.save(made, io.BytesIO())):
            with pytest.raises(TypeError, match=f"{type(loss_fn).__name__}: it cannot be copied or pickled"):
                take(loss_fn)
        copy.deepcopy(model)


def test_a_nested_call_is_refused():
    model = tiny("llama")
    loss_fn = RepNoiseLoss(model)
    harmful, harmless = pair()
    again = lambda *_: loss_fn(harmful=harmful, harmless=harmless)  # noqa: E731
    hook = model.model.layers[0].register_forward_pre_hook(again)
    with pytest.raises(RuntimeError, match="already in progress"):
        loss_fn(harmful=harmful, harmless=harmless)
    hook.remove()
    loss_fn(harmful=harmful, harmless=harmless)
