import itertools
import shutil
import threading

import pytest
import torch

import tiny
from fastguard.data.chat import collate
from fastguard.losses.answer import answer_loss
from fastguard.run.keep import Keeper
from fastguard.run.streams import Order
from fastguard.run.train import train, train_scored, trainable
from plain_training import Fixed, fixed, items


def test_training_by_steps_lowers_the_loss_and_leaves_the_embedding_alone():
    tokenizer, model = tiny.tokenizer(), tiny.model()
    batch = collate(items(tokenizer), 1)
    before = model.get_input_embeddings().weight.detach().clone()
    seen = []
    trainable(model, freeze_embedding=True)
    steps, wall, curve = train(Fixed(model), fixed(batch), lr=1e-2, steps=8, report=lambda f, t: seen.append(f))
    assert steps == len(curve) == 8 and wall > 0 and curve[-1]["loss"] < curve[0]["loss"] - 0.1
    assert [p["step"] for p in curve] == list(range(8)) and curve[0]["mark"] == 1.0
    assert torch.equal(before, model.get_input_embeddings().weight)
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_training_by_the_clock_stops_by_the_clock(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("fastguard.run.train.time.perf_counter", lambda: next(ticks) * 0.5)
    tokenizer, model = tiny.tokenizer(), tiny.model()
    steps, wall, _ = train(Fixed(model), fixed(collate(items(tokenizer), 1)), lr=1e-3, seconds=3.0)
    assert steps == 6 and wall == 3.0


def test_what_cannot_be_trained_is_refused():
    tokenizer, model = tiny.tokenizer(), tiny.model()
    data = fixed(collate(items(tokenizer), 1))
    for wrong in ({}, {"steps": 2, "seconds": 1.0}):
        with pytest.raises(ValueError, match="exactly one"):
            train(Fixed(model), data, lr=1e-3, **wrong)
    with pytest.raises(FloatingPointError, match="Fixed: the loss is nan"):
        train(Fixed(model, float("nan")), data, lr=1e-3, steps=1)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(Fixed(model), data, lr=1e-3, steps=1)


def test_finetuning_is_scored_where_asked_repeats_with_its_seed_and_stops():
    data = items(tiny.tokenizer())
    whole = collate(data, 1)

    def run(seed, stop=lambda figures: False, steps=(0, 1, 3, 6)):
        model, order = tiny.model(), Order(len(data), 2, seed)

        def score():
            with torch.no_grad():
                return {"loss": float(answer_loss(model, whole))}

        batches = {"harmless": lambda number: collate([data[i] for i in order(number)], 1)}
        return train_scored(Fixed(model), batches, score, steps, 5e-3, warmup_steps=1, stop=stop)

    curve = run(0)
    assert [p["step"] for p in curve] == [0, 1, 3, 6] and curve[-1]["loss"] < curve[0]["loss"]
    assert run(0) == curve and run(1) != curve
    assert [p["step"] for p in run(0, lambda figures: True)] == [0, 1]
    with pytest.raises(ValueError, match="scored_steps"):
        run(0, steps=(1, 2))


def test_an_order_is_a_function_of_the_number():
    order, other = Order(5, 2, seed=3), Order(5, 2, seed=3)
    drawn = [order(n) for n in range(10)]
    assert [other(n) for n in reversed(range(10))] == drawn[::-1]
    passes = [i for batch in drawn for i in batch]
    assert all(sorted(passes[k : k + 5]) == list(range(5)) for k in range(0, 20, 5))
    with pytest.raises(ValueError, match="at least one of each"):
        Order(0, 2, 0)


def test_every_item_comes_once_before_any_comes_again():
    order = Order(10, 4, seed=3)
    drawn = [i for number in range(5) for i in order(number)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    with pytest.raises(ValueError, match="batch of 0"):
        Order(3, 0, 0)


def test_training_goes_on_while_a_checkpoint_is_written_and_learns_that_it_failed(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp

    write, begun, go_on = dcp.save, threading.Event(), threading.Event()

    def waits(*args, **kwargs):
        begun.set()
        assert go_on.wait(60)
        return write(*args, **kwargs)

    def run(report=lambda fraction, text: None, minutes=1e-9):
        keeper, model = Keeper(tmp_path, minutes, background=True), tiny.model()
        keepers.append(keeper)
        train(Fixed(model), fixed(batch), lr=1e-2, steps=6, report=report, keeper=keeper)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def report(fraction, text):  # the save after the first step is let go after the third
        assert begun.wait(60) and not (tmp_path / "latest").exists()
        if fraction == 0.5:
            go_on.set()
            raise KeyboardInterrupt

    def lost(fraction, text):
        assert fraction == 1 / 6  # the step after the one whose save failed raises
        keepers[-1]._background._thread.join()

    batch, keepers = collate(items(tiny.tokenizer()), 1), []
    monkeypatch.setattr(dcp, "save", waits)
    with pytest.raises(KeyboardInterrupt):
        run(report)
    assert (tmp_path / "latest").read_text() == "step-00000001"
    resumed = run()
    shutil.rmtree(tmp_path)
    assert torch.equal(resumed, run(minutes=1e9))  # what was written is what the weights were at the save

    monkeypatch.setattr(dcp, "save", lambda *args, **kwargs: (tmp_path / "no" / "room").read_text())
    with pytest.raises(RuntimeError, match=r"a checkpoint could not be saved in the background: .*room"):
        run(lost)
    assert not (tmp_path / "latest").exists()
