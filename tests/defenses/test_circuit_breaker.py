"""Circuit breakers against their published form, two truncated models and stacks of states, in float64.

GPT-2 and Phi to 1e-9; the others norm in fp32 whatever the weights are, which shows where batches run joined.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

from checks import assert_agrees, assert_catches_spoiled
from defenses.published_circuit_breaker import published_circuit_breaker
from fastguard import CircuitBreakerLoss
from fastguard.defenses.circuit_breaker.cost import read
from fastguard.defenses.circuit_breaker.options import Options
from fastguard.defenses.circuit_breaker.step import CircuitBreaker
from fastguard.losses.circuit_breaker import default_layers
from fastguard.methods import registry
from fastguard.nested import Reference
from fastguard.plan.architecture import find
from fastguard.plan.setting import Setting
from fastguard.settings import build
from fastguard.taps import find_structure
from fastguard.taps.shallow import shallow
from tiny_models import assert_same_gradients, gradients, pair, tiny

Batch = dict[str, Tensor]


def batches(step: int = 0) -> dict[str, Batch]:
    """Of different shapes, with labels and padding."""
    harmful, _ = pair(seed=step, padding=True)
    _, retain = pair(batch=4, length=7, seed=50 + step, padding=True)
    for batch in (harmful, retain):
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, :3] = -100
    return {"harmful": harmful, "retain": retain}


@torch.no_grad()
def move(*models: nn.Module, by: float = 0.02, seed: int = 0) -> None:
    """The same random step for all of them."""
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def published(model: nn.Module, frozen: nn.Module, given: dict[str, Batch], **options):
    """Gradients, loss and both terms."""
    loss, parts = published_circuit_breaker(model, frozen, **given, **options)
    loss.backward()
    return gradients(model), [float(loss.detach()), *(float(part.detach()) for part in parts)]


def said(figures) -> list[float]:
    assert all(not v.requires_grad for v in figures.values())
    return [float(figures[name]) for name in ("loss", "retain", "rerouting")]


def by_hand(model: nn.Module, frozen: nn.Module, given: dict[str, Batch], *, layers, labels=False, all_states=False,
            padding_counts=True, relative=False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both terms with every option, row by row of whole models; states up to max(layers) unless all of them."""

    def rows(name: str, of: nn.Module) -> list[Tensor]:
        batch = given[name]
        mask = batch["labels"] != -100 if labels else batch["attention_mask"] != 0
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return [state[mask] for state in of(**inputs, output_hidden_states=True).hidden_states]

    with torch.no_grad():
        before = {name: rows(name, frozen) for name in given}
    live = {name: rows(name, model) for name in given}
    similar = [torch.cosine_similarity(live["harmful"][i], before["harmful"][i], -1, 0).relu() for i in layers]
    assert all_states
    pairs = list(zip(live["retain"], before["retain"], strict=True))
    moved = torch.stack([(a - b).norm(dim=-1) / (b.norm(dim=-1) if relative else 1) for a, b in pairs])
    count = len(moved) * given["retain"]["input_ids"].numel() if padding_counts else moved.numel()
    return moved.sum() / count, torch.stack(similar).mean()


@pytest.mark.parametrize(
    "name, layers, checkpointing, tolerance",
    [
        ("gpt2", None, False, 1e-9),
        ("gpt2", (3,), False, 1e-9),  # the final norm's output
        ("phi", (0, 2), True, 1e-9),  # up to the last layer
        ("llama", (1,), False, 1e-6),
        ("llama_tied", (0,), True, 1e-6),
        ("gemma2", (0, 1), False, 1e-5),
    ],
)
def test_three_steps_equal_the_published_form(name, layers, checkpointing, tolerance):
    model = tiny(name, torch.float64)
    twin, frozen = copy.deepcopy(model), copy.deepcopy(model).eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    breaker = CircuitBreaker(model, layers=layers)
    move(model, twin)  # away from where both gradients are nothing but rounding errors
    for number in range(3):
        given = batches(number)
        expected, parts = published(twin, frozen, given, step=number + 1, layers=breaker.loss_fn.layers)
        figures = breaker.backward(**given)
        assert_same_gradients(found := gradients(model), expected, tolerance)
        assert said(figures) == pytest.approx(parts, rel=tolerance)
        assert parts[1] > 0.01 and 1e-4 < parts[2] < 0.9999
        with torch.no_grad():
            for each in (model, twin):
                for key, p in each.named_parameters():
                    if key in found:
                        p -= 0.02 * found[key]
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    assert breaker.state_dict()["step"] == 3 and int(breaker.state_dict()["loss"]["call"]) == 3


@pytest.mark.parametrize(
    "labels, padding_counts, relative", [(False, False, False), (True, True, True), (True, False, False)]
)
def test_options_reach_the_loss(labels, padding_counts, relative):
    model = tiny("gpt2", torch.float64)
    frozen = tiny("gpt2", torch.float64, seed=1)
    loss_fn = CircuitBreakerLoss(
        model, layers=(2, 1), alpha=3.0, schedule=4, positions="labels" if labels else "attended",
        mask_padding=not padding_counts, retain_states="all", reference=Reference(frozen),
        retain_distance="relative" if relative else "absolute",
    )  # fmt: skip
    given = batches()
    kept, turned = by_hand(
        model, frozen, given, layers=(2, 1), labels=labels, all_states=True, padding_counts=padding_counts,
        relative=relative,
    )  # fmt: skip
    expected = 3.0 * (kept / 4 + turned * 3 / 4)
    expected.backward()
    wanted = gradients(model)
    loss = loss_fn(**given)
    loss.backward()
    assert_same_gradients(gradients(model), wanted, 1e-9)
    assert said(loss_fn.components) == pytest.approx([float(x.detach()) for x in (expected, kept, turned)], rel=1e-9)
    by_layer = loss_fn.components["rerouting_per_layer"]
    assert by_layer.shape == (2,) and float(by_layer.mean()) == pytest.approx(float(turned.detach()))
    assert loss_fn.components["retain_per_state"].shape == (4,)


def test_spoiled_gradients_are_caught():
    model = tiny("gpt2")
    twin, frozen = copy.deepcopy(model).double(), copy.deepcopy(model).double().eval()
    peer, peer_frozen = copy.deepcopy(model), copy.deepcopy(model).eval()
    loss_fn = CircuitBreakerLoss(model, layers=(1, 2))
    move(model, twin, peer, by=0.05)
    given = batches()
    expected, _ = published(twin, frozen, given, step=1, layers=(1, 2))
    same, _ = published(peer, peer_frozen, given, step=1, layers=(1, 2))
    loss_fn(**given).backward()
    found = gradients(model)
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight", "transformer.wte.weight"):
        assert_catches_spoiled(lambda g, name=name: assert_agrees(name, g, expected[name], same[name]), found[name])


# --- the first step -------------------------------------------------------------------------------------------------


def test_states_that_have_not_moved_are_turned():
    """Without the nudge a model would stay for ever where it is; with it the value is the same, to the bit."""
    given = batches()
    found = {}
    for nudge in (0.0, 0.01):
        model = tiny("gpt2", torch.float64)
        loss_fn = CircuitBreakerLoss(model, layers=(1, 2), nudge=nudge)
        loss = loss_fn(**given)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(10 * (1 - 1 / 300), rel=1e-15)
        found[nudge] = gradients(model)
    assert all(not g.any() for g in found[0.0].values())
    # what a reference gives that is turned by that angle, to second order
    model = tiny("gpt2", torch.float64)
    loss_fn = CircuitBreakerLoss(model, layers=(1, 2), nudge=0.01)
    mask = given["harmful"]["attention_mask"] != 0
    out = model(**{k: v for k, v in given["harmful"].items() if k != "labels"}, output_hidden_states=True)
    states = [out.hidden_states[i][mask] for i in (1, 2)]
    turned = []
    for state, direction in zip(states, loss_fn._directions([s.detach() for s in out.hidden_states]).values()):
        h = state.detach()
        across = direction - h * (h @ direction)[:, None] / h.square().sum(-1, keepdim=True)  # turned away from there
        turned.append(torch.cosine_similarity(state, h / h.norm(dim=-1, keepdim=True) + 0.01 * across, -1, 0))
    (10 * (1 - 1 / 300) * torch.stack(turned).mean()).backward()
    expected = gradients(model)
    name = "transformer.h.0.mlp.c_proj.weight"
    # Only across the state: cos does not care for lengths, the nudge's projection along it is a part in sqrt(D).
    cosine = torch.cosine_similarity(found[0.01][name].flatten(), expected[name].flatten(), 0)
    assert cosine > 0.95 and float(found[0.01][name].norm() / expected[name].norm()) == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_leaves_the_start(dtype):
    """bf16, where published code has gradients of exactly 0 for ever: no rounding error sets it going."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny("llama", dtype, num_hidden_layers=2), LoraConfig(r=4, target_modules="all-linear"),
        autocast_adapter_dtype=False,
    )  # fmt: skip
    loss_fn = CircuitBreakerLoss(model, layers=(1,))
    given = batches()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    turned = []
    for _ in range(16):
        loss_fn(**given).backward()
        turned.append(float(loss_fn.components["rerouting"]))
        optimizer.step()
        optimizer.zero_grad()
    assert turned[0] == 1.0 and turned[-1] < 0.9, turned


def test_states_that_have_moved_are_not_nudged():
    found = []
    for nudge in (0.0, 0.5):
        model = tiny("gpt2", torch.float64)
        loss_fn = CircuitBreakerLoss(model, layers=(1, 2), nudge=nudge)
        move(model, by=1e-6)
        loss_fn(**batches()).backward()
        found.append(gradients(model))
    assert all(torch.equal(g, found[1][name]) for name, g in found[0].items())


# --- the schedule ---------------------------------------------------------------------------------------------------


def test_the_schedule_counts_calls_that_trained():
    model = tiny("gpt2", num_hidden_layers=2)
    loss_fn = CircuitBreakerLoss(model, layers=(1,), alpha=2.0, schedule=4)
    given = batches()

    def weights(components) -> tuple[float, float]:
        return float(components["retain_weight"]), float(components["rerouting_weight"])

    with torch.no_grad():
        loss_fn(**given)
    assert weights(loss_fn.evaluation) == (0.5, 1.5) and loss_fn.components == {} and int(loss_fn.call) == 0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    seen = []
    for _ in range(5):
        loss_fn(**given).backward()
        seen.append(weights(loss_fn.components))
    assert seen == [(0.5, 1.5), (1.0, 1.0), (1.5, 0.5), (2.0, 0.0), (2.0, 0.0)]
    again = CircuitBreakerLoss(tiny("gpt2", num_hidden_layers=2), layers=(1,), alpha=2.0, schedule=6)
    again.load_state_dict(pickle.loads(pickle.dumps(loss_fn.state_dict())))
    again(**given)
    assert int(again.call) == 6 and weights(again.components) == (2.0, 0.0)
    handle = model.transformer.wte.register_forward_hook(lambda *a: a[-1] * torch.nan)
    with pytest.raises(FloatingPointError):
        loss_fn(**given)
    handle.remove()
    assert int(loss_fn.call) == 5


def test_a_resumed_run_goes_on_to_the_same_bits():
    given = batches()

    def steps(breaker, model, count):
        for _ in range(count):
            breaker.backward(**given)
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.01 * p.grad if p.grad is not None else 0
            model.zero_grad()

    model, first, again = (tiny("gpt2") for _ in range(3))
    whole = CircuitBreaker(model, schedule=5)
    steps(whole, model, 3)
    half = CircuitBreaker(first, schedule=5)
    steps(half, first, 2)
    resumed = CircuitBreaker(again, schedule=5)  # on the model as it was: the reference
    again.load_state_dict(first.state_dict())
    resumed.load_state_dict(half.state_dict())
    steps(resumed, again, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# --- wrapped, narrow, compiled --------------------------------------------------------------------------------------


def test_adapters_are_switched_off_for_the_reference():
    from peft import LoraConfig, get_peft_model

    base = tiny("gpt2", torch.float64)
    frozen = copy.deepcopy(base).eval()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn", "c_proj"], layers_to_transform=[0, 1]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    loss_fn = CircuitBreakerLoss(model, layers=(1,))
    assert loss_fn.reference.bytes == 0
    loss_fn(**batches()).backward()
    found = gradients(model)
    expected, parts = published(model.get_base_model(), frozen, batches(), step=1, layers=(1,))
    expected = {f"base_model.model.{name}": g for name, g in expected.items()}
    assert_same_gradients(found, expected, 1e-9)
    assert said(loss_fn.components) == pytest.approx(parts, rel=1e-9)


def test_bfloat16_is_near():
    model = tiny("llama").bfloat16()
    twin, frozen = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    loss_fn = CircuitBreakerLoss(model, layers=(1, 2))
    with torch.no_grad():
        move(model, by=0.05)
        twin.load_state_dict({name: p.double() for name, p in model.state_dict().items()})
    expected, parts = published(twin, frozen, batches(), step=1, layers=(1, 2))
    loss_fn(**batches()).backward()
    assert loss_fn.components["loss"].dtype == torch.float32
    assert said(loss_fn.components) == pytest.approx(parts, rel=2e-2)
    found = gradients(model)
    off = sum(float((found[n].double() - g).square().sum()) for n, g in expected.items())
    assert off < 0.05**2 * sum(float(g.square().sum()) for g in expected.values())


def test_compiled():
    """Whole graphs with checkpoints, in evaluation mode for the reference and in training."""
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model = tiny("gpt2", torch.float64, num_hidden_layers=1)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        loss_fn = CircuitBreakerLoss(wrapped, layers=(0, 1))
        move(model)
        loss_fn(**batches()).backward()
        found.append((float(loss_fn.components["loss"]), gradients(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-12)
    assert_same_gradients(found[1][1], found[0][1], 1e-9)


def test_reentrant_checkpointing():
    """Right, or refused by transformers whose layers checkpoint their hooks too."""
    found = []
    for reentrant in (None, True):
        model = tiny("gpt2", torch.float64)
        if reentrant:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        loss_fn = CircuitBreakerLoss(model, layers=(1,))
        move(model)
        try:
            loss_fn(**batches()).backward()
        except RuntimeError as error:
            assert reentrant and "reentrant" in str(error)
            return
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0], 1e-12)


# --- layers that are left out ---------------------------------------------------------------------------------------


def test_layers_above_are_left_out_and_put_back():
    """Bits and gradients are those of the whole forward, which a hook of somebody else's asks for."""
    found = []
    for hooked in (False, True):
        model = tiny("llama", torch.float64, num_hidden_layers=4)
        loss_fn = CircuitBreakerLoss(model, layers=(1,))
        move(model)
        ran = []
        for i, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_hook(lambda *a, i=i: ran.append(i))
        if hooked:
            model.model.layers[3].register_forward_hook(lambda *a: None)
        loss_fn(**batches()).backward()
        assert ran == (2 * [0, 1, 2, 3] if hooked else 2 * [0, 1])
        assert not any("forward" in vars(layer) for layer in model.model.layers)
        found.append((loss_fn.components["loss"], gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(g, found[1][1][name]) for name, g in found[0][1].items())
    assert found[0][1].keys() == found[1][1].keys() and "model.layers.2.mlp.up_proj.weight" not in found[0][1]


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral", "opt", "gpt_neox", "phi"])
def test_what_a_shallow_forward_returns(name):
    """Every form in which layers return their state; in another thread, and after an error, the model is whole."""
    model = tiny(name).eval()
    structure = find_structure(model)
    batch = pair()[0]
    with torch.no_grad():
        whole = model(**batch, output_hidden_states=True)
        seen = {}
        with contextlib.suppress(KeyError), shallow(structure, model, 1) as left_out:
            assert left_out
            cut = model(**batch).logits

            def elsewhere():
                with torch.no_grad():
                    seen["logits"] = model(**batch).logits

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            raise KeyError
        for handle in (structure.norm.register_forward_pre_hook(lambda m, a: (whole.hidden_states[1],)),):
            expected = model(**batch).logits
            handle.remove()
        assert torch.equal(cut, expected) and not torch.equal(cut, whole.logits)
        assert torch.equal(seen["logits"], whole.logits) and torch.equal(model(**batch).logits, whole.logits)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "half, layer, message",
    [
        (0, 0, r"CircuitBreakerLoss: cosine of hidden state 1 \(of 0 to 4\) is nan"),
        (1, 0, r"CircuitBreakerLoss: retain distance of hidden state 1 \(of 0 to 4\) is nan"),
        (1, 2, r"CircuitBreakerLoss: retain distance of the final norm of hidden state 3 \(of 0 to 4\) is nan"),
    ],
)
@pytest.mark.parametrize("method", [False, True])
def test_nan_is_named(half, layer, message, method):
    model = tiny("llama", num_hidden_layers=4)
    made = CircuitBreaker(model, layers=(1, 2)) if method else CircuitBreakerLoss(model, layers=(1, 2))

    def hook(module, args, output):
        if torch.is_grad_enabled():  # the live forward
            keep = torch.arange(len(output)) < 3 if half else torch.arange(len(output)) >= 3
            return torch.where(keep[:, None, None], output, torch.nan)
        return None

    model.model.layers[layer].mlp.register_forward_hook(hook)
    with pytest.raises(FloatingPointError, match=message):
        made.backward(**batches()) if method else made(**batches())
    assert int((made.loss_fn if method else made).call) == 0


def test_what_it_refuses():
    model = tiny("gpt2")
    for options, message in {
        "layers": ({"layers": (2, 4)}, r"layers: expected indices of hidden states, 0 to 3, each once, got \(2, 4\)"),
        "twice": ({"layers": (2, 2)}, "layers: expected indices"),
        "none": ({"layers": ()}, "layers: expected indices"),
        "half": ({"layers": (1.5,)}, "layers: expected indices"),
        "alpha": ({"alpha": -1.0}, "alpha: expected a finite number >= 0"),
        "nudge": ({"nudge": float("nan")}, "nudge: expected a finite number >= 0"),
        "schedule": ({"schedule": 0}, "schedule: expected an int >= 1, got 0"),
        "seed": ({"seed": 0.5}, "seed: expected an int, got 0.5"),
        "positions": ({"positions": "some"}, "positions: expected attended or labels, got 'some'"),
        "states": ({"retain_states": "few"}, "retain_states: expected truncated or all"),
    }.values():
        with pytest.raises(ValueError, match=message):
            CircuitBreakerLoss(model, **options)
    with pytest.raises(ValueError, match="layers: expected at least one index"):
        build(Options, {"layers": [1, 1]})
    given = batches()
    loss_fn = CircuitBreakerLoss(model)
    empty = {**given["retain"], "attention_mask": torch.zeros_like(given["retain"]["attention_mask"])}
    for changes, message in (
        ({"retain": empty}, "retain: expected a token that counts"),
        ({"harmful": [1]}, "harmful: expected input_ids"),
        ({"harmful": {**given["harmful"], "pixels": given["harmful"]["labels"]}}, "harmful: .* got also pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_fn(**{**given, **changes})
    bare = {name: {k: v for k, v in batch.items() if k != "labels"} for name, batch in given.items()}
    with pytest.raises(ValueError, match="harmful: expected labels"):
        CircuitBreakerLoss(model, positions="labels")(**bare)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(loss_fn)
    assert int(loss_fn.call) == 0 and torch.isfinite(loss_fn(**bare))
    loss_fn.close()
    with pytest.raises(RuntimeError, match="was closed"):
        loss_fn(**given)


def test_layers_are_the_published_ones_scaled():
    assert default_layers(32) == (10, 20) and default_layers(30) == (9, 19) and default_layers(80) == (25, 50)
    assert [default_layers(n) for n in (1, 2, 3)] == [(1,), (1,), (1, 2)]
    for name in ("llama-3-8b", "smollm2", "llama-3.2-1b"):  # the planner, free of torch, says the same
        model = find(name)
        layers = default_layers(model.layers)
        assert read(Setting(model), Options()) == (len(layers), max(layers) + 1)


def test_the_registry_has_it():
    options = build(Options, {"layers": [1, 2], "schedule": 20, "positions": "labels"})
    breaker = registry.find("circuit_breaker", "defense").build(tiny("gpt2"), options)
    assert isinstance(breaker, CircuitBreaker)
    loss_fn = breaker.loss_fn
    assert (loss_fn.layers, loss_fn.schedule, loss_fn.positions, loss_fn.alpha) == ((1, 2), 20, "labels", 10.0)
