"""What steps in a run: schedules, AdamW as it is asked for, and the averaged weights of its schedule-free form."""

import importlib.util
import math

import pytest
import torch

import tiny
from fastguard.data.chat import collate
from fastguard.run import pipeline
from fastguard.run.config import from_dict
from fastguard.run.keep import Keeper
from fastguard.run.optimizers import OptimizerConfig
from fastguard.run.train import train
from plain_training import Fixed, fixed, items

FREE = OptimizerConfig(name="schedulefree", schedule="constant")
needs_package = pytest.mark.skipif(importlib.util.find_spec("schedulefree") is None, reason="schedulefree is not there")


def trained(optimizer, folder=None, dies=None, seen=lambda loop: None):
    """Weights after four steps; where it ``dies`` each step before was saved."""
    model = tiny.model()

    class Watched(Keeper):
        def after_step(self, loop):
            super().after_step(loop)
            seen(loop)

    def report(fraction, text):
        if fraction == dies:
            raise KeyboardInterrupt

    train(
        Fixed(model), fixed(collate(items(tiny.tokenizer()), 1)), lr=1e-2, steps=4, warmup=0.0, report=report,
        keeper=Watched(folder, 1e-9), optimizer=optimizer,
    )  # fmt: skip
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@needs_package
def test_schedule_free_training_leaves_the_average_of_its_iterates():
    iterates, stepped = [], []

    def seen(loop):
        state = loop.optimizer.state
        iterates.append(torch.cat([state[p]["z"].flatten() for p in loop.parameters]))
        stepped.append(torch.cat([p.detach().flatten() for p in loop.parameters]))

    found = trained(FREE, seen=seen)
    torch.testing.assert_close(found, torch.stack(iterates).mean(0))
    assert (found - stepped[-1]).norm() > 1e-3 * (found - stepped[0]).norm() > 0


@needs_package
def test_a_killed_schedule_free_training_goes_on_with_the_same_bits(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(FREE, tmp_path, dies=0.5)
    assert (tmp_path / "latest").read_text() == "step-00000002"
    assert torch.equal(trained(FREE, tmp_path), trained(FREE))


def test_schedules_begin_with_the_warm_up_and_end_as_they_are_called():
    factors = {kind: OptimizerConfig(schedule=kind).factor for kind in ("warmup_cosine", "linear", "constant")}
    assert all(factor(0.05, 0.1) == 0.5 and factor(0.0, 0.1) == 0.1 for factor in factors.values())
    ends = [[factor(progress, 0.1) for progress in (0.1, 0.55, 1.0)] for factor in factors.values()]
    assert ends == [pytest.approx(wanted) for wanted in ([1, 0.55, 0.1], [1, 0.5, 0], [1, 1, 1])]


def test_adamw_takes_decay_betas_and_clipping():
    plain = trained(None)
    assert torch.equal(plain, trained(OptimizerConfig()))
    for changes in ({"weight_decay": 0.1}, {"betas": (0.5, 0.9)}, {"clip": 1e-9}, {"schedule": "linear"}):
        assert not torch.equal(plain, trained(OptimizerConfig(**changes))), changes


def test_what_an_optimizer_cannot_be_is_named(small, tmp_path, monkeypatch):
    for changes, words in (
        ({"name": "schedulefree"}, "immunize.optimizer.schedule: expected constant with the optimizer schedulefree"),
        ({"betas": [0.9]}, "immunize.optimizer.betas: expected two numbers, each below 1"),
        ({"betas": [0.9, math.inf]}, "immunize.optimizer.betas: expected a number that is finite"),
        ({"name": "sgd"}, "immunize.optimizer.name: expected adamw or schedulefree"),
    ):
        with pytest.raises(ValueError, match=words):
            from_dict({"immunize": {"optimizer": changes}})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pipeline.models, "load_model", None)
    chosen = from_dict({**small.to_dict(), "align": {"optimizer": FREE.to_dict()}})
    with pytest.raises(ImportError, match=r"align.optimizer.name: .*fastguard-kernels\[schedulefree\]"):
        pipeline.run(chosen, tmp_path / "run")
