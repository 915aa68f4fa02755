"""A low-rank defense is taken out of the weights, then refusal directions out of what is left."""

import dataclasses

import pytest
import torch

from attacks.test_refusal_ablation import evidence, score
from directions.planted import planted
from fastguard.attacks.delta_strip.options import Options
from fastguard.attacks.delta_strip.step import DeltaStrip
from fastguard.attacks.delta_strip.strip import strip
from fastguard.edits.stream import source_folder
from tiny_models import tiny


def low_rank(model, rank, scale=0.3, seed=5):
    """Adds a merged adapter to each matrix of the layers, and something to each norm."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    with torch.no_grad():
        for p in model.model.layers.parameters():
            change = normal(p.shape[0], rank) @ normal(rank, p.shape[1]) if p.dim() == 2 else normal(*p.shape)
            p.add_((scale * change).to(p.dtype))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a planted model in float64."""
    folder = tmp_path_factory.mktemp("base")
    planted(layers=3)[0].save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_adapter_of_the_rank_is_gone_and_one_above_it_is_not(base, dtype):
    model = planted(layers=3)[0].to(dtype)
    public, before = weights(planted(layers=3)[0]), score(model)
    low_rank(model, 4)
    merged = weights(model)
    assert abs(score(model) - before) > 0.1
    figures = strip(model, str(base), 4)
    eps = torch.finfo(dtype).eps
    for name, p in model.named_parameters():
        size = float(merged[name].abs().max())
        assert float((p.double() - public[name]).abs().max()) < (300 if dtype == torch.float64 else 4) * eps * size, (
            name
        )
    assert figures["share"] == pytest.approx(1, abs=0.05 if dtype == torch.bfloat16 else 1e-6)
    other = planted(layers=3)[0]
    low_rank(other, 6)
    left = strip(other, str(base), 4)
    assert 0.5 < left["share"] < 0.99
    for name, p in other.named_parameters():
        if p.dim() == 2 and "layers" in name:
            change = torch.linalg.svdvals(p.detach() - public[name])
            assert int((change > 1e-9 * change[0]).sum()) == 2, name


def test_what_equals_the_base_stays_to_the_bit(base):
    model = planted(layers=3)[0]
    before = weights(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert strip(model, str(base), 16) == {"changed": 1.0, "share": pytest.approx(1.0)}
    assert strip(planted(layers=3)[0], str(base), 16) == {"changed": 0.0, "share": 0.0}
    for name, p in model.named_parameters():
        if "layers.1.mlp.up_proj" not in name:
            assert torch.equal(p, before[name]), name


def test_rank_0_gives_the_base_to_the_bit(base):
    model, public = planted(layers=3)[0], weights(planted(layers=3)[0])
    low_rank(model, 30)
    assert strip(model, str(base), 0)["share"] == pytest.approx(1)
    assert all(torch.equal(p, public[name]) for name, p in model.named_parameters())


def test_experts_and_tied_heads(tmp_path):
    model = tiny("mixtral", torch.float64)
    model.save_pretrained(tmp_path / "experts")
    names = source_folder(tmp_path / "experts").tensors
    if all(name in names for name, _ in model.named_parameters()):
        pytest.fail("mixtral's files name experts as its parameters do: give this test another model")
    with pytest.raises(ValueError, match=r"base: .* has no tensor 'model.layers.0.mlp"):
        strip(model, str(tmp_path / "experts"), 2)
    tied = tiny("llama_tied", torch.float64)
    tied.save_pretrained(tmp_path / "tied")
    untied = tiny("llama", torch.float64)
    untied.load_state_dict(tied.state_dict())
    assert strip(untied, str(tmp_path / "tied"), 2) == {"changed": 0.0, "share": 0.0}
    with torch.no_grad():
        untied.lm_head.weight[5] += 1
    assert strip(untied, str(tmp_path / "tied"), 2)["share"] == pytest.approx(1)
    torch.testing.assert_close(untied.lm_head.weight, tied.lm_head.weight)


def test_rounds_of_ablation_follow_and_the_change_stays_out(base):
    model, direction = planted(layers=3)
    refusing = score(model)
    low_rank(model, 2, scale=0.2)
    attack = DeltaStrip(model, base=str(base), rank=2, rounds=1, positions=1, validation=4)
    assert attack.rounds == 2
    rounds = attack.apply(evidence())
    assert float(next(rounds)["share"]) == pytest.approx(1)
    assert score(model) == pytest.approx(refusing)
    next(rounds)
    assert score(model) < refusing - 5
    assert float(torch.cosine_similarity(attack.ablation.chosen[0].direction, direction, dim=0)) > 0.99
    rounds.close()
    attack.close()
    assert score(model) == pytest.approx(refusing)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_does_not_fit_is_named_and_nothing_is_changed(base, tmp_path):
    deeper = planted(layers=4)[0]
    with pytest.raises(ValueError, match=r"base: .* has no tensor 'model.layers.3"):
        strip(deeper, str(base), 4)
    wider = tiny("llama", torch.float64, intermediate_size=48)
    before = weights(wider)
    with pytest.raises(ValueError, match=r"base: 'model.layers.0.mlp.gate_proj.weight' is \[40, 32\] .* \[48, 32\]"):
        strip(wider, str(base), 4)
    assert all(torch.equal(p, before[name]) for name, p in wider.named_parameters())
    with pytest.raises(FileNotFoundError, match="base: expected a model's folder or id"):
        strip(wider, str(tmp_path / "nothing"), 4)
    with pytest.raises(ValueError, match="rank: expected an integer >= 0, got -1"):
        Options(rank=-1)
    with pytest.raises(ValueError, match="base: expected a folder"):
        dataclasses.replace(Options(), base="")
