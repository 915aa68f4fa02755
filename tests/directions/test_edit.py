"""Directions cut out of one weight, against the formulas written out in float64."""

import pytest
import torch

from fastguard.directions import edit

D, N = 24, 40


def basis(k=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, k, dtype=torch.float64, generator=g))[0].T.contiguous()


def weight(*shape, dtype=torch.float64):
    w = torch.randn(*shape, dtype=torch.float64)
    return (w * torch.linspace(0.1, 3, shape[-1], dtype=torch.float64)).to(dtype)


def oracle(form, w, q):
    """On W [D, n] in float64, as the formulas stand."""
    left = w - q.T @ (q @ w)
    if form == "orthogonal":
        return left
    if form == "norm_columns":
        n, s = w.norm(dim=0), (q @ w).norm(dim=0)
        return left @ torch.diag(n / (n**2 - s**2).sqrt())
    m = w.norm(dim=1, keepdim=True)
    unit = w / m
    v = unit - q.T @ (q @ unit)
    return m * v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("form", edit.FORMS)
@pytest.mark.parametrize("strip", [edit.STRIP, 7 * D])
def test_every_layout_equals_the_formula(form, strip, monkeypatch):
    monkeypatch.setattr(edit, "STRIP", strip)
    apply, q, w = edit.FORMS[form], basis(), weight(D, N)
    expected = oracle(form, w, q)
    assert float((expected - w).norm() / w.norm()) > 0.1  # what is compared is not the weight itself
    torch.testing.assert_close(apply(w, q), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(apply(w.T.contiguous(), q, axis=1), expected.T, rtol=1e-11, atol=1e-12)
    experts = torch.stack([w, 2 * w.flip(1)])
    both = torch.stack([expected, oracle(form, 2 * w.flip(1), q)])
    torch.testing.assert_close(apply(experts, q, axis=1), both, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(apply(experts.mT.contiguous(), q, axis=2), both.mT, rtol=1e-11, atol=1e-12)
    kept = w.clone()
    assert apply(w, q, out=w) is w
    torch.testing.assert_close(w, expected, rtol=1e-11, atol=1e-12)
    assert not torch.equal(w, kept)


def test_a_basis_kept_in_fp32_is_orthonormal_again_in_float64():
    q, w = basis(), weight(D, N)
    left = edit.orthogonalise(w, q.float())
    assert float((q.float().double() @ left).norm() / (q @ w).norm()) < 1e-14


def test_a_bias_is_a_column():
    q, b = basis(), weight(D)
    left = b - q.T @ (q @ b)
    torch.testing.assert_close(edit.orthogonalise(b, q), left)
    torch.testing.assert_close(edit.norm_columns(b, q), left * b.norm() / left.norm())


def test_what_the_forms_keep_and_what_they_leave_of_the_directions():
    q, w = basis(), weight(D, N)
    by_columns, by_rows = edit.norm_columns(w, q), edit.norm_rows(w, q)
    torch.testing.assert_close(by_columns.norm(dim=0), w.norm(dim=0))
    assert float((q @ by_columns).norm() / (q @ w).norm()) < 1e-14
    torch.testing.assert_close(by_rows.norm(dim=1), w.norm(dim=1))
    w = w * torch.linspace(0.2, 5, D, dtype=torch.float64)[:, None]  # rows of different norms
    left = float((q @ edit.norm_rows(w, q)).norm() / (q @ w).norm())
    assert left > 0.05  # heretic's form does not take the directions out
    m = w.norm(dim=1, keepdim=True)
    v = w / m - q.T @ (q @ (w / m))
    torch.testing.assert_close(q @ edit.norm_rows(w, q), q @ torch.diag((m / v.norm(dim=1, keepdim=True))[:, 0]) @ v)


@pytest.mark.parametrize(("dtype", "left"), [(torch.float32, 3e-7), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
def test_narrow_dtypes_are_computed_in_fp32(dtype, left):
    q, w = basis(), weight(D, N, dtype=dtype)
    for form in ("orthogonal", "norm_columns"):
        found = edit.FORMS[form](w, q)
        assert found.dtype == dtype
        # Nothing but the rounding of what is stored.
        exact = oracle(form, w.double(), q)
        assert float((found.double() - exact).abs().max()) <= torch.finfo(dtype).eps * float(exact.abs().max())
        assert float((q @ found.double()).norm() / (q @ w.double()).norm()) < left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_column_within_the_span_becomes_zero_not_noise(dtype):
    q = basis()
    w = weight(D, N, dtype=dtype)
    w[:, 3] = (5 * q[0] - 2 * q[1]).to(dtype)
    w[:, 4] = 0
    found = edit.norm_columns(w, q)
    assert torch.isfinite(found).all()
    assert not found[:, 3].any() and not found[:, 4].any() and bool(found[:, 5].any())
    rows = weight(D, N, dtype=dtype)
    rows[2] = 0
    found = edit.norm_rows(rows, q)
    assert torch.isfinite(found).all() and not found[2].any()


def test_behind_a_norm_the_stream_is_free_of_the_direction():
    q, w, scale = basis(), weight(D, N), 0.5 + torch.rand(D, dtype=torch.float64)
    x = torch.randn(N, 5, dtype=torch.float64)

    def stream(w):
        y = w @ x
        return scale[:, None] * y / y.square().mean(0).sqrt()

    own = edit.followed_by_norm(q, scale)
    torch.testing.assert_close(own @ own.T, torch.eye(2, dtype=torch.float64))
    before = (q @ stream(w)).norm()
    assert (q @ stream(edit.orthogonalise(w, own))).norm() < 1e-13 * before
    assert (q @ stream(edit.orthogonalise(w, q))).norm() > 1e-2 * before  # the plain basis would not do


def test_a_norm_with_zeros_loses_directions_only_where_it_is_zero():
    q = torch.eye(D, dtype=torch.float64)[:2]
    scale = torch.ones(D, dtype=torch.float64)
    scale[0] = 0
    assert edit.followed_by_norm(q, scale).shape == (1, D)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: edit.orthogonalise(torch.ones(D, 3), torch.ones(2, D)), "orthonormal"),
        (lambda: edit.orthogonalise(torch.ones(3, D), basis()), "rows of 3 features"),
        (lambda: edit.orthogonalise(torch.ones(D, 3), basis()[0]), r"\[K, D\]"),
        (lambda: edit.orthogonalise(torch.ones(D, 3), torch.full((1, D), float("nan"))), "orthonormal"),
        (lambda: edit.norm_rows(torch.ones(D, 3), basis(), axis=2), "axis"),
        (lambda: edit.norm_rows(torch.ones(D, 3, 3), basis(), axis=0), "axis"),
        (lambda: edit.norm_columns(torch.ones(D, 3), basis(), out=torch.ones(D, 4)), "out"),
    ],
)
def test_bad_input_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
    with pytest.raises(TypeError, match="16 bits"):
        edit.orthogonalise(torch.ones(D, 3).to(torch.float8_e4m3fn), basis())
