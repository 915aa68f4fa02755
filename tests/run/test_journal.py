"""What a training writes down: every step once, also where it was killed, and how fast it was."""

import importlib.util
import json

import pytest

import tiny
from fastguard.data.chat import collate
from fastguard.run import journal as journals
from fastguard.run import pipeline
from fastguard.run.config import LoggingConfig
from fastguard.run.journal import Journal
from fastguard.run.keep import Keeper
from fastguard.run.train import train
from plain_training import Fixed, fixed, items


class Killed(Exception):
    pass


def trained(folder, trackers, steps=6, dies=None):
    """Train; where it ``dies`` the last checkpoint is two steps old."""
    batch, model = collate(items(tiny.tokenizer()), 1), tiny.model()
    journal = Journal(folder / "logs" / "align", LoggingConfig(trackers), {"stage": "align", "model": "aligned"}, 10)
    keeper = Keeper(folder / "checkpoints", 1e-9, journal=journal)

    def report(fraction, text):
        step = round(fraction * steps)
        if dies and step == dies - 2:
            keeper.minutes = 1e9
        if step == dies:
            raise Killed

    curve = train(Fixed(model), fixed(batch), lr=1e-3, steps=steps, report=report, keeper=keeper)[2]
    assert not model._forward_pre_hooks
    return curve, batch, model


def test_every_step_of_a_killed_training_is_written_once(tmp_path):
    file = tmp_path / "killed" / "logs" / "align.jsonl"
    with pytest.raises(Killed):
        trained(tmp_path / "killed", ("jsonl",), dies=4)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [10, 11, 12, 13]
    with file.open("a") as lines:
        lines.write('{"step": 14, "lo')  # torn
    trained(tmp_path / "killed", ("jsonl",))
    curve, batch, _ = trained(tmp_path / "whole", ("jsonl",))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(10, 16))
    for row, point in zip(rows, curve, strict=True):
        assert row["stage"] == "align" and row["model"] == "aligned" and row["mark"] == 1.0
        assert (row["loss"], row["gradient_norm"]) == (point["loss"], point["gradient_norm"])
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(float(batch["attention_mask"].sum()))
        assert row["peak_memory_bytes"] > 1e7 and "model_flops_utilisation" not in row
    assert rows[0]["lr"] == pytest.approx(1e-4) and rows[1]["lr"] > rows[5]["lr"]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_shows_every_step_of_a_killed_training_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Killed):
        trained(tmp_path, ("tensorboard",), dies=4)
    curve, _, _ = trained(tmp_path, ("tensorboard",))
    found = EventAccumulator(str(tmp_path / "logs" / "align")).Reload()
    shown = found.Scalars("loss")
    assert [event.step for event in shown] == list(range(10, 16))
    assert [event.value for event in shown] == pytest.approx([point["loss"] for point in curve])
    assert {"lr", "gradient_norm", "tokens_per_second", "seconds"} <= set(found.Tags()["scalars"])


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_gets_every_step(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trained(tmp_path, ("wandb",))
    assert list((tmp_path / "logs" / "wandb").glob("offline-run-*/*.wandb"))


def test_utilisation_counts_the_products_of_the_tokens_that_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "bf16_peak", lambda device: 1e12)
    _, batch, model = trained(tmp_path, ("jsonl",), steps=1)
    row = json.loads((tmp_path / "logs" / "align.jsonl").read_text())
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)  # a tied head multiplies each token
    tokens = batch["attention_mask"].sum(-1).double()
    flops = 6 * weights * tokens.sum() + 12 * 2 * 32 * tokens.square().sum()
    assert row["model_flops_utilisation"] * row["seconds"] * 1e12 == pytest.approx(float(flops))


def test_a_tracker_that_is_not_installed_is_named_before_a_model_is_loaded(small, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pipeline.models, "load_model", None)
    chosen = type(small)(**{**vars(small), "logging": LoggingConfig(("jsonl", "wandb"))})
    with pytest.raises(ImportError, match=r"logging.trackers: wandb needs .*fastguard-kernels\[wandb\]"):
        pipeline.run(chosen, tmp_path / "run")
    with pytest.raises(ValueError, match="trackers: expected some of jsonl, tensorboard, wandb"):
        LoggingConfig(("tensorboard", "tensorboard"))
