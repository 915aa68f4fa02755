"""What a loss refuses before it computes something that nobody asked for: parts replaced since it was constructed,
weights that are no numbers, a forgotten model=."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from fastguard import LanguageModelLoss, RepNoiseLoss
from fastguard.losses import guards
from fastguard.taps import find_structure
from fastguard.taps.structure import synchronised
from tiny_models import pair, tiny

HARMFUL, HARMLESS = pair()


def adapters(model) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))


def replace(place: str):
    def change(model) -> None:
        parent, _, name = place.rpartition(".")
        model.get_submodule(parent)._modules[name] = tiny("llama", seed=1).get_submodule(place)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: model.resize_token_embeddings(99), "head was (replaced|resized from 97 to 99 rows)"),
        (lambda model: model.set_output_embeddings(nn.Linear(32, 97, bias=False)), "head was replaced"),
        (adapters, "head was replaced"),
        (replace("model.norm"), "final norm was replaced"),
        (replace("model.layers.1"), "layers were replaced"),
        (lambda model: model.model.layers.append(tiny("llama").model.layers[0]), "layers were replaced"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_replaced_part_is_noticed(name, change, message):
    model = tiny(name)
    losses = RepNoiseLoss(model), LanguageModelLoss(model)
    change(model)
    with pytest.raises(RuntimeError, match=f"RepNoiseLoss: the model's {message}"):
        losses[0](harmful=HARMFUL, harmless=HARMLESS)
    for call in (losses[1], losses[1].sequence_logp, losses[1].hidden_states):
        with pytest.raises(RuntimeError, match=f"LanguageModelLoss: the model's {message}"):
            call(HARMFUL)


def test_an_mlp_counts_where_it_is_tapped():
    model = tiny("llama")
    losses = RepNoiseLoss(model), LanguageModelLoss(model)
    replace("model.layers.1.mlp")(model)
    with pytest.raises(RuntimeError, match="the model's MLP of layer 1 was replaced"):
        losses[0](harmful=HARMFUL, harmless=HARMLESS)
    losses[1](HARMFUL)


def test_what_replaces_nothing():
    model = tiny("llama")
    losses = RepNoiseLoss(model), LanguageModelLoss(model)
    layer = type(model.model.layers[0])
    apply_activation_checkpointing(model, checkpoint_wrapper, check_fn=lambda m: isinstance(m, layer))
    model.lm_head.weight = nn.Parameter(torch.zeros(97, 32))  # another parameter in the same module: it is read
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    losses[0](harmful=HARMFUL, harmless=HARMLESS)
    losses[1](HARMFUL)
    assert losses[1].components["loss"].item() == pytest.approx(4.5747, abs=1e-4)  # log 97: the head of zeros


def test_weights_that_are_not_finite_are_named():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"logits are not finite on .*; .*model\.layers\.1\.mlp\.up_proj\.weight"):
        RepNoiseLoss(model)


@pytest.mark.parametrize("wrap", ["checkpoints", "compiled"])
def test_a_structure_found_before_the_layers_were_wrapped(wrap):
    model = tiny("llama")
    structure = find_structure(model)
    layer = type(model.model.layers[0])
    if wrap == "checkpoints":
        apply_activation_checkpointing(model, checkpoint_wrapper, check_fn=lambda m: isinstance(m, layer))
    else:
        for i, one in enumerate(structure.layers):
            model.model.layers[i] = torch.compile(one, backend="eager")
    loss = LanguageModelLoss(model, structure=structure)
    loss(HARMFUL).backward()
    replace("model.layers.1")(model)
    with pytest.raises(RuntimeError, match="layers were replaced"):
        loss(HARMFUL)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_forgotten_model(monkeypatch, sharded):
    """By both losses, on more ranks than one, where gradients are wanted and nothing reduces them."""
    monkeypatch.setattr(guards, "ranks", lambda: 2)
    model = tiny("llama")
    losses = RepNoiseLoss(model), LanguageModelLoss(model)
    if sharded:
        monkeypatch.setattr(torch.nn.Parameter, "device_mesh", None, raising=False)
    for name, call in (
        ("RepNoiseLoss", lambda **given: losses[0](harmful=HARMFUL, harmless=HARMLESS, **given)),
        ("LanguageModelLoss", lambda **given: losses[1](HARMFUL, **given)),
        ("LanguageModelLoss", lambda **given: losses[1].sequence_logp(HARMFUL, **given)),
    ):
        expected = contextlib.nullcontext() if sharded else pytest.raises(ValueError, match=f"{name}: model: expected")
        with expected:
            call()
        with torch.no_grad():
            call()
        assert call(model=model).requires_grad
    losses[1].hidden_states(HARMFUL)


@pytest.mark.parametrize("order", ["compiled", "wrapped", "compiled, wrapped", "wrapped, compiled", "bare"])
def test_what_reduces_gradients_is_seen_through_other_wrappers(order):
    """DDP's backward hangs on the model's output, which a loss of taps alone would never ask for."""

    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    base = model = tiny("llama")
    for how in order.split(", "):
        model = {"compiled": torch.compile, "wrapped": Wrapped, "bare": lambda m: m}[how](model)
    assert synchronised(model) == synchronised(model, base) == ("wrapped" in order)


def test_a_quantised_head_is_refused():
    model = tiny("llama")
    model.lm_head.weight = nn.Parameter(torch.ones(97, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"its head Linear has a weight of torch\.int8; expected float32"):
        LanguageModelLoss(model)
