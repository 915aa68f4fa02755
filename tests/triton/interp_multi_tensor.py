"""The GPU kernels of ``multi_tensor`` in Triton's interpreter, against the float64 specification.

Run by tests/test_triton.py with TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton in a process of its own. The
interpreter truncates where it stores bfloat16, which GPUs round: here its conversion is replaced by torch's.
"""

from __future__ import annotations

import itertools
import os

import numpy
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from checks import assert_catches_spoiled
from fastguard.bench.agreement import EPS
from fastguard.ops.multi_tensor import accumulate_, adamw_, copy_, dot, perturb_, reference, squared_norm

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

from fastguard.ops.multi_tensor import triton as ops

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Shapes and why: no dimension; none; part of a block; a block; a chunk and a bit; several chunks
SHAPES = [(), (0,), (33, 5), (1024,), (1, 8193), (3, 8192)]

ADAMW = dict(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


@pytest.fixture(autouse=True)
def rounding_as_on_a_gpu(monkeypatch):
    truncating = interpreter._convert_float

    def convert(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return truncating(data, source, target, mode)
        rounded = torch.from_numpy(numpy.ascontiguousarray(data)).view(torch.float32).bfloat16()
        return rounded.view(torch.int16).numpy().view(numpy.uint16).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def draw(dtypes):
    """Tensors of all SHAPES, and one that is unaligned, in the dtypes one after the other."""
    dtype = itertools.cycle(dtypes)
    return [torch.randn(s).to(next(dtype)) for s in SHAPES] + [torch.randn(2003).to(next(dtype))[3:]]


def clones(tensors, dtype=None):
    return [t.to(dtype or t.dtype, copy=True) for t in tensors]


def assert_rounded(name, actual, exact, magnitude):
    """Every element is right to half an ulp of its dtype and a few roundings of the magnitudes it was made from."""
    for i, (x, e, m) in enumerate(zip(actual, exact, magnitude, strict=True)):
        bound = 0.5 * (1 + 2**-6) * torch.finfo(x.dtype).eps * e.abs() + 4 * EPS[torch.float32] * m + 1e-30
        if x.dtype == torch.float16:
            bound += 2.0**-25  # half of its smallest number

        def check(y, e=e, bound=bound):
            assert y.shape == e.shape and bool(((y.double() - e).abs() <= bound).all()), f"{name}[{i}]"

        check(x)
        if x.numel() > 1:
            assert_catches_spoiled(check, x)


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], DTYPES[:3], DTYPES], ids=str)
def test_sums(dtypes):
    a, b = draw(dtypes), draw(dtypes[1:] + dtypes[:1])
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    for value, exact, scale in (
        (squared_norm(a), reference.squared_norm(a), reference.squared_norm(a)),
        (dot(a, b), reference.dot(a, b), reference.dot([t.abs() for t in a], [t.abs() for t in b])),
    ):
        assert value.dtype == wide
        assert abs(float(value) - float(exact)) <= 2 * EPS[torch.float32] * float(scale)
        assert abs(float(value) / 2 - float(exact)) > 2 * EPS[torch.float32] * float(scale)
    assert float(squared_norm([])) == 0 and float(squared_norm([torch.empty(0)])) == 0


@pytest.mark.parametrize("weight", [-0.37, torch.tensor(0.25)], ids=["number", "tensor"])
def test_accumulate(weight):
    tensors = draw(DTYPES[:3])
    for accumulators in (draw(DTYPES[:3]), draw([torch.float32]), draw([torch.float64])):
        exact = clones(accumulators, torch.float64)
        magnitude = [a.abs() + t.double().abs() for a, t in zip(exact, tensors, strict=True)]
        reference.accumulate_(exact, tensors, float(weight))
        accumulate_(accumulators, tensors, weight)
        assert_rounded("accumulators", accumulators, exact, magnitude)


@pytest.mark.parametrize("through", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("source", [False, True], ids=["in place", "from masters"])
def test_perturb(source, through):
    tensors, directions = draw([torch.float32, torch.bfloat16, torch.float64]), draw(DTYPES[1:3])
    masters = [t.float() + 1e-4 * torch.randn(t.shape) for t in tensors]
    base = masters if source else tensors
    old, exact = clones(tensors), clones(base, torch.float64)
    magnitude = [e.abs() + d.double().abs() for e, d in zip(exact, directions, strict=True)]
    reference.perturb_(exact, directions, 0.125)
    scale = torch.tensor(0.125) if source else 0.125
    stats = perturb_(tensors, directions, scale, source=masters if source else None, through=through)
    assert_rounded("tensors", tensors, exact, magnitude)
    want = torch.zeros(3, dtype=torch.float64)
    for before, after, d in zip(old, tensors, directions, strict=True):
        intended = 0.125 * d.double()
        realised = after.to(through or after.dtype).double() - before.to(through or before.dtype).double()
        want += torch.stack([intended.pow(2).sum(), realised.pow(2).sum(), (intended * realised).sum()])
    assert_catches_spoiled(lambda s: torch.testing.assert_close(s, want, rtol=1e-6, atol=0), stats)


@pytest.mark.parametrize(
    ("params", "grads", "states"),
    [
        ([torch.float32], [torch.float32], [torch.float32]),
        ([torch.bfloat16], [torch.bfloat16], [torch.float32]),
        (DTYPES, DTYPES[1:3], [torch.float32, torch.bfloat16]),
    ],
    ids=str,
)
def test_adamw(params, grads, states):
    p, g, m = draw(params), draw(grads), draw(states)
    v = [t.square() for t in draw(states)]
    exact = [clones(x, torch.float64) for x in (p, g, m, v)]
    sizes = [torch.maximum(a.abs(), b.abs()) for a, b in zip(exact[1], exact[2], strict=True)]
    reference.adamw_(*exact, 7, **ADAMW)
    adamw_(p, g, m, v, 7, **ADAMW)
    assert_rounded("exp_avgs", m, exact[2], sizes)
    assert_rounded("exp_avg_sqs", v, exact[3], exact[3])
    root = [(x / (1 - 0.95**7)).sqrt() + 1e-8 for x in exact[3]]
    update = [0.006 * 4 * (s + a.abs()) / r for s, a, r in zip(sizes, exact[2], root, strict=True)]
    assert_rounded("params", p, exact[0], [x.abs() + u for x, u in zip(exact[0], update, strict=True)])


def test_copy():
    sources = [torch.randint(-(2**15), 2**15, (n,), dtype=torch.int16).view(torch.bfloat16) for n in (1, 77, 9001)]
    destinations = [torch.zeros_like(t) for t in sources]
    copy_(destinations, sources)
    assert all(torch.equal(d.view(torch.int16), s.view(torch.int16)) for d, s in zip(destinations, sources))


def test_results_repeat_and_tables_are_kept():
    """The same lists find their table again; new addresses bring a new table of addresses, and no other."""
    a, b = draw([torch.float32]), draw([torch.bfloat16])
    ops._kept_chunks.cache_clear()
    ops._kept_addresses.cache_clear()
    first = dot(a, b)
    built = ops._kept_chunks.cache_info().misses, ops._kept_addresses.cache_info().misses
    assert torch.equal(first, dot(a, b))
    assert (ops._kept_chunks.cache_info().misses, ops._kept_addresses.cache_info().misses) == built
    moved = clones(b)
    assert torch.equal(first, dot(a, moved))
    assert ops._kept_chunks.cache_info().misses == built[0] and ops._kept_addresses.cache_info().misses > built[1]


def test_chunks_cover_every_element_once():
    sizes = (1, ops.CHUNK, ops.CHUNK + 1, 3, 5 * ops.CHUNK - 1)
    size, tensor, number = ops._chunks(sizes, torch.device("cpu"), 0)
    covered = [torch.zeros(n, dtype=torch.int32) for n in size.tolist()]
    for t, k in zip(tensor.tolist(), number.tolist(), strict=True):
        part = covered[t][k * ops.CHUNK : (k + 1) * ops.CHUNK]
        assert part.numel()
        part += 1
    assert all(bool((c == 1).all()) for c in covered)
