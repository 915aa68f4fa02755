"""project_out against its specification, on every backend this machine has."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from checks import assert_agrees, assert_catches_spoiled
from fastguard import backend, directions
from fastguard.ops.project_out import project_out, project_out_, reference

BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(reason is not None, reason=f"{b}: {reason}"))
    for b in ("cpu", "portable")
    for reason in [backend.unavailable(b, "cpu")]
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = (torch.bfloat16, torch.float16)

# (shape of x, K, index's dimensions or None) and why
SHAPES = {
    "one row, one direction": ((1, 40), 1, None),
    "less than a vector": ((3, 5), 2, None),
    "odd, three dimensions": ((2, 7, 37), 3, None),
    "several chunks, odd end": ((5, 1100), 4, None),
    "blocks of rows and what is left of them": ((21, 70), 6, None),
    "many directions": ((9, 600), 64, None),
    "as many directions as features": ((4, 16), 16, None),
    "a basis for each row": ((11, 50), 2, 1),
    "a basis for each sequence": ((6, 9, 50), 5, 1),
    "a basis for each token": ((2, 5, 20), 1, 2),
}


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    return request.param


def draw(case, dtype=torch.float64):
    """x with rows of different scales, a basis in fp32 (float64 for float64), an index that leaves rows out."""
    shape, k, index_dims = case
    x = torch.randn(shape, dtype=torch.float64) * torch.rand(*shape[:-1], 1, dtype=torch.float64).add(0.1) * 3
    groups = () if index_dims is None else (4,)
    given = torch.randn(*groups, k, shape[-1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    index = None if index_dims is None else torch.randint(-1, 4, shape[:index_dims])
    if index is not None:
        index.view(-1)[0] = -1
    return x.to(dtype), directions.orthonormalise(given), index


def value_and_gradients(fn, x, basis, upstream):
    leaves = [x.detach().clone().requires_grad_()]
    if basis is not None:
        leaves.append(basis.detach().clone().requires_grad_())
    value = fn(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))


@pytest.mark.parametrize("preserve", [False, True], ids=["linear", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(on_backend, case, dtype, preserve):
    """Values and gradients, with a basis that is constant and one that is trained."""
    if preserve and case[1] == case[0][-1]:
        pytest.skip("nothing is left of a row to be enlarged")
    x, basis, index = draw(case, dtype)
    scale = 0.8 if case[1] == case[0][-1] else 1.3
    upstream = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def ours(x, q=basis):
        return project_out(x, q, scale, basis_index=index, preserve_norm=preserve)

    def plain(x, q=basis):
        return reference.project_out(x, q, scale, index, preserve)

    value, dx = value_and_gradients(ours, x, None, upstream)
    assert value.dtype == dtype and value.is_contiguous() and dx.dtype == dtype
    exact = value_and_gradients(plain, x.double(), basis.double(), upstream)
    peer = value_and_gradients(plain, x.to(wide), basis, upstream)
    ulps = 1.0 if dtype in HALF else 32.0

    def check(name, k):
        return lambda found: assert_agrees(name, found.view(exact[k].shape), exact[k], peer[k].to(dtype), ulps=ulps)

    check("value", 0)(value)
    assert_catches_spoiled(check("gradient", 1), dx.flatten(0, -2) if x.dim() > 2 else dx)
    trained = value_and_gradients(ours, x, basis, upstream)
    check("value", 0)(trained[0])
    check("gradient", 1)(trained[1])
    assert trained[2].dtype == basis.dtype
    assert_catches_spoiled(
        lambda g: assert_agrees("basis", g.view(exact[2].shape), exact[2], peer[2], ulps=64), trained[2].flatten(0, -2)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_left_in_the_span(on_backend, dtype):
    """With scale 1 the result is orthogonal to the basis to rounding, whatever the activations' one massive feature."""
    x, basis, _ = draw(((6, 300), 3, None), dtype)
    x[0] = (500 * basis[1].double() + torch.randn(300).double()).to(dtype)
    out = project_out(x, basis)
    eps = torch.finfo(dtype).eps
    left = (out.double() @ basis.double().T).abs().amax(-1)
    size = x.double().norm(dim=-1) if dtype not in HALF else out.double().norm(dim=-1)
    assert (left <= 4 * max(eps, 2.0**-23 if dtype != torch.float64 else 0) * size + 1e-30).all() or dtype in HALF
    if dtype in HALF:  # rounding of the result, element by element, and of the removal in fp32
        assert (left <= eps * size + 8 * 2.0**-23 * x.double().norm(dim=-1)).all()


def test_the_norm_is_kept(on_backend):
    x, basis, index = draw(((6, 4, 90), 3, 1))
    out = project_out(x, basis, 0.7, basis_index=index, preserve_norm=True)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(out[index < 0], x[index < 0])
    x = (2.5 * basis[0, 1]).expand(3, 90).clone().requires_grad_()
    x.data[1] += torch.randn(90)
    x.data[2] = 0
    spanned = torch.zeros(2, 90, dtype=torch.float64)
    spanned[0, 5] = spanned[1, 7] = 1
    x.data[0] = spanned[0] * 4
    out = project_out(x, spanned, preserve_norm=True)
    (grad,) = torch.autograd.grad(out, x, torch.randn(3, 90, dtype=torch.float64))
    assert not out[[0, 2]].any() and not grad[[0, 2]].any() and out[1].any() and grad[1].any()


def test_a_row_without_a_basis_is_left_alone_to_the_bit(on_backend):
    for dtype in DTYPES:
        x, basis, index = draw(((7, 3, 50), 2, 1), dtype)
        out = project_out(x, basis, basis_index=index)
        assert torch.equal(out[index < 0], x[index < 0]) and not torch.equal(out[index >= 0], x[index >= 0])


@pytest.mark.parametrize("preserve", [False, True], ids=["linear", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(on_backend, dtype, preserve):
    for case in SHAPES.values():
        x, basis, index = draw(case, dtype)
        want = project_out(x, basis, basis_index=index, preserve_norm=preserve)
        assert project_out_(x, basis, basis_index=index, preserve_norm=preserve) is x
        assert torch.equal(x, want)
    whole = torch.randn(4, 6, 20, dtype=torch.float64).to(dtype)
    basis = directions.orthonormalise(torch.randn(2, 20))
    for view in (lambda t: t[:, 1:3], lambda t: t.transpose(0, 1), lambda t: t[..., ::2]):
        copy, own = whole.clone(), directions.orthonormalise(torch.randn(2, view(whole).shape[-1]))
        want = project_out(view(copy).contiguous(), own, preserve_norm=preserve)
        version = copy._version
        project_out_(view(copy), own, preserve_norm=preserve)
        assert torch.equal(view(copy), want) and copy._version > version
        untouched = torch.ones_like(copy, dtype=torch.bool)
        view(untouched).fill_(False)
        assert torch.equal(copy[untouched], whole[untouched])
    assert torch.equal(
        project_out(whole.transpose(0, 1), basis), project_out(whole.transpose(0, 1).contiguous(), basis)
    )


def test_in_place_is_refused_where_something_may_need_x():
    x, basis, _ = draw(((4, 20), 2, None))
    with pytest.raises(ValueError, match=r"^x: expected no gradient to be recorded"):
        project_out_(x.clone().requires_grad_(), basis)
    with pytest.raises(ValueError, match=r"^basis: expected no gradient to be recorded"):
        project_out_(x, basis.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"^x: expected memory of its own"):
        project_out_(x[:1].expand(3, 20), basis)
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        project_out_(leaf, basis)
    assert torch.equal(leaf, project_out(x, basis))


def test_gradients_by_differences(on_backend):
    """gradcheck of everything that has a gradient, the basis off the orthonormal ones included."""
    for case in (((3, 6), 2, None), ((4, 2, 6), 2, 1)):
        x, basis, index = draw(case)
        for preserve in (False, True):

            def run(x, move, basis=basis, index=index, preserve=preserve):
                return torch.ops.fastguard.project_out(x, basis.view(-1, 2, 6) + move, index, 0.9, preserve, True)

            move = torch.zeros(basis.view(-1, 2, 6).shape, dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradcheck(run, (x.requires_grad_(), move))


def test_what_is_kept_for_the_backward(on_backend):
    x, basis, index = draw(((5, 3, 40), 2, 1), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        project_out(x.requires_grad_(), basis, basis_index=index)
    assert x.data_ptr() not in {t.data_ptr() for t in saved}
    assert sum(t.numel() for t in saved) <= basis.numel() + index.numel()
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        project_out(x, basis, basis_index=index, preserve_norm=True)
    assert x.data_ptr() in {t.data_ptr() for t in saved}


def test_the_linear_form_has_every_derivative(on_backend):
    """It is linear: the derivative of its gradient is the op again."""
    x, basis, _ = draw(((3, 12), 2, None))
    assert torch.autograd.gradgradcheck(lambda x: project_out(x, basis, 0.6), (x.requires_grad_(),))
    out = project_out(x, basis, preserve_norm=True)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="project_out: has no second derivative"):
        grad.sum().backward()


def test_transforms(on_backend):
    x, basis, _ = draw(((3, 4, 12), 2, None))

    def loss(x, q):
        return project_out(x, q, preserve_norm=True).sin().sum()

    def plain(x, q):
        return reference.project_out(x, q, preserve_norm=True).sin().sum()

    for found, want in zip(
        torch.func.grad(loss, (0, 1))(x, basis), torch.func.grad(plain, (0, 1))(x, basis), strict=True
    ):
        assert_agrees("func.grad", found, want)
    each = torch.func.vmap(torch.func.grad(loss), (0, None))(x, basis)
    assert_agrees("vmap", each, torch.func.grad(plain)(x, basis))
    with pytest.raises(RuntimeError, match="project_out: has no forward-mode derivative"):
        torch.func.jvp(lambda x: project_out(x, basis), (x,), (x,))


def test_checkpointing_and_autocast(on_backend):
    x, basis, _ = draw(((3, 4, 12), 2, None), torch.float32)
    x.requires_grad_()

    def run(x):
        return project_out(x.sin(), basis, preserve_norm=True).square().mul(x).sum()

    want = torch.autograd.grad(run(x), x)[0]
    assert torch.equal(torch.autograd.grad(checkpoint(run, x, use_reentrant=False), x)[0], want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(run(x), x)[0], want)


def test_does_not_depend_on_threads_nor_on_the_rows_beside(on_backend):
    if on_backend != "cpu":
        pytest.skip("the products are torch's")
    for k in (1, 4, 7):
        x, basis, _ = draw(((203, 600), k, None), torch.float32)
        threads, results = torch.get_num_threads(), []
        try:
            for n in (1, 2):
                torch.set_num_threads(n)
                results.append(project_out(x, basis))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*results)
        assert torch.equal(project_out(x[3:4], basis), results[0][3:4])


@pytest.mark.parametrize("indexed, preserve", [(False, True), (True, False)])
def test_opcheck(indexed, preserve):
    x, basis, index = draw(((4, 3, 10), 2, 1 if indexed else None))
    groups = basis.view(-1, 2, 10)
    args = (x.requires_grad_(), groups.clone().requires_grad_(), index, 0.7, preserve, True)
    torch.library.opcheck(torch.ops.fastguard.project_out, args)
    torch.library.opcheck(torch.ops.fastguard.project_out_, (x.detach().clone(), groups, index, 0.7, preserve))
    args = (torch.randn_like(x), x.detach(), groups, index, 0.7, preserve, True, indexed)
    torch.library.opcheck(torch.ops.fastguard.project_out_backward, args)


def test_compiles_without_breaks_or_recompiles(on_backend):
    x, basis, index = draw(((4, 3, 24), 2, 1), torch.float32)

    def loss(x, q, i):
        y = project_out(2 * x, q, basis_index=i)
        with torch.no_grad():
            z = project_out_(x + 1, q, basis_index=i)
        return (y * z + project_out(x, q[1], preserve_norm=True)).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (1.0, 2.0):
            leaf, again = (scale * x).requires_grad_(), (scale * x).requires_grad_()
            want = torch.autograd.grad(loss(leaf, basis, index), leaf)[0]
            assert_agrees("compiled", torch.autograd.grad(compiled(again, basis, index), again)[0], want)


def test_no_rows(on_backend):
    x, basis, _ = draw(((0, 5, 12), 2, None), torch.float32)
    out = project_out(x.requires_grad_(), basis, preserve_norm=True)
    assert out.shape == x.shape and torch.autograd.grad(out.sum(), x)[0].shape == x.shape
    assert project_out(torch.randn(12), basis).shape == (12,)


def test_the_basis_is_looked_at_once_a_version(monkeypatch):
    x, basis, _ = draw(((2, 30), 3, None), torch.float32)
    looked = []
    eye = torch.eye
    monkeypatch.setattr(torch, "eye", lambda *a, **k: looked.append(1) or eye(*a, **k))
    for _ in range(3):
        project_out(x, basis)
    assert len(looked) == 1
    basis.mul_(1.01)
    with pytest.raises(ValueError, match="basis: expected orthonormal rows, got rows whose products differ"):
        project_out(x, basis)
    basis.div_(1.01)
    project_out(x, basis)
    assert len(looked) == 3
    with torch.inference_mode():
        other = directions.orthonormalise(torch.randn(2, 30))
        project_out(x, other)
        project_out(x, other)
    assert len(looked) == 4


X, Q = torch.zeros(2, 3, 12), torch.eye(12)[:2]
ERRORS = {
    "x": ((X.long(), Q), {}),
    "x no features": ((X[..., :0], Q), {}),
    "x no dimension": ((X[0, 0, 0], Q), {}),
    "basis width": ((X, Q[:, :5]), {}),
    "basis dims": ((X, Q[0]), {}),
    "basis none": ((X, Q[:0]), {}),
    "basis dtype": ((X, Q.bfloat16()), {}),
    "basis device": ((X, Q.to("meta")), {}),
    "basis not orthonormal": ((X, torch.ones(2, 12)), {}),
    "basis not finite": ((X, Q * float("nan")), {}),
    "basis too many": ((torch.zeros(2, 70), torch.eye(70)[:65]), {}),
    "basis of groups without index": ((X, Q[None]), {}),
    "basis without groups": ((X, Q), {"basis_index": torch.zeros(2, dtype=torch.long)}),
    "basis_index dtype": ((X, Q[None]), {"basis_index": torch.zeros(2)}),
    "basis_index shape": ((X, Q[None]), {"basis_index": torch.zeros(3, dtype=torch.long)}),
    "basis_index range": ((X, Q[None]), {"basis_index": torch.tensor([0, 1])}),
    "basis_index negative": ((X, Q[None]), {"basis_index": torch.tensor([0, -2])}),
    "basis_index device": ((X, Q[None]), {"basis_index": torch.zeros(2, dtype=torch.long, device="meta")}),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("op", [project_out, project_out_])
def test_errors_name_the_argument(op, case):
    arguments, options = ERRORS[case]
    with pytest.raises(ValueError, match=rf"^{case.split()[0]}: expected"):
        op(*arguments, **options)


def test_dtensors_are_refused_by_name():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise AssertionError

    with pytest.raises(ValueError, match=r"^x: expected a plain tensor, got a DTensor"):
        project_out(X.as_subclass(Sharded), Q)
    with pytest.raises(ValueError, match=r"^basis: expected a plain tensor, got a DTensor"):
        project_out(X, Q.as_subclass(Sharded))
