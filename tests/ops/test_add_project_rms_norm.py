"""add_project_rms_norm against its specification, on every backend this machine has."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from checks import assert_agrees, assert_catches_spoiled
from fastguard import backend, directions
from fastguard.ops.add_project_rms_norm import add_project_rms_norm, reference

BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(reason is not None, reason=f"{b}: {reason}"))
    for b in ("cpu", "portable")
    for reason in [backend.unavailable(b, "cpu")]
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = (torch.bfloat16, torch.float16)
KINDS = ["rms", "rms_offset", "layer"]

# (shape of the stream, K or None, index's dimensions or None) and why
SHAPES = {
    "no projection": ((7, 37), None, None),
    "one direction, one row": ((1, 40), 1, None),
    "one direction, odd": ((2, 5, 37), 1, None),
    "four directions, several chunks, odd end": ((5, 1100), 4, None),
    "sixteen": ((19, 70), 16, None),
    "sixty-four": ((9, 200), 64, None),
    "a basis for each sequence": ((5, 9, 50), 3, 1),
}
EPS = 1e-5


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    return request.param


def draw(case, dtype=torch.float64, update_dtype=None, weight_dtype=None):
    """Residual, update, weight, bias; the basis and its index."""
    shape, k, index_dims = case
    size = torch.rand(*shape[:-1], 1, dtype=torch.float64).add(0.2)
    residual, update = ((size * torch.randn(shape, dtype=torch.float64)) for _ in range(2))
    weight, bias = torch.rand(2, shape[-1], dtype=torch.float64).add(0.3)
    given = [t.to(d or dtype) for t, d in (
        (residual, dtype), (update, update_dtype), (weight, weight_dtype), (bias, weight_dtype)
    )]  # fmt: skip
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    groups = () if index_dims is None else (4,)
    basis = None if k is None else directions.orthonormalise(torch.randn(*groups, k, shape[-1], dtype=wide))
    index = None if index_dims is None else torch.tensor([1, -1, 3, 3, 0, 2])[: shape[0]]
    return given, basis, index


def values_and_gradients(fn, given, upstream):
    """[stream, normed, and the gradients of residual, update, weight, bias]."""
    leaves = [t.detach().clone().requires_grad_() for t in given]
    values = fn(*leaves)
    grads = torch.autograd.grad(values, leaves, [u.to(v.dtype) for u, v in zip(upstream, values, strict=True)])
    return [v.detach() for v in values] + list(grads)


NAMES = ("stream", "normed", "residual's gradient", "update's gradient", "weight's gradient", "bias's gradient")


def compare(case, dtype, kind, scale=1.0, update_dtype=None, weight_dtype=None):
    given, basis, index = draw(case, dtype, update_dtype, weight_dtype)
    upstream = [torch.randn(case[0], dtype=torch.float64).to(dtype) for _ in range(2)]

    def ours(r, u, w, b):
        return add_project_rms_norm(r, u, basis, w, EPS, scale=scale, kind=kind, bias=b, basis_index=index)

    def plain(r, u, w, b):
        q = None if basis is None else basis.to(r.dtype)
        return reference.add_project_rms_norm(r, u, q, w, EPS, scale, kind, b, index)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = values_and_gradients(ours, given, upstream)
    exact = values_and_gradients(plain, [t.double() for t in given], upstream)
    peer = values_and_gradients(plain, [t.to(wide) for t in given], upstream)
    dtypes = [given[0].dtype, given[0].dtype, *(t.dtype for t in given)]
    for name, got, want, same, expected in zip(NAMES, found, exact, peer, dtypes, strict=True):
        assert got.dtype == expected, name
        # fp32 arithmetic; in half precision the norm and its gradient see the stream as it was rounded
        ulps = (1.0 if name == "stream" else 4.0) if expected in HALF else (32.0 if dtype not in HALF else 2.0**15)

        def check(g, name=name, want=want, same=same, expected=expected, ulps=ulps):
            assert_agrees(name, g.reshape(want.shape), want, same.to(expected), ulps=ulps)

        if name.endswith("gradient"):
            assert_catches_spoiled(check, got.flatten(0, -2) if got.dim() > 2 else got)
        else:
            check(got)
            assert got.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(on_backend, case, dtype, kind):
    compare(case, dtype, kind)


@pytest.mark.parametrize("dtypes", [
    (torch.float32, torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float64, torch.float16, torch.float32), (torch.float32, torch.float32, torch.float16),
], ids=str)  # fmt: skip
def test_update_and_weight_have_dtypes_of_their_own(on_backend, dtypes):
    compare(((4, 70), 4, None), *dtypes[:1], "rms_offset", 0.7, *dtypes[1:])


def test_either_gradient_alone_and_no_weight(on_backend):
    (r, u, w, _), basis, _ = draw(((6, 40), 3, None))
    r.requires_grad_()
    for kind in KINDS:
        for weight in (w, None):
            got = add_project_rms_norm(r, u, basis, weight, EPS, kind=kind)
            want = reference.add_project_rms_norm(r, u, basis, weight, EPS, 1.0, kind)
            for one, other in zip(got, want, strict=True):
                upstream = torch.randn_like(one)
                grads = [torch.autograd.grad(x, r, upstream, retain_graph=True)[0] for x in (one, other)]
                assert_agrees("gradient", *grads)
    plain = add_project_rms_norm(r, u, None, w, EPS)[0]
    assert torch.equal(torch.autograd.grad(plain, r, plain.detach())[0], plain)


def test_a_massive_activation_along_the_basis(on_backend):
    """What is left of it is normed from its elements: sqrt(|x|^2 - s^2) has no digits left here."""
    basis = directions.orthonormalise(torch.randn(1, 256))
    residual = 3e4 * basis.repeat(3, 1)
    update = torch.randn(3, 256)
    stream, normed = add_project_rms_norm(residual, update, basis, torch.ones(256), EPS)
    exact = reference.add_project_rms_norm(
        residual.double(), update.double(), basis.double(), torch.ones(256).double(), EPS
    )
    # the sum's own rounding, 2^-24 of the massive feature
    assert_agrees("stream", stream, exact[0], ulps=2.0**13)
    assert_agrees("normed", normed, exact[1], ulps=2.0**13)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(3), rtol=1e-4, atol=0)
    assert float((normed @ basis.T).abs().max()) < 0.05


def test_the_norm_is_of_the_stream_as_it_is_stored(on_backend):
    (r, u, w, _), basis, _ = draw(((6, 300), 2, None), torch.bfloat16)
    stream, normed = add_project_rms_norm(r, u, basis, w, EPS)
    _, again = add_project_rms_norm(stream, torch.zeros_like(stream), None, w, EPS)
    assert torch.equal(normed, again)


def test_equals_the_modules_that_it_replaces(on_backend):
    (r, u, w, b), _, _ = draw(((4, 96), None, None), torch.float32)
    rms, layer = torch.nn.RMSNorm(96, EPS), torch.nn.LayerNorm(96, EPS)
    with torch.no_grad():
        rms.weight.copy_(w)
        layer.weight.copy_(w)
        layer.bias.copy_(b)
        for norm, kind, bias in ((rms, "rms", None), (layer, "layer", b)):
            stream, normed = add_project_rms_norm(r, u, None, w, EPS, kind=kind, bias=bias)
            assert torch.equal(stream, r + u)
            assert_agrees(kind, normed, norm(r + u).double())


def test_gradients_by_differences(on_backend):
    for kind, case in (("rms", ((3, 6), 2, None)), ("layer", ((4, 2, 6), 1, 1))):
        given, basis, index = draw(case)

        def run(r, u, w, b, basis=basis, index=index, kind=kind):
            return add_project_rms_norm(r, u, basis, w, 1e-2, scale=0.8, kind=kind, bias=b, basis_index=index)

        assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in given])


def test_strides(on_backend):
    whole = torch.randn(4, 6, 40, dtype=torch.float64)
    basis = directions.orthonormalise(torch.randn(2, 40, dtype=torch.float64))
    w = torch.rand(80, dtype=torch.float64)[::2]
    for r, u in ((whole[:, 1:4], whole[:, 2:5]), (whole.transpose(0, 1), whole[:1, :1].expand(6, 4, 40))):
        leaf = r.detach().requires_grad_()
        got = add_project_rms_norm(leaf, u, basis, w, EPS)
        want = add_project_rms_norm(r.contiguous(), u.contiguous(), basis, w.contiguous(), EPS)
        assert all(map(torch.equal, got, want))
        (grad,) = torch.autograd.grad(got[1].transpose(0, 1).sum(), leaf)  # an expanded upstream gradient
        dense = r.contiguous().requires_grad_()
        out = add_project_rms_norm(dense, u.contiguous(), basis, w, EPS)[1]
        assert torch.equal(grad, torch.autograd.grad(out, dense, torch.ones_like(out))[0])


def test_what_is_kept_for_the_backward(on_backend):
    """The stream, which is an output, and the weight."""
    (r, u, w, _), basis, _ = draw(((5, 40), 2, None), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        stream, _ = add_project_rms_norm(r.requires_grad_(), u, basis, w, EPS)
    own = {t.data_ptr() for t in (stream, w, basis)}
    assert {t.data_ptr() for t in saved} == own


def test_does_not_depend_on_threads(on_backend):
    if on_backend != "cpu":
        pytest.skip("the products are torch's")
    given, basis, _ = draw(((203, 300), 4, None), torch.float32)
    upstream = [torch.randn(203, 300) for _ in range(2)]
    threads, results = torch.get_num_threads(), []

    def run(r, u, w, b):
        return add_project_rms_norm(r, u, basis, w, EPS, bias=b)

    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(values_and_gradients(run, given, upstream))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_transforms_checkpointing_and_autocast(on_backend):
    (r, u, w, _), basis, _ = draw(((3, 4, 12), 2, None), torch.float32)

    def loss(r, w, op=add_project_rms_norm):
        stream, normed = op(r, u, basis, w, EPS)
        return (stream * normed.sin()).sum()

    found = torch.func.grad(loss, (0, 1))(r, w)
    want = torch.func.grad(loss, (0, 1))(r, w, reference.add_project_rms_norm)
    assert_agrees("func.grad", found[0], want[0])
    assert_agrees("func.grad", found[1], want[1])
    with pytest.raises(RuntimeError, match="add_project_rms_norm: has no forward-mode derivative"):
        torch.func.jvp(lambda r: loss(r, w), (r,), (r,))
    r.requires_grad_()
    (plain,) = torch.autograd.grad(loss(r, w), r)
    assert torch.equal(torch.autograd.grad(checkpoint(loss, r, w, use_reentrant=False), r)[0], plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(loss(r, w), r)[0], plain)
    (grad,) = torch.autograd.grad(loss(r, w), r, create_graph=True)
    with pytest.raises(RuntimeError, match="add_project_rms_norm: has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("indexed", [False, True])
def test_opcheck(indexed):
    given, basis, index = draw(((4, 3, 10), 2, 1 if indexed else None))
    r, u, w, b = (t.requires_grad_() for t in given)
    groups = basis.view(-1, 2, 10)
    torch.library.opcheck(torch.ops.fastguard.add_project_rms_norm, (r, u, groups, index, w, b, EPS, 0.9, int(indexed)))
    grads = (torch.randn_like(r), torch.randn_like(r))
    args = (*grads, r.detach(), groups, index, w.detach(), EPS, 0.9, 2, True)
    torch.library.opcheck(torch.ops.fastguard.add_project_rms_norm_backward, args)


def test_compiles_without_breaks_or_recompiles(on_backend):
    (r, u, w, b), basis, index = draw(((4, 3, 24), 2, 1), torch.float32)

    def loss(r, u, w, b, q, i):
        h, x = add_project_rms_norm(r, u, q, w, EPS, basis_index=i)
        h, x = add_project_rms_norm(h, x.relu(), None, w, EPS, kind="layer", bias=b)
        return (h * x).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (1.0, 2.0):
            leaves = [(scale * t).requires_grad_() for t in (r, u, w, b)]
            wants = torch.autograd.grad(loss(*leaves, basis, index), leaves)
            for got, want in zip(torch.autograd.grad(compiled(*leaves, basis, index), leaves), wants, strict=True):
                assert_agrees("compiled", got, want)


def test_no_rows(on_backend):
    (r, u, w, b), basis, _ = draw(((2, 12), 2, None), torch.float32)
    r, w = r[:0].requires_grad_(), w.requires_grad_()
    _, normed = add_project_rms_norm(r, u[:0], basis, w, EPS, bias=b)
    grads = torch.autograd.grad(normed.sum(), (r, w))
    assert normed.shape == r.shape and grads[0].shape == r.shape and not grads[1].any()


X, Q, W = torch.zeros(2, 3, 12), torch.eye(12)[:2], torch.ones(12)
ERRORS = {
    "residual": ((X.long(), X, Q, W, EPS), {}),
    "residual no features": ((X[..., :0], X[..., :0], Q, W, EPS), {}),
    "update": ((X, X[:1], Q, W, EPS), {}),
    "update dtype": ((X.bfloat16(), X, Q, W, EPS), {}),
    "update device": ((X, X.to("meta"), Q, W, EPS), {}),
    "basis": ((X, X, Q[:, :5], W, EPS), {}),
    "basis not orthonormal": ((X, X, torch.ones(2, 12), W, EPS), {}),
    "basis trained": ((X, X, Q.clone().requires_grad_(), W, EPS), {}),
    "basis_index": ((X, X, Q[None], W, EPS), {"basis_index": torch.zeros(3, dtype=torch.long)}),
    "basis_index range": ((X, X, Q[None], W, EPS), {"basis_index": torch.tensor([0, 1])}),
    "basis_index without basis": ((X, X, None, W, EPS), {"basis_index": torch.tensor([0, 0])}),
    "weight": ((X, X, Q, W[:5], EPS), {}),
    "weight dtype": ((X, X, Q, W.long(), EPS), {}),
    "bias": ((X, X, Q, W, EPS), {"bias": W[:5]}),
    "eps": ((X, X, Q, W, 0.0), {}),
    "kind": ((X, X, Q, W, EPS), {"kind": "batch"}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    arguments, options = ERRORS[case]
    with pytest.raises(ValueError, match=rf"^{case.split()[0]}: expected"):
        add_project_rms_norm(*arguments, **options)


def test_dtensors_are_refused_by_name():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise AssertionError

    with pytest.raises(ValueError, match=r"^weight: expected a plain tensor, got a DTensor"):
        add_project_rms_norm(X, X, Q, W.as_subclass(Sharded), EPS)
