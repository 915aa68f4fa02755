"""A corpus of four requests and the immunization of a tiny model on it."""

import pytest

import tiny
from fastguard.data.chat import encode
from fastguard.data.corpus import Corpus
from fastguard.data.sets import Example, placeholder, refusal
from fastguard.evaluation.scores import mean_answer_loss
from fastguard.run.config import ControlConfig, ImmunizeConfig
from fastguard.run.pipeline import immunize

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
