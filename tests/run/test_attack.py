import pytest

import tiny
from fastguard.data.chat import encode
from fastguard.data.corpus import Corpus
from fastguard.data.sets import Example, placeholder
from fastguard.run import evaluate
from fastguard.run.config import AttackConfig


@pytest.fixture
def attack(monkeypatch):
    """Attacks a tiny model whose scores follow a script."""
    tokenizer = tiny.tokenizer()
    data = [encode(tokenizer, Example(p, placeholder(p, i)), 12) for i, p in enumerate(("do a", "do b", "do c"))]
    corpus = Corpus(
        pad=1, harmful={"attack": data, "measure": data}, safe={}, harmless={}, benign_train=[], benign_measure=[],
        requests=["do a"], instructions=[], edgy=[], perplexity=lambda n: [], sources={},
    )  # fmt: skip

    def run(compliance, model=None, **changes):
        script = iter(compliance)

        def rates(*_):
            c = next(script)
            return {"refusal": 1 - c, "compliance": c, "neither": 0.0}

        monkeypatch.setattr(evaluate, "answer_rates", rates)
        part = AttackConfig(batch=2, scored_steps=(0, 1, 2, 4), **changes)
        return evaluate.attack(model or tiny.model(), tokenizer, corpus, part, 3, 1e-3, 0, lambda f, t: None)

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
