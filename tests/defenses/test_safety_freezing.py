"""What is frozen is what the published set difference holds, and no optimizer moves it."""

import copy

import pytest
import torch

from defenses.published_antidote import find_layers
from defenses.published_safety_freezing import fine_tuned, frozen_entries
from fastguard.defenses.safety_freezing.step import SafetyFreezing
from methods.batches import evidence, labelled
from tiny_models import tiny

Q, P = 0.2, 0.15

OPTIMIZERS = {
    "AdamW with decay": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.3),
    "SGD with momentum and decay": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.3, fused=True),
}


def model_of(dtype=torch.float64):
    return tiny("llama", dtype, num_hidden_layers=2).eval()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_under_it_equals_the_published_one(optimizer):
    """Three steps; what is frozen stays bit for bit, also with momentum from steps before."""
    ours = model_of()
    theirs = copy.deepcopy(ours)
    make = OPTIMIZERS[optimizer]
    mine, its = make(ours.parameters()), make(theirs.parameters())
    for model, steps in ((ours, mine), (theirs, its)):  # one free step
        model(**labelled(50, 0)).loss.backward()
        steps.step()
        steps.zero_grad()
    method = SafetyFreezing(ours, safety_top=Q, utility_top=P)
    data = evidence(method.roles)
    entries = frozen_entries(theirs, data["safety"], data["utility"], Q, P)
    (figures,) = method.apply(data)
    assert float(figures["frozen"]) == sum(map(len, entries.values())) > 0
    numel = sum(m.weight.numel() for m in find_layers(ours).values())
    assert float(figures["frozen_share"]) == pytest.approx(float(figures["frozen"]) / numel)
    before = {name: module.weight.detach().clone() for name, module in find_layers(ours).items()}
    fine_tuned(theirs, entries, its, lambda n: theirs(**labelled(n, 0)).loss, 3)
    for n in range(3):
        mine.zero_grad()
        ours(**labelled(n, 0)).loss.backward()
        for name, module in find_layers(ours).items():
            assert (module.weight.grad.view(-1)[sorted(entries[name])] == 0).all()
        mine.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)
    for name, module in find_layers(ours).items():
        held, now = sorted(entries[name]), module.weight.detach().view(-1)
        assert torch.equal(now[held], before[name].view(-1)[held]), name
        free = torch.ones(now.numel(), dtype=torch.bool)
        free[held] = False
        assert (now[free] != before[name].view(-1)[free]).float().mean() > 0.99, name
    method.close()
    mine.step()
    assert any(
        not torch.equal(m.weight.detach().view(-1)[sorted(entries[n])], before[n].view(-1)[sorted(entries[n])])
        for n, m in find_layers(ours).items() if entries[n]
    )  # fmt: skip


def test_in_bf16_the_bits_stay():
    model = model_of(torch.bfloat16)
    method = SafetyFreezing(model, safety_top=0.5, utility_top=0.1, score="wanda")
    list(method.apply(evidence(method.roles)))
    held = {id(p): (mask, p.detach().clone()) for p, mask, _ in method.frozen._held.values()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for n in range(3):
        model(**labelled(n, 0)).loss.backward()
        optimizer.step()
    from fastguard.ops.masks import unpack_mask

    for p in model.parameters():
        if id(p) in held:
            mask, before = held[id(p)]
            where = unpack_mask(mask, p.shape)
            assert where.any() and torch.equal(p.detach()[where], before[where])
    method.close()


def test_adapters_are_refused_and_so_is_a_weight_that_is_not_trained():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model_of(), peft.LoraConfig(r=2, target_modules="all-linear"))
    method = SafetyFreezing(wrapped)
    with pytest.raises(ValueError, match="model: expected fine-tuning of the weights themselves, got LoRA adapters"):
        list(method.apply(evidence(method.roles)))
    model = model_of()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    method = SafetyFreezing(model)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight is not trained"):
        list(method.apply(evidence(method.roles)))
    for bad in ({"safety_top": 0.0}, {"utility_top": 1.5}, {"score": "magnitude"}, {"samples": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SafetyFreezing(model, **bad)
