"""representation_distance against its specification, on every backend this machine has."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from checks import assert_agrees, assert_catches_spoiled
from fastguard import backend
from fastguard.ops.representation_distance import reference, representation_distance

BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(reason is not None, reason=f"{b}: {reason}"))
    for b in ("cpu", "portable")
    for reason in [backend.unavailable(b, "cpu")]
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["l2", "cosine"]

# (L, N, D) and why
SHAPES = {
    "one row": (2, 1, 40),
    "two features": (1, 5, 2),
    "less than a vector, odd": (3, 7, 37),
    "several chunks of a row, odd end": (2, 3, 2500),
    "several tiles of rows": (2, 300, 576),
}


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    return request.param


def draw(shape, dtype, reference_dtype=None):
    """a and b, neither small nor parallel, and a mask that leaves a row out where there is more than one."""
    layers, n, _ = shape
    scale = torch.logspace(-1, 2, layers * n, dtype=torch.float64).view(layers, n, 1)
    a = (scale * (0.3 + torch.randn(shape, dtype=torch.float64))).to(dtype)
    b = (a.double() + scale * torch.randn(shape, dtype=torch.float64)).to(reference_dtype or dtype)
    mask = torch.rand(n) < 0.7
    mask[0] = True
    mask[1:2] = False
    return a, b, mask


def upstream_of(shape):
    """Another gradient for each row, of either sign."""
    return torch.linspace(-1.5, 2.1, shape[0] * shape[1], dtype=torch.float64).view(shape[:2])


def value_and_gradient(fn, a, upstream):
    leaf = a.detach().clone().requires_grad_()
    value = fn(leaf)
    (grad,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
    return value.detach(), grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(on_backend, shape, masked, dtype, kind):
    a, b, mask = draw(shape, dtype)
    mask = mask if masked else None
    upstream = upstream_of(shape)
    value, grad = value_and_gradient(lambda v: representation_distance(v, b, mask, kind=kind), a, upstream)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert value.dtype == wide and value.shape == shape[:2]
    assert grad.dtype == dtype and grad.is_contiguous()
    exact = value_and_gradient(lambda v: reference.representation_distance(v, b, mask, kind), a.double(), upstream)
    peer = value_and_gradient(lambda v: reference.representation_distance(v, b, mask, kind), a.to(wide), upstream)
    assert_agrees("distance", value, exact[0], peer[0])

    def check(g):
        # fp32 arithmetic, rounded once to the dtype of a: a half ulp of each element, which `ulps` is relative to
        ulps = 1.0 if dtype in (torch.bfloat16, torch.float16) else 32.0
        assert_agrees("gradient", g, exact[1], peer[1].to(dtype), ulps=ulps)

    check(grad)
    if shape[1] > 1:
        assert_catches_spoiled(lambda g: check(g.view(shape)), grad.flatten(0, 1))
    if masked:
        assert not value[:, ~mask].any() and not grad[:, ~mask].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float64),
    (torch.float64, torch.float16), (torch.float16, torch.bfloat16),
], ids=str)  # fmt: skip
def test_the_reference_has_a_dtype_of_its_own(on_backend, dtypes, kind):
    a, b, _ = draw((2, 3, 70), *dtypes)
    upstream = upstream_of(a.shape)
    value, grad = value_and_gradient(lambda v: representation_distance(v, b, kind=kind), a, upstream)
    exact = value_and_gradient(lambda v: reference.representation_distance(v, b, kind=kind), a.double(), upstream)
    assert_agrees("distance", value, exact[0])
    assert_agrees("gradient", grad, exact[1], exact[1].to(a.dtype), ulps=1 if a.dtype.itemsize == 2 else 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_have_no_distance_and_no_gradient(on_backend, kind, dtype):
    """To the bit, whatever the instructions: a live model that starts as its reference."""
    a, _, _ = draw((3, 40, 333), dtype)
    value, grad = value_and_gradient(lambda v: representation_distance(v, a, kind=kind), a, upstream_of(a.shape))
    assert not value.any() and not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_equal_row_among_others(on_backend, dtype):
    a, b, _ = draw((2, 4, 50), dtype)
    b[1, 2] = a[1, 2]
    for kind in KINDS:
        value, grad = value_and_gradient(
            lambda v, k=kind: representation_distance(v, b, kind=k), a, upstream_of(a.shape)
        )
        assert value[1, 2] == 0 and not grad[1, 2].any()
        assert torch.isfinite(grad).all() and int((value == 0).sum()) == 1


def test_nearly_parallel_rows(on_backend):
    """1 - cos of 1e-10 in fp32: as 1 minus a quotient it would be noise, and its gradient too."""
    a = torch.randn(1, 6, 200)
    b = (a + 1e-5 * torch.randn(1, 6, 200)).contiguous()
    upstream = upstream_of(a.shape)
    value, grad = value_and_gradient(lambda v: representation_distance(v, b, kind="cosine"), a, upstream)
    exact = value_and_gradient(lambda v: reference.representation_distance(v, b, kind="cosine"), a.double(), upstream)
    assert 1e-12 < float(exact[0].max()) < 1e-9
    # The unit vectors are rounded: eps over |u - v|, of 1e-5.
    assert_agrees("distance", value, exact[0], ratio=0.03, ulps=0.03 / 2.0**-23)
    assert_agrees("gradient", grad, exact[1], ratio=0.03, ulps=0.03 / 2.0**-23)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros(on_backend, dtype):
    a, b, _ = draw((1, 4, 40), dtype)
    a[0, 1], b[0, 2] = 0, 0
    a[0, 3], b[0, 3] = 0, 0
    value, grad = value_and_gradient(lambda v: representation_distance(v, b, kind="cosine"), a, upstream_of(a.shape))
    assert value[0, 1:].tolist() == [1.0, 1.0, 1.0] and not grad[0, 1:].any() and grad[0, 0].any()
    value, grad = value_and_gradient(lambda v: representation_distance(v, b), a, upstream_of(a.shape))
    exact = value_and_gradient(lambda v: reference.representation_distance(v, b), a.double(), upstream_of(a.shape))
    assert_agrees("distance", value, exact[0])
    assert_agrees("gradient", grad, exact[1], exact[1].to(dtype), ulps=1 if dtype.itemsize == 2 else 32)
    assert value[0, 3] == 0 and not grad[0, 3].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_is_not_read(on_backend, kind):
    a, b, mask = draw((2, 8, 30), torch.float32)
    spoiled = [torch.where(mask[:, None], x, torch.tensor(float("nan"))) for x in (a, b)]
    upstream = upstream_of(a.shape)
    want = value_and_gradient(lambda v: representation_distance(v, b, mask, kind=kind), a, upstream)
    found = value_and_gradient(lambda v: representation_distance(v, spoiled[1], mask, kind=kind), spoiled[0], upstream)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_are_reported_not_hidden(on_backend, kind):
    for value in ("nan", "inf"):
        for spoil in (0, 1):
            a, b, _ = draw((1, 3, 40), torch.float32)
            (a, b)[spoil][0, 1, 7] = float(value)
            distance = representation_distance(a, b, kind=kind)
            assert (~torch.isfinite(distance)).tolist() == [[False, True, False]]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_masked_and_nothing_at_all(on_backend, kind):
    a, b, mask = draw((2, 5, 30), torch.float32)
    cases = [(a, b, torch.zeros_like(mask)), (a[:0], b[:0], mask), (a[:, :0], b[:, :0], mask[:0])]
    for x, y, m in cases:
        value, grad = value_and_gradient(
            lambda v, y=y, m=m: representation_distance(v, y, m, kind=kind), x, torch.ones(x.shape[:2])
        )
        assert value.shape == x.shape[:2] and not value.any()
        assert grad.shape == x.shape and not grad.any()
    empty = a[:, :, :0]
    assert representation_distance(empty, empty, kind=kind).unique().tolist() == [0.0 if kind == "l2" else 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_non_contiguous(on_backend, kind):
    """Both on strides of their own: hidden states cut out of a larger batch, every other feature, expanded rows."""
    whole = torch.randn(6, 4, 80, dtype=torch.float64)
    views = {
        "rows of a batch": whole[:, 1:3],
        "transposed": whole.transpose(0, 1)[:, :3],
        "every other feature": whole[..., ::2],
        "expanded": whole[:1].expand(3, 4, 80),
    }
    for a in views.values():
        for b in (torch.randn(a.shape, dtype=torch.float32), torch.randn(1, 1, a.shape[2]).expand(a.shape)):
            upstream = upstream_of(a.shape)
            want = value_and_gradient(
                lambda v, b=b: representation_distance(v, b.contiguous(), kind=kind), a.contiguous(), upstream
            )
            leaf = a.detach().requires_grad_()
            value = representation_distance(leaf, b, kind=kind)
            (grad,) = torch.autograd.grad(value, leaf, upstream)
            assert torch.equal(want[0], value.detach()) and torch.equal(want[1], grad)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_differences(on_backend, kind):
    a, b, _ = draw((2, 3, 12), torch.float64)
    upstream = upstream_of(a.shape)
    _, grad = value_and_gradient(lambda v: representation_distance(v, b, kind=kind), a, upstream)
    step = 1e-6 * torch.randn_like(a)
    up, down = (representation_distance(a + s, b, kind=kind) for s in (step, -step))
    assert float(((up - down) * upstream).sum() / 2) == pytest.approx(float((grad * step).sum()), rel=1e-6)


def test_the_reference_gets_no_gradient(on_backend):
    a, b, _ = draw((1, 3, 20), torch.float32)
    b.requires_grad_()
    assert not representation_distance(a, b).requires_grad
    representation_distance(a.requires_grad_(), b).sum().backward()
    assert b.grad is None and a.grad is not None


def test_does_not_depend_on_the_number_of_threads(on_backend):
    if on_backend != "cpu":
        pytest.skip("the reductions are torch's")
    a, b, mask = draw((3, 100, 600), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(value_and_gradient(lambda v: representation_distance(v, b, mask), a, upstream_of(a.shape)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_works_under_checkpointing_and_twice_before_backward(on_backend, kind):
    a, b, mask = draw((2, 3, 16), torch.float64)
    a.requires_grad_()

    def run(v, scale):
        return representation_distance(v.sin() * scale, b, mask, kind=kind).sum()

    plain = torch.autograd.grad(run(a, 1.0) + 2 * run(a, 3.0), a)
    kept = sum(k * checkpoint(run, a, s, use_reentrant=False) for k, s in ((1, 1.0), (2, 3.0)))
    assert_agrees("checkpointed", torch.autograd.grad(kept, a)[0], plain[0])


@pytest.mark.parametrize("kind", KINDS)
def test_no_full_size_tensor_is_kept(on_backend, kind):
    """Between forward and backward: a and b themselves, the mask, and up to three numbers a row."""
    a, b, mask = draw((2, 9, 64), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        representation_distance(a.requires_grad_(), b, mask, kind=kind)
    own = {a.data_ptr(), b.data_ptr(), mask.data_ptr()}
    assert sum(t.numel() for t in saved if t.data_ptr() not in own) <= 3 * 2 * 9


def test_the_upstream_gradient_is_not_written(on_backend):
    a, b, _ = draw((2, 3, 16), torch.float32)
    value = representation_distance(a.requires_grad_(), b)
    upstream = torch.tensor(2.0).expand(2, 3)
    torch.autograd.grad(value, a, upstream)
    assert upstream.unique().tolist() == [2.0]


@pytest.mark.parametrize("cosine", [False, True])
def test_opcheck(on_backend, cosine):
    a, b, mask = draw((2, 3, 10), torch.float64)
    op = torch.ops.fastguard.representation_distance
    torch.library.opcheck(op, (a.requires_grad_(), b, mask, cosine))
    torch.library.opcheck(op, (a.detach().transpose(0, 1).requires_grad_(), b.float().transpose(0, 1), None, cosine))
    distance, inverse = op(a.detach(), b, mask, cosine)
    backward = torch.ops.fastguard.representation_distance_backward
    torch.library.opcheck(backward, (torch.ones(2, 3).double(), a.detach(), b, mask, distance, inverse, cosine))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_breaks_or_recompiles(on_backend, compiler):
    if compiler == "inductor" and on_backend != "cpu":
        pytest.skip("inductor is checked on one backend: it takes long")
    a, b, mask = draw((2, 5, 24), torch.float32)

    def loss(v, r, m):
        return (representation_distance(2 * v, r, m) + representation_distance(v, r, m, kind="cosine")).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (1.0, 2.0):
            leaf, again = (scale * a).requires_grad_(), (scale * a).requires_grad_()
            want = torch.autograd.grad(loss(leaf, b, mask), leaf)[0]
            assert_agrees("compiled", torch.autograd.grad(compiled(again, b, mask), again)[0], want)


X = torch.zeros(2, 3, 12)
ERRORS = {
    "a": ((X[0], X[0]), {}),
    "a dtype": ((X.int(), X), {}),
    "b": ((X, X[:1]), {}),
    "b dtype": ((X, X.long()), {}),
    "b device": ((X, X.to("meta")), {}),
    "mask": ((X, X, torch.ones(2, dtype=torch.bool)), {}),
    "mask dtype": ((X, X, torch.ones(3)), {}),
    "mask device": ((X, X, torch.ones(3, dtype=torch.bool, device="meta")), {}),
    "kind": ((X, X), {"kind": "l1"}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    arguments, options = ERRORS[case]
    with pytest.raises(ValueError, match=rf"^{case.split()[0]}: expected"):
        representation_distance(*arguments, **options)
