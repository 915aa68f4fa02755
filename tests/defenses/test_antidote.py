"""Antidote prunes what its authors' algorithm prunes, of weights and of LoRA factors."""

import copy

import pytest
import torch

from defenses.published_antidote import find_layers, published_antidote, sample_gradients
from fastguard.defenses.antidote.step import Antidote
from methods.batches import evidence
from tiny_models import tiny


def model_of(name="llama", lora=False):
    model = tiny(name, torch.float64, num_hidden_layers=2).eval()
    if not lora:
        return model
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=5, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for n, p in wrapped.named_parameters():
        if "lora_B" in n:
            p.data = 0.3 * torch.randn(p.shape, dtype=p.dtype)
    return wrapped.double()


def applied(model, data, **options):
    method = Antidote(model, **options)
    (figures,) = method.apply(data)
    method.close()
    return {name: float(value) for name, value in figures.items()}


def assert_equal_weights(ours, theirs):
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25])
def test_it_prunes_what_the_published_algorithm_prunes(ratio, lora):
    ours = model_of(lora=lora)
    theirs, before = copy.deepcopy(ours), copy.deepcopy(ours)
    data = evidence({"harmful": Antidote(ours).roles["harmful"]})
    figures = applied(ours, data, dense_ratio=ratio)
    published_antidote(theirs, data["harmful"], ratio)
    assert_equal_weights(ours, theirs)
    layers = find_layers(theirs)
    gone = sum(int((m.weight == 0).sum()) for m in layers.values())
    assert figures == {
        "pruned": gone,
        "pruned_share": pytest.approx(gone / sum(m.weight.numel() for m in layers.values())),
    }
    touched = {n for n, p in before.named_parameters() if not torch.equal(p, dict(ours.named_parameters())[n])}
    assert touched and all(("lora_" in name) == lora for name in touched)


def test_the_data_choose(ratio=0.1):
    """Other data, or the answers' tokens alone, prune other entries; a result that ignored them would not."""
    one, other, answers = model_of(), model_of(), model_of()
    roles = {"first": Antidote(one).roles["harmful"], "second": Antidote(one).roles["harmful"]}
    data = evidence(roles)
    applied(one, {"harmful": data["first"]}, dense_ratio=ratio)
    applied(other, {"harmful": data["second"]}, dense_ratio=ratio)
    applied(answers, {"harmful": data["first"]}, dense_ratio=ratio, tokens="answer")
    for model in (other, answers):
        assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("score", ["snip", "magnitude"])
def test_other_scores(score):
    ours = model_of()
    theirs = copy.deepcopy(ours)
    data = evidence({"harmful": Antidote(ours).roles["harmful"]})
    gradients = sample_gradients(theirs, data["harmful"])
    applied(ours, data, score=score)
    published_antidote(theirs, data["harmful"], 0.1, score=score, gradients=gradients)
    assert_equal_weights(ours, theirs)


def test_modules_by_name_as_published_without_lora():
    model = model_of()
    before = copy.deepcopy(model)
    data = evidence({"harmful": Antidote(model).roles["harmful"]})
    applied(model, data, modules=("q_proj", "k_proj", "v_proj"))
    touched = {n for n, p in before.named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])}
    assert {name.split(".")[-2] for name in touched} == {"q_proj", "k_proj", "v_proj"} and len(touched) == 6
    with pytest.raises(ValueError, match="modules: expected at least one weight"):
        applied(model, data, modules=("nothing",))


def test_what_is_out_of_range_is_named():
    with pytest.raises(ValueError, match="dense_ratio: expected a number > 0, got 0"):
        Antidote(tiny("llama"), dense_ratio=0.0)
    with pytest.raises(ValueError, match="score: expected wanda or snip or magnitude"):
        Antidote(tiny("llama"), score="fi")
