"""Selections against the published code's index sets, and what is done to weights with them."""

from __future__ import annotations

import pytest
import torch

from fastguard import saliency
from fastguard.edits.stream import source_folder, stream
from fastguard.ops.masks import count_bits, pack_mask, unpack_mask
from fastguard.saliency import Scores
from fastguard.saliency.scores import SCORES
from tiny_models import tiny

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.2.self_attn.o_proj.weight")


def made(model, seed):
    g = torch.Generator().manual_seed(seed)
    weights = {name: model.get_parameter(name).detach() for name in NAMES}
    sums = {
        "snip": {name: torch.rand(w.shape, generator=g) for name, w in weights.items()},
        "fisher": {name: torch.rand(w.shape, generator=g) for name, w in weights.items()},
        "wanda": {name: torch.rand(w.shape[1], generator=g) for name, w in weights.items()},
    }
    return Scores(sums, {}, 4, 20, 20, {name: i for i, name in enumerate(NAMES)})


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def plain(scores, kind, name, weight):
    """The score of the papers."""
    if kind == "snip":
        return weight.abs() * scores.sums["snip"][name]
    if kind == "fisher":
        return weight.square() * scores.sums["fisher"][name]
    if kind == "wanda":
        return weight.abs() * (scores.sums["wanda"][name] / 20).sqrt()
    return weight.abs()


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("per", ["tensor", "row", "model"])
def test_the_top_is_that_of_a_sort(model, kind, per):
    scores, weights = made(model, 0), saliency.weights_of(model)
    masks = saliency.top(scores, weights, 0.13, score=kind, per=per)
    values = {name: plain(scores, kind, name, weights(name)) for name in NAMES}
    whole = torch.cat([v.flatten() for v in values.values()]).sort(descending=True).values
    for name, value in values.items():
        mask = unpack_mask(masks[name], value.shape)
        if per == "model":
            expected = value >= whole[int(0.13 * len(whole)) - 1]
        elif per == "row":
            k = int(0.13 * value.shape[1])
            expected = torch.zeros_like(mask).scatter_(1, value.topk(k, 1).indices, True)
        else:
            k = int(0.13 * value.numel())
            expected = torch.zeros(value.numel(), dtype=torch.bool)
            expected[value.flatten().topk(k).indices] = True
            expected = expected.view(value.shape)
        assert torch.equal(mask, expected)
        assert not torch.equal(mask.roll(1, 0), expected)


def test_the_set_difference_is_the_published_one(model):
    """lib/prune.py of the published code: topk of each flattened matrix, unique, isin."""
    safety, utility, weights = made(model, 0), made(model, 1), saliency.weights_of(model)
    masks = saliency.set_difference(safety, utility, weights, 0.3, 0.2)
    for name in NAMES:
        w = weights(name)
        p, q = int(0.2 * w.numel()), int(0.3 * w.numel())
        u = plain(utility, "snip", name, w).flatten().topk(p).indices.unique()
        s = plain(safety, "snip", name, w).flatten().topk(q).indices.unique()
        only = s[~torch.isin(s, u)]
        assert torch.equal(unpack_mask(masks[name], w.shape).flatten().nonzero()[:, 0], only)
    everything = saliency.set_difference(safety, utility, weights, 0.3, 0.0)
    assert all(torch.equal(everything[n], m) for n, m in saliency.top(safety, weights, 0.3).items())
    nothing = saliency.set_difference(safety, safety, weights, 0.3, 0.3)
    assert not any(int(count_bits(mask)) for mask in nothing.values())


def test_weights_may_be_a_difference_from_a_base(model, tmp_path):
    other = tiny("llama", seed=5)
    other.save_pretrained(tmp_path)
    weights = saliency.weights_of(model, source_folder(tmp_path))
    expected = model.get_parameter(NAMES[0]) - other.get_parameter(NAMES[0])
    torch.testing.assert_close(weights(NAMES[0]), expected.detach())


def test_a_draw_has_as_many_and_depends_on_seed_and_name_alone(model):
    weights = saliency.weights_of(model)
    one = saliency.at_random(weights, {NAMES[0]: 100, NAMES[1]: 7}, seed=3)
    assert [int(count_bits(one[name])) for name in NAMES] == [100, 7]
    assert torch.equal(saliency.at_random(weights, {NAMES[1]: 7}, seed=3)[NAMES[1]], one[NAMES[1]])
    assert not torch.equal(saliency.at_random(weights, {NAMES[1]: 7}, seed=4)[NAMES[1]], one[NAMES[1]])


def test_pruning_sets_those_entries_and_no_others(model, tmp_path):
    """In the model and in its files alike; to zero, or to what a base has there."""
    torch.manual_seed(0)
    base = tiny("llama", torch.bfloat16, seed=7)
    given = tiny("llama", torch.bfloat16)
    given.save_pretrained(tmp_path / "model")
    base.save_pretrained(tmp_path / "base")
    masks = {name: pack_mask(torch.rand(given.get_parameter(name).shape) < 0.1) for name in NAMES}
    for other in (None, base):
        edited = tiny("llama", torch.bfloat16)
        whole = None if other is None else {name: other.get_parameter(name).detach() for name in NAMES}
        count = saliency.prune_(edited, masks, whole)
        assert count == sum(int(count_bits(mask)) for mask in masks.values())
        source = source_folder(tmp_path / "model")
        folder = None if other is None else source_folder(tmp_path / "base")
        out = tmp_path / f"out{other is None}"
        done = stream(source, out, saliency.pruning(source, masks, folder))
        assert done.edited == 2
        from_files = type(given).from_pretrained(out)
        for name, p in given.named_parameters():
            mask = unpack_mask(masks[name], p.shape) if name in masks else torch.zeros_like(p, dtype=torch.bool)
            there = torch.zeros_like(p) if other is None else base.get_parameter(name)
            expected = torch.where(mask, there, p)
            assert torch.equal(edited.get_parameter(name), expected)
            assert torch.equal(from_files.get_parameter(name), expected)


def test_what_is_not_there_is_told(model, tmp_path):
    mask = {"model.nothing.weight": torch.zeros(4, dtype=torch.uint8)}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for call in (
        lambda: saliency.prune_(model, {NAMES[0]: torch.full((160,), 255, dtype=torch.uint8), **mask}),
        lambda: saliency.Frozen(model, mask),
        lambda: saliency.Neurons(model, rows={"model.nothing.weight": torch.tensor([0])}),
    ):
        with pytest.raises(ValueError, match=r"model\.nothing\.weight: there is no such parameter"):
            call()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    scores = made(model, 0)
    with pytest.raises(ValueError, match="share: expected a number from 0 to 1"):
        saliency.top(scores, saliency.weights_of(model), 1.5)
    with pytest.raises(ValueError, match="per: expected one of tensor"):
        saliency.top(scores, saliency.weights_of(model), 0.5, per="column")
    with pytest.raises(ValueError, match="score: expected one of snip"):
        saliency.top(scores, saliency.weights_of(model), 0.5, score="taylor")
    fewer = Scores({"snip": {NAMES[0]: scores.sums["snip"][NAMES[0]]}}, {}, 4, 20, 20, {NAMES[0]: 0})
    with pytest.raises(ValueError, match="utility: expected scores of the same weights"):
        saliency.set_difference(scores, fewer, saliency.weights_of(model), 0.1, 0.1)
    scores.sums["snip"][NAMES[1]][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"o_proj"):
        saliency.top(scores, saliency.weights_of(model), 0.5)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="safetensors"):
        Scores.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="fastguard saliency"):
        Scores.load(tmp_path / "absent")
