"""The whole job on a model of two layers and sets made up here: what is written, and what a killed run takes up."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from evaluation.test_metrics import assert_matches
from fastguard.data import corpus
from fastguard.evaluation import report
from fastguard.evaluation.aims import aims
from fastguard.evaluation.metrics import Metrics
from fastguard.machine import write_json
from fastguard.models import load_tokenizer
from fastguard.progress import silent
from fastguard.run import config as configuration
from fastguard.run import evaluate, pipeline
from fastguard.run.stages import Stages


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
    real, calls = evaluate.attack, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluate, "attack", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(small, tmp_path / "killed")
    assert not (tmp_path / "killed" / "metrics.json").exists()
    monkeypatch.setattr(evaluate, "attack", real)
    resumed = pipeline.run(small, tmp_path / "killed")
    found = [s["name"] for s in resumed["stages"] if s["resumed"]]
    assert found[:2] == ["align", "immunize"] and found[-1] == "attack aligned, lr 0.0001, seed 0"
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


def test_what_is_changed_is_done_again_with_all_that_follows_from_it_and_nothing_else(small, tmp_path):
    """Each change, and the stages that ran."""
    tree = small.to_dict() | {"variants": {}, "control": {"run": False}}
    tree["attack"] = tree["attack"] | {"lr": [1e-4]}

    def ran():
        metrics = pipeline.run(configuration.from_dict(tree), tmp_path / "run")
        return [s["name"].split(",")[0] for s in metrics["stages"] if not s["resumed"]]

    everything = ["align", "immunize", "measure aligned", "attack aligned", "measure immunized", "attack immunized"]
    assert ran() == everything
    tree["title"] = "another"
    assert ran() == []
    tree["attack"] = tree["attack"] | {"lr": [2e-4]}
    assert ran() == ["attack aligned", "attack immunized"]
    tree["immunize"] = tree["immunize"] | {"lr": 2e-4}
    assert ran() == ["immunize", "measure immunized", "attack immunized"]
    tiny.model(seed=5).save_pretrained(small.model.name)  # another model in the same place
    assert ran() == everything
    tree["data"] = tree["data"] | {"seed": 1}
    assert ran() == everything


def test_an_attack_that_knows_a_model_of_the_run_reads_it_where_it_is(small, tmp_path):
    """The aligned model is delta-strip's base: without what was added to it the immunized one is the aligned one."""
    tree = small.to_dict() | {"variants": {}, "control": {"run": False}}
    options = {"base": "aligned", "rank": 0, "rounds": 1, "positions": 1, "validation": 1}
    tree["attack"] = {"method": "delta_strip", "options": options, "batch": 2, "threshold": 1.0}
    tree["evaluate"] = {"run": False}

    def attacked():
        metrics = pipeline.run(configuration.from_dict(tree), tmp_path / "run")
        ran = [s["name"].split(",")[0] for s in metrics["stages"] if not s["resumed"]]
        return ran, {name: m["attacks"][0] for name, m in metrics["models"].items()}

    _, found = attacked()
    aligned, immunized = (found[name]["points"] for name in ("aligned", "immunized"))
    assert immunized[0] != aligned[0] and immunized[1:] == aligned[1:] and len(aligned) == 3
    assert aligned[1] == {**aligned[0], "step": 1}
    assert attacked()[0] == []
    options["base"] = "base"  # another model: its name, or what it is, is part of what the attack reads
    assert attacked()[0] == ["attack aligned", "attack immunized"]


def test_stages_can_be_left_out(small, tmp_path):
    tree = small.to_dict() | {"variants": {}, "align": {"run": False}, "control": {"run": False}}
    tree["attack"] = {"run": False}
    metrics = pipeline.run(configuration.from_dict(tree), tmp_path / "run")
    assert [s["name"] for s in metrics["stages"]] == ["immunize", "measure aligned", "measure immunized"]
    assert list(metrics["models"]) == ["aligned", "immunized"] and metrics["models"]["aligned"]["attacks"] == []
    report.write(tmp_path / "run")


def test_two_runs_do_not_share_a_folder(small, tmp_path):
    with (
        Stages(tmp_path / "run", silent).locked(),
        pytest.raises(RuntimeError, match=f"in use .*process {os.getpid()}"),
    ):
        pipeline.run(small, tmp_path / "run")


def test_a_corrupt_record_is_named(small, tmp_path):
    stages = Stages(tmp_path, silent)
    assert stages.run("one", {"a": 1}, lambda report: 5) == 5
    file = tmp_path / "work" / "one.json"
    for broken in (file.read_text()[:20], "[1]"):
        file.write_text(broken)
        with pytest.raises(ValueError, match=r"one\.json: not a stage's record"):
            stages.run("one", {"a": 1}, lambda report: 6)


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
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1} and [p.name for p in file.parent.iterdir()] == ["x.json"]


def test_aims_name_what_was_only_a_lower_bound():
    example = json.loads((Path(__file__).parents[1] / "evaluation" / "example_metrics.json").read_text())["models"]
    found = aims(example, (5e-5,), 0.5)
    ratio = (
        example["immunized"]["attacks"][0]["compliance_crossing"]
        / example["control"]["attacks"][0]["compliance_crossing"]
    )
    assert found[0]["value"] == pytest.approx(ratio) and "at least" not in found[0]["name"]
    example["immunized"]["attacks"][0]["compliance_crossing"] = None
    found = aims(example, (5e-5,), 0.5)
    assert "at least" in found[0]["name"] and found[0]["value"] > 5 and found[0]["met"] is True
    example["control"]["attacks"][0]["compliance_crossing"] = None
    assert aims(example, (5e-5,), 0.5)[0]["met"] is None
