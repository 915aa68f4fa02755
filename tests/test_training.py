import itertools

import pytest
import torch

import tiny
from fastguard.data.chat import collate, encode
from fastguard.data.sets import Example
from fastguard.evaluation.scores import answer_loss
from fastguard.training import finetune_scored, train, warmup_cosine


def items(tokenizer):
    return [encode(tokenizer, Example(f"say {w}", w * 2), 12) for w in ("one", "two", "six", "ten")]


def fixed_loss(model, batch):
    return lambda: (answer_loss(model, batch), {"mark": 1.0})


def test_training_by_steps_lowers_the_loss_and_leaves_the_embedding_alone():
    tokenizer, model = tiny.tokenizer(), tiny.model()
    batch = collate(items(tokenizer), 1)
    before = model.get_input_embeddings().weight.detach().clone()
    seen = []
    steps, wall, curve = train(model, fixed_loss(model, batch), lr=1e-2, steps=8, report=lambda f, t: seen.append(f))
    assert steps == len(curve) == 8 and wall > 0 and curve[-1]["loss"] < curve[0]["loss"] - 0.1
    assert [p["step"] for p in curve] == list(range(8)) and curve[0]["mark"] == 1.0
    assert torch.equal(before, model.get_input_embeddings().weight)
    assert all(p.requires_grad for p in model.parameters())
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_training_by_the_clock_stops_by_the_clock(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("fastguard.training.time.perf_counter", lambda: next(ticks) * 0.5)
    tokenizer, model = tiny.tokenizer(), tiny.model()
    steps, wall, _ = train(model, fixed_loss(model, collate(items(tokenizer), 1)), lr=1e-3, seconds=3.0)
    assert steps == 5 and wall >= 3.0


def test_what_cannot_be_trained_is_refused():
    tokenizer, model = tiny.tokenizer(), tiny.model()
    loss = fixed_loss(model, collate(items(tokenizer), 1))
    for wrong in ({}, {"steps": 2, "seconds": 1.0}):
        with pytest.raises(ValueError, match="exactly one"):
            train(model, loss, lr=1e-3, **wrong)
    with pytest.raises(FloatingPointError, match="step 0"):
        train(model, lambda: (loss()[0] * float("nan"), {}), lr=1e-3, steps=1)


def test_schedule():
    assert warmup_cosine(0.05, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(0.1, 0.1) == pytest.approx(1.0)
    assert warmup_cosine(1.0, 0.1) == pytest.approx(0.1)


def test_finetuning_is_scored_where_asked_repeats_with_its_seed_and_stops():
    tokenizer = tiny.tokenizer()
    data = items(tokenizer)

    def run(seed, stop=lambda figures: False):
        model = tiny.model()
        whole = collate(data, 1)

        def score():
            with torch.no_grad():
                return {"loss": float(answer_loss(model, whole))}

        return finetune_scored(model, data, score, (0, 1, 3, 6), 5e-3, 2, 1, seed, warmup_steps=1, stop=stop)

    curve = run(0)
    assert [p["step"] for p in curve] == [0, 1, 3, 6] and curve[-1]["loss"] < curve[0]["loss"]
    assert run(0) == curve and run(1) != curve
    assert [p["step"] for p in run(0, lambda figures: True)] == [0, 1]
    with pytest.raises(ValueError, match="scored_steps"):
        finetune_scored(tiny.model(), data, dict, (1, 2), 1e-3, 2, 1, 0)
