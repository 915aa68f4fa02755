"""linearised: the same losses and gradients as at weights that were really moved, with none of them touched."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

from checks import assert_agrees, assert_catches_spoiled
from fastguard.losses import language_model
from fastguard.nested import Weights, linearised, perturbed
from tiny_models import gradients, pair, tiny

NORM = 0.5


def loss(model: nn.Module) -> torch.Tensor:
    ids = pair()[0]["input_ids"]
    return model(input_ids=ids, labels=ids).loss


def directions(model: nn.Module) -> list[torch.Tensor | None]:
    weights = Weights(model)
    loss(model).backward()
    return weights.take_gradients()


def moved(model: nn.Module, along: list[torch.Tensor | None], norm: float) -> nn.Module:
    """A copy whose weights are moved, by hand."""
    twin = copy.deepcopy(model)
    length = torch.sqrt(sum(d.double().square().sum() for d in along if d is not None))
    trained = [p for p in twin.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, d in zip(trained, along, strict=True):
            if d is not None:
                p.copy_(p.double() + norm * d.double() / (length + 1e-7))
    return twin


def at_once(model: nn.Module, along: list[torch.Tensor | None], norm: float) -> tuple[float, dict[str, torch.Tensor]]:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with linearised(Weights(model), along, norm):
        value = loss(model)
        value.backward()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    return float(value.detach()), gradients(model)


MODELS = ["llama", "llama_tied", "gemma2", "phi", "gpt2", "gpt_neox", "cohere", "granite", "opt", "qwen3"]
IN_FP32 = ("llama", "llama_tied", "gemma2", "cohere", "granite", "qwen3")  # their norms, whatever the model's dtype


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_equals_weights_that_were_moved(name, checkpointing):
    if checkpointing and name not in ("llama_tied", "gemma2", "gpt2"):
        pytest.skip("three architectures")
    model = tiny(name, torch.float64)
    along = directions(model)
    plain = float(loss(model).detach())
    twin = moved(model, along, -NORM)
    expected = loss(twin)
    expected.backward()
    reference = gradients(twin)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    value, found = at_once(model, along, -NORM)
    ulps = 1e3 * (2.0**29 if name in IN_FP32 else 1)
    assert abs(value - float(expected)) <= ulps * 2.0**-52 * abs(plain) < 0.05 * abs(plain - float(expected))
    largest = max(float(g.abs().max()) for g in reference.values())
    assert found.keys() == reference.keys()
    for key, theirs in reference.items():
        if float(theirs.abs().max()) < 1e-12 * largest:  # zero but for rounding, as a bias on attention keys
            assert float(found[key].abs().max()) < 1e-10 * largest
            continue
        assert_agrees(key, found[key], theirs, ulps=ulps)
    key = max(reference, key=lambda k: reference[k].numel())
    assert_catches_spoiled(lambda x: assert_agrees(key, x, reference[key], ulps=ulps), found[key])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_in_bf16_a_small_step_is_there_that_the_weights_cannot_hold(name):
    """The change of the logits, against exact weights and exact arithmetic; the rounded weights miss most of it."""
    exact = tiny(name, torch.float64, hidden_size=128, num_hidden_layers=2)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict(model.state_dict())  # the same numbers
    along = directions(exact)
    ids = pair(8, 32)[0]["input_ids"]
    norm = 0.03
    with torch.no_grad():
        truth = moved(exact, along, norm)(input_ids=ids).logits - exact(input_ids=ids).logits
        plain = model(input_ids=ids).logits
        with linearised(Weights(model), along, norm):
            ours = (model(input_ids=ids).logits - plain).double()
        rounded = (moved(model, along, norm)(input_ids=ids).logits - plain).double()

    def kept(x: torch.Tensor) -> float:
        return float((x * truth).sum() / truth.square().sum())

    assert abs(kept(ours) - 1) < 0.07
    assert kept(rounded) < 0.8


def test_a_weight_is_copied_in_blocks(monkeypatch):
    model = tiny("gpt2", torch.float64)
    along = directions(model)
    whole = at_once(model, along, NORM)
    monkeypatch.setattr(importlib.import_module("fastguard.nested.linearised"), "BLOCK", 1000)
    blocks = at_once(model, along, NORM)
    assert abs(whole[0] - blocks[0]) < 1e-13
    largest = max(float(g.abs().max()) for g in whole[1].values())
    for key, value in whole[1].items():
        assert float((blocks[1][key] - value).abs().max()) < 1e-12 * largest


def test_parameters_that_do_not_move_stay_where_they_are():
    model = tiny("phi", torch.float64)  # biases of linear maps, of the head and of norms
    for name, p in model.named_parameters():
        p.requires_grad_("k_proj" not in name and not name.endswith("lm_head.bias") and "layernorm.bias" not in name)
    along = directions(model)
    along[3] = None
    twin = moved(model, along, NORM)
    expected = loss(twin)
    expected.backward()
    reference = gradients(twin)
    value, found = at_once(model, along, NORM)
    assert abs(value - float(expected)) < 1e-12
    assert found.keys() == reference.keys() and len(found) < len(list(model.parameters()))
    for key, theirs in reference.items():
        assert_agrees(key, found[key], theirs, ulps=1e5)


def test_adapters():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj", "embed_tokens", "lm_head"])
    model = get_peft_model(tiny("llama", torch.float64), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    with pytest.raises(
        ValueError, match=r"lora_embedding_A \(ParameterDict\), which holds default, is neither a linear map"
    ):
        at_once(model, directions(model), NORM)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"])
    model = get_peft_model(tiny("llama", torch.float64), config)
    along = directions(model)
    twin = moved(model, along, NORM)
    expected = loss(twin)
    expected.backward()
    reference = gradients(twin)
    value, found = at_once(model, along, NORM)
    assert abs(value - float(expected)) < 1e-7
    for key, theirs in reference.items():
        assert_agrees(key, found[key], theirs, ulps=1e3 * 2.0**29)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_refused(name):
    model = tiny(name)
    with pytest.raises(ValueError, match=r"is neither a linear map nor an embedding"):
        at_once(model, directions(model), NORM)
    check_clean(model)


def test_a_module_of_vectors_need_not_be_affine():
    class Curved(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))

        def forward(self, x, *, power):
            return (x * self.w.exp()).pow(power)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Curved()

        def forward(self, x):
            return self.inner(x, power=2)

    x, model, d = torch.randn(3, 4), Model(), torch.randn(4)
    w = (model.inner.w.detach() + NORM * d / (d.norm() + 1e-7)).requires_grad_()
    expected = (x * w.exp()).pow(2)
    expected.sum().backward()
    with linearised(Weights(model), [d], NORM):
        found = model(x)
        found.sum().backward()
    assert_agrees("output", found, expected)
    assert_agrees("gradient", model.inner.w.grad, w.grad)


def test_autocast():
    """The products run in autocast's dtype, where the parameters are wider."""
    model = tiny("llama", torch.float32)
    along = directions(model)
    ids = pair()[0]["input_ids"]
    expected = moved(model, along, NORM)(input_ids=ids).logits
    with torch.autocast("cpu", torch.bfloat16), linearised(Weights(model), along, NORM):
        found = model(input_ids=ids).logits
        found.float().square().mean().backward()
    assert found.dtype == torch.bfloat16
    assert_agrees("logits", found, expected, ulps=32, ratio=0.02)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def check_clean(model: nn.Module) -> None:
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not hasattr(module, "_fastguard_shifted")
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind(error):
    model = tiny("llama")
    along = directions(model)
    with pytest.raises(error), linearised(Weights(model), along, NORM):
        loss(model)
        raise error
    check_clean(model)
    value = loss(model)
    at_once(model, along, NORM)
    check_clean(model)
    assert torch.equal(loss(model), value)


def test_a_loss_that_reads_the_head_is_refused():
    model = tiny("llama")
    along = directions(model)
    fused = language_model.LanguageModelLoss(model)
    with (
        pytest.raises(RuntimeError, match=r"(LlamaRMSNorm|Linear): its output is shifted by nested\.linearised"),
        linearised(Weights(model), along, NORM),
    ):
        fused(pair()[0])
    fused(pair()[0])
    fused.close()


def test_taps_see_the_shifted_output():
    model = tiny("llama", torch.float64)
    along = directions(model)
    seen = []
    model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    loss(moved(model, along, NORM))
    with linearised(Weights(model), along, NORM):
        loss(model)
    assert_agrees("norm", seen[1], seen[0], ulps=1e3 * 2.0**29)


def test_a_weight_read_past_its_module_is_an_error():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(x, self.inner.weight, self.inner.bias)

    model = Reads()
    with (
        pytest.raises(RuntimeError, match=r"inner.(weight|bias) was used, but not by calling inner \(Linear\)"),
        linearised(Weights(model), [torch.ones(4, 4), torch.ones(4)], NORM),
    ):
        model(torch.randn(3, 4)).sum().backward()
    check_clean(model)


def test_bad_input_is_named():
    model = nn.Linear(2, 2)
    for bad in (0.0, torch.nan, torch.inf):
        along = [torch.full_like(p, bad) for p in model.parameters()]
        for form in (linearised, perturbed):
            with pytest.raises(FloatingPointError, match=r"norm is (0\.0|nan|inf)"), form(Weights(model), along, 1.0):
                pass
    with (
        pytest.raises(ValueError, match="directions: expected 2, one a parameter, got 1"),
        linearised(Weights(model), [torch.ones(2, 2)], 1.0),
    ):
        pass
    with (
        pytest.raises(FloatingPointError, match="no parameter has one"),
        linearised(Weights(model), [None, None], 1.0),
    ):
        pass
