"""The scan by descriptors of ``lm_head_stats`` in Triton's interpreter, against the scan through pointers and the rule.

That one is held to the float64 specification in interp_lm_head_stats.py.
"""

from __future__ import annotations

import os

import pytest
import torch

from checks import assert_agrees
from fastguard.ops.lm_head_stats import live, reference
from fastguard.ops.table import Chip
from fastguard.ops.vocabulary import Head

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

import triton.language as tl

from fastguard.ops.launch import processors
from fastguard.ops.lm_head_stats import triton as ops
from fastguard.ops.lm_head_stats.op import TILE
from fastguard.ops.lm_head_stats.triton import configs, forward_pass, hopper

pytestmark = pytest.mark.interpreter

V, TOL = 1100, 0.1


def draw(n, spread=12.0):
    hidden = torch.randn(n, 40) * spread / 40**0.5
    hidden = hidden[torch.arange(n) % 8] + 0.1 * hidden  # as a batch's rows, alike
    return hidden, torch.randn(V, 40), torch.randint(0, V, (n,))


def record(hidden, head, target, with_mean=False):
    """(statistics, codes [T, V]) of the whole forward."""
    columns = torch.zeros(-(-len(hidden) // TILE), V, dtype=torch.uint8)
    return ops.forward(hidden, head, target, TOL, with_mean, columns), columns


@pytest.fixture
def by_descriptors(monkeypatch):
    monkeypatch.setattr(forward_pass, "SAMPLE", 64)
    monkeypatch.setattr(hopper, "serves", lambda x, head: True)
    monkeypatch.setattr(hopper, "chip", lambda device: Chip("", "sm_90", 227 * 1024))
    half = configs.by_descriptors  # whose rows the interpreter's float32 takes
    monkeypatch.setattr(hopper, "by_descriptors", lambda _, width, options: half(torch.float16, width, options))
    launched = []
    scan = hopper.scan
    monkeypatch.setattr(hopper, "scan", lambda *a: launched.append(a) or scan(*a))
    yield
    assert launched


@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"softcap": 15.0, "bias": True}, {"with_mean": True}], ids=str)
def test_statistics_and_promise(options, by_descriptors, monkeypatch):
    """Five tiles in groups of two: every row's statistics, and no row drops more than it may."""
    monkeypatch.setattr(hopper, "GROUP", tl.constexpr(2))
    n = 4 * TILE + 3
    hidden, weight, target = draw(n)
    bias = 0.5 * torch.randn(V) if "bias" in options else None
    scale, softcap = options.get("scale", 1.0), options.get("softcap")
    got, columns = record(hidden, Head(weight, bias, scale, softcap), target, options.get("with_mean", False))
    given = (hidden, weight, target, bias)
    want = reference.lm_head_stats(*(None if t is None else t.double() if t.is_floating_point() else t for t in given),
                                   scale, softcap)  # fmt: skip
    peer = reference.lm_head_stats(*given, scale, softcap)
    for i, name in enumerate(("lse", "rest_lse", "target_logit", "mean_logit")[: 4 if "with_mean" in options else 3]):
        assert_agrees(name, got[i], want[i], peer[i], ulps=64)
    z = reference.logits_of(
        hidden.double(), Head(weight.double(), None if bias is None else bias.double(), scale, softcap)
    )
    mass = (z.scatter(1, target[:, None], float("-inf")) - want[1][:, None]).exp()
    if "with_mean" in options:
        mass *= (1 + z - want[3][:, None]).abs().clamp_min(1)
    is_live = (columns == live.LIVE)[torch.arange(n) // TILE]
    assert 0.01 < is_live.double().mean() < 0.9, "the case must drop columns"
    assert float((mass * ~is_live).sum(1).max()) <= TOL * (1 + 1e-5)
    assert is_live[torch.arange(n), target].all()


def test_live_columns_are_those_of_the_rule(by_descriptors):
    """Among flat, one-hot, equal and NaN rows; what is dropped has the middle of its octave as its code."""
    hidden, weight, target = draw(128)
    hidden[3] /= 3
    hidden[4] *= 8
    hidden[5] = hidden[6]
    hidden[7] = hidden[15] = float("nan")  # two that one thread holds
    head, rows = Head(weight), ~torch.isnan(hidden[:, 0])
    stats, columns = record(hidden, head, target)
    assert stats.lse.isnan().tolist() == (~rows).tolist()
    bound = forward_pass._bound(hidden, head, target, stats.target_logit)[rows]
    block = hopper.blocks_of(hidden, head, False).outer
    parts = hopper.parts_of(1, -(-V // block), processors(hidden.device))
    assert parts > 1
    z = reference.logits_of(hidden, head)[rows]
    codes = reference.one_pass_codes(z, target[rows], bound, TOL, parts, block, forward_pass.ROUNDING)
    codes[target[~rows]] = live.LIVE
    mine, rule = columns[0] == live.LIVE, codes == live.LIVE
    assert 0.01 < rule.double().mean() < 0.5
    assert (mine == rule).double().mean() > 0.99  # a mass next to a threshold may be taken for the octave beside it
    dropped = ~mine & ~rule & (columns[0] > 0)
    assert dropped.any() and ((columns[0].int() - codes.int()).abs() <= 3)[dropped].all()
    last = 254 + live.CODES_PER_OCTAVE * (live.first_octave(TOL) - live.THRESHOLDS + 1)
    assert (codes[~mine & (columns[0] == 0)] <= last).all()
