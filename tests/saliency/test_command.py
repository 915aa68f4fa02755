"""`fastguard saliency` and `fastguard prune`: what they write, take up, and refuse; what the page says."""

from __future__ import annotations

import json
import re

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from directions import chat
from evaluation.test_report import Page
from fastguard import cli
from fastguard.evaluation.saliency import Cell, Map, headlines, render
from fastguard.run import saliency as job
from fastguard.run.saliency import Options, measure, prune
from fastguard.saliency import Scores


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    path = tmp_path_factory.mktemp("given")
    model = chat.folder(path / "model")
    rows = {
        "safety": [{"prompt": p, "answer": "sorry g1"} for p in chat.prompts(chat.BAD)],
        "utility": [{"prompt": p, "answer": "g1 g2 g3"} for p in chat.prompts(chat.GOOD)],
    }
    for name, each in rows.items():
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, each)))
    return {"model": str(model), **{name: str(path / f"{name}.jsonl") for name in rows}, "path": path}


SMALL = Options(samples=20, batch=8, safety_top=0.1, utility_top=0.1)


@pytest.fixture(scope="module")
def measured(given):
    out = given["path"] / "scores"
    return measure(given["model"], given["safety"], given["utility"], out, SMALL), out


def command(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_the_sums_lie_in_two_files(measured, given):
    found, out = measured
    assert found.samples == {"safety": 20, "utility": 20}
    for role in ("safety", "utility"):
        scores = Scores.load(out / role)
        assert scores.samples == 20 and len(scores.names) == 5 * 7
        assert scores.about["model_sha256"] == found.model_sha256 and scores.about["set"] == role
        assert not (out / role / job.UNFINISHED).exists()
    about = json.loads((out / "saliency.json").read_text())
    assert about["sources"]["safety"]["splits"] == {"scored": {"prompts": 20, "clusters": None}}
    assert about["map"]["cells"].keys() == set(scores.names)
    assert found.maps.modules[0] == "self_attn.q_proj" and found.maps.layers == 5


def test_a_second_run_finds_them(measured, given, monkeypatch):
    found, out = measured
    monkeypatch.setattr(job, "Collect", lambda *a, **k: pytest.fail("summed again"))
    again = measure(given["model"], given["safety"], given["utility"], out, SMALL)
    assert again.maps == found.maps


def test_a_killed_run_goes_on_with_the_same_bits(given, measured, tmp_path, monkeypatch):
    """The state of the second batch is kept; the third fails; what is made then equals an unbroken run's."""
    calls = []

    class Failing(job.Collect):
        def add(self, batch):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().add(batch)

    monkeypatch.setattr(job, "Collect", Failing)
    eager = Options(**{**SMALL.to_dict(), "statistics": SMALL.statistics, "save_seconds": 1e-9})
    with pytest.raises(KeyboardInterrupt):
        measure(given["model"], given["safety"], given["utility"], tmp_path / "scores", eager)
    assert (tmp_path / "scores" / "safety" / job.UNFINISHED).is_file()
    measure(given["model"], given["safety"], given["utility"], tmp_path / "scores", eager)
    assert len(calls) == 3 + 1 + 3  # of three batches of the first set the last alone came again
    for role in ("safety", "utility"):
        one, other = Scores.load(tmp_path / "scores" / role), Scores.load(measured[1] / role)
        for kind in ("snip", "wanda"):
            for name in one.names:
                assert torch.equal(one.statistic(kind, name), other.statistic(kind, name))


def test_other_input_is_not_taken_for_the_same(given, measured, tmp_path):
    measure(given["model"], given["safety"], given["utility"], tmp_path, SMALL)
    before = (tmp_path / "safety" / "saliency.safetensors").read_bytes()
    fewer = Options(**{**SMALL.to_dict(), "statistics": ("snip",), "samples": 8})
    found = measure(given["model"], given["safety"], given["utility"], tmp_path, fewer)
    assert found.samples["safety"] == 8
    assert (tmp_path / "safety" / "saliency.safetensors").read_bytes() != before


def test_the_commands(given, tmp_path):
    scores = tmp_path / "scores"
    result = command(
        "saliency", given["model"], "--safety", given["safety"], "--refusals", "--utility", given["utility"], "--out",
        scores, "--samples", 16, "--batch", 8,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "within each matrix" in result.output and "safety: " in result.output
    page = (scores / "saliency.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    shares = ("--safety-top", 0.2, "--utility-top", 0.2)
    result = command("prune", given["model"], "--scores", scores, *shares, "--out", tmp_path / "pruned")
    assert result.exit_code == 0, result.output
    count = int(re.search(r"\((\d+) of", result.output)[1])
    result = command("prune", given["model"], "--scores", scores, *shares, "--out", tmp_path / "drawn", "--random", 1)
    assert result.exit_code == 0, result.output
    whole, pruned, drawn = (
        AutoModelForCausalLM.from_pretrained(p) for p in (given["model"], tmp_path / "pruned", tmp_path / "drawn")
    )
    zeros = {
        name: [int((m.get_parameter(name) == 0).sum() - (p == 0).sum()) for m in (pruned, drawn)]
        for name, p in whole.named_parameters()
    }
    assert 0 < sum(z[0] for z in zeros.values()) <= count  # some were 0 before
    assert all((z[0] > 0) == (z[1] > 0) for name, z in zeros.items() if "layers.1" in name)
    assert (tmp_path / "pruned" / "tokenizer.json").is_file()
    record = json.loads((tmp_path / "pruned" / "fastguard_edit.json").read_text())
    assert record["edit"]["options"]["origin"]["safety_top"] == 0.2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("saliency", "{model}", "--safety", "absent.jsonl", "--utility", "{utility}", "--out", "{out}"), "absent"),
        (("saliency", "{model}", "--safety", "{safety}", "--utility", "{utility}", "--out", "{out}",
          "--statistics", "snap"), "statistics"),
        (("saliency", "{model}", "--safety", "{safety}", "--utility", "{utility}", "--out", "{out}", "--score",
          "fisher"), "score"),
        (("prune", "{model}", "--scores", "{out}", "--safety-top", "0.1", "--utility-top", "0.1", "--out", "{out}"),
         "fastguard saliency"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told(given, tmp_path, arguments, said):
    given = {**given, "out": tmp_path / "out"}
    result = command(*(a.format(**given) for a in arguments))
    assert result.exit_code == 2 and said in result.output


def test_scores_of_another_model_are_refused(given, measured, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(given["model"])
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="expected those of"):
        prune(str(tmp_path / "other"), measured[1], tmp_path / "out", 0.1, 0.1)


def test_the_page(measured):
    found = measured[0]
    page = Page(render(found))
    assert f"{100 * found.maps.safety_only:.2f}%" in page.text
    for heading in ("Where safety's entries are its own", "By module", "What the numbers do not show"):
        assert heading in page.text
    assert "The smaller set has 20 samples" in page.text


def test_headlines_name_the_largest_part():
    cells = {f"model.layers.{i}.mlp.{m}.weight": Cell(1000, 50, n) for (i, m), n in
             {(0, "up"): 10, (0, "down"): 20, (1, "up"): 30, (1, "down"): 45}.items()}  # fmt: skip
    places = {name: (name.split(".", 3)[3].removesuffix(".weight"), int(name.split(".")[2])) for name in cells}
    maps = Map("snip", 0.05, 0.05, 2, ("mlp.up", "mlp.down"), cells, places, {s: [0.3, 0.4] for s in (0.01, 0.05, 0.2)})

    class Found:
        pass

    Found.maps = maps
    said = headlines(Found)
    assert said[0].startswith("2.62% of 4,000 entries")
    assert "mlp.down (65%) and in layer 1 (75%)" in said[1]
    assert maps.grid() == [[0.2, 0.6], [0.4, 0.9]]
