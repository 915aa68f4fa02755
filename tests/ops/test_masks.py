"""Packed masks against their bit-by-bit specification, on every backend this machine has."""

import numpy
import pytest
import torch

from fastguard import backend
from fastguard.ops.masks import and_not, apply_mask_, count_bits, pack_mask, reference, unpack_mask
from fastguard.ops.masks.op import FLOATS

BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(reason is not None, reason=f"{b}: {reason}"))
    for b in ("cpu", "portable")
    for reason in [backend.unavailable(b, "cpu")]
]

# Sizes and why: none; a bit; a byte less one, a byte, one more; a word and a bit; several vectors; several spans
SIZES = [0, 1, 7, 8, 9, 65, 1000, 200003]
DENSITIES = [0.0, 0.02, 0.5, 1.0]


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("n", SIZES)
def test_pack_and_unpack(on_backend, n, density):
    mask = torch.rand(n) < density
    packed = pack_mask(mask)
    assert torch.equal(packed, reference.pack(mask))
    assert torch.equal(packed, torch.from_numpy(numpy.packbits(mask.numpy(), bitorder="little")))
    assert torch.equal(unpack_mask(packed, (n,)), reference.unpack(packed, n))
    assert torch.equal(unpack_mask(packed, [n]), mask)
    assert count_bits(packed).dtype == torch.int64 and int(count_bits(packed)) == int(mask.sum())


def test_more_than_a_piece(on_backend):
    mask = torch.rand(3, 3_000_001) < 0.3
    packed = pack_mask(mask)
    assert torch.equal(packed, torch.from_numpy(numpy.packbits(mask.numpy(), bitorder="little")))
    assert torch.equal(unpack_mask(packed, mask.shape), mask)
    assert int(count_bits(packed)) == int(mask.sum())
    weight, value = torch.randn(2, *mask.shape)
    pruned = weight.clone()
    apply_mask_(pruned, packed, value)
    assert torch.equal(pruned, torch.where(mask, value, weight))


def test_shapes_and_strides(on_backend):
    for mask in (torch.tensor(True), torch.rand(5, 9).t() < 0.5, (torch.rand(4, 6) < 0.5)[:, ::2]):
        packed = pack_mask(mask)
        assert torch.equal(packed, reference.pack(mask))
        assert torch.equal(unpack_mask(packed, mask.shape), mask)
        assert torch.equal(unpack_mask(packed.repeat_interleave(2)[::2], mask.shape), mask)


def bits(x):
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_apply(on_backend, n, dtype, density):
    """Bit for bit, NaN payloads, infinities and -0.0 included, and nothing beside the entries whose bits are set."""
    mask = torch.rand(n) < density
    memory, value = torch.randint(0, 256, (2, (n + 2) * dtype.itemsize), dtype=torch.uint8).view(dtype)
    for given in (None, value[1:-1]):
        whole = memory.clone()
        apply_mask_(whole[1:-1], pack_mask(mask), given)
        exact = memory.clone()
        of_value = None if given is None else bits(given)
        bits(exact)[1:-1] = reference.apply(bits(memory)[1:-1], mask, of_value)
        assert torch.equal(bits(whole), bits(exact))
        if mask.any() and given is not None and not torch.equal(bits(exact), bits(memory)):
            assert not torch.equal(bits(whole), bits(memory)), "an untouched weight would pass"


def test_a_mask_on_strides_on_a_parameter_and_on_a_gradient(on_backend):
    mask = torch.rand(6, 10) < 0.5
    parameter = torch.nn.Parameter(torch.randn(10, 6).t())
    before, version = parameter.detach().clone(), parameter._version
    apply_mask_(parameter, pack_mask(mask))
    assert torch.equal(parameter.detach(), before.masked_fill(mask, 0)) and parameter._version > version
    assert parameter.requires_grad and parameter.stride() == (1, 6)
    y = (parameter * 2).sum()
    y.backward()
    apply_mask_(parameter.grad, pack_mask(mask))
    assert torch.equal(parameter.grad, torch.full((6, 10), 2.0).masked_fill(mask, 0))
    held = torch.nn.Parameter(torch.randn(6, 10))
    loss = held.square().sum()
    apply_mask_(held, pack_mask(mask))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_values_are_rounded_to_the_weights_dtype(on_backend):
    mask, weight, value = torch.rand(100) < 0.5, torch.randn(100).bfloat16(), torch.randn(100, dtype=torch.float64)
    exact = torch.where(mask, value.bfloat16(), weight)
    apply_mask_(weight, pack_mask(mask), value)
    assert torch.equal(weight, exact)


def test_set_difference(on_backend):
    a, b = torch.rand(2, 77) < 0.5
    difference = and_not(pack_mask(a), pack_mask(b))
    assert torch.equal(unpack_mask(difference, (77,)), a & ~b)
    assert int(count_bits(difference)) == int((a & ~b).sum())


def test_what_does_not_fit_is_refused_by_name():
    weight, mask = torch.randn(3, 5), pack_mask(torch.rand(15) < 0.5)
    for call, match in (
        (lambda: pack_mask(torch.ones(3)), "mask: expected torch.bool, got torch.float32"),
        (lambda: unpack_mask(mask, (17,)), r"packed: expected uint8 \[3\], a packed mask of 17 entries, got .*\(2,\)"),
        (lambda: unpack_mask(mask.int(), (15,)), "packed: expected uint8"),
        (lambda: apply_mask_(weight, mask[:1]), r"mask: expected uint8 \[2\]"),
        (lambda: apply_mask_(weight, weight > 0), "mask: expected uint8"),
        (lambda: apply_mask_(weight.int(), mask), "weight: expected a dtype of"),
        (lambda: apply_mask_(torch.ones(1, 5).expand(3, 5), mask), "weight: expected memory of its own"),
        (lambda: apply_mask_(weight, mask, weight[0]), r"value: expected floats \(3, 5\)"),
        (lambda: apply_mask_(weight, mask, weight.to("meta")), "value: expected device cpu, got meta"),
        (lambda: and_not(mask, mask[:1]), r"b: expected uint8 \(2,\)"),
        (lambda: and_not(weight, weight), "a: expected uint8"),
        (lambda: count_bits(weight), "packed: expected torch.uint8"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_opcheck_and_compile(on_backend):
    mask, weight = torch.rand(3, 7) < 0.5, torch.randn(3, 7)
    packed = pack_mask(mask)
    ops = torch.ops.fastguard
    for op, arguments in (
        (ops.pack_mask, (mask,)),
        (ops.unpack_mask, (packed, [3, 7])),
        (ops.apply_mask_, (weight, packed, None)),
        (ops.apply_mask_, (weight.t(), packed, torch.randn(7, 3))),
        (ops.count_bits, (packed,)),
    ):
        torch.library.opcheck(op, arguments)

    def run(weight, scores):
        chosen = pack_mask(scores > 0)
        rest = and_not(chosen, pack_mask(scores > 1))
        apply_mask_(weight, rest)
        return count_bits(rest), unpack_mask(rest, weight.shape), weight.sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    scores, ours, theirs = torch.randn(3, 7), weight.clone(), weight.clone()
    for a, b in zip(compiled(ours, scores), run(theirs, scores), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours, theirs)
