"""ProbeProjectionLoss against its equation written out in float64, and what it does to a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from checks import assert_agrees, assert_catches_spoiled
from defenses.test_circuit_breaker import batches, move
from fastguard import directions
from fastguard.losses import ProbeProjectionLoss
from tiny_models import assert_same_gradients, gradients, pair, tiny

TOLERANCE = 1e-9


def probe_of(seed: int = 0, rows: int | None = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*([] if rows is None else [rows]), 32, generator=generator, dtype=torch.float64)


def by_hand(model: nn.Module, frozen: nn.Module, given, w: dict[int, Tensor], target=None, weight=1.0,
            labels=True) -> Tensor:  # fmt: skip
    def rows(name: str, of: nn.Module) -> list[Tensor]:
        batch = given[name]
        mask = batch["labels"] != -100 if labels else batch["attention_mask"] != 0
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return [state[mask] for state in of(**inputs, output_hidden_states=True).hidden_states]

    bad, good = rows("harmful", model), rows("retain", model)
    with torch.no_grad():
        bad_before, good_before = rows("harmful", frozen), rows("retain", frozen)
    terms = []
    for layer, direction in w.items():
        direction = (direction / direction.norm()).to(bad[layer].dtype)
        unit = good_before[layer].square().mean().sqrt()
        to = (good_before[layer] @ direction).mean()
        to = to if target is None else bad_before[layer] @ direction - target * unit
        moved = (good[layer] - good_before[layer]) @ direction
        terms.append((((bad[layer] @ direction - to) / unit) ** 2).mean() + weight * ((moved / unit) ** 2).mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize(
    "name, layers, options, checkpointing",
    [
        ("gpt2", None, {}, False),
        ("gpt2", (2, 0), {"target": 1.5, "retain_weight": 0.3}, True),
        ("phi", (1,), {"positions": "attended"}, False),
    ],
)
def test_it_equals_its_equation(name, layers, options, checkpointing):
    model = tiny(name, torch.float64)
    frozen = copy.deepcopy(model).eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = probe_of()
    loss_fn = ProbeProjectionLoss(model, directions=found, layers=layers, **options)
    move(model)
    given = batches()
    used = {i: found[i] for i in loss_fn.layers}
    expected = by_hand(
        model, frozen, given, used, options.get("target"), options.get("retain_weight", 1.0),
        options.get("positions") != "attended",
    )  # fmt: skip
    expected.backward()
    wanted = gradients(model)
    loss = loss_fn(**given)
    loss.backward()
    assert_same_gradients(gradients(model), wanted, TOLERANCE)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=TOLERANCE)
    parts = loss_fn.components
    assert float(parts["harmful"] + options.get("retain_weight", 1.0) * parts["retain"]) == pytest.approx(float(loss))
    assert parts["shift_per_layer"].shape == (len(loss_fn.layers),)


def test_spoiled_gradients_are_caught():
    model = tiny("gpt2")
    twin, peer = copy.deepcopy(model).double(), copy.deepcopy(model)
    frozen = [copy.deepcopy(each).eval() for each in (twin, peer)]
    loss_fn = ProbeProjectionLoss(model, directions=probe_of(), layers=(2,))
    move(model, twin, peer, by=0.05)
    wanted = []
    for each, before in zip((twin, peer), frozen, strict=True):
        by_hand(each, before, batches(), {2: probe_of()[2]}).backward()
        wanted.append(gradients(each))
    loss_fn(**batches()).backward()
    found = gradients(model)
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"):
        assert_catches_spoiled(lambda g, n=name: assert_agrees(n, g, wanted[0][n], wanted[1][n]), found[name])


def test_directions_may_be_one_one_each_or_a_probes():
    model = tiny("gpt2", torch.float64)
    found = probe_of()
    values = []
    for given in (found, found[:3], found[[2, 1]], 7 * found):
        loss_fn = ProbeProjectionLoss(model, directions=given, layers=(2, 1))
        values.append(float(loss_fn(**batches()).detach()))
        loss_fn.close()
    assert values == pytest.approx([values[0]] * 4, rel=1e-12)
    one = ProbeProjectionLoss(model, directions=found[1], layers=(2, 1))
    both = ProbeProjectionLoss(model, directions=found[[1, 1]], layers=(2, 1))
    assert float(one(**batches()).detach()) == float(both(**batches()).detach())


def test_a_planted_direction_is_found_and_crossed():
    """Harmful projections reach the target, in bf16 adapters too, and the retained ones stay."""
    from peft import LoraConfig, get_peft_model

    model = tiny("llama", torch.bfloat16, num_hidden_layers=2)
    bad, good = pair(batch=4, length=8)
    found = directions.probe(model, [bad], [good], [pair(batch=4, length=8, seed=1)[0]],
                             [pair(batch=4, length=8, seed=1)[1]])  # fmt: skip
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    loss_fn = ProbeProjectionLoss(
        model, directions=found.directions, layers=(1,), target=1.0, positions="attended", retain_weight=0.5
    )
    assert loss_fn.reference.bytes == 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        loss_fn(harmful=bad, retain=good).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss_fn(harmful=bad, retain=good)
    before, after = loss_fn.components, loss_fn.evaluation
    assert float(after["loss"]) < 0.6 and -1.2 < float(after["shift"]) < -0.4, after
    assert float(before["loss"]) > float(after["loss"]) and after["loss"].dtype == torch.float32


def test_what_it_refuses():
    model = tiny("gpt2")
    good = probe_of()
    for options, message in (
        ({"directions": good[:, :5]}, r"directions: expected \[32\], \[2, 32\], \[3, 32\] or \[4, 32\], got \(4, 5\)"),
        ({"directions": good.long()}, "directions: expected a floating tensor"),
        ({"directions": good * torch.tensor([[1.0], [0.0], [1.0], [1.0]])}, "directions: .* other than zero"),
        ({"directions": good, "layers": (3,)}, r"layers: expected indices of hidden states, 0 to 2, .* got \(3,\)"),
        ({"directions": good, "target": float("inf")}, "target: expected a finite number or None"),
        ({"directions": good, "retain_weight": -1}, "retain_weight: expected"),
        ({"directions": good, "positions": "last"}, "positions: expected attended or labels"),
    ):
        with pytest.raises(ValueError, match=message):
            ProbeProjectionLoss(model, **options)
    with pytest.raises(ValueError, match="layers: expected a model of more than one layer"):
        ProbeProjectionLoss(tiny("gpt2", num_hidden_layers=1), directions=good[0])
    loss_fn = ProbeProjectionLoss(model, directions=good)
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda m, a, out: out * torch.nan)
    with pytest.raises(
        FloatingPointError, match=r"ProbeProjectionLoss: harmful projection of hidden state 1 \(of 0 to 3\) is nan"
    ):
        loss_fn(**batches())
    handle.remove()
    loss_fn.close()
    with pytest.raises(RuntimeError, match="was closed"):
        loss_fn(**batches())
