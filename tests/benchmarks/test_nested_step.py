"""What the benchmark of nested steps is made of, on a tiny model; nothing is timed."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path

import pytest
import torch

from fastguard import methods
from fastguard.nested import profile
from fastguard.plan import passes
from fastguard.plan.architecture import MODELS
from fastguard.plan.cost import Recipe
from fastguard.plan.parts import Item
from tiny_models import VOCABULARY, tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from end_to_end import nested_step

SAMPLES, TOKENS = 4, 8
NAMES = [name for name, entry in methods.defenses().items() if entry.cost is not None]


@pytest.fixture
def model():
    return tiny("llama_tied", num_hidden_layers=2)


@pytest.fixture
def texts():
    pool = torch.randint(1, VOCABULARY, (24, TOKENS), generator=torch.Generator().manual_seed(0))
    return nested_step.Streams(pool, SAMPLES)


def job(name, **changes):
    quick = methods.find(name).load_options().quick
    return nested_step.Job.of(name, {**quick, **changes}, SAMPLES, TOKENS)


def gradient(model):
    """Taken off the model, as one vector."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return torch.cat([g.flatten() for g in parts])


@contextlib.contextmanager
def counted(model):
    """Sequences that go through the embedding and through the head."""
    seen = {"sequences": 0, "heads": 0}

    def count(key):
        return lambda module, args, output: seen.__setitem__(key, seen[key] + output.shape[0])

    handles = [
        model.get_input_embeddings().register_forward_hook(count("sequences")),
        model.lm_head.register_forward_hook(count("heads")),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_the_passes_of_a_defense_are_those_of_its_cost(name, model, texts):
    work = job(name)
    recipe = work.recipe(nested_step.architecture_of(model))
    once = nested_step.step(work, "passes", model, texts)
    with counted(model) as seen:
        assert math.isfinite(once())
    forwards = [p for p in recipe.parts if p.of and p.name.endswith(": forward") and p.count >= 0.5]
    assert seen["sequences"] == sum(p.count * p.of.samples for p in forwards if p.count % 1 == 0)
    assert seen["heads"] == sum(run.count * run.of.samples for run in nested_step.runs(recipe) if run.head)
    assert all(p.requires_grad for p in model.parameters()) and gradient(model).norm() > 0


def test_the_passes_have_the_batches_that_a_step_draws():
    planned = nested_step.runs(job("tar", batch=2, held_out=3).recipe(MODELS["smollm2-135m"]))
    assert {run.of.name: run.of.samples for run in planned} == {
        "attack": 2, "tamper": 3, "reference": SAMPLES, "retain": SAMPLES,
    }  # fmt: skip


def test_a_fused_head_gives_the_passes_the_same_losses(model, texts):
    losses = [nested_step.step(job("booster"), name, model, texts)() for name in ("passes", "passes, fused head")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.filterwarnings("ignore:alpha. the step of length")
@pytest.mark.parametrize("name", NAMES)
def test_a_defense_takes_the_same_step_at_every_call_but_the_first(name, model, texts):
    once = nested_step.step(job(name), "fastguard", model, texts)
    assert math.isfinite(once())
    with profile.listening() as found:
        second = once()
    theirs = gradient(model)
    assert theirs.norm() > 0 and once() == second and torch.equal(gradient(model), theirs)
    assert found.seconds["parameter lists"] > 0


@pytest.mark.filterwarnings("ignore:alpha. the step of length")
@pytest.mark.parametrize("name", [name for name in NAMES if not nested_step.no_published(name)])
def test_a_published_contender_takes_the_same_step(name, model, texts):
    work = job(name)
    ours = nested_step.step(work, "fastguard", model.double(), texts)
    ours()
    ours()
    found = gradient(model)
    nested_step.step(work, "published", model, texts)()
    expected = gradient(model)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_who_has_no_published_contender_is_left_out_and_it_is_said(model, texts):
    assert not any(map(nested_step.no_published, ("tar", "booster", "vaccine")))
    with pytest.raises(LookupError, match=r"no tests/defenses/published_sft\.py"):
        nested_step.step(job("sft"), "published", model, texts)
    with pytest.raises(ValueError, match="contender: expected one of"):
        nested_step.step(job("sft"), "passed", model, texts)


def test_a_backward_without_a_forward_is_another_of_the_next():
    s = job("sft").setting(MODELS["smollm2-135m"])
    first, second = passes.run(s, "first", 2), passes.run(s, "second", 3, 4)
    [run] = nested_step.runs(Recipe([first[1], *second], []))
    assert (run.of.name, run.of.samples, run.count, run.backwards, run.head) == ("second", 3, 4, 2, False)
    with pytest.raises(ValueError, match="after the last forward"):
        nested_step.runs(Recipe([*second, first[1]], []))


def test_the_bound_counts_what_waits_on_the_host():
    item, host = Item("a", 100.0, frozenset({"m"})), Item("b", 10.0, None, host=True)
    later = Item("c", 50.0, frozenset({"n"}))
    assert nested_step.bound(Recipe([], [item, host, later]), 20) == int(1.1 * 110) - 20


def test_the_largest_pass_is_one_for_weights_and_with_a_head():
    architecture = MODELS["smollm2-135m"]
    found = {
        name: nested_step.largest_pass(nested_step.runs(nested_step.Job.of(name).recipe(architecture))).of.name
        for name in ("tar", "vaccine", "random_mapping")
    }
    assert found == {"tar": "retain", "vaccine": "perturbed", "random_mapping": "retain"}


def test_those_with_more_than_one_pass_are_benchmarked():
    assert {"tar", "booster", "vaccine"} <= set(nested_step.default()) and "sft" not in nested_step.default()
