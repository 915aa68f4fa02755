"""CRL against its published form, two models and full logits, in float64 on the same batches.

GPT-2 and Phi to 1e-8; the others norm in fp32 whatever the weights are, which shows where batches run joined.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from defenses.published_crl import PORT, published_crl
from fastguard import CRL
from fastguard.defenses.crl.options import Options
from fastguard.defenses.crl.step import default_layers
from fastguard.methods import registry
from fastguard.nested import Reference
from fastguard.settings import build
from tiny_models import assert_same_gradients, gradients, pair, tiny

Batch = dict[str, torch.Tensor]


def batches(step: int = 0) -> tuple[Batch, Batch]:
    """Of different shapes, with labels and padding."""
    harmful, _ = pair(seed=step, padding=True)
    _, harmless = pair(batch=4, length=7, seed=50 + step, padding=True)
    for batch in (harmful, harmless):
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, :3] = -100
    return harmful, harmless


def published(model: nn.Module, frozen: nn.Module, given: tuple[Batch, Batch], **options):
    """Gradients, loss and parts."""
    loss, parts = published_crl(model, frozen, *given, **{**PORT, **options})
    loss.backward()
    return gradients(model), [float(loss.detach()), *(float(p.detach()) for p in parts[:3])]


def said(figures) -> list[float]:
    assert all(v.dim() == 0 and not v.requires_grad for v in figures.values())
    return [float(figures[name]) for name in ("loss", "benign_hinge", "harmful_hinge", "kl")]


def descend(models, given: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for model in models:
            for name, p in model.named_parameters():
                if name in given:
                    p -= 0.05 * given[name]


@pytest.mark.parametrize(
    "name, layers, checkpointing, tolerance",
    [
        ("gpt2", None, False, 1e-8),
        ("phi", (2, 3), True, 1e-8),
        ("llama", None, False, 1e-6),
        ("llama_tied", (1, 3), True, 1e-6),
        ("gemma2", (0, 2), False, 1e-5),
        ("cohere", (1,), False, 1e-6),
    ],
)
def test_three_steps_equal_the_published_form(name, layers, checkpointing, tolerance):
    """A trained head, also with a bias (phi), soft-cap and scale: the frozen model keeps its own."""
    model = tiny(name, torch.float64)
    twin, frozen = copy.deepcopy(model), copy.deepcopy(model).eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    crl = CRL(model, layers=layers, benign_margin=1.2)  # so that both hinges are open in a random model
    kl = 0.0
    for number in range(3):
        given = batches(number)
        expected, parts = published(twin, frozen, given, layers=crl.layers, margins=(1.2, 0.5))
        figures = crl.backward(harmful=given[0], harmless=given[1])
        assert_same_gradients(found := gradients(model), expected, tolerance)
        assert said(figures) == pytest.approx(parts, rel=tolerance, abs=1e-12)
        assert min(parts[1:3]) > 0.1
        kl = parts[3]
        descend((model, twin), found)
    assert kl > 1e-6  # the terms that are compared are there
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
    assert crl.state_dict() == {"step": 3}
    crl.close()


def test_options_reach_the_algorithm():
    model, frozen = tiny("gpt2", torch.float64), tiny("gpt2", torch.float64, seed=1)
    given = batches()
    reference = Reference(frozen)
    assert [p.shape for p in frozen.parameters()] == [p.shape for p in model.parameters()]
    options = dict(layers=(1, 2), temperature=2.0)
    expected, parts = published(
        model, frozen.eval(), given, **options, distances=("norm",) * 4, margins=(2.0, 3.0), weights=(0.1, 0.2, 0.3)
    )
    crl = CRL(
        model, 0.1, 0.2, 0.3, benign_margin=2.0, harmful_margin=3.0, distance="norm", **options, reference=reference
    )
    figures = crl.backward(harmful=given[0], harmless=given[1])
    assert_same_gradients(gradients(model), expected, 1e-8)
    assert said(figures) == pytest.approx(parts, rel=1e-8)


def test_adapters_are_switched_off_for_the_reference():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama", torch.float64), LoraConfig(r=2, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    frozen = copy.deepcopy(model).get_base_model()
    for module in frozen.modules():
        if hasattr(module, "lora_B"):
            module.enable_adapters(False)
    given = batches()
    expected, parts = published(model, frozen, given, layers=(1, 2))
    crl = CRL(model, layers=(1, 2))
    assert crl.reference.bytes == 0
    assert said(crl.backward(harmful=given[0], harmless=given[1])) == pytest.approx(parts, rel=1e-8)
    assert_same_gradients(gradients(model), expected, 1e-8)


def test_a_frozen_head_is_not_copied_and_no_logits_are_made():
    model = tiny("llama", torch.float64)
    frozen = copy.deepcopy(model)
    for p in model.lm_head.parameters():
        p.requires_grad = False
    given = batches()
    crl = CRL(model)
    torch.manual_seed(1)
    descend([model], {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad})
    shapes = []
    model.lm_head.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    figures = crl.backward(harmful=given[0], harmless=given[1])
    assert shapes == [(7, 0, 97), (7, 0, 97)]  # one frozen and one live forward of the joined batch
    found = gradients(model)
    expected, parts = published(model, frozen, given, layers=crl.layers)
    assert_same_gradients(found, expected, 1e-8)
    assert said(figures) == pytest.approx(parts, rel=1e-8)


def test_bfloat16_is_near():
    """The first two steps of a model in bf16: the reference equals the live weights at first, to the bit."""
    model = tiny("llama").bfloat16()
    crl, given = CRL(model), batches()
    figures = crl.backward(harmful=given[0], harmless=given[1])
    assert float(figures["kl"]) == 0.0
    twin, frozen = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    expected, parts = published(twin, frozen, given, layers=crl.layers)
    assert said(figures) == pytest.approx(parts, rel=2e-2, abs=1e-6)
    found = gradients(model)
    off = sum(float((found[n].double() - g).square().sum()) for n, g in expected.items())
    assert off < 0.05**2 * sum(float(g.square().sum()) for g in expected.values())


class Boom(Exception):
    pass


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("kind", ["exception", "interrupt", "nan"])
def test_a_failing_step_leaves_no_trace(kind, call):
    model = tiny("gpt2", resid_pdrop=0.3)
    crl, calls, (harmful, harmless) = CRL(model), 0, batches()
    descend([model], {n: 0.1 * torch.randn_like(p) for n, p in model.named_parameters()})

    def hook(module, args, output):
        nonlocal calls
        calls += 1
        if calls == call:
            if kind == "nan":
                return output * torch.nan
            raise Boom if kind == "exception" else KeyboardInterrupt
        return None

    model.transformer.wte.register_forward_hook(hook)
    calls = 2
    model(**harmful).loss.backward()
    before = [(p, p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    host = [t.clone() for t in crl.reference._host]
    calls = 0
    with pytest.raises({"exception": Boom, "interrupt": KeyboardInterrupt, "nan": FloatingPointError}[kind]):
        crl.backward(harmful=harmful, harmless=harmless)
    assert all(torch.equal(p, v) and torch.equal(p.grad, g) for p, v, g in before)
    assert all(torch.equal(a, b) for a, b in zip(crl.reference._host, host, strict=True))
    assert all(m.training for m in model.modules()) and crl.step == 0
    crl.backward(harmful=harmful, harmless=harmless)  # and it can be tried again
    assert any(not torch.equal(p.grad, g) for p, _, g in before)


def test_a_resumed_run_goes_on():
    model = tiny("gpt2", torch.float64)
    fresh, given = copy.deepcopy(model), batches()
    crl = CRL(model)
    crl.backward(harmful=given[0], harmless=given[1])
    descend([model], gradients(model))
    crl.backward(harmful=given[0], harmless=given[1])
    resumed = CRL(fresh)
    fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict({"step": 1})
    resumed.backward(harmful=given[0], harmless=given[1])
    expected = gradients(model)
    assert all(torch.equal(g, expected[n]) for n, g in gradients(fresh).items()) and resumed.step == 2


def test_layers_are_the_ports_scaled():
    assert default_layers(32) == tuple(range(20, 32))
    assert default_layers(30) == tuple(range(18, 30))
    assert [default_layers(n) for n in (1, 2, 3)] == [(1,), (1,), (1, 2)]


def test_bad_input_is_named():
    model = tiny("gpt2")
    for options, message in [
        ({"harmful_margin": 3.0}, "harmful_margin: expected a number < 2 with distance cosine"),
        ({"benign_margin": 2.0}, "the hinge never closes"),
        ({"layers": (2, 4)}, "layers: expected indices of the hidden states, 0 to 3, got 4"),
        ({"layers": (2, 2)}, "layers: expected at least one index of a hidden state, each once"),
        ({"layers": ()}, "layers: expected at least one index"),
        ({"distance": "l1"}, "distance: expected cosine or norm, got 'l1'"),
    ]:
        with pytest.raises(ValueError, match=message):
            CRL(model, **options)
    harmful, harmless = batches()
    crl = CRL(model)
    with pytest.raises(ValueError, match="harmless: it has no response token"):
        crl.backward(harmful=harmful, harmless={**harmless, "labels": torch.full_like(harmless["labels"], -100)})
    with pytest.raises(
        ValueError, match="harmful: expected entries input_ids, attention_mask, labels, got also pixels"
    ):
        crl.backward(harmful={**harmful, "pixels": harmful["labels"]}, harmless=harmless)
    assert all(p.grad is None for p in model.parameters())


def test_the_registry_has_it():
    entry = registry.find("crl", "defense")
    options = build(Options, {"layers": [1, 2], "distance": "norm", "harmful_margin": 9})
    crl = entry.build(tiny("gpt2"), options)
    assert isinstance(crl, CRL)
    assert (crl.layers, crl.distance, crl.harmful_margin, crl.benign_margin) == ((1, 2), "norm", 9.0, 0.3)
