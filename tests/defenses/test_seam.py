"""SEAM against double backward and its published difference, in float64; and that a failing step leaves no trace.

GPT-2 where tolerances are narrow: Llama computes norms and softmax in fp32, 1e-7 / eps of noise in a difference.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from defenses.published_seam import Losses, dot, exact_gradient, published_gradient
from fastguard import SEAM
from fastguard.defenses.seam.options import Options
from fastguard.methods import registry
from fastguard.nested import PerturbationLostError, Weights, hessian_product
from tiny_models import gradients, pair, tiny, transform

Batch = dict[str, torch.Tensor]


def batches(step: int = 0) -> tuple[Batch, Batch, Batch]:
    """A padded pair, and a benign batch with labels, of another shape."""
    harmful, harmless = pair(seed=step, padding=True)
    benign, _ = pair(batch=2, length=7, seed=9 + step)
    benign["labels"] = benign["input_ids"].clone()
    benign["labels"][:, :2] = -100
    return harmful, harmless, benign


def losses(model: nn.Module, given: tuple[Batch, Batch, Batch]) -> Losses:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    norm = base.transformer.ln_f if hasattr(base, "transformer") else getattr(base.model, "norm", None)
    after, head = transform(base), base.get_output_embeddings()
    return Losses(model, *given, norm or base.model.final_layernorm, lambda h: after(head(h)))


def step(seam: SEAM, given: tuple[Batch, Batch, Batch], **more):
    return seam.backward(**dict(zip(("harmful", "harmless", "benign"), given, strict=True)), **more)


def error(found, expected, scale=None) -> float:
    """Relative to the expected gradient, or to ``scale``."""
    off = {n: found.get(n, torch.zeros_like(e)) - e for n, e in expected.items()}
    return math.sqrt(float(dot(off, off)) / float(dot(*(scale or expected,) * 2)))


@pytest.mark.parametrize(
    "name, checkpointing, attention, tolerance",
    [
        ("gpt2", False, "eager", 1e-10),
        ("gpt2", True, "sdpa", 1e-10),
        ("phi", False, "sdpa", 1e-5),  # rotates in fp32, whose rounding differs from CPU to CPU
        ("llama_tied", False, "sdpa", 1e-6),
        ("gemma2", True, "eager", 1e-6),
        ("qwen3_moe", False, "sdpa", 1e-6),
    ],
)
def test_three_steps_with_tangents_equal_double_backward(name, checkpointing, attention, tolerance):
    """alpha and beta large enough that each term shows."""
    model = tiny(name, torch.float64, attn_implementation=attention, num_hidden_layers=2)
    twin = copy.deepcopy(model)
    twin.config._attn_implementation = "eager"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seam = SEAM(model, alpha=0.7, beta=0.5)
    for number in range(3):
        given = batches(number)
        expected, said = exact_gradient(twin, losses(twin, given), 0.7, 0.5)
        figures = step(seam, given)
        assert error(gradient := gradients(model), expected) < tolerance
        assert gradient.keys() == expected.keys()
        names = ("unlearning", "harmless_ce", "cosine", "harmful_norm", "benign_norm")
        assert [float(figures[n]) for n in names] == pytest.approx(list(said), rel=10 * tolerance)
        assert float(figures["loss"]) == pytest.approx(said[0] + 0.7 * said[1] + 0.5 * said[2], rel=10 * tolerance)
        assert all(v.dim() == 0 and not v.requires_grad for v in figures.values())
        with torch.no_grad():
            for m in (model, twin):
                for n, p in m.named_parameters():
                    p -= 0.05 * expected[n]
    assert seam.state_dict() == {"step": 3}
    seam.close()


def test_the_cosine_counts_and_the_tolerance_would_show_it():
    model = tiny("gpt2", torch.float64, num_hidden_layers=2)
    step(SEAM(model, beta=0.01), batches())
    with_it = gradients(model)
    step(SEAM(model, beta=0.0), batches())
    assert 1e-4 < error(gradients(model), with_it) < 0.1


@pytest.mark.parametrize("product", ["linearised", "difference"])
def test_the_differences_equal_the_published_one_and_are_off_by_eps(product):
    """At the published eps of 1e-3; the error against the exact slope of the cosine falls with eps."""
    model = tiny("gpt2", torch.float64, attn_implementation="eager", num_hidden_layers=2)
    given = batches()
    oracle = losses(model, given)
    exact, _ = exact_gradient(model, oracle, beta=1.0)
    without, _ = exact_gradient(model, oracle, beta=0.0)
    slope = {n: e - without[n] for n, e in exact.items()}
    errors = []
    for eps in (1e-3, 1e-4):
        figures = step(SEAM(model, beta=1.0, eps=eps, product=product), given)
        found = gradients(model)
        expected, _ = published_gradient(model, oracle, beta=1.0, eps=eps)
        assert error(found, expected) < 1e-9
        errors.append(error(found, exact, slope))
    assert ("perturbation_cosine" in figures) == (product == "difference")
    step(SEAM(model, beta=1.0), given)
    assert error(gradients(model), exact, slope) < 1e-11 < 1e-4 < errors[0] < 0.05
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)


def test_in_bfloat16_tangents_keep_what_differences_lose():
    """Slope of the cosine alone: tangents are right to the dtype, the linearised difference at eps 1e-3 is noise."""
    model = tiny("gpt2", torch.float64, num_hidden_layers=2).bfloat16()
    given, twin = batches(), copy.deepcopy(model).double()
    slope, found = {}, {}
    for beta in (0.0, 1.0):
        step(SEAM(twin, beta=beta), given)
        slope[beta] = gradients(twin)
    slope = {n: g - slope[0.0][n] for n, g in slope[1.0].items()}
    for product in ("tangent", "linearised"):
        step(SEAM(model, alpha=0.0, beta=1e3, product=product), given)  # the other terms are nothing beside it
        found[product] = error({n: g.double() / 1e3 for n, g in gradients(model).items()}, slope)
    assert found["tangent"] < 0.1 < 1.0 < found["linearised"]
    with pytest.raises(PerturbationLostError, match="the dtype rounded the step away"):
        step(SEAM(model, product="difference"), given)
    assert all(p.grad is None for p in model.parameters())


def test_scale_and_earlier_gradients():
    model = tiny("gpt2", torch.float64, num_hidden_layers=2)
    seam = SEAM(model)
    step(seam, batches())
    once = gradients(model)
    for _ in range(2):
        step(seam, batches(), scale=0.5)
    assert error(gradients(model), once) < 1e-12


@pytest.mark.parametrize("product", ["tangent", "linearised", "difference"])
def test_adapters(product):
    from peft import LoraConfig, get_peft_model

    model = tiny("phi", torch.float64, attn_implementation="eager", num_hidden_layers=2)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    given = batches()
    oracle = losses(model, given)
    expected, _ = exact_gradient(model, oracle) if product == "tangent" else published_gradient(model, oracle)
    step(SEAM(model, product=product), given)
    assert error(gradients(model), expected) < 1e-9


class Boom(Exception):
    pass


@pytest.mark.parametrize("product, forwards", [("tangent", 5), ("linearised", 6), ("difference", 5)])
@pytest.mark.parametrize("kind", ["exception", "interrupt", "nan"])
def test_a_failing_step_leaves_no_trace(kind, product, forwards):
    model = tiny("gpt2", num_hidden_layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    seam, calls, fails = SEAM(model, product=product), 0, 0

    def hook(module, args, output):
        nonlocal calls
        calls += 1
        if calls == fails:
            if kind == "nan":
                return output * torch.nan
            raise Boom if kind == "exception" else KeyboardInterrupt
        return None

    model.transformer.wte.register_forward_hook(hook)
    model(**batches(3)[0]).logits.sum().backward()
    before = [(p, p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    modules = [(m, dict(m.__dict__), dict(m._parameters)) for m in model.modules()]
    random = torch.get_rng_state()
    for fails in range(1, forwards + 1):
        calls = 0
        with pytest.raises({"exception": Boom, "interrupt": KeyboardInterrupt, "nan": FloatingPointError}[kind]):
            step(seam, batches())
        assert calls == fails and seam.step == 0
        assert all(torch.equal(p, v) and torch.equal(p.grad, g) for p, v, g in before)
        assert all(all(m._parameters[k] is p for k, p in own.items()) for m, _, own in modules)
        assert all(m.__dict__.keys() == d.keys() for m, d, _ in modules)
        assert torch.equal(torch.get_rng_state(), random)
    fails = calls = 0
    step(seam, batches())  # and it can be tried again
    assert calls == forwards and any(not torch.equal(p.grad, g) for p, _, g in before)
    assert all(torch.equal(p, v) for p, v, _ in before)


def test_a_resumed_run_goes_on_with_its_dropout():
    model = tiny("gpt2", torch.float64, num_hidden_layers=2, resid_pdrop=0.3)
    seam = SEAM(model, seed=4)
    first = {n: float(v) for n, v in step(seam, batches()).items()}
    gradients(model)
    torch.manual_seed(1)
    figures = step(seam, batches())
    expected = gradients(model)
    assert float(figures["harmful_ce"]) != first["harmful_ce"]
    resumed = SEAM(model, seed=4)
    resumed.load_state_dict({"step": 1})
    torch.manual_seed(1)
    step(resumed, batches())
    assert error(gradients(model), expected) == 0
    small = SEAM(model, seed=4, product="difference", eps=1e-5, beta=10.0)  # one dropout at both ends
    torch.manual_seed(1)
    step(small, batches())
    difference = gradients(model)
    torch.manual_seed(1)
    small.product, small.step = "tangent", 0
    step(small, batches())
    assert error(difference, gradients(model)) < 1e-3


def test_tangents_are_refused_by_name_where_there_are_none():
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    model = tiny("gpt2", num_hidden_layers=1)
    model.transformer.ln_f.register_forward_hook(lambda m, a, y: Fused.apply(y))
    weights = Weights(model)
    with pytest.raises(ValueError, match="one of its operations has no tangent"):
        hessian_product(weights, weights.local(), lambda: model(**batches()[0]).logits.square().mean())
    with pytest.raises(ValueError, match="directions: expected 16, one a parameter, got 1"):
        hessian_product(weights, [None], lambda: model(**batches()[0]).logits.mean())


def test_bad_input_is_named():
    model = tiny("gpt2", num_hidden_layers=1)
    for options, message in [
        ({"eps": 0.0}, "eps: expected a number > 0, got 0"),
        ({"beta": -1.0}, "beta: expected a number >= 0"),
        ({"product": "exact"}, "product: expected tangent or linearised or difference, got 'exact'"),
    ]:
        with pytest.raises(ValueError, match=message):
            SEAM(model, **options)
    harmful, harmless, benign = batches()
    seam = SEAM(model)
    with pytest.raises(TypeError, match=r"SEAM\.backward: expected batches harmful, harmless, benign; got harmful"):
        seam.backward(harmful=harmful)
    with pytest.raises(ValueError, match="harmful: no token carries loss"):
        step(seam, (harmful, harmful, benign))
    with pytest.raises(ValueError, match="benign: no token carries loss"):
        step(seam, (harmful, harmless, {**benign, "labels": torch.full_like(benign["labels"], -100)}))
    assert all(p.grad is None for p in model.parameters())


def test_the_registry_has_it():
    entry = registry.find("seam", "defense")
    seam = entry.build(tiny("gpt2", num_hidden_layers=1), Options(product="difference", eps=0.5), seed=3)
    assert isinstance(seam, SEAM) and (seam.product, seam.eps, seam.seed, seam.alpha, seam.beta) == (
        "difference", 0.5, 3, 1.0, 0.01,
    )  # fmt: skip
    data = {"pair": lambda n: {"harmful": n, "harmless": -n}, "benign": lambda n: 10 * n}
    seam.step = 2
    assert seam.draw(data) == {"harmful": 2, "harmless": -2, "benign": 20}
