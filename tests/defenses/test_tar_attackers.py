"""TAR whose attackers train adapters and pass in one forward, against each of them by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from defenses.published_tar import cross_entropy, dpo, inputs, negative_entropy
from defenses.test_tar import batch, float64_norms, preferences
from fastguard.defenses.tar.options import Options
from fastguard.defenses.tar.step import TAR
from fastguard.nested.attackers import _linears
from fastguard.settings import SettingError
from tiny_models import assert_same_gradients, gradients, tiny

__all__ = ["float64_norms"]  # a fixture

LAMBDA, SCALE = 0.0625, 4.0
SMALL = dict(steps=2, every=1, lrs=(2e-2, 5e-2), count=2, adversary="lora", adversary_rank=2, seed=4)
SOURCES = {"harmful": lambda n: batch("harmful", n, length=6 + n % 3), "retain": partial(batch, "retain")}
READ = {
    "max_entropy": (lambda model, frozen, b: negative_entropy(model(**inputs(b)).logits), partial(batch, "held out")),
    "dpo": (partial(dpo, beta=0.1), preferences),
}


def alone(tar: TAR, number: int, held_out, read) -> dict[str, Tensor]:
    """What one attacker's part of a step gives, adapters and all written out."""
    model, frozen = (tiny("llama", torch.float64, num_hidden_layers=2) for _ in range(2))
    attacker = tar.adversaries(SOURCES)[number]
    adapters = []
    for name, linear in _linears(model, "all-linear").items():
        a, b = (tar.attackers.parameters[f"attacker {number}: {name}.{f}"].detach().clone() for f in "AB")
        adapters += [nn.Parameter(a), nn.Parameter(b)]
        linear.register_forward_hook(lambda m, x, out, own=adapters[-2:]: out + 2 * x[0] @ own[0] @ own[1].T)
    optimizer = torch.optim.AdamW(adapters, lr=attacker.lr, weight_decay=0.01)
    for i, (_, data) in enumerate(zip(range(2), attacker.batches, strict=False)):
        loss = cross_entropy(model(**inputs(data)).logits, data["labels"])
        for p, g in zip(adapters, torch.autograd.grad(loss, adapters), strict=True):
            p.grad = g
        optimizer.step()
        (SCALE * math.exp(LAMBDA * (i - 1)) / 2 * read(model, frozen, held_out)).backward()
    return gradients(model)


@pytest.mark.parametrize("loss", READ)
def test_attackers_in_one_forward_give_the_sum_of_what_each_gives_alone(loss, float64_norms):
    read, make = READ[loss]
    held_out = [make(0), make(1)]
    found = []
    for micro in (None, 2, 3):
        model = tiny("llama", torch.float64, num_hidden_layers=2)
        tar = TAR(model, tamper_loss=loss, retain_weight=0.0, micro=micro, **SMALL)
        forwards: list[int] = []
        model.model.layers[0].register_forward_hook(lambda m, x, out, seen=forwards: seen.append(len(x[0])))
        attackers = tar.adversaries(SOURCES)
        assert {a.lr for a in attackers} == set(SMALL["lrs"])  # the seed's draw
        figures = tar.backward(retain=batch("outer retain", 0), tamper=held_out, adversaries=attackers)
        found.append((gradients(model), {name: float(value) for name, value in figures.items()}))
        assert figures["attacker_last"] < figures["attacker_first"]
        if micro is None:
            start, rows = tar, forwards
        tar.close()
        assert not any(m._forward_hooks for m in model.model.layers[0].mlp.modules())
    pairs = 2 if loss == "dpo" else 1
    asked = [2 * 3 * pairs] * (loss == "dpo")
    assert rows == [*asked, *[6, 6 * pairs] * 2, 3, 3]  # attackers and reads pass once each, for both of them
    start.load_state_dict({"step": 0, "calls": 0})
    each = [alone(start, number, held_out[number], read) for number in range(2)]
    together = {name: each[0][name] + each[1][name] for name in each[0]}
    assert_same_gradients(found[0][0], together, 1e-10)
    with pytest.raises(AssertionError):
        assert_same_gradients(found[0][0], {name: 2 * g for name, g in each[0].items()}, 1e-2)
    for divided, figures in found[1:]:
        assert_same_gradients(divided, found[0][0], 1e-10)
        assert figures == pytest.approx(found[0][1], rel=1e-9)


def test_bad_input_is_named_before_the_first_pass():
    model = tiny("llama", num_hidden_layers=2)
    for options, message in (
        (dict(adversary="resident"), r"adversary: expected \('weights', 'lora'\), got 'resident'"),
        (dict(loss=len), "loss: expected none with adversary='lora'"),
        (dict(tamper_loss=len), "tamper_loss: expected none with adversary='lora'"),
        (dict(trains=[]), "trains: expected none with"),
        (dict(micro=1), "micro: expected a sample of each of 2 attackers at least, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TAR(model, **{**SMALL, **options})
    with pytest.raises(SettingError, match=r"micro: expected with adversary lora at least adversaries \(4\), got 3"):
        Options(adversary="lora", adversaries=4, micro=3)
    with pytest.raises(ValueError, match="persistent: expected none with adversary='lora'"):
        TAR(model, **SMALL, persistent=True, fresh=1)
    with pytest.raises(SettingError, match="persistent: expected with adversary lora False"):
        Options(adversary="lora", persistent=True)
    with pytest.raises(SettingError, match="bf16_reductions: expected with adversary lora False"):
        Options(adversary="lora", bf16_reductions=True)
    with pytest.raises(ValueError, match="reduce_dtype: expected none with adversary='lora'"):
        TAR(model, **SMALL, reduce_dtype=torch.bfloat16)
    tar = TAR.from_options(model, Options(adversary="lora", adversaries=2))
    assert tar.attackers.count == 2 and all(p.shape[1] == 16 for p in tar.attackers.parameters.values())
    assert TAR.from_options(model, Options(bf16_reductions=True)).attack.reduce_dtype == torch.bfloat16
    tar = TAR(model, **SMALL)
    retain = batch("outer retain", 0)
    for tamper, some, message in (
        ([batch("t", 0)], 1, r"adversaries: expected count \(2\) with adversary='lora', got 1"),
        ([batch("t", 0), batch("t", 0, length=8)], 2, "tamper: expected batches of one shape"),
        ([batch("t", 0), batch("t", 0, size=2)], 2, r"tamper: expected as many samples in each, got \[3, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tar.backward(retain=retain, tamper=tamper, adversaries=tar.adversaries(SOURCES)[:some])
    other = TAR(model, **SMALL, kinds=(("harmful",), ("retain",)))
    uneven = {**SOURCES, "harmful": partial(batch, "harmful", size=2)}
    with pytest.raises(ValueError, match=r"adversaries, batch 0: expected as many samples in each"):
        other.backward(retain=retain, tamper=batch("t", 0), adversaries=other.adversaries(uneven))
