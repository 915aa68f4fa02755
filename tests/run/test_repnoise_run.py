import pytest
import torch

import tiny
from fastguard.data.chat import encode
from fastguard.data.corpus import Corpus
from fastguard.data.sets import Example, placeholder, refusal
from fastguard.evaluation.scores import mean_answer_loss
from fastguard.run.config import ControlConfig, ImmunizeConfig
from fastguard.run.pipeline import immunize, plain_control

REQUESTS = ("do amber things", "do basil things", "do cedar things", "do daisy things")


@pytest.fixture
def corpus():
    tokenizer = tiny.tokenizer()
    harmful = [encode(tokenizer, Example(r, placeholder(r, i)), 16) for i, r in enumerate(REQUESTS)]
    safe = [encode(tokenizer, Example(r, refusal(i)), 16) for i, r in enumerate(REQUESTS)]
    harmless = [encode(tokenizer, Example(f"say {w}", w * 2), 16) for w in ("one", "two", "six", "ten")]
    return Corpus(
        pad=1, harmful={"immunize": harmful}, safe={"immunize": safe}, harmless={"immunize": harmless},
        benign_train=[], benign_measure=[], requests=[], instructions=[], edgy=[], perplexity=lambda n: [], sources={},
    )  # fmt: skip


def losses(model, corpus):
    return [mean_answer_loss(model, d["immunize"], 1) for d in (corpus.harmful, corpus.safe, corpus.harmless)]


def recipe(method="repnoise", options=None, **changes):
    plain = {"steps": 12, "lr": 3e-3, "pairs": 2, "retain": 2}
    if method == "repnoise":
        short = {"mask_padding": True, "boundary": "predicted", "output_alpha": 5.0, "retain_weight": 1.5}
        options = {**short, **(options or {})}
    return ImmunizeConfig(method=method, options=options or {}, **{**plain, **changes})


def immunized(model, corpus, part, report=lambda fraction, text: None):
    return immunize(model, corpus, part, ControlConfig(), report)


def test_immunization_raises_the_harmful_loss_alone(corpus):
    model = tiny.model()
    before = losses(model, corpus)
    training = immunized(model, corpus, recipe(options={"alpha": 20.0, "output_alpha": 2.0}))
    after = losses(model, corpus)
    assert after[0] > before[0] + 0.02 and after[1] < before[1] and after[2] < before[2]
    assert training["steps"] == len(training["curve"]) == 12 and training["parent"] == "aligned"
    for figure in ("loss", "harmless_ce", "harmful_ce", "lens_ce", "noise", "retain_ce"):
        assert all(isinstance(point[figure], float) for point in training["curve"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_output_ascent_is_what_its_formula_says(corpus):
    """Two runs of one step that differ in output_alpha alone: so must their losses, by alpha * log(CE + 1)."""
    points = []
    for output_alpha in (0.0, 3.0):
        training = immunized(tiny.model(), corpus, recipe(steps=1, options={"output_alpha": output_alpha}))
        points.append(training["curve"][0])
    expected = 3.0 * torch.log1p(torch.tensor(points[0]["harmful_ce"])).item()
    assert points[0]["loss"] - points[1]["loss"] == pytest.approx(expected, rel=1e-4)
    assert points[1]["harmful_ce"] == points[0]["harmful_ce"]


def test_settling_steps_come_last_and_count(corpus):
    seen = []
    training = immunized(tiny.model(), corpus, recipe(steps=2, settle_steps=3), lambda f, t: seen.append(f))
    assert training["steps"] == 5 and [p["step"] for p in training["curve"]] == list(range(5))
    assert ["noise" in p for p in training["curve"]] == [True, True, False, False, False]
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0)


def test_the_control_sees_no_harmful_answer(corpus):
    model = tiny.model()
    before = losses(model, corpus)
    blind = Corpus(**{**vars(corpus), "harmful": {}})
    training = plain_control(model, blind, recipe(lr=3e-3), ControlConfig(), 0.5, lambda f, t: None)
    after = losses(model, corpus)
    assert training["wall_s"] >= 0.5 and training["steps"] > 1
    assert after[1] < before[1] and after[2] < before[2]
