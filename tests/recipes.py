"""A corpus of four requests and the immunization of a tiny model on it, by one process or several."""

import importlib.util

import pytest

import tiny
from fastguard import methods
from fastguard.data.chat import encode
from fastguard.data.corpus import Corpus
from fastguard.data.sets import Example, placeholder, refusal
from fastguard.evaluation.scores import mean_answer_loss
from fastguard.run.config import ControlConfig, ImmunizeConfig
from fastguard.run.optimizers import OptimizerConfig
from fastguard.run.pipeline import immunize

SHARED = {name: {} for name, entry in methods.defenses().items() if not entry.edits}
"""What several processes train as one does: a defense, and what differs from its recipe."""

if importlib.util.find_spec("schedulefree"):
    SHARED["sft, schedule-free"] = {"optimizer": OptimizerConfig(name="schedulefree", schedule="constant")}

REQUESTS = ("do amber things", "do basil things", "do cedar things", "do daisy things")


def made():
    tokenizer = tiny.tokenizer()
    harmful = [encode(tokenizer, Example(r, placeholder(r, i)), 16) for i, r in enumerate(REQUESTS)]
    safe = [encode(tokenizer, Example(r, refusal(i)), 16) for i, r in enumerate(REQUESTS)]
    harmless = [encode(tokenizer, Example(f"say {w}", w * 2), 16) for w in ("one", "two", "six", "ten")]
    return Corpus(
        pad=1, harmful={"immunize": harmful}, safe={"immunize": safe}, harmless={"immunize": harmless},
        benign_train=[], benign_measure=[], requests=[], instructions=[], edgy=[], perplexity=lambda n: [], sources={},
    )  # fmt: skip


@pytest.fixture
def corpus():
    return made()


def trained(model, name):
    """``model`` after two steps of one of ``SHARED`` on batches of four, and one that settles it."""
    method = name.split(",")[0]
    more = {"tar": {"batch": 4, "held_out": 4}, "seam": {"product": "difference"}}  # divided among ranks, and sharded
    options = {**methods.find(method).load_options().quick, **more.get(method, {})}
    part = ImmunizeConfig(
        method=method, options=options, steps=2, lr=1e-3, pairs=4, retain=4, settle_steps=1,
        freeze_embedding=method != "sft", **SHARED[name],
    )  # fmt: skip
    immunize(model, made(), part, ControlConfig(), lambda fraction, text: None)
    return model


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
