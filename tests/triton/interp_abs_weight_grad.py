"""The GPU kernel of ``abs_weight_grad_`` in Triton's interpreter, against the float64 specification.

Run by tests/test_triton.py with TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton in a process of its own. bfloat16
is left to GPUs: the interpreter computes products of bfloat16 operands wrongly.
"""

from __future__ import annotations

import os

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard.ops import segments
from fastguard.ops.abs_weight_grad import abs_weight_grad_, reference
from fastguard.ops.table import Chip

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

from fastguard.ops.abs_weight_grad import triton as ops

pytestmark = pytest.mark.interpreter

NAMES = ("score", "squared", "signed")

# (B, T, O, I) and why
SHAPES = {
    "one of each": (1, 1, 1, 1),
    "several tiles, no multiple": (3, 70, 130, 75),
    "whole tiles": (2, 64, 64, 64),
    "many short samples": (9, 3, 20, 37),
}


def draw(b, t, o, i, dtype):
    grad_out = torch.randn(b, t, o, dtype=torch.float64) * (torch.rand(b, 1, 1) + 0.1)
    return grad_out.to(dtype), (torch.randn(b, t, i, dtype=torch.float64) + 0.3).to(dtype)


def added(names, grad_out, input, **where):
    wide = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    states = {name: torch.zeros(grad_out.shape[-1], input.shape[-1], dtype=wide) for name in names}
    abs_weight_grad_(states.get("score"), grad_out, input, squared=states.get("squared"), signed=states.get("signed"),
                     **where)  # fmt: skip
    return states


def specified(grad_out, input, bounds):
    flat = [t.flatten(0, -2).double() for t in (grad_out, input)]
    return dict(zip(NAMES, reference.sums(*flat, bounds), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_reference(shape, dtype):
    grad_out, input = draw(*shape, dtype)
    states = added(NAMES, grad_out, input)
    for name, want in specified(grad_out, input, segments.bounds_of(input)).items():
        assert_catches_spoiled(lambda got, name=name, want=want: assert_agrees(name, got, want), states[name])
        assert_agrees(name, added((name,), grad_out, input)[name], want)  # in larger tiles


def test_large_weights_have_large_tiles():
    grad_out, input = draw(2, 5, 8 * 128 + 1, 16 * 128 - 3, torch.float32)
    blocks = ops.blocks_of(grad_out.shape[-1], input.shape[-1], 1, torch.float32, Chip("", "", 0))
    assert blocks.inputs == 128
    want = specified(grad_out, input, segments.bounds_of(input))
    assert_agrees("score", added(("score",), grad_out, input)["score"], want["score"])


def test_padding_is_never_read():
    """NaN outside the samples; rows that have one stride and rows that have not; packed."""
    grad_out, input = draw(4, 40, 18, 21, torch.float32)
    mask = torch.arange(40) < torch.tensor([[33], [0], [1], [40]])
    bounds, _ = segments.runs(mask.flip(1))
    spoiled = [torch.where(mask.flip(1)[..., None], t, float("nan")) for t in (grad_out, input)]
    want = specified(*(t.nan_to_num(0.0) for t in spoiled), bounds)
    cut = [torch.cat([torch.full_like(t, float("nan")), t], 1)[:, 40:] for t in spoiled]
    packed = [t[mask.flip(1)] for t in spoiled]
    for got in (
        added(NAMES, *spoiled, bounds=bounds),
        added(NAMES, *cut, bounds=bounds),
        added(NAMES, *packed, offsets=torch.tensor([0, 33, 33, 34, 74])),
    ):
        for name in NAMES:
            assert_agrees(name, got[name], want[name])


def test_states_are_added_to():
    grad_out, input = draw(2, 5, 6, 7, torch.float16)
    score = torch.full((6, 7), 10.0)
    abs_weight_grad_(score, grad_out, input)
    assert_agrees("score", score - 10, specified(grad_out, input, segments.bounds_of(input))["score"], ulps=256)
