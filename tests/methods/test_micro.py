"""Batches that pass through the model a few samples at a time: the undivided step, at a lower peak."""

from __future__ import annotations

import pytest
import torch

from fastguard import methods
from methods.batches import labelled, make, streams
from methods.ranks_worker import MORE, whole
from plan.live import Watch
from tiny_models import assert_same_gradients, gradients, pair, tiny

DIVIDING = [entry for entry in methods.entries().values() if hasattr(entry.load_options(), "micro")]
CASES = [
    (entry, how, changes)
    for entry in DIVIDING
    for how, changes in {"plain": {}, **MORE.get(entry.name, {})}.items()
]  # fmt: skip
CASES += [(methods.find("booster"), "linearised", {"mode": "linearised"})]


def step(entry, changes, batch, micro, watch=None):
    model = tiny("llama", torch.float64, num_hidden_layers=2)
    method = make(entry, model, **changes, micro=micro)
    batches = method.draw(streams(method.roles, batch))
    with watch(model) if watch else torch.enable_grad() as watching:
        figures = method.backward(**batches)
        if entry.name == "refat":  # which ablates from its second step on
            model.zero_grad()
            figures = method.backward(**method.draw(streams(method.roles, batch)))
            assert watch or 0 < float(figures["ablated"]) < 1
    found = gradients(model)
    method.close()
    return found, {name: float(value) for name, value in figures.items()}, watching


def test_the_methods_of_several_passes_divide_batches():
    assert {entry.name for entry in DIVIDING} == {
        "repnoise", "tar", "booster", "vaccine", "t_vaccine", "sft", "random_mapping", "refat"
    }  # fmt: skip


@pytest.mark.parametrize(("entry", "how", "changes"), CASES, ids=[f"{entry.name}, {how}" for entry, how, _ in CASES])
@pytest.mark.parametrize("micro", [1, 2])
def test_divided_batches_make_the_gradient_of_undivided_ones(entry, how, changes, micro):
    expected, figures, _ = step(entry, changes, whole, None)
    found, ours, _ = step(entry, changes, whole, micro)
    assert_same_gradients(found, expected, 1e-12)
    assert ours.keys() == figures.keys()
    for name, value in figures.items():
        assert abs(ours[name] - value) <= 1e-10 * abs(value) + 1e-13, name


@pytest.mark.parametrize("entry", DIVIDING, ids=lambda entry: entry.name)
def test_the_peak_of_live_tensors_falls(entry):
    def long(n, half):
        one = pair(12, length=48, seed=n)[half]
        return {**one, "labels": one["input_ids"].index_fill(1, torch.tensor(0), -100)}

    def peak(micro):
        return step(entry, {}, long, micro, lambda model: Watch(model.parameters()))[2].peak

    assert peak(2) < 0.7 * peak(None)


@pytest.mark.parametrize("entry", DIVIDING, ids=lambda entry: entry.name)
def test_bad_sizes_are_refused(entry):
    with pytest.raises(ValueError, match="micro"):
        step(entry, {}, labelled, 0)


def test_a_piece_without_tokens_is_refused():
    def silent(n, half):
        one = labelled(n, half)
        return {**one, "labels": torch.cat([one["labels"][:-1], torch.full_like(one["labels"][-1:], -100)])}

    with pytest.raises(ValueError, match=r"micro: expected pieces .* with \[\[6, 6, 0\]\] such tokens"):
        step(methods.find("booster"), {}, silent, 1)
