"""Frozen entries keep their bits under every optimizer; neurons train as they would among everything else."""

from __future__ import annotations

import copy

import pytest
import torch

from fastguard import saliency
from fastguard.ops.masks import pack_mask, unpack_mask
from saliency.batches import batches
from tiny_models import tiny

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.2.self_attn.o_proj.weight")


def masks_of(model, share=0.3):
    g = torch.Generator().manual_seed(0)
    return {n: pack_mask(torch.rand(model.get_parameter(n).shape, generator=g) < share) for n in NAMES}


OPTIMIZERS = {
    "AdamW with decay": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.5),
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.5, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_entries_keep_their_bits(name, dtype):
    model = tiny("llama", dtype)
    masks, optimizer = masks_of(model), OPTIMIZERS[name](model.parameters())
    for batch in batches(1):  # momentum from before the freezing
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict())
    with saliency.freeze(model, masks):
        for batch in batches(3):
            model(**batch).loss.backward()
            for weight in NAMES:
                grad = model.get_parameter(weight).grad
                assert not grad[unpack_mask(masks[weight], grad.shape)].any()
            optimizer.step()
            optimizer.zero_grad()
    for weight, value in model.state_dict().items():
        if weight in masks:
            held = unpack_mask(masks[weight], value.shape)
            assert torch.equal(value[held], before[weight][held])
            assert float((value[~held] != before[weight][~held]).float().mean()) > 0.5
    for batch in batches(1):  # and move again afterwards
        model(**batch).loss.backward()
        optimizer.step()
    held = unpack_mask(masks[NAMES[0]], model.get_parameter(NAMES[0]).shape)
    assert not torch.equal(model.get_parameter(NAMES[0])[held], before[NAMES[0]][held])


def test_the_rest_moves_as_without_a_mask():
    """Without decay or clipping an unmasked entry does not notice the masked ones of its own first step."""
    results = []
    for held in (True, False):
        model = tiny("llama", torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        with saliency.freeze(model, masks_of(model) if held else {}):
            model(**batches(1)[0]).loss.backward()
            optimizer.step()
        results.append(model.state_dict())
    mask = unpack_mask(masks_of(tiny("llama"))[NAMES[0]], results[0][NAMES[0]].shape)
    assert torch.equal(results[0][NAMES[0]][~mask], results[1][NAMES[0]][~mask])
    assert torch.equal(results[0][NAMES[1].replace("2", "1")], results[1][NAMES[1].replace("2", "1")])


def test_a_weight_that_is_not_trained_needs_no_mask():
    model = tiny("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="is not trained"):
        saliency.Frozen(model, masks_of(model))


ROWS = {
    "model.layers.0.mlp.up_proj.weight": torch.tensor([3, 0, 17]),
    "model.layers.1.self_attn.q_proj.weight": torch.tensor([5]),
}
COLUMNS = {"model.layers.0.mlp.down_proj.weight": torch.tensor([3, 0, 17])}


def test_neurons_train_as_among_everything_else():
    """AdamW on the parts alone equals AdamW on whole weights whose other gradients are zero, with less state."""
    whole, model = tiny("llama", torch.float64), tiny("llama", torch.float64)
    given = batches(3)
    wanted = {**{n: (0, i) for n, i in ROWS.items()}, **{n: (1, i) for n, i in COLUMNS.items()}}
    full = torch.optim.AdamW([whole.get_parameter(n) for n in wanted], lr=1e-2, weight_decay=0.0)
    with saliency.neurons(model, ROWS, COLUMNS) as chosen:
        optimizer = torch.optim.AdamW(chosen.parameters(), lr=1e-2, weight_decay=0.0)
        for batch in given:
            for half in ({k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}):  # accumulated
                model(**half).loss.backward()
                whole(**half).loss.backward()
            for n, (dim, index) in wanted.items():
                grad = whole.get_parameter(n).grad
                keep = torch.zeros_like(grad).index_fill_(dim, index, 1)
                grad.mul_(keep)
                assert model.get_parameter(n).grad is None
            full.step()
            optimizer.step()
            optimizer.zero_grad()
            whole.zero_grad()
        state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
        assert state == 2 * (3 * 32 + 32 + 32 * 3)
        assert [n for n, p in model.named_parameters() if p.requires_grad] == sorted(
            wanted, key=list(dict(model.named_parameters())).index
        )
    untouched = tiny("llama", torch.float64)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, whole.get_parameter(n), rtol=1e-10, atol=1e-13)
        assert torch.equal(p, untouched.get_parameter(n)) == (n not in wanted)
    assert all(p.requires_grad for p in model.parameters())


def test_neurons_of_narrow_weights_are_trained_in_fp32():
    model = tiny("llama", torch.bfloat16)
    with saliency.neurons(model, ROWS) as chosen:
        assert {p.dtype for p in chosen.parameters()} == {torch.float32}
        optimizer = torch.optim.SGD(chosen.parameters(), lr=1e-5)
        start = [p.detach().clone() for p in chosen.parameters()]
        for batch in batches(2):
            model(**batch).loss.backward()
            optimizer.step()
        assert all(not torch.equal(a, b) for a, b in zip(start, chosen.parameters(), strict=True))


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        ({"model.layers.0.mlp.up_proj.weight": torch.tensor([40])}, None, "distinct integers from 0 to 39"),
        ({"model.layers.0.mlp.up_proj.weight": torch.tensor([1, 1])}, None, "distinct integers"),
        ({"model.layers.0.mlp.up_proj.weight": torch.tensor([0.5])}, None, "expected integers"),
        ({}, None, "expected some neurons"),
        (ROWS, {"model.layers.0.mlp.up_proj.weight": torch.tensor([1])}, "not among rows"),
        ({"model.norm.weight": torch.tensor([1])}, None, "expected a whole matrix"),
    ],
)
def test_neurons_that_are_none_are_told(rows, columns, said):
    with pytest.raises(ValueError, match=said):
        saliency.Neurons(tiny("llama"), rows, columns)
