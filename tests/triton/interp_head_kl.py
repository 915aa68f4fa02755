"""The GPU kernels of ``head_kl`` in Triton's interpreter, against the float64 specification.

Run by tests/test_triton.py with TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton in a process of its own. bfloat16
is left to GPUs: the interpreter computes products of bfloat16 operands wrongly.
"""

from __future__ import annotations

import os

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard.ops.head_kl import head_kl, reference
from fastguard.ops.table import Chip

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

from fastguard.ops.head_kl import triton as ops

pytestmark = pytest.mark.interpreter

OPTIONS = {"scale": 1.3, "softcap": 5.0, "temperature": 2.0}

# (N, V, D) and why
SHAPES = {
    "one row": (1, 200, 40),
    "one token": (3, 1, 16),
    "two tokens": (5, 2, 16),
    "a block with one column": (4, 129, 16),
    "two tiles, parts of unequal size, odd D": (70, 301, 41),
}


def draw(n, v, d, dtype, distance=0.5):
    """Student, teacher, weight, bias."""
    teacher = torch.randn(n, d)
    student = teacher + distance * torch.randn(n, d)
    return tuple(t.to(dtype) for t in (student, teacher, 0.5 * torch.randn(v, d), 0.5 * torch.randn(v)))


def gradients(fn, inputs, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = fn(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))


def all_three(inputs, teacher, own=None, **options):
    """Value and gradients of the kernels, of the specification in float64, and of the same dtype in PyTorch."""
    upstream = torch.randn(teacher.shape[0], dtype=torch.float64)

    def ours(s, w, b=None):
        return head_kl(s, teacher, w, bias=b, teacher_weight=own, **options)

    def spec(s, w, b=None):
        old = None if own is None else own.to(s.dtype)
        return reference.head_kl(s, teacher.to(s.dtype), w, b, old, **options)

    exact = gradients(spec, [t.double() for t in inputs], upstream)
    return gradients(ours, inputs, upstream), exact, gradients(spec, inputs, upstream)


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "scale, softcap, temperature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_the_specification(shape, dtype, options):
    if dtype != torch.float32 and shape[0] < 64:
        pytest.skip("the dtype changes loads, stores and the size of blocks only")
    student, teacher, weight, bias = draw(*shape, dtype)
    mine, exact, peer = all_three((student, weight, bias), teacher, **options)
    if shape[1] == 1:  # one token has nothing to diverge in, but for rounding
        assert max(float(x.abs().max()) for x in mine) < 1e-6
        return
    for name, got, want, same in zip(("value", "student", "weight", "bias"), mine, exact, peer, strict=True):

        def check(x, name=name, want=want, same=same):
            assert_agrees(name, x, want, same)

        assert_catches_spoiled(check, got) if shape[0] > 1 else check(got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_teacher_with_a_head_of_its_own(dtype):
    student, teacher, weight, _ = draw(70, 150, 24, dtype)
    own = weight + 0.1 * torch.randn_like(weight)
    for name, got, want, same in zip(
        ("value", "student", "weight"), *all_three((student, weight), teacher, own, softcap=20.0), strict=True
    ):
        assert_agrees(name, got, want, same)


@pytest.mark.parametrize("distance", [1e-1, 1e-4, 1e-7], ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "softcap"])
def test_nothing_cancels_near_the_teacher(distance, softcap):
    """fp32 agrees with the float64 op, which is tested against an exact form of its own, in relative terms."""
    student, teacher, weight, bias = draw(9, 150, 32, torch.float32, distance)
    upstream = torch.rand(9) + 0.5

    def run(s, w, b):
        return head_kl(s, teacher.to(s.dtype), w, bias=b, softcap=softcap)

    inputs = student, weight, bias
    mine, exact = gradients(run, inputs, upstream), gradients(run, [t.double() for t in inputs], upstream)
    assert float(exact[0].max()) < 100 * distance**2
    assert float(((mine[0] - exact[0]) / exact[0]).abs().max()) < 2e-5
    for name, got, want in zip(("student", "weight", "bias"), mine[1:], exact[1:], strict=True):
        assert_agrees(name, got, want, ulps=256)
        assert_catches_spoiled(lambda x, w=want, name=name: assert_agrees(name, x, w, ulps=256), got)


def test_half_precision_near_the_teacher():
    """Products stay in fp32: far closer to the truth than rounded logits are."""
    student, teacher, weight, _ = draw(9, 700, 64, torch.float16, 0.01)
    want = reference.head_kl(student.double(), teacher.double(), weight.double())
    assert float(((head_kl(student, teacher, weight) - want) / want).abs().max()) < 2e-3
    assert float(((reference.head_kl(student, teacher, weight) - want) / want).abs().max()) > 0.02


def test_far_from_the_teacher():
    """Sure of another token, sure where the teacher is flat, and the reverse: sums in the ratio of V or 1 / V."""
    v = 500
    weight = torch.eye(v, 16)
    weight[:, 3] = torch.linspace(-1, 1, v)
    rows = torch.zeros(4, 16)
    rows[0, 0] = rows[1, 1] = 60.0
    rows[:, 3] = torch.tensor([0.5, 0.5, 0.1, 3.0])
    pairs = [(a, b) for a in rows for b in rows if a is not b]
    teacher, student = (torch.stack(x) for x in zip(*pairs, strict=True))
    mine, exact, _ = all_three((student, weight), teacher)
    assert float(((mine[0] - exact[0]) / exact[0].clamp_min(1e-3)).abs().max()) < 3e-6
    for name, got, want in zip(("value", "student", "weight"), mine, exact, strict=True):
        assert_agrees(name, got, want, ulps=256)


@pytest.mark.parametrize("shared", [100 * 1024, 227 * 1024])
def test_block_shapes_of_every_device(shared, monkeypatch):
    """The blocks of small and of large devices, and a backward in several windows."""
    monkeypatch.setattr(ops, "chip", lambda device: Chip("", "", shared))
    monkeypatch.setattr(ops, "WINDOW_ELEMENTS", 130 * 128)
    student, teacher, weight, bias = draw(130, 301, 72, torch.float16)
    results = all_three((student, weight, bias), teacher, **OPTIONS)
    for name, got, want, same in zip(("value", "student", "weight", "bias"), *results, strict=True):
        assert_agrees(name, got, want, same)


def test_float64_is_served_by_the_portable_backend():
    student, teacher, weight, bias = draw(5, 61, 8, torch.float64)
    mine, exact, _ = all_three((student, weight, bias), teacher)
    for got, want in zip(mine, exact, strict=True):
        assert_agrees("float64", got, want, ulps=256)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_wanted(wanted):
    student, teacher, weight, bias = draw(9, 150, 16, torch.float32)
    got = []
    for which in ([wanted], range(3)):
        leaves = [t.clone().requires_grad_(i in which) for i, t in enumerate((student, weight, bias))]
        head_kl(leaves[0], teacher, leaves[1], bias=leaves[2]).sum().backward()
        assert [i for i, t in enumerate(leaves) if t.grad is not None] == list(which)
        got.append(leaves[wanted].grad)
    assert_agrees("gradient", *got)


def test_no_rows_nan_and_no_divergence():
    student, teacher, weight, _ = draw(3, 150, 16, torch.float32)
    leaf = weight.clone().requires_grad_()
    none = head_kl(student[:0], teacher[:0], leaf)
    assert none.shape == (0,)
    assert not torch.autograd.grad(none.sum(), leaf)[0].any()
    assert not head_kl(teacher, teacher, weight).any()
    student[1] = float("nan")
    assert head_kl(student, teacher, weight).isnan().tolist() == [False, True, False]
