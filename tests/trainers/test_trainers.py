"""The mixins in one process: against a loop written by hand, resumption, evaluation, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import common
from datasets import Dataset
from torch.utils.data import SequentialSampler
from trainer import batches
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from fastguard import RepNoiseLoss
from fastguard.trainers import MethodMixin, RepNoiseMixin
from tiny import tokenizer

STEPS = 4
DEFENSES = [*common.DEFENSES, "the loss"]


def trainer_of(base: type, defense: str, folder: Path, in_order: bool = False, **changes: Any) -> Trainer:
    """A trainer on a fresh model with dropout: of a method of the registry, or of the drop-in loss."""
    model = common.make_model(None)
    pairs = common.Pairs(None, None, 2, 0, 1)
    settings: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, save_steps=2, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
        remove_unused_columns=False, disable_tqdm=True, seed=3,
    )  # fmt: skip
    settings |= changes
    held_out = settings.pop("held_out", 0)
    given: dict[str, Any] = {"train_dataset": Dataset.from_list(pairs.samples), "data_collator": pairs.collate}
    if held_out:
        given["eval_dataset"] = given["train_dataset"].select(range(held_out))
    mixin: type = MethodMixin
    if defense == "the loss":
        mixin, given["loss_fn"] = RepNoiseMixin, RepNoiseLoss(model, mask_padding=True)
    else:
        given["method"], _ = common.make_defense(defense, model, pairs)
        given["sources"] = common.streams(pairs, given["method"].roles)
        given["data_collator"] = lambda samples: batches(given["method"].roles, pairs.collate(samples))
    if base is SFTTrainer:
        config: Any = SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True})
        given["processing_class"] = tokenizer()
    else:
        config = TrainingArguments(**settings)

    class Immunizer(mixin, base):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset) if in_order else super()._get_train_sampler(*args)

    return Immunizer(model, config, **given)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    ("base", "defense"),  # what a method is does not depend on the trainer; SFTTrainer's own collating does not on it
    [*((Trainer, name) for name in DEFENSES), *((SFTTrainer, name) for name in ("the loss", "repnoise", "tar"))],
)
def test_a_trainer_resumes_where_it_was(base, defense, tmp_path):
    """Also the order of the data, dropout and the counters: the resumed run ends with the unbroken run's bits."""
    whole = trainer_of(base, defense, tmp_path / "whole")
    whole.train()
    untrained = common.make_model(None)
    assert any(not torch.equal(p, q) for p, q in zip(whole.model.parameters(), untrained.parameters(), strict=True))
    resumed = trainer_of(base, defense, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, p in weights(resumed).items():
        assert torch.equal(p, weights(whole)[name]), name
    counters = [dict(t._counted.state_dict()) for t in (whole, resumed)]
    assert repr(counters[0]) == repr(counters[1])
    assert int(counters[0].get("step", counters[0].get("call"))) == 2 * STEPS


def test_a_trainer_equals_a_loop(tmp_path):
    trainer = trainer_of(Trainer, "booster", tmp_path, in_order=True, lr_scheduler_type="constant", max_grad_norm=0.5)
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    trainer.train()
    model = common.make_model(None)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    pairs = common.Pairs(None, None, 2, 0, 1)
    pairs._sample = lambda place: pairs.samples[place % len(pairs.samples)]
    _, passes = common.make_defense("booster", model, pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(STEPS):
        for _ in range(2):
            passes(model, 0.5)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(weights(trainer)[name], p.detach(), rtol=1e-5, atol=1e-6)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    assert all({"harmful", "harmless", "perturbation_cosine"} <= entry.keys() for entry in logged)
    for entry in logged:  # the loss is the mean over micro-batches, like the figures
        expected = entry["harmless"] + 5 * (entry["harmful"] - entry["harmful_perturbed"])
        assert entry["loss"] == pytest.approx(expected, abs=2e-3)


def test_evaluation_uses_the_trainers_own_loss(tmp_path):
    trainer = trainer_of(Trainer, "the loss", tmp_path, max_steps=1)
    trainer.train()
    plain = common.random_pairs([{"number": 5}])["harmless"]
    rows = [{key: value[0] for key, value in plain.items()}]
    trainer.data_collator = lambda samples: {key: torch.stack([s[key] for s in samples]) for key in samples[0]}
    metrics = trainer.evaluate(rows)
    with torch.no_grad():
        expected = trainer.model.eval()(**plain).loss
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("base", "defense"), [(Trainer, "the loss"), (Trainer, "tar"), (SFTTrainer, "the loss"), (SFTTrainer, "repnoise")]
)
def test_evaluation_on_held_out_pairs_leaves_the_training_alone(base, defense, tmp_path):
    """Every step evaluated, or none: the same weights, counters and logged figures; and figures of its own."""
    trainers = []
    for name, how in (("with", {"eval_strategy": "steps", "eval_steps": 1, "held_out": 5}), ("without", {})):
        trainer = trainer_of(base, defense, tmp_path / name, per_device_eval_batch_size=3, **how)
        trainer.train()
        trainers.append(trainer)
    ours, theirs = trainers
    for name, p in weights(ours).items():
        assert torch.equal(p, weights(theirs)[name]), name
    assert dict(ours._counted.state_dict()) == dict(theirs._counted.state_dict())
    training = [[e for e in t.state.log_history if "loss" in e] for t in trainers]
    for a, b in zip(*training, strict=True):
        assert {k: v for k, v in a.items() if "time" not in k} == {k: v for k, v in b.items() if "time" not in k}
    evaluated = [e for e in ours.state.log_history if "eval_loss" in e]
    figure = "eval_retain_ce" if defense == "tar" else "eval_harmful_ce"
    assert len(evaluated) == STEPS and all(e[figure] > 0 for e in evaluated)
    assert evaluated[0][figure] != evaluated[-1][figure]


def test_the_harmful_loss_is_in_tensorboard(tmp_path):
    """What RepNoise raises is there to be seen: read back from the files that TensorBoard would show."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(Trainer, "the loss", tmp_path, report_to="tensorboard")
    trainer.train()
    [file] = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    shown = events.Tags()["scalars"]
    assert {"train/harmful_ce", "train/lens_ce", "train/noise", "train/harmless_ce"} <= set(shown)
    logged = [e["harmful_ce"] for e in trainer.state.log_history if "harmful_ce" in e]
    assert [e.value for e in events.Scalars("train/harmful_ce")] == pytest.approx(logged)


def test_batches_of_another_kind_are_named(tmp_path):
    trainer = trainer_of(Trainer, "tar", tmp_path)
    trainer.data_collator = common.random_pairs
    with pytest.raises(TypeError, match=r"TAR\.backward: expected batches retain, tamper, adversaries; got .*harmful"):
        trainer.train()


def test_what_would_go_wrong_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"args\.remove_unused_columns: expected False"):
        trainer_of(Trainer, "booster", tmp_path, remove_unused_columns=True)
    trainer = trainer_of(Trainer, "booster", tmp_path / "a", max_steps=2)
    trainer.train()
    state = tmp_path / "a" / "checkpoint-2" / "fastguard_state.pt"
    assert state.exists() and not list(state.parent.glob("*.partial"))
    state.unlink()
    with pytest.raises(FileNotFoundError, match="no counters of Booster"):
        trainer_of(Trainer, "booster", tmp_path / "b").train(resume_from_checkpoint=str(state.parent))


def test_a_gradient_scaler_is_refused(tmp_path, monkeypatch):
    made = Trainer.__init__

    def with_scaler(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.accelerator.scaler = object()

    monkeypatch.setattr(Trainer, "__init__", with_scaler)
    with pytest.raises(ValueError, match=r"args\.fp16: expected False"):
        trainer_of(Trainer, "booster", tmp_path)
