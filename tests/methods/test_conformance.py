"""What every method of the registry promises, this package's and others' alike.

That two ranks equal one is in tests/trainers and tests/nested, that a step equals its paper's in tests/defenses, that
the planner's memory is near a step's in tests/plan.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastguard import methods
from fastguard.losses import guards
from fastguard.methods.edit import Edit
from fastguard.methods.training import Training
from methods.batches import evidence, make, streams
from tiny_models import tiny

ENTRIES = list(methods.entries().values())
named = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
every = pytest.mark.parametrize("entry", [e for e in ENTRIES if not e.edits], ids=lambda entry: entry.name)
"""Those that train: an edit has no steps."""
edits = pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e.edits and e.kind == "defense"], ids=lambda entry: entry.name
)
"""Of attacks that edit, the rounds are held in tests/run, and what they do in tests of their own."""


def state(model):
    """Weights, buffers and gradients, copied."""
    found = {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    grads = {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, **grads}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@named
def test_an_entry_names_what_is_there(entry):
    options = entry.load_options()
    assert options() == options(**options().to_dict())
    assert issubclass(entry.load_method(), Edit if entry.edits else Training)
    assert entry.name == entry.name.lower().replace("-", "_") and entry.summary.endswith(".")
    assert min(entry.steps, entry.batch, entry.tokens) >= 1 and entry.epochs > 0 and entry.steps_source
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"`{entry.name}`" in readme, "the README has a row for each method"


def test_the_registry_and_all_options_need_no_torch():
    code = (
        "import sys; from fastguard import methods; from fastguard.run import config\n"
        "for entry in methods.entries().values(): entry.load_options()()\n"
        "for name in config.packaged(): config.load(name)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


@every
def test_a_failing_step_leaves_no_trace(entry):
    """The forward of a layer fails the first time it runs in a step, then the second, and so on until none does."""
    model = tiny("llama", num_hidden_layers=2)
    method = make(entry, model)
    data = streams(method.roles)
    method.backward(**method.draw(data))  # gradients and counters that are to stay as they are
    inner = method.model
    layer = next(m for name, m in inner.named_modules() if name.endswith("layers.1"))
    for fails_at in range(1, 40):
        before, counters = state(inner), repr(method.state_dict())
        calls = []

        def fail(*_, calls=calls, fails_at=fails_at):
            calls.append(1)
            if len(calls) == fails_at:
                raise KeyboardInterrupt

        handle = layer.register_forward_pre_hook(fail)
        try:
            method.backward(**method.draw(data))
        except KeyboardInterrupt:
            assert_same(state(inner), before)
            assert repr(method.state_dict()) == counters
        else:
            break
        finally:
            handle.remove()
    assert fails_at > 1 and len(calls) < fails_at
    method.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@every
def test_a_loss_that_is_not_finite_is_refused_and_named(entry):
    model = tiny("llama", num_hidden_layers=2)
    method = make(entry, model)
    data = streams(method.roles)
    handle = method.model.get_input_embeddings().register_forward_hook(lambda *a: a[-1] * float("nan"))
    before = state(method.model)
    with pytest.raises((FloatingPointError, ValueError), match=r"nan|finite"):
        method.backward(**method.draw(data))
    handle.remove()
    assert_same(state(method.model), before)


@every
def test_a_run_goes_on_to_the_same_bits(entry):
    def model_of():
        return tiny("llama", num_hidden_layers=2, attention_dropout=0.1)

    def run(method, steps):
        optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(steps):
            torch.manual_seed(method.step)  # dropout of passes that are the caller's
            method.backward(**method.draw(streams(method.roles)))
            optimizer.step()
            optimizer.zero_grad()

    whole = make(entry, model_of())
    run(whole, 3)
    first = make(entry, model_of())
    run(first, 2)
    again = make(entry, model_of())
    again.model.load_state_dict(first.model.state_dict())
    again.load_state_dict(first.state_dict())
    run(again, 1)
    assert_same(state(again.model), state(whole.model))


@every
def test_gradients_are_scaled_and_added(entry):
    model = tiny("llama", dtype=torch.float64, num_hidden_layers=2)
    method = make(entry, model)
    data = streams(method.roles)
    start = method.state_dict()
    drawn = method.draw(data)

    def gradient(scale):
        method.load_state_dict(start)
        batches = method.draw(data)  # the same; an attacker's batches are an iterator, used once
        assert batches.keys() == drawn.keys()
        method.backward(**batches, scale=scale)
        return {name: p.grad.clone() for name, p in method.model.named_parameters() if p.grad is not None}

    once = gradient(1.0)
    assert any(float(g.abs().max()) > 0 for g in once.values())
    both = gradient(0.5)  # onto the first
    for name, g in once.items():
        torch.testing.assert_close(both[name], 1.5 * g, rtol=1e-9, atol=1e-12)


@every
def test_an_enclosing_autocast_reads_the_weights_of_the_moment(entry):
    """It casts a weight once for all forwards inside it, also where a method moves weights between two of them."""

    def gradient(cached):
        method = make(entry, tiny("llama", num_hidden_layers=2))
        data = streams(method.roles)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            for _ in range(2):
                method.backward(**method.draw(data))
        grads = [p.grad for p in method.model.parameters() if p.grad is not None]
        return torch.cat([g.flatten() for g in grads])

    once, each = gradient(True), gradient(False)
    assert float((once - each).norm()) < 0.03 * float(each.norm())


@every
def test_evaluation_moves_nothing(entry):
    model = tiny("llama", num_hidden_layers=2)
    method = make(entry, model)
    before, counters = state(method.model), repr(method.state_dict())
    random = torch.get_rng_state()
    figures = method.evaluate({"harmful": streams_of("harmful"), "harmless": streams_of("safe")})
    assert float(figures["loss"]) == float(figures["loss"]) and float(figures["harmful_ce"]) > 0
    assert_same(state(method.model), before)
    assert repr(method.state_dict()) == counters and torch.equal(torch.get_rng_state(), random)


def streams_of(data):
    from fastguard.methods.training import Role

    return streams({"one": Role(data)})["one"](0)


@every
def test_a_forgotten_model_is_refused(entry, monkeypatch):
    """On more ranks than one, where each would train a model of its own; the bare model says that this is meant."""
    method = make(entry, tiny("llama", num_hidden_layers=2))
    data, before, counters = streams(method.roles), state(method.model), repr(method.state_dict())
    monkeypatch.setattr(guards, "ranks", lambda: 2)
    with pytest.raises(ValueError, match=rf"{type(method).__name__}: model: expected .* got none on 2 ranks"):
        method.backward(**method.draw(data))
    assert_same(state(method.model), before)
    assert repr(method.state_dict()) == counters
    method.backward(**method.draw(data), model=method.model)
    assert any(p.grad is not None for p in method.model.parameters())


@every
def test_wrong_batches_are_named(entry):
    method = make(entry, tiny("llama", num_hidden_layers=2))
    name = type(method).__name__
    with pytest.raises(TypeError, match=rf"{name}\.backward: expected batches \w+.*; got none"):
        method.backward()
    with pytest.raises(TypeError, match=rf"{name}\.backward: expected .*; got .*surplus"):
        method.backward(**method.draw(streams(method.roles)), surplus=1)


def trained(model, steps=2):
    """Somebody fine-tunes: AdamW with weight decay, on whatever is trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for n in range(steps):
        batch = streams_of("harmful") if n else streams_of("safe")
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@edits
def test_an_edit_reads_what_a_defender_has(entry):
    method = make(entry, tiny("llama", num_hidden_layers=2))
    assert {role.data for role in method.roles.values()} <= {"harmful", "refusal", "retain", "instructions"}
    assert method.rounds >= 1


@edits
def test_an_edit_is_a_function_of_model_and_data_and_leaves_nothing_behind(entry):
    def edited():
        model = tiny("llama", num_hidden_layers=2, attention_dropout=0.1)
        model.lm_head.requires_grad_(False)
        method = make(entry, model)
        rounds = [{k: float(v) for k, v in figures.items()} for figures in method.apply(evidence(method.roles))]
        method.close()
        assert 1 <= len(rounds) <= method.rounds and all(rounds)
        asked = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert asked == ["lm_head.weight"] and model.training and all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        return model, rounds

    (one, figures), (two, again) = edited(), edited()
    assert figures == again
    assert_same(state(one), state(two))
    untouched = state(tiny("llama", num_hidden_layers=2, attention_dropout=0.1))
    changed = [name for name, value in state(one).items() if not torch.equal(value, untouched[name])]
    assert bool(changed) == (entry.stage != "during")  # one that acts during a fine-tuning changes no weight itself


@edits
def test_an_edit_that_fails_has_changed_nothing(entry):
    model = tiny("llama", num_hidden_layers=2)
    method, before, calls = make(entry, model), state(model), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        list(method.apply(evidence(method.roles)))
    handle.remove()
    method.close()
    assert_same(state(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@edits
def test_an_edit_without_data_is_refused(entry):
    method = make(entry, tiny("llama", num_hidden_layers=2))
    for name in method.roles:
        with pytest.raises(ValueError, match=r"batches: expected at least one"):
            list(method.apply({**evidence(method.roles), name: []}))
        method.close()


@pytest.mark.parametrize("entry", methods.defenses("during").values(), ids=lambda entry: entry.name)
def test_a_guard_changes_what_training_does_until_it_is_closed(entry):
    free, guarded = (tiny("llama", num_hidden_layers=2) for _ in range(2))
    method = make(entry, guarded)
    list(method.apply(evidence(method.roles)))
    with pytest.raises(RuntimeError, match="already"):
        list(method.apply(evidence(method.roles)))
    trained(free)
    trained(guarded)
    differ = [n for n, v in state(free).items() if not torch.equal(v, state(guarded)[n])]
    assert differ
    method.close()
    method.close()
    guarded.load_state_dict(free.state_dict())
    trained(free)
    trained(guarded)
    assert_same(state(guarded), state(free))
