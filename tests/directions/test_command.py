"""`fastguard directions`: what it finds on a model with a planted direction, what it writes, what its page says."""

import json
import re

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
from safetensors import safe_open
from typer.testing import CliRunner

from directions import chat
from evaluation.test_report import Page
from fastguard import cli
from fastguard.directions import Directions, probe
from fastguard.directions.select import NoCandidateError
from fastguard.edits.basis import read_basis
from fastguard.evaluation.directions import render, summary
from fastguard.models import model_digest
from fastguard.run.directions import Options, _given_tokens, _shared_end, find


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    path = tmp_path_factory.mktemp("given")
    return {"model": chat.folder(path / "model"), **chat.files(path), "path": path}


@pytest.fixture(scope="module")
def found(given):
    return find(str(given["model"]), str(given["harmful"]), str(given["harmless"]), Options(count=3))


def run(given, *more):
    arguments = given["model"], "--harmful", given["harmful"], "--harmless", given["harmless"], *more
    return CliRunner().invoke(cli.app, ["directions", *(str(a) for a in arguments)])


def test_it_finds_the_planted_direction_and_stops_where_nothing_is_left(found):
    _, direction = chat.model()
    assert found.basis.shape == (1, 32) and abs(float(found.basis[0].double() @ direction.double())) > 0.999
    (first,) = found.choices
    assert first.passed and first.selection.harmful > 5 > 0 > first.refusal
    assert found.refusals.tokens == (chat.SORRY,) and found.refusals.source == "own"
    assert found.refusals.refused == found.refusals.prompts == 10
    assert found.means.positions == (-3, -2, -1) and found.position_tokens == (
        "<|im_end|>",
        "<|im_start|>",
        "assistant",
    )
    splits = {name: source["splits"] for name, source in found.sources.items()}
    sizes = {part: split["prompts"] for part, split in splits["harmful"].items()}
    assert sizes == {"estimate": 20, "validation": 10, "held_out": 10} and found.means.counts == (20, 20)
    assert "3 directions were asked for; after 1 the classes no longer differed" in summary(found)


def test_separation_is_what_a_probe_measures(found):
    """On prompts of the same kinds, of which no direction was made; at the embedding the template tells nothing."""
    model, _ = chat.model()
    tokenizer = chat.tokenizer()

    def batch(words, seed):
        texts = [f"user {p} <|im_end|> <|im_start|> assistant" for p in chat.prompts(words, 6, seed)]
        return [dict(tokenizer(texts, return_tensors="pt").data)]

    sets = [batch(words, seed) for seed in (1, 2) for words in (chat.BAD, chat.GOOD)]
    sets = [[{k: b[k] for k in ("input_ids", "attention_mask")} for b in one] for one in sets]
    measured = probe(model, *sets).auc
    assert torch.equal(found.separation[2], measured[: found.layers])
    assert float(measured[0]) == 0.5 and float(measured[1]) == 1


def test_the_file_is_read_by_ablate_and_says_where_it_comes_from(given, tmp_path):
    out = tmp_path / "below" / "refusal.safetensors"
    result = run(given, "--out", out, "--positions", 2, "--validation", 6, "--held-out", 6, "--refusal-tokens", "sorry")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "estimate 28, validation 6, held_out 6" in text and "'sorry' (5), as given" in text
    assert sorted(p.name for p in out.parent.iterdir()) == ["refusal.html", "refusal.safetensors"]
    means = Directions.load(out, model_hash=model_digest(given["model"]))
    assert means.positions == (-2, -1) and len(means.data_hash) == 64 and read_basis(out).shape == (1, 32)
    with safe_open(out, "pt") as opened:
        about = opened.metadata()
    (choice,) = json.loads(about["choices"])
    at = means.at(int(about["position"]), int(about["layer"])).double()
    assert torch.allclose(read_basis(out)[0], at / at.norm(), atol=1e-6) and choice["refusal_before"] > 5
    assert json.loads(about["settings"])["validation"] == 6 and json.loads(about["data"])["harmless"]["rows"] == 40
    ablated = CliRunner().invoke(
        cli.app, ["ablate", str(given["model"]), "--directions", str(out), "--out", str(tmp_path / "ablated")]
    )
    assert ablated.exit_code == 0, ablated.output


def test_the_page_is_whole_and_says_what_was_found(found):
    page = render(found)
    parsed = Page(page)
    text = " ".join(parsed.text.split())
    assert page.count("<svg ") == 4 and not re.search(r"#0000[0-9a-f]{2}\b", page)
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", page))
    light, dark = (set(re.findall(r"(--[a-z0-9-]+):", block)) for block in re.findall(r":root \{(.*?)\}", page, re.S))
    assert used <= light and light == dark
    for target in parsed.loads:
        assert target == "data:," or (target.startswith("#") and target[1:] in parsed.ids), target
    assert "https://" not in page and "<script" not in page and "default-src 'none'" in parsed.policy
    first = found.choices[0]
    assert f"Layer {first.layer} of 5, position {first.position}" in text and found.means.model_hash in text
    assert "falls from 18.4" in text and "estimate 20, validation 10, held out 10" in text
    field = page[page.index('aria-label="Refusal score') :]
    field = field[: field.index("</svg>")]
    cells = sum(bool(torch.isfinite(v)) for v in first.selection.refusal.flatten())
    assert field.count("var(--series-1)") == cells + 24  # each candidate that was asked, and the scale


def test_no_page_where_none_is_wanted(given, tmp_path):
    result = run(given, "--out", tmp_path / "r.safetensors", "--no-report", "--refusal-tokens", "5,I")
    assert result.exit_code == 0 and [p.name for p in tmp_path.iterdir()] == ["r.safetensors"], result.output


def test_a_model_that_does_not_refuse_is_told_what_to_do(given):
    sets = str(given["harmless"]), str(given["path"] / "more.txt")
    (given["path"] / "more.txt").write_text("\n".join(chat.prompts(chat.GOOD, seed=5)))
    with pytest.raises(NoCandidateError, match=r"does not refuse has no such direction.*--max-kl.*--refusal-tokens"):
        find(str(given["model"]), *sets, Options())


def test_tokens_are_words_or_ids():
    tokenizer = chat.tokenizer()
    assert _given_tokens(tokenizer, ("sorry", " 6 ", "I am", "sorry")) == (5, 6)
    with pytest.raises(ValueError, match="refusal_tokens: expected ids below"):
        _given_tokens(tokenizer, ("4000",))


def test_the_end_that_all_prompts_share():
    assert _shared_end([(1, 2, 3, 4), (9, 3, 4), (5, 5, 3, 4)]) == (3, 4)
    assert _shared_end([(1,), (2,)]) == () and _shared_end([(1, 2), (2,)]) == (2,)
