"""Every defense from a configuration: what it trains on, and that it trains."""

from __future__ import annotations

import pytest
import torch

import tiny
from fastguard import methods
from fastguard.evaluation.scores import mean_answer_loss
from fastguard.run.config import PrepareConfig, load
from recipes import corpus, immunized, recipe  # noqa: F401, a fixture

SHORT = {
    "tar": {"inner_steps": 2, "inner_lr": 1e-3, "read_every": 1, "batch": 2},
    "booster": {"alpha": 0.05},
    "vaccine": {"rho": 0.05},
    "t_vaccine": {"rho": 0.05, "layers": 1, "every": 1, "probe_every": 2},
    "sn_tune": {"threshold": 0.0, "samples": 4},
    "rsn_tune": {"threshold": 0.0, "samples": 4, "foundation_most": 8},
}


HOLDS = {"circuit_breaker": 0.05}
"""Methods that keep states where they were and learn no answer: what the loss of what is kept may rise by."""


TRAINING = [name for name, entry in methods.defenses("before").items() if not entry.edits]


@pytest.mark.parametrize("method", TRAINING)
def test_training_lowers_the_loss_on_what_is_to_be_kept(corpus, method):  # noqa: F811
    model = tiny.model()
    frozen = model.lm_head.weight.detach().clone()
    before = [mean_answer_loss(model, part["immunize"], 1) for part in (corpus.safe, corpus.harmless)]
    training = immunized(model, corpus, recipe(method, steps=8, options=SHORT.get(method, {})))
    after = [mean_answer_loss(model, part["immunize"], 1) for part in (corpus.safe, corpus.harmless)]
    rise = HOLDS.get(method, 0.0)
    assert after[0] < before[0] + rise and after[1] < before[1] + rise
    assert not rise or training["curve"][-1]["rerouting"] < training["curve"][0]["rerouting"]
    assert training["steps"] == len(training["curve"]) == 8
    assert all(isinstance(value, (int, float)) for point in training["curve"] for value in point.values())
    assert methods.find(method).title in training["method"]
    assert torch.equal(model.lm_head.weight, frozen)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["tar", "booster", "t_vaccine"])
def test_a_run_is_a_function_of_its_seed(corpus, method):  # noqa: F811
    def weights(seed):
        model = tiny.model()
        immunized(model, corpus, recipe(method, steps=2, seed=seed, options=SHORT[method]))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize("adversary", ["weights", "lora"])
def test_preference_pairs_for_dpo(corpus, adversary):  # noqa: F811
    options = {**SHORT["tar"], "inner_steps": 1, "tamper_loss": "dpo", "adversary": adversary, "adversaries": 2}
    training = immunized(tiny.model(), corpus, recipe("tar", steps=1, options=options))
    assert training["curve"][0]["tamper"] == pytest.approx(0.69, abs=0.05)  # log 2 where model and reference agree


def test_a_defense_may_go_before_another(corpus):  # noqa: F811
    part = recipe("sft", steps=3, settle_steps=1, prepare=PrepareConfig(steps=2, lr=1e-3))
    marks = []
    training = immunized(tiny.model(), corpus, part, lambda fraction, text: marks.append(fraction))
    assert [p["step"] for p in training["curve"]] == list(range(6)) and training["steps"] == 6
    assert marks == sorted(marks) and marks[-1] == pytest.approx(1)
    assert training["method"].startswith("Random Mapping for 2 steps") and "; SFT; " in training["method"]
    names = [set(point) - {"step", "loss", "gradient_norm"} for point in training["curve"]]
    assert names[0] == names[1] != names[2] == names[3]
    assert load("tar_prepared").immunize.prepare.method == "random_mapping"
    assert load("tar_prepared", quick=True).immunize.prepare.steps == 2
