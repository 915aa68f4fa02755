"""The GPU kernels of ``gaussian_mmd`` in Triton's interpreter, against the float64 specification.

Run by tests/test_triton.py with TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton in a process of its own. The
interpreter truncates where it stores bfloat16, which GPUs round: its gradients are held to one more ulp here.
"""

from __future__ import annotations

import os

import pytest
import torch
import triton.language as tl

import triton
from checks import assert_agrees, assert_catches_spoiled
from fastguard.ops.gaussian_mmd import gaussian_mmd, reference
from fastguard.ops.philox import noise_slice, philox4x32

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

from fastguard.ops.gaussian_mmd import triton as ops

pytestmark = pytest.mark.interpreter

# (L, B, T, D) and why
SHAPES = {
    "one sample": (2, 1, 3, 20),
    "words stacked in pairs, tokens inside a block": (2, 3, 7, 37),
    "whole blocks": (1, 4, 5, 128),
    "one word at a time, items of unequal size": (1, 7, 3, 200),
    "a full tile": (1, 16, 2, 64),
    "pairs of tiles": (1, 19, 2, 40),
}


def draw(shape, dtype):
    layers, b, t, d = shape
    x = (0.3 + 1.2 * torch.randn(layers, b, t * d, dtype=torch.float64)).to(dtype)
    mask = torch.rand(b, t) < 0.7
    mask[0, 0] = True
    if t > 2:
        mask[:, 1] = False
    if b > 2:
        mask[1] = False
    return x, mask


def noise_of(x, *, seed, call, layer, sample_offset):
    """The noise of every layer in float64, from the emulation in torch."""
    at = dict(seed=seed, call=call, sample_offset=sample_offset, dtype=torch.float64)
    return torch.stack([noise_slice(x.shape[1], 0, x.shape[2], layer=layer + i, **at) for i in range(x.shape[0])])


def value_and_gradient(fn, x, upstream):
    leaf = x.detach().clone().requires_grad_()
    value = fn(leaf)
    (grad,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
    return value.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(shape, masked, dtype):
    if dtype != torch.float32 and not (masked and shape == SHAPES["whole blocks"]):
        pytest.skip("the dtype changes loads and stores only")
    if not masked and shape not in (SHAPES["whole blocks"], SHAPES["pairs of tiles"]):
        pytest.skip("a mask is the longer way through either kernel")
    x, mask = draw(shape, dtype)
    mask = mask if masked else None
    at = dict(seed=2**40 + 7, call=torch.tensor(3), layer=5, sample_offset=11)
    upstream = torch.linspace(-1.5, 2.0, shape[0], dtype=torch.float64)
    value, grad = value_and_gradient(lambda v: gaussian_mmd(v, mask, **at), x, upstream)
    noise = noise_of(x, **at)
    exact = value_and_gradient(lambda v: reference.gaussian_mmd(v, noise, mask), x.double(), upstream)
    peer = value_and_gradient(lambda v: reference.gaussian_mmd(v, noise.float(), mask), x.float(), upstream)
    assert_agrees("mmd", value, exact[0], peer[0], ulps=64)

    def check(g):
        assert_agrees("gradient", g, exact[1], peer[1].to(dtype), ulps=64 if dtype == torch.float32 else 2)

    if shape[1] > 1:
        assert_catches_spoiled(check, grad)
    check(grad)
    if mask is not None:
        assert not grad[:, ~mask.repeat_interleave(shape[3], 1)].any()


def test_explicit_noise_and_strides():
    whole, mask = draw((2, 6, 3, 48), torch.float32)
    x = whole[:, :4]
    noise = torch.randn(x.shape, dtype=torch.float64)
    upstream = torch.tensor([1.0, -0.5])
    for keep in (mask[:4], None):
        value, grad = value_and_gradient(lambda v, m=keep: gaussian_mmd(v, m, noise=noise), x, upstream)
        exact = value_and_gradient(lambda v, m=keep: reference.gaussian_mmd(v, noise, m), x.double(), upstream.double())
        assert_agrees("mmd", value, exact[0], ulps=64)
        assert_agrees("gradient", grad, exact[1], ulps=64)
    leaf = whole.clone().requires_grad_()
    gaussian_mmd(leaf[:, :4], noise=noise).backward(torch.ones(2))
    assert not leaf.grad[:, 4:].any() and leaf.grad[:, :4].any()


def test_all_masked_is_zero_and_nan_is_reported():
    x = torch.randn(2, 3, 40)
    value, grad = value_and_gradient(lambda v: gaussian_mmd(v, torch.zeros(3, 4), call=0), x, torch.ones(2))
    assert value.tolist() == [0.0, 0.0] and not grad.any()
    mask = torch.ones(3, 4)
    mask[0, 1] = 0
    x[0, 0, 12] = float("nan")  # under the mask
    x[1, 2, 7] = float("nan")
    value, grad = value_and_gradient(lambda v: gaussian_mmd(v, mask, call=0), x, torch.ones(2))
    assert value.isnan().tolist() == [False, True]
    assert torch.isfinite(grad[0]).all() and not torch.isfinite(grad[1]).all()


@triton.jit
def words_kernel(p_counter, p_words, p_noise, seed_low, seed_high, N: tl.constexpr):
    o = tl.arange(0, N)
    b_c0 = tl.load(p_counter + 4 * o).to(tl.uint32)
    b_c1 = tl.load(p_counter + 4 * o + 1).to(tl.uint32)
    layer = tl.load(p_counter + 2).to(tl.uint32)
    call = tl.load(p_counter + 3).to(tl.uint32)
    k0, k1 = tl.cast(seed_low, tl.uint32), tl.cast(seed_high, tl.uint32)
    b_w0, b_w1, b_w2, b_w3 = ops.words_of(b_c0, b_c1, layer, call, k0, k1)
    tl.store(p_words + 4 * o, b_w0.to(tl.int64))
    tl.store(p_words + 4 * o + 1, b_w1.to(tl.int64))
    tl.store(p_words + 4 * o + 2, b_w2.to(tl.int64))
    tl.store(p_words + 4 * o + 3, b_w3.to(tl.int64))
    b_z0, b_z1 = ops.pair_of_normals(b_w0, b_w1)
    b_z2, b_z3 = ops.pair_of_normals(b_w2, b_w3)
    tl.store(p_noise + o, b_z0)
    tl.store(p_noise + N + o, b_z1)
    tl.store(p_noise + 2 * N + o, b_z2)
    tl.store(p_noise + 3 * N + o, b_z3)


def test_integers_are_equal_and_normals_within_a_millionth():
    n, seed = 16384, 0xA4093822 | 0x299F31D0 << 32
    counters = torch.randint(0, 2**32, (n, 4))
    counters[:, 2:] = torch.tensor([0x13198A2E, 0x03707344])
    counters[0, :2] = torch.tensor([0x243F6A88, 0x85A308D3])
    words, noise = torch.zeros(n, 4, dtype=torch.int64), torch.zeros(4, n)
    words_kernel[(1,)](counters, words, noise, seed & 0xFFFFFFFF, seed >> 32, N=n)
    assert words[0].tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]  # Random123's known answer
    assert torch.equal(words, torch.stack(philox4x32(tuple(counters.T), seed), 1))
    radius = torch.sqrt(-2 * torch.log(((words[:, ::2] >> 9).double() + 0.5) * 2.0**-23))
    angle = (words[:, 1::2] >> 8).double() * (2 * torch.pi * 2.0**-24)
    want = torch.stack([radius * angle.cos(), radius * angle.sin()], 2).flatten(1).T
    assert float((noise - want).abs().max()) < 1e-6


def test_live_tokens_come_first():
    for t in (1, 5, 1500):
        mask = torch.rand(3, t) < 0.3
        order, live = torch.empty(t, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
        ops.order_kernel[(1,)](mask.view(torch.uint8), order, live, 3, t, TOKENS=min(1024, triton.next_power_of_2(t)))
        kept = mask.any(0)
        assert int(live) == int(kept.sum())
        assert order[: int(live)].tolist() == kept.nonzero()[:, 0].tolist()
        assert sorted(order.tolist()) == list(range(t))
