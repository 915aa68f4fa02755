"""What a loss refuses or warns of before it computes something that nobody asked for."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from fastguard import LanguageModelLoss, RepNoiseLoss
from tiny_models import gradients, pair, tiny, transform


@pytest.mark.parametrize("kind", ["repnoise", "language model"])
@pytest.mark.parametrize("how", ["resized", "another head"])
def test_a_head_that_was_replaced_is_not_read_any_longer(kind, how):
    model = tiny("llama")
    loss = RepNoiseLoss(model) if kind == "repnoise" else LanguageModelLoss(model)
    bad, good = pair()

    def call():
        return loss(harmful=bad, harmless=good) if kind == "repnoise" else loss(bad)

    call()
    if how == "resized":
        model.resize_token_embeddings(120)
    else:
        model.lm_head = torch.nn.Linear(32, 97, bias=False)
    with pytest.raises(RuntimeError, match=r"head .*(replaced|rows)"):
        call()


def test_a_loss_cannot_be_copied():
    with pytest.raises(TypeError, match="RepNoiseLoss: it cannot be copied"):
        copy.deepcopy(RepNoiseLoss(tiny("llama")))


def step(model, loss, optimizer, micro_batches=1):
    for i in range(micro_batches):
        bad, good = pair(seed=i)
        (loss(harmful=bad, harmless=good) / micro_batches).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_steps_that_bf16_rounds_away_are_warned_of_once_with_their_share():
    model = tiny("llama", torch.bfloat16)
    loss, optimizer = RepNoiseLoss(model), torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    with pytest.warns(UserWarning, match=r"changed \d\.\d% of the weights: torch.bfloat16") as said:
        for _ in range(4):
            step(model, loss, optimizer, micro_batches=2)
    assert len([w for w in said if "of the weights" in str(w.message)]) == 1


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float32, 1e-7), (torch.bfloat16, 1e-1)])
def test_steps_that_are_kept_are_not_warned_of(dtype, lr):
    model = tiny("llama", dtype)
    loss, optimizer = RepNoiseLoss(model), torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(model, loss, optimizer)


def test_an_evaluation_does_not_move_the_noise():
    model, (bad, good) = tiny("llama"), pair()
    loss = RepNoiseLoss(model, layers=1)
    first = loss(harmful=bad, harmless=good).item()
    before = int(loss.call)
    with torch.no_grad():
        again = [loss(harmful=bad, harmless=good).item() for _ in range(2)]
    assert int(loss.call) == before == 1 and again[0] == again[1] and again[0] != first


def test_lens_without_the_models_soft_cap_is_as_published():
    """Inner states read by plain products, the output with its cap: against the same by hand, and not as capped."""
    model, (bad, good) = tiny("gemma2", torch.float64), pair()
    plain = RepNoiseLoss(model, lens_transform="none", boundary="predicted", ignore_token_zero=False)
    plain(harmful=bad, harmless=good)
    found = plain.components["harmful_ce"]
    out = model(**bad, output_hidden_states=True)
    rows = (bad["input_ids"] != good["input_ids"])[:, 1:]
    target = bad["input_ids"][:, 1:][rows]

    def ce(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1][rows], target)

    capped = transform(model)
    assert found[0].item() == pytest.approx(ce(out.logits).item(), rel=1e-9)
    for i, state in enumerate(out.hidden_states[:-1]):
        logits = model.lm_head(model.model.norm(state))
        assert found[i + 1].item() == pytest.approx(ce(logits).item(), rel=1e-7)  # its norm is in fp32
        assert abs(ce(capped(logits)).item() - ce(logits).item()) > 1e-4
    gradients(model)


def test_boundary_labels_are_float64_in_a_float64_loss():
    model, (bad, good) = tiny("llama", torch.float64), pair()
    loss = RepNoiseLoss(model)
    loss(harmful=bad, harmless=good)
    rows = loss.components["harmless_ce"]
    assert rows.dtype == torch.float64 and loss.components["harmful_ce"].dtype == torch.float64
