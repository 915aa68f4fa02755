"""Random Mapping against an eager statement of it, and its directions."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

from checks import assert_agrees, assert_catches_spoiled
from defenses.published_tar import random_mapping_step
from fastguard.defenses.random_mapping.step import RandomMapping, token_directions
from fastguard.ops.philox import gaussian_noise
from tiny_models import VOCABULARY, gradients, pair, tiny

WIDTH = 32


def batches(step: int) -> dict[str, dict[str, Tensor]]:
    harmful, retain = pair(seed=step, padding=True)
    return {"harmful": harmful, "retain": retain}


def table(seed: int) -> Tensor:
    return gaussian_noise(VOCABULARY, WIDTH, seed=seed, dtype=torch.float64)


def outer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama_tied", "gpt_neox"])
def test_three_steps_equal_the_published_algorithm(name, checkpointing):
    model = tiny(name, torch.float64)
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mapping = RandomMapping(model, seed=4)
    ours, theirs = outer(model), outer(twin)
    for step in range(3):
        figures = mapping.backward(**batches(step))
        expected = random_mapping_step(twin, **batches(step), table=table(4))
        assert float(figures["retain_ce"]) == pytest.approx(expected["retain"], rel=1e-9)
        assert float(figures["mapping"]) == pytest.approx(expected["mapping"], rel=1e-9)
        assert float(figures["loss"]) == pytest.approx(expected["retain"] + expected["mapping"], rel=1e-9)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert largest_difference(model, twin) < 1e-8
    assert largest_difference(model, start) > 1e-3
    assert mapping.step == 3 and mapping.direction_bytes == 3 * 9 * WIDTH * 8


def test_the_comparison_catches_wrong_gradients():
    model = tiny("llama", torch.float64)
    mapping = RandomMapping(model, seed=4)
    mapping.backward(**batches(0))
    found = gradients(model)
    random_mapping_step(model, **batches(0), table=table(4))
    expected = gradients(model)
    name = "model.layers.1.mlp.down_proj.weight"
    assert_catches_spoiled(lambda x: assert_agrees(name, x, expected[name], ulps=1e4), found[name])
    random_mapping_step(model, **batches(0), table=table(5))  # other directions are another gradient
    with pytest.raises(AssertionError):
        assert_agrees(name, found[name], gradients(model)[name], ulps=1e4)


def test_states_turn_towards_the_directions():
    model = tiny("llama")
    mapping = RandomMapping(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    values = []
    for _ in range(12):
        values.append(float(mapping.backward(**batches(0))["mapping"]))
        optimizer.step()
        optimizer.zero_grad()
    assert values[0] > 0.75  # random directions of 32 features: 1 - E|cos| is 0.86
    assert values[-1] < values[0] - 0.2


@pytest.mark.parametrize("features", [1, 64, 100])
def test_directions_are_rows_of_the_noise(features):
    ids = torch.tensor([[5, 0, 96], [5, 7, 3]])
    rows = token_directions(ids, features, seed=9, dtype=torch.float64)
    assert rows.shape == (2, 3, features)
    assert torch.equal(rows[0, 0], rows[1, 0])
    expected = gaussian_noise(97, features, seed=9, dtype=torch.float64)[ids]
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-14)
    assert not torch.equal(rows, token_directions(ids, features, seed=10, dtype=torch.float64))
    half = token_directions(ids, features, seed=9)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), expected, rtol=1e-5, atol=1e-6)


def test_masks_weights_scale_and_earlier_gradients():
    model = tiny("llama", torch.float64)
    once = RandomMapping(model)
    once.backward(**batches(0))
    whole = gradients(model)
    parts = []
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        mapping = RandomMapping(model, mapping_weight=weights[0], retain_weight=weights[1])
        mapping.backward(**batches(0), scale=0.5)
        mapping.backward(**batches(0), scale=0.5)
        parts.append(gradients(model))
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-6, atol=1e-9)

    masked = RandomMapping(model, mask_padding=True)
    values = []
    for padding in (2, 3):
        both = batches(0)
        both["harmful"]["input_ids"][both["harmful"]["attention_mask"] == 0] = padding
        values.append((float(masked.backward(**both)["mapping"]), float(once.backward(**both)["mapping"])))
    assert values[0][0] == values[1][0] and abs(values[0][1] - values[1][1]) > 1e-6


def test_a_step_that_fails_leaves_the_earlier_gradients():
    model = tiny("llama", torch.bfloat16)
    mapping = RandomMapping(model)
    mapping.backward(**batches(1))
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    bad = batches(0)
    bad["harmful"] = {"input_ids": bad["harmful"]["input_ids"][0]}
    with pytest.raises(ValueError, match="expected input_ids of shape"):
        mapping.backward(**bad)
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())
    assert mapping.state_dict() == {"step": 1}


def test_adapters_alone_are_trained_where_they_are():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama", torch.float64), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    twin = copy.deepcopy(model)
    RandomMapping(model, seed=4).backward(**batches(0))
    random_mapping_step(twin, **batches(0), table=table(4))
    found, expected = gradients(model), gradients(twin)
    assert found.keys() == expected.keys() and all(".lora_" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-10)


def test_defaults_are_published():
    given = {name: p.default for name, p in inspect.signature(RandomMapping).parameters.items()}
    assert given["mapping_weight"] == given["retain_weight"] == 1.0 and not given["mask_padding"]
