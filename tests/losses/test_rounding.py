"""The warning about a dtype that rounds training away: when it comes, what it says, and when it must not."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastguard import RepNoiseLoss
from tiny_models import pair, tiny

HARMFUL, HARMLESS = pair()


def train(dtype: torch.dtype, lr, steps: int = 9, micro: int = 1, backward: bool = True, change=lambda model: None):
    """(what warned, the share of weights with a gradient that each step changed, the model)."""
    model = tiny("llama", dtype)
    change(model)
    loss_fn = RepNoiseLoss(model)
    parameters = [p for p in model.parameters() if p.requires_grad and p is not model.model.embed_tokens.weight]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    shares = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            for _ in range(micro):
                loss = loss_fn(harmful=HARMFUL, harmless=HARMLESS)
                if backward:
                    loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = lr(step) if callable(lr) else lr
            before = [p.detach().clone() for p in parameters]
            asked = [p.grad != 0 if p.grad is not None else torch.zeros_like(p, dtype=torch.bool) for p in parameters]
            optimizer.step()
            optimizer.zero_grad()
            changed = sum(int((a & (p != b)).sum()) for p, a, b in zip(parameters, asked, before, strict=True))
            shares.append(changed / max(sum(int(a.sum()) for a in asked), 1))
    loss_fn.close()
    return [str(w.message) for w in caught if "rounds most" in str(w.message)], shares, model


@pytest.mark.parametrize("micro", [1, 3])
def test_steps_that_are_rounded_away_are_counted(micro):
    found, shares, _ = train(torch.bfloat16, 2e-5, micro=micro)
    assert len(found) == 1 and "RepNoiseLoss: the model's torch.bfloat16 rounds" in found[0]
    assert "dtype=torch.float32" in found[0] and "LoRA" in found[0] and "master weights" in found[0]
    said = [float(word.rstrip("%")) / 100 for word in found[0].split() if word.endswith("%")]
    assert 0 < shares[0] < 0.25
    assert said == pytest.approx([shares[0], shares[7]], abs=0.01)


def test_a_step_that_loses_everything_counts():
    assert len(train(torch.bfloat16, 1e-9)[0]) == 1


@pytest.mark.parametrize(
    "dtype, lr, options",
    [
        (torch.float32, 1e-7, {}),
        (torch.bfloat16, 1e-2, {}),
        (torch.bfloat16, lambda step: 1e-2 * step, {}),  # a warmup, whose first step is of size 0
        (torch.bfloat16, 2e-5, {"steps": 8}),  # no call after the eighth step yet
        (torch.bfloat16, 2e-5, {"backward": False}),  # no step is a step without gradients
    ],
)
def test_no_warning(dtype, lr, options):
    assert train(dtype, lr, **options)[0] == []


def test_frozen_weights_do_not_count():
    def adapters_alone(model) -> None:
        model.requires_grad_(False)
        model.model.layers[0].mlp.down_proj.float().weight.requires_grad_(True)
        model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: (args[0].float(),))
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, out: out.bfloat16())

    assert train(torch.bfloat16, 1e-7, change=adapters_alone)[0] == []


def test_no_hook_stays():
    hooked = lambda model: [p for p in model.parameters() if p._post_accumulate_grad_hooks]  # noqa: E731
    assert not hooked(train(torch.bfloat16, 2e-5)[2])
    model = tiny("llama", torch.bfloat16)
    loss_fn = RepNoiseLoss(model)
    loss_fn(harmful=HARMFUL, harmless=HARMLESS)
    assert hooked(model)
    del loss_fn
    assert not hooked(model)
