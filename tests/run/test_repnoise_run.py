import pytest
import torch

import tiny
from fastguard.data.corpus import Corpus
from fastguard.run.config import ControlConfig
from fastguard.run.pipeline import plain_control
from recipes import corpus, immunized, losses, recipe  # noqa: F401, a fixture


def test_immunization_raises_the_harmful_loss_alone(corpus):  # noqa: F811
    model = tiny.model()
    before = losses(model, corpus)
    training = immunized(model, corpus, recipe(options={"alpha": 20.0, "output_alpha": 2.0}))
    after = losses(model, corpus)
    assert after[0] > before[0] + 0.02 and after[1] < before[1] and after[2] < before[2]
    assert training["steps"] == len(training["curve"]) == 12 and training["parent"] == "aligned"
    for figure in ("loss", "harmless_ce", "harmful_ce", "lens_ce", "noise", "retain_ce"):
        assert all(isinstance(point[figure], float) for point in training["curve"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_output_ascent_is_what_its_formula_says(corpus):  # noqa: F811
    """Two runs of one step that differ in output_alpha alone: so must their losses, by alpha * log(CE + 1)."""
    points = []
    for output_alpha in (0.0, 3.0):
        training = immunized(tiny.model(), corpus, recipe(steps=1, options={"output_alpha": output_alpha}))
        points.append(training["curve"][0])
    expected = 3.0 * torch.log1p(torch.tensor(points[0]["harmful_ce"])).item()
    assert points[0]["loss"] - points[1]["loss"] == pytest.approx(expected, rel=1e-4)
    assert points[1]["harmful_ce"] == points[0]["harmful_ce"]


def test_settling_steps_come_last_and_count(corpus):  # noqa: F811
    seen = []
    training = immunized(tiny.model(), corpus, recipe(steps=2, settle_steps=3), lambda f, t: seen.append(f))
    assert training["steps"] == 5 and [p["step"] for p in training["curve"]] == list(range(5))
    assert ["noise" in p for p in training["curve"]] == [True, True, False, False, False]
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0)


def test_the_control_sees_no_harmful_answer(corpus):  # noqa: F811
    model = tiny.model()
    before = losses(model, corpus)
    blind = Corpus(**{**vars(corpus), "harmful": {}})
    training = plain_control(model, blind, recipe(lr=3e-3), ControlConfig(), 0.5, lambda f, t: None)
    after = losses(model, corpus)
    assert training["wall_s"] >= 0.5 and training["steps"] > 1
    assert after[1] < before[1] and after[2] < before[2]
