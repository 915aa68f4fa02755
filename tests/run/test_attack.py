import dataclasses
from typing import ClassVar

import pytest
import torch

import tiny
from fastguard import methods
from fastguard.data.chat import encode
from fastguard.data.corpus import Corpus
from fastguard.data.sets import Example, placeholder
from fastguard.methods import registry
from fastguard.methods.edit import Edit
from fastguard.methods.training import Role
from fastguard.run import evaluate
from fastguard.run.config import AttackConfig


class Halving(Edit):
    """Halves the head each round."""

    roles: ClassVar = {"harmful": Role("attack", count=2), "harmless": Role("instructions")}
    rounds = 3

    def apply(self, data):
        assert [len(batch["input_ids"]) for batch in data["harmful"]] == [2]
        assert [len(batch["input_ids"]) for batch in data["harmless"]] == [2, 1]
        assert (data["harmful"][0]["labels"] < 0).all()  # requests, up to the answer
        for _ in range(self.rounds):
            with torch.no_grad():
                self.model.lm_head.weight.mul_(0.5)
            yield {"largest": self.model.lm_head.weight.detach().abs().max()}


@pytest.fixture
def halving(monkeypatch):
    """An attack that edits, in the registry."""
    entry = dataclasses.replace(
        methods.find("harmful_finetuning"), name="halving", title="halving", method=f"{__name__}:Halving", edits=True
    )
    known = registry._all()
    monkeypatch.setattr(registry, "_all", lambda: {**known, "halving": entry})
    monkeypatch.setattr(methods.Entry, "load_method", lambda self: Halving)


@pytest.fixture
def attack(monkeypatch):
    """Attacks a tiny model whose scores follow a script."""
    tokenizer = tiny.tokenizer()
    data = [encode(tokenizer, Example(p, placeholder(p, i)), 12) for i, p in enumerate(("do a", "do b", "do c"))]
    corpus = Corpus(
        pad=1, harmful={"attack": data, "measure": data}, safe={}, harmless={"immunize": data}, benign_train=[],
        benign_measure=[], requests=["do a"], instructions=[], edgy=[], perplexity=lambda n: [], sources={},
    )  # fmt: skip

    def run(compliance, model=None, **changes):
        script = iter(compliance)

        def rates(*_):
            c = next(script)
            return {"refusal": 1 - c, "compliance": c, "neither": 0.0}

        monkeypatch.setattr(evaluate, "answer_rates", rates)
        part = AttackConfig(batch=2, scored_steps=(0, 1, 2, 4), **changes)
        (lr,) = dataclasses.replace(part, lr=(1e-3,)).rates()
        return evaluate.attack(model or tiny.model(), tokenizer, corpus, part, 3, lr, 0, lambda f, t: None)

    return run


def test_the_attack_stops_past_the_threshold_and_is_summed_up(attack):
    found = attack([0.0, 0.25, 0.75, 1.0])
    assert [p["step"] for p in found["points"]] == [0, 1, 2]
    assert found["compliance_crossing"] == pytest.approx(1.5)
    assert found["refusal_crossing"] == pytest.approx(1.5)
    assert found["compliance_area"] == pytest.approx((0.125 + 0.5 + 2 * 0.75) / 4)
    assert found["budget"] == 4 and found["wall_s"] > 0


def test_an_attack_that_fails_has_no_crossing(attack):
    found = attack([0.0, 0.1, 0.1, 0.2])
    assert found["points"][-1]["step"] == 4
    assert found["compliance_crossing"] is None and found["refusal_crossing"] is None


def test_an_attacker_with_adapters_leaves_the_weights_alone(attack):
    model = tiny.model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = attack([0.0, 0.0, 0.0, 0.0], model, method="lora", options={"rank": 2})
    losses = [p["harmful_loss"] for p in found["points"]]
    assert losses[-1] < losses[0]  # it learned
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all((after[name] == p).all() for name, p in before.items())


def test_an_attack_that_edits_is_scored_after_each_round(attack, halving):
    model = tiny.model()
    before = model.lm_head.weight.detach().clone()
    found = attack([0.0, 0.25, 0.75], model, method="halving")
    assert [p["step"] for p in found["points"]] == [0, 1, 2] and found["budget"] == 3 and found["lr"] is None
    assert found["compliance_crossing"] == pytest.approx(1.5)
    assert torch.equal(model.lm_head.weight, before / 4)  # past the threshold there is no third round
