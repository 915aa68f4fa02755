"""gaussian_mmd against its specification, on every backend this machine has."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from checks import assert_agrees, assert_catches_spoiled
from fastguard import backend
from fastguard.ops.gaussian_mmd import gaussian_mmd, portable, reference
from fastguard.ops.philox import gaussian_noise

BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(reason is not None, reason=f"{b}: {reason}"))
    for b in ("cpu", "portable")
    for reason in [backend.unavailable(b, "cpu")]
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# (L, B, T, D) and why
SHAPES = {
    "one sample": (2, 1, 3, 20),
    "one feature": (1, 3, 1, 1),
    "tokens that share noise blocks": (2, 3, 7, 37),
    "several chunks of a token, odd end": (1, 2, 2, 2500),
    "more rows than share a load": (2, 9, 4, 64),
}


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    return request.param


def draw(shape, dtype):
    """x [L, B, T D] with a mean, so that samples stand apart from noise, and a mask with a dead token and sample."""
    layers, b, t, d = shape
    x = (0.3 + 1.2 * torch.randn(layers, b, t * d, dtype=torch.float64)).to(dtype)
    mask = torch.rand(b, t) < 0.7
    mask[0, 0] = True
    if t > 2:
        mask[:, 1] = False
    if b > 2:
        mask[1] = False
    return x, mask


def noise_of(x, dtype=torch.float64, **at):
    layer = at.pop("layer", 0)
    layers = range(layer, layer + x.shape[0])
    return torch.stack([gaussian_noise(*x.shape[1:], layer=i, dtype=dtype, **at) for i in layers])


def value_and_gradient(fn, x, upstream):
    leaf = x.detach().clone().requires_grad_()
    value = fn(leaf)
    (grad,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
    return value.detach(), grad


def upstream_of(x):
    """Another gradient for each layer, of either sign."""
    return torch.linspace(-1.5, 2.0, x.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(on_backend, shape, masked, dtype):
    x, mask = draw(shape, dtype)
    mask = mask if masked else None
    at = dict(seed=7, call=torch.tensor(3), layer=5, sample_offset=11)
    upstream = upstream_of(x)
    value, grad = value_and_gradient(lambda v: gaussian_mmd(v, mask, **at), x, upstream)
    assert grad.dtype == dtype and grad.is_contiguous()
    noise = noise_of(x, **at)
    exact = value_and_gradient(lambda v: reference.gaussian_mmd(v, noise, mask), x.double(), upstream)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    peer = value_and_gradient(lambda v: reference.gaussian_mmd(v, noise.to(wide), mask), x.to(wide), upstream)
    assert value.dtype == wide
    assert_agrees("mmd", value, exact[0], peer[0], ulps=64)

    def check(g):
        # fp32 arithmetic, rounded once to the dtype of x: a half ulp of each element, which `ulps` is relative to
        ulps = 1.0 if dtype in (torch.bfloat16, torch.float16) else 64.0
        assert_agrees("gradient", g, exact[1], peer[1].to(dtype), ulps=ulps)

    if shape[1] > 1 and shape[2] * shape[3] > 1:
        assert_catches_spoiled(check, grad)
    check(grad)
    if mask is not None:
        dropped = ~mask.repeat_interleave(shape[3], 1)
        assert not grad[:, dropped].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_explicit_noise(on_backend, dtype):
    x, mask = draw((2, 4, 5, 24), dtype)
    noise = torch.randn(x.shape, dtype=torch.float64)
    upstream = upstream_of(x)
    for kept in (mask, mask.to(torch.int64), mask.float(), None):
        value, grad = value_and_gradient(lambda v, m=kept: gaussian_mmd(v, m, noise=noise.float()), x, upstream)
        exact = value_and_gradient(
            lambda v, m=kept: reference.gaussian_mmd(v, noise.float().double(), m), x.double(), upstream
        )
        assert_agrees("mmd", value, exact[0], ulps=64)
        assert_agrees("gradient", grad, exact[1], exact[1].to(dtype), ulps=1 if dtype == torch.bfloat16 else 64)
    leaf = noise.clone().requires_grad_()
    gaussian_mmd(x.double().requires_grad_(), noise=leaf).sum().backward()
    assert leaf.grad is None


def test_samples_that_nearly_coincide(on_backend):
    """Squared distances far below the rows' norms: the values are as good as the bandwidth lets them be."""
    base = 3 * torch.randn(1, 1, 600, dtype=torch.float64)
    x = (base + 1e-3 * torch.randn(1, 4, 600, dtype=torch.float64)).float()
    upstream = torch.ones(1)
    value, grad = value_and_gradient(lambda v: gaussian_mmd(v, seed=1, call=0), x, upstream)
    exact = value_and_gradient(lambda v: reference.gaussian_mmd(v, noise_of(x, seed=1)), x.double(), upstream.double())
    assert_agrees("mmd", value, exact[0], ulps=64)
    assert_agrees("gradient", grad, exact[1], ulps=64)


def test_far_samples_underflow_without_harm(on_backend):
    x = torch.randn(1, 3, 50) * 1e15
    value, grad = value_and_gradient(lambda v: gaussian_mmd(v, call=0), x, torch.ones(1))
    exact = value_and_gradient(
        lambda v: reference.gaussian_mmd(v, noise_of(x)), x.double(), torch.ones(1, dtype=torch.float64)
    )
    assert_agrees("mmd", value, exact[0], ulps=64)
    assert_agrees("gradient", grad, exact[1], ulps=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_masked_is_zero(on_backend, dtype):
    x = torch.randn(2, 3, 40).to(dtype)
    for features, mask in (
        (x, torch.zeros(3, 4, dtype=torch.bool)),
        (x[:, :, :0], None),
        (x[:, :, :0], torch.ones(3, 2)),
    ):
        value, grad = value_and_gradient(lambda v, m=mask: gaussian_mmd(v, m, call=0), features, torch.ones(2))
        assert value.tolist() == [0.0, 0.0]
        assert grad.shape == features.shape and not grad.any()


def test_no_layers(on_backend):
    x = torch.zeros(0, 3, 40).requires_grad_()
    value = gaussian_mmd(x, call=0)
    assert value.shape == (0,)
    assert torch.autograd.grad(value.sum(), x)[0].shape == x.shape


def test_what_is_masked_is_not_read(on_backend):
    """Anything may lie under the mask: NaN and infinity too."""
    x, mask = draw((1, 3, 6, 16), torch.float32)
    spoiled = torch.where(mask.repeat_interleave(16, 1), x, torch.tensor(float("nan")))
    upstream = torch.ones(1)
    a = value_and_gradient(lambda v: gaussian_mmd(v, mask, call=0), x, upstream)
    b = value_and_gradient(lambda v: gaussian_mmd(v, mask, call=0), spoiled, upstream)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_nan_is_reported_not_hidden(on_backend):
    x = torch.randn(2, 3, 40)
    x[1, 2, 7] = float("nan")
    assert gaussian_mmd(x, call=0).isnan().tolist() == [False, True]


def test_non_contiguous(on_backend):
    """A view into a larger batch is taken as it is; strided features are copied; expanded samples coincide."""
    whole = torch.randn(3, 8, 80, dtype=torch.float64)
    mask = torch.rand(3, 4) < 0.6
    views = {
        "rows of a batch": whole[:, :3],
        "layers in the middle": whole.transpose(0, 1)[:, :3],
        "every other feature": torch.randn(2, 3, 160, dtype=torch.float64)[..., ::2],
        "expanded": torch.randn(1, 1, 80, dtype=torch.float64).expand(2, 3, 80),
    }
    for x in views.values():
        upstream = upstream_of(x)
        a = value_and_gradient(lambda v: gaussian_mmd(v, mask, call=0), x.contiguous(), upstream)
        leaf = x.detach().requires_grad_()
        value = gaussian_mmd(leaf, mask, call=0)
        (grad,) = torch.autograd.grad(value, leaf, upstream)
        assert torch.equal(a[0], value.detach()) and torch.equal(a[1], grad)


def test_samples_of_two_ranks_are_two_parts_of_one_batch(on_backend):
    """A shard at its offset sees the noise rows of the whole batch."""
    x, mask = draw((1, 6, 3, 20), torch.float64)
    noise = noise_of(x, seed=2)
    for part in (slice(0, 2), slice(2, 6)):
        mine = gaussian_mmd(x[:, part], mask[part], seed=2, call=0, sample_offset=part.start)
        assert_agrees("mmd", mine, reference.gaussian_mmd(x[:, part], noise[:, part], mask[part]), ulps=256)
    layers = torch.cat([x, x + 1])
    apart = torch.cat([gaussian_mmd(layers[i : i + 1], mask, call=0, layer=4 + i) for i in range(2)])
    assert torch.equal(gaussian_mmd(layers, mask, call=0, layer=4), apart)


def test_does_not_depend_on_the_number_of_threads(on_backend):
    if on_backend != "cpu":
        pytest.skip("the products are torch's")
    x, mask = draw((2, 5, 30, 50), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(value_and_gradient(lambda v: gaussian_mmd(v, mask, call=0), x, upstream_of(x)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_by_differences(on_backend):
    """The bandwidth counts as a constant, so the difference quotient is that of the frozen kernel."""
    x, _ = draw((1, 3, 1, 12), torch.float64)
    noise = noise_of(x)
    rows = torch.cat([x, noise], 1)[0]
    bandwidth = torch.cdist(rows, rows).square().sum() / 30 / 4

    def frozen(v):
        d2 = (r := torch.cat([v, noise], 1)[0])[:, None].sub(r[None]).square().sum(-1)
        k = sum(torch.exp(-d2 / (bandwidth * 2**i)) for i in range(5))
        return (k[:3, :3] + k[3:, 3:] - k[:3, 3:] - k[3:, :3]).mean()

    _, grad = value_and_gradient(lambda v: gaussian_mmd(v, call=0), x, torch.ones(1))
    step = 1e-5 * torch.randn_like(x)
    assert abs(float(frozen(x + step) - frozen(x - step)) / 2 - float((grad * step).sum())) < 1e-11


def test_works_under_checkpointing_and_twice_before_backward(on_backend):
    x, mask = draw((1, 3, 4, 16), torch.float64)
    x.requires_grad_()

    def run(v, call):
        return gaussian_mmd(v.sin(), mask, call=call).sum()

    calls = [torch.tensor(1), torch.tensor(2)]
    plain = torch.autograd.grad(run(x, calls[0]) + 2 * run(x, calls[1]), x)
    kept = sum(k * checkpoint(run, x, c, use_reentrant=False) for k, c in zip((1, 2), calls, strict=True))
    assert_agrees("checkpointed", torch.autograd.grad(kept, x)[0], plain[0])
    counter = torch.tensor(1)
    first = run(x, counter)
    counter += 1
    second = run(x, counter)
    counter += 1
    assert_agrees("raised in place", torch.autograd.grad(first + 2 * second, x)[0], plain[0])


def test_no_full_size_tensor_is_kept(on_backend):
    """Between forward and backward: x itself, the mask, and two 2B x 2B statistics."""
    x, mask = draw((1, 4, 8, 64), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gaussian_mmd(x.requires_grad_(), mask, call=0)
    assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) <= mask.numel() + 64 + 1


def test_the_upstream_gradient_is_not_written(on_backend):
    x, mask = draw((3, 2, 4, 16), torch.float32)
    value = gaussian_mmd(x.requires_grad_(), mask, call=0)
    upstream = torch.tensor(2.0).expand(3)
    torch.autograd.grad(value, x, upstream)
    assert upstream.tolist() == [2.0] * 3


def test_opcheck(on_backend):
    x, mask = draw((2, 3, 4, 10), torch.float64)
    x.requires_grad_()
    op = torch.ops.fastguard.gaussian_mmd
    torch.library.opcheck(op, (x, mask, None, torch.tensor(4), 3, 1, 2))
    torch.library.opcheck(op, (x[:, :2], None, torch.randn(2, 2, 40, dtype=torch.float64), None, 0, 0, 0))
    _, gram, call = op(x, mask, None, torch.tensor(4), 3, 1, 2)
    backward = torch.ops.fastguard.gaussian_mmd_backward
    torch.library.opcheck(backward, (torch.ones(2).double(), x.detach(), mask, None, call, gram.detach(), 3, 1, 2))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_breaks_or_recompiles(on_backend, compiler):
    if compiler == "inductor" and on_backend != "cpu":
        pytest.skip("inductor is checked on one backend: it takes 12 s")
    x, mask = draw((1, 3, 4, 16), torch.float32)

    def loss(v, m, call):
        return gaussian_mmd((2 * v).view(1, 3, -1), m, seed=5, call=call, layer=2).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            call = torch.tensor(step)
            leaf, again = x.clone().requires_grad_(), x.clone().requires_grad_()
            want = torch.autograd.grad(loss(leaf, mask, call), leaf)[0]
            assert_agrees("compiled", torch.autograd.grad(compiled(again, mask, call), again)[0], want)


def test_call_numbers_the_draw(on_backend):
    """An integer is the tensor that holds it, mod 2^32; another call is other noise."""
    x, mask = draw((1, 3, 4, 16), torch.float64)
    first, again, wrapped, other = (gaussian_mmd(x, mask, call=c) for c in (torch.tensor(5), 5, 5 - 2**32, 6))
    assert first.equal(again) and first.equal(wrapped) and not first.equal(other)


def test_segments_cover_live_tokens_only():
    mask = torch.tensor([[0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    assert portable.segments(mask, 60, 1000) == [(10, 30), (50, 60)]
    assert portable.segments(mask, 60, 8) == [(10, 18), (18, 26), (26, 30), (50, 58), (58, 60)]
    assert portable.segments(None, 60, 64) == [(0, 60)]
    assert portable.segments(mask & False, 60, 64) == []


X = torch.zeros(2, 3, 12)
ERRORS = {
    "x": ((X[0],), {}),
    "x dtype": ((X.int(),), {}),
    "x without samples": ((X[:, :0],), {}),
    "mask": ((X, torch.ones(2, 4)), {}),
    "mask dimensions": ((X, torch.ones(3)), {}),
    "mask width": ((X, torch.ones(3, 5)), {}),
    "mask without tokens": ((X, torch.ones(3, 0)), {}),
    "mask values": ((X, torch.full((3, 4), 0.5)), {}),
    "mask device": ((X, torch.ones(3, 4, device="meta")), {}),
    "mask dtype": ((X, torch.ones(3, 4, dtype=torch.complex64)), {}),
    "noise": ((X,), {"noise": torch.zeros(2, 3, 11)}),
    "noise dtype": ((X,), {"noise": X.int()}),
    "noise device": ((X,), {"noise": X.to("meta")}),
    "call": ((X,), {"call": torch.tensor(1.0)}),
    "call left out": ((X,), {"call": None}),
    "layer": ((X,), {"layer": -1}),
    "sample_offset": ((X,), {"sample_offset": 2**32}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(on_backend, case):
    arguments, options = ERRORS[case]
    with pytest.raises(ValueError, match=rf"^{case.split()[0]}: expected"):
        gaussian_mmd(*arguments, **{"call": 0, **options})
