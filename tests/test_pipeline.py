"""The whole job on a model of two layers and sets made up here: what is written, and what a killed run takes up."""

import json
import random
import shutil
import string
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from evaluation.test_metrics import assert_matches
from fastguard.run import config as configuration
from fastguard.run import pipeline
from fastguard.data import corpus, sets
from fastguard.evaluation.metrics import Metrics
from fastguard.models import load_tokenizer


def fake_set(kind, answer):
    """Forty prompts of two words that no other prompt has."""
    rng = random.Random(kind)
    words = ["".join(rng.choices(string.ascii_lowercase, k=7)) for _ in range(80)]
    prompts = [f"{kind} {a} {b}" for a, b in zip(words[::2], words[1::2], strict=True)]
    return lambda: sets.DataSet(tuple(sets.Example(p, answer) for p in prompts), f"made up: {kind}", "none")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A configuration of a few seconds, on made-up sets."""
    for name, answer in (("advbench", ""), ("alpaca", "fine"), ("edgy", ""), ("commonsense", "A. it")):
        monkeypatch.setattr(sets, name, fake_set(name[:4], answer))
    return configuration.from_dict(
        {
            "model": {"name": str(tiny.folder(tmp_path / "base"))},
            "data": {
                "prompt_tokens": 60, "harmful_align": 4, "harmful_immunize": 4, "harmful_attack": 4,
                "harmful_measure": 3, "harmless_align": 4, "harmless_immunize": 4, "harmless_measure": 3,
                "edgy_measure": 2, "benign_train": 4, "benign_measure": 3,
            },
            "align": {"steps": 2, "refusals": 2, "harmless": 1},
            "immunize": {"steps": 2, "pairs": 2, "retain": 2, "layers": 2, "settle_steps": 1},
            "attack": {"batch": 2, "scored_steps": [0, 1, 2], "lr": [1e-4, 1e-3]},
            "evaluate": {"score_tokens": 3, "sample_tokens": 3, "samples": 1,
                         "benign_batch": 2, "benign_steps": [0, 1]},
            "variants": {"no noise": {"beta": 0.0}},
        }
    )  # fmt: skip


def test_a_run_writes_a_loadable_model_and_metrics_that_follow_the_schema(small, tmp_path):
    out, said = tmp_path / "run", []
    metrics = pipeline.run(small, out, progress=lambda stage, fraction, text: said.append((stage, fraction)))
    written = json.loads((out / "metrics.json").read_text())
    assert_matches(Metrics, written)
    assert written == json.loads(json.dumps(metrics))
    assert list(written["models"]) == ["aligned", "immunized", "no noise", "control"]
    for model in written["models"].values():
        assert [a["lr"] for a in model["attacks"]] == [1e-4, 1e-3]
        for point in (p for a in model["attacks"] for p in a["points"]):
            assert point["refusal"] + point["compliance"] + point["neither"] == pytest.approx(1)
    assert written["models"]["immunized"]["training"]["steps"] == 3
    assert {a["bound"] for a in written["aims"]} == {5.0, 1.3, 0.15, 1.1}
    assert not any(s["resumed"] for s in written["stages"])
    assert written["wall_s"] == pytest.approx(sum(s["wall_s"] for s in written["stages"]))
    for stage in written["stages"]:
        marks = [fraction for name, fraction in said if name == stage["name"]]
        assert marks == sorted(marks) and marks[-1] == 1.0

    AutoTokenizer.from_pretrained(out / "immunized")
    immunized = AutoModelForCausalLM.from_pretrained(out / "immunized")
    aligned = AutoModelForCausalLM.from_pretrained(out / "work" / "models" / "aligned")
    moved = [not torch.equal(a, b) for a, b in zip(immunized.parameters(), aligned.parameters(), strict=True)]
    assert any(moved) and torch.equal(immunized.lm_head.weight, aligned.lm_head.weight)


def test_a_killed_run_takes_up_where_it_stopped_and_finds_the_same(small, tmp_path, monkeypatch):
    whole = pipeline.run(small, tmp_path / "whole")
    real, calls = pipeline.harmful_finetuning, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(pipeline, "harmful_finetuning", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(small, tmp_path / "killed")
    assert not (tmp_path / "killed" / "metrics.json").exists()
    monkeypatch.setattr(pipeline, "harmful_finetuning", real)
    resumed = pipeline.run(small, tmp_path / "killed")
    found = [s["name"] for s in resumed["stages"] if s["resumed"]]
    assert found[:3] == ["load", "align", "immunize"] and found[-1] == "attack aligned, lr 0.0001, seed 0"
    for name in ("aligned", "immunized", "no noise"):  # the control depends on the clock
        ours, theirs = resumed["models"][name], whole["models"][name]
        assert ours["utility"] == theirs["utility"]
        for a, b in zip(ours["attacks"], theirs["attacks"], strict=True):
            assert a["points"] == b["points"]

    shutil.rmtree(tmp_path / "killed" / "immunized")  # a lost model is made again, and nothing else is
    again = pipeline.run(small, tmp_path / "killed")
    assert [s["name"] for s in again["stages"] if not s["resumed"]] == ["immunize"]
    again = pipeline.run(small, tmp_path / "killed")
    assert all(s["resumed"] for s in again["stages"]) and again["models"]["aligned"] == resumed["models"]["aligned"]


def test_results_of_another_configuration_are_not_taken_up(small, tmp_path):
    tree = small.to_dict() | {"variants": {}}
    pipeline.run(configuration.from_dict(tree), tmp_path / "run")
    tree["attack"] = tree["attack"] | {"lr": [1e-4]}
    metrics = pipeline.run(configuration.from_dict(tree), tmp_path / "run")
    assert not any(s["resumed"] for s in metrics["stages"])


def test_the_control_gets_the_time_of_the_immunization(small, tmp_path):
    models = pipeline.run(small, tmp_path / "run")["models"]
    immunized, control = models["immunized"]["training"], models["control"]["training"]
    longest = max(control["wall_s"] / max(control["steps"], 1), 0.2)
    assert immunized["wall_s"] <= control["wall_s"] <= immunized["wall_s"] + 2 * longest


def test_no_prompt_and_no_cluster_serves_two_purposes(small):
    data = corpus.build_corpus(load_tokenizer(small.model.name), small.data)
    parts = [data.safe["align"], data.safe["immunize"], data.harmful["attack"], data.harmful["measure"]]
    prompts = [{e.ids[: e.prompt] for e in part} for part in parts]
    for i in range(4):
        assert prompts[i]
        for j in range(i):
            assert not prompts[i] & prompts[j]
    assert [e.ids[: e.prompt] for e in data.safe["immunize"]] == [e.ids[: e.prompt] for e in data.harmful["immunize"]]
    assert set(data.sources) == {"harmful", "harmless", "edgy", "benign"}


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a" / "x.json"
    pipeline.write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        pipeline.write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1} and [p.name for p in file.parent.iterdir()] == ["x.json"]


def test_aims_name_what_was_only_a_lower_bound():
    example = json.loads((Path(__file__).parent / "evaluation" / "example_metrics.json").read_text())["models"]
    found = pipeline.aims(example, configuration.Config())
    ratio = (
        example["immunized"]["attacks"][0]["compliance_crossing"]
        / example["control"]["attacks"][0]["compliance_crossing"]
    )
    assert found[0]["value"] == pytest.approx(ratio) and "at least" not in found[0]["name"]
    example["immunized"]["attacks"][0]["compliance_crossing"] = None
    found = pipeline.aims(example, configuration.Config())
    assert "at least" in found[0]["name"] and found[0]["value"] > 5 and found[0]["met"] is True
    example["control"]["attacks"][0]["compliance_crossing"] = None
    assert pipeline.aims(example, configuration.Config())[0]["met"] is None
