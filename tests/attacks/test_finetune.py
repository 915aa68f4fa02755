import pytest

import tiny
from fastguard.attacks.finetune import harmful_finetuning
from fastguard.data.chat import encode
from fastguard.data.sets import Example, placeholder


def attack(compliance, threshold=0.5):
    """Attack a tiny model whose scores follow a script."""
    tokenizer = tiny.tokenizer()
    data = [encode(tokenizer, Example(p, placeholder(p, i)), 12) for i, p in enumerate(("do a", "do b", "do c"))]
    script = iter(compliance)

    def score():
        c = next(script)
        return {"refusal": 1 - c, "compliance": c, "neither": 0.0, "harmful_loss": 2.0}

    return harmful_finetuning(
        tiny.model(), data, score, 1e-3, 0, 1, batch=2, scored_steps=(0, 1, 2, 4), threshold=threshold
    )


def test_the_attack_stops_past_the_threshold_and_is_summed_up():
    found = attack([0.0, 0.25, 0.75, 1.0])
    assert [p["step"] for p in found["points"]] == [0, 1, 2]
    assert found["compliance_crossing"] == pytest.approx(1.5)
    assert found["refusal_crossing"] == pytest.approx(1.5)
    assert found["compliance_area"] == pytest.approx((0.125 + 0.5 + 2 * 0.75) / 4)
    assert found["budget"] == 4 and found["wall_s"] > 0


def test_an_attack_that_fails_has_no_crossing():
    found = attack([0.0, 0.1, 0.1, 0.2])
    assert found["points"][-1]["step"] == 4
    assert found["compliance_crossing"] is None and found["refusal_crossing"] is None
