"""A guard while a model is fine-tuned and a repair afterwards: what they change, what is recorded, what is refused."""

import dataclasses
import json
from typing import ClassVar

import pytest
import torch

import tiny
from evaluation.test_metrics import assert_matches
from fastguard import methods
from fastguard.evaluation import report
from fastguard.evaluation.metrics import Metrics
from fastguard.methods import registry
from fastguard.methods.edit import Edit
from fastguard.methods.training import Role
from fastguard.run import config as configuration
from fastguard.run import evaluate, pipeline
from fastguard.run.config import GuardConfig, ImmunizeConfig, RepairConfig
from fastguard.run.evaluate import Services
from recipes import corpus, immunized, losses  # noqa: F401, a fixture

WEIGHT = "model.layers.0.mlp.up_proj.weight"


class Halving(Edit):
    """Halves a weight."""

    roles: ClassVar = {"harmful": Role("harmful"), "refusal": Role("refusal"), "retain": Role("retain", count=2)}

    @classmethod
    def from_options(cls, model, options, *, seed=0):
        return cls(model, seed=seed)

    def apply(self, data):
        assert all((batch["labels"] >= 0).any() for batches in data.values() for batch in batches)  # with answers
        assert sum(len(batch["input_ids"]) for batch in data["retain"]) == 2
        with torch.no_grad():
            self.weight.mul_(0.5)
        yield {"largest": self.weight.detach().abs().max()}

    @property
    def weight(self):
        """`WEIGHT`, under adapters too."""
        found = {name.replace("base_layer.", ""): p for name, p in self.model.named_parameters()}
        return next(p for name, p in found.items() if name.endswith(WEIGHT))


class Holding(Halving):
    """Holds that weight while somebody trains."""

    def apply(self, data):
        def hold(p):
            p.grad.zero_()

        self._handle = self.weight.register_post_accumulate_grad_hook(hold)
        yield {"held": torch.tensor(1.0)}

    def close(self):
        self._handle.remove()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """One edit for each stage, in the registry."""
    plain = methods.find("sft")
    kinds = {"halving": (Halving, "before"), "holding": (Holding, "during"), "mending": (Halving, "after")}
    found = dict(registry._all())
    for name, (kind, stage) in kinds.items():
        found[name] = dataclasses.replace(
            plain, name=name, title=name.title(), edits=True, stage=stage, method=f"test:{name}"
        )
    monkeypatch.setattr(registry, "_all", lambda: found)
    real = methods.Entry.load_method
    monkeypatch.setattr(
        methods.Entry, "load_method", lambda self: kinds[self.name][0] if self.name in kinds else real(self)
    )


def weight_of(model):
    return dict(model.named_parameters())[WEIGHT].detach().clone()


def test_a_defense_may_edit_instead_of_training(corpus):  # noqa: F811
    model, before, marks = tiny.model(), weight_of(tiny.model()), []
    part = ImmunizeConfig(method="halving", pairs=2, retain=2)
    made = immunized(model, corpus, part, lambda fraction, text: marks.append(fraction))
    assert torch.equal(weight_of(model), before / 2) and all(p.requires_grad for p in model.parameters())
    assert made["steps"] == 1 and made["lr"] is None and made["method"] == "Halving" and marks == [1.0]
    assert made["curve"] == [{"step": 0.0, "largest": pytest.approx(float(before.abs().max()) / 2)}]


def test_an_edit_may_go_before_training_and_settling_after_it(corpus):  # noqa: F811
    from fastguard.run.config import PrepareConfig

    marks = []
    part = ImmunizeConfig(method="sft", steps=3, pairs=2, retain=2, prepare=PrepareConfig(method="halving", steps=2))
    made = immunized(tiny.model(), corpus, part, lambda fraction, text: marks.append(fraction))
    assert [p["step"] for p in made["curve"]] == [0, 1, 2, 3] and made["lr"] == part.lr
    assert made["method"].startswith("Halving; SFT; 2 requests") and marks == sorted(marks) and marks[-1] == 1
    part = ImmunizeConfig(method="halving", pairs=2, retain=2, settle_steps=2)
    made = immunized(tiny.model(), corpus, part)
    assert made["steps"] == 3 and made["lr"] is not None and "last 2 steps" in made["method"]


@pytest.fixture
def attacked(corpus, monkeypatch):  # noqa: F811
    """Attacks a tiny model with services, by full fine-tuning or otherwise."""
    rates = {"refusal": 1.0, "compliance": 0.0, "neither": 0.0}
    monkeypatch.setattr(evaluate, "answer_rates", lambda *_: dict(rates))
    data = dataclasses.replace(
        corpus, harmful={**corpus.harmful, "attack": corpus.harmful["immunize"], "measure": corpus.harmful["immunize"]},
        requests=["do amber things"], benign_measure=corpus.harmless["immunize"],
        perplexity=lambda tokens: corpus.harmless["immunize"],
    )  # fmt: skip

    def run(model, services, method="harmful_finetuning", **options):
        part = configuration.AttackConfig(method=method, options=options, batch=2, scored_steps=(0, 1, 2))
        return evaluate.attack(model, tiny.tokenizer(), data, part, 3, 1e-2, 0, lambda f, t: None, services)

    return run


def test_a_guard_is_on_while_the_attacker_trains_and_off_afterwards(attacked):
    free, held = tiny.model(), tiny.model()
    before = weight_of(held)
    plain = attacked(free, Services())
    found = attacked(held, Services(GuardConfig(method="holding")))
    assert not torch.equal(weight_of(free), before) and torch.equal(weight_of(held), before)
    assert any(not torch.equal(p, q) for p, q in zip(held.parameters(), tiny.model().parameters(), strict=True))
    assert "guard" not in plain and "repair" not in plain
    assert found["guard"].items() >= {"name": "holding", "title": "Holding", "figures": {"held": 1.0}}.items()
    assert not any(p._post_accumulate_grad_hooks for p in held.parameters())


def test_a_guard_is_off_where_training_fails(attacked, monkeypatch):
    held = tiny.model()
    monkeypatch.setattr(evaluate, "train_scored", lambda *a, **k: (_ for _ in ()).throw(FloatingPointError("nan")))
    with pytest.raises(FloatingPointError):
        attacked(held, Services(GuardConfig(method="holding")))
    assert not any(p._post_accumulate_grad_hooks for p in held.parameters())


@pytest.mark.parametrize("attack", ["harmful_finetuning", "lora"])
def test_a_repair_is_measured_before_and_after(attacked, attack):
    model, plain = tiny.model(), tiny.model()
    attacked(plain, Services(), attack)
    found = attacked(model, Services(repair=RepairConfig(method="mending")), attack)
    repair = found["repair"]
    assert torch.equal(weight_of(model), weight_of(plain) / 2)  # what the attacker made of it, halved
    assert repair["title"] == "Mending" and repair["figures"].keys() == {"largest"} and repair["wall_s"] > 0
    assert repair["before"]["harmful_loss"] == pytest.approx(found["points"][-1]["harmful_loss"], rel=1e-6)
    for key in ("harmful_loss", "perplexity", "task_loss"):
        assert repair["before"][key] != repair["after"][key]
    assert repair["after"]["refusal"] == 1.0
    assert found["wall_s"] > 0 and "guard" not in found


def test_what_a_run_has_no_data_for_is_not_measured(corpus):  # noqa: F811
    found = evaluate.condition(tiny.model(), tiny.tokenizer(), corpus, 3, 8)
    assert set(found.values()) == {None}


def test_a_whole_run_with_guard_and_repair(small, tmp_path):
    """Every model is repaired, the immunized one guarded beside itself; what is changed alone is done again."""
    tree = small.to_dict() | {"variants": {}, "guard": {"method": "holding"}, "repair": {"method": "mending"}}
    tree["attack"] = tree["attack"] | {"lr": [1e-3]}
    further = {"method": "refusal_ablation", "options": {"rounds": 1, "positions": 1, "validation": 1}}
    tree["attacks"] = {"ablation": further}

    def run():
        metrics = pipeline.run(configuration.from_dict(tree), tmp_path / "run")
        return metrics, [s["name"].split(", lr")[0] for s in metrics["stages"] if not s["resumed"]]

    metrics, _ = run()
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert_matches(Metrics, written)
    models = written["models"]
    assert list(models) == ["aligned", "immunized", "immunized, guarded", "control"]
    for name, model in models.items():
        guarded = name == "immunized, guarded"
        served = [*model["attacks"], model["utility"]["benign"]]
        assert len(model["attacks"]) == (1 if guarded else 2)  # nobody edits under a guard
        assert all("repair" in one and ("guard" in one) == guarded for one in served)
    guarded = models["immunized, guarded"]
    assert guarded["utility"]["perplexity"] == models["immunized"]["utility"]["perplexity"]
    assert guarded["attacks"][0]["points"][0] == models["immunized"]["attacks"][0]["points"][0]
    assert guarded["attacks"][0]["points"][-1] != models["immunized"]["attacks"][0]["points"][-1]
    assert guarded["training"]["parent"] == "immunized" and "under Holding" in guarded["training"]["method"]
    page = report.write(tmp_path / "run").read_text()
    assert "Repair after fine-tuning" in page and "After fine-tuning on the harmless task" in page
    assert run()[1] == []
    tree["guard"]["run"] = False
    metrics, ran = run()
    assert ran == [] and "immunized, guarded" not in metrics["models"]
    tree["repair"]["batch"] = 3
    assert {name.split(",")[0] for name in run()[1]} == {
        f"{what} {name}" for what in ("measure", "attack", "ablation") for name in ("aligned", "immunized", "control")
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("repair: {method: sft}",
         r"repair\.method: expected one of .*mending \(methods after fine-tuning\), got 'sft', a method before "
         r"fine-tuning, of section 'immunize'"),
        ("guard: {method: mending}", r"guard\.method: expected one of .*got 'mending', .* after .* section 'repair'"),
        ("immunize: {method: holding}", r"immunize\.method: .*got 'holding', a method during .* section 'guard'"),
        ("immunize: {prepare: {method: mending}}", r"immunize\.prepare\.method: .*got 'mending'"),
        ("variants: {x: {method: mending}}", r"variants\.x\.method: .*got 'mending'"),
        ("repair: {method: magic}", r"repair\.method: .*got 'magic'$"),
        ("repair: {method: mending, steps: 3}", r"repair\.steps: unknown key"),
        ("guard: {method: holding, batch: 0}", r"guard\.batch: expected an integer >= 1"),
        ("variants: {'immunized, guarded': {}}", r"variants: expected names that do not end with ', guarded'"),
    ],
)  # fmt: skip
def test_a_method_in_the_wrong_section_is_named(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        configuration.load(file)


def test_sections_merge_like_those_of_other_methods(tmp_path):
    (tmp_path / "base.yaml").write_text("repair: {method: mending, batch: 3}\nguard: {method: holding}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\nrepair: {batch: 4}\nguard: null\n")
    found = configuration.load(tmp_path / "run.yaml")
    assert found.repair == RepairConfig(method="mending", batch=4) and found.guard is None
    assert configuration.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(("name", "section"), [("holding", "guard"), ("mending", "repair")])
def test_a_defense_of_another_stage_has_a_configuration_of_its_own(name, section):
    found = configuration.load(name, quick=True)
    assert getattr(found, section).method == name and not found.immunize.run
    assert {"guard": found.repair, "repair": found.guard}[section] is None


@pytest.mark.parametrize("changes", [{"stage": "later"}, {"stage": "after"}, {"kind": "attack", "stage": "during"}])
def test_an_entry_of_no_stage_is_refused(changes):
    entry = dataclasses.replace(methods.find("sft"), name="odd", **changes)
    with pytest.raises(ValueError, match=r"here: stage: expected before or during or after"):
        registry._add({}, entry, "here")
