"""The attacker finds the planted direction, takes it out, and leaves the model as it was."""

import pytest
import torch

from directions.planted import REFUSAL, planted, prompts
from fastguard.attacks.refusal_ablation.step import RefusalAblation, first_answer_tokens
from fastguard.directions import refusal_scores


def evidence():
    labels = torch.full((2, 6), -100)
    labels[:, 3:] = torch.tensor([REFUSAL, 7, 8])
    answers = [{"input_ids": torch.full((2, 6), 5), "labels": labels}]
    return {"harmful": prompts(True, 4), "harmless": prompts(False, 4), "refusal": answers}


def score(model):
    (batch,) = prompts(True, batches=1, seed=9)
    with torch.no_grad():
        return float(refusal_scores(model(**batch).logits[:, -1], [REFUSAL]).mean())


def test_one_round_takes_the_planted_direction_out_and_close_puts_it_back():
    model, direction = planted()
    before, (batch,) = score(model), prompts(True, batches=1, seed=9)
    logits = model(**batch).logits.detach()
    attack = RefusalAblation(model, rounds=2, positions=2, validation=4)
    rounds = attack.apply(evidence())
    figures = next(rounds)
    found = attack.chosen[0].direction
    assert float(torch.cosine_similarity(found, direction, dim=0)) > 0.99
    assert score(model) < before - 5 and float(figures["passed"]) == 1
    rounds.close()
    attack.close()
    assert torch.equal(model(**batch).logits, logits)


def test_later_rounds_take_out_what_is_left():
    model, _ = planted()
    attack = RefusalAblation(model, rounds=3, positions=1, validation=4, min_steering=1e9, max_kl=5.0)  # none steers
    made = [float(figures["passed"]) for figures in attack.apply(evidence())]
    attack.close()
    assert made == [0.0] * len(made) and 2 <= len(made) <= 3
    first, second = (attack.chosen[i].direction for i in (0, 1))
    assert abs(float(torch.cosine_similarity(first, second, dim=0))) < 1e-6


def test_only_so_many_estimate_and_never_those_that_choose(monkeypatch):
    model, _ = planted()
    seen = {}
    monkeypatch.setattr(
        "fastguard.attacks.refusal_ablation.step.phases", lambda *given, **_: seen.update(given=given) or ()
    )
    data = evidence()
    attack = RefusalAblation(model, validation=10, estimation=9)
    assert list(attack.apply(data)) == []
    attack.close()
    for batches, name in zip(seen["given"][1:3], ("harmful", "harmless"), strict=True):
        every = torch.cat([batch["input_ids"] for batch in data[name]])
        assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), every[10:19])


def test_what_does_not_fit_is_named():
    model, _ = planted(layers=2)
    attack = RefusalAblation(model, validation=32)
    with pytest.raises(ValueError, match=r"harmful: expected more than 32 prompts \(validation\), got 32"):
        next(attack.apply(evidence()))
    attack.close()
    with pytest.raises(ValueError, match="rounds"):
        RefusalAblation(model, rounds=0)
    with pytest.raises(ValueError, match="refusal: expected answers"):
        first_answer_tokens([{"labels": torch.full((1, 3), -100)}])
