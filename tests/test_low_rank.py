"""The randomised decomposition against LAPACK's, on spectra that fall fast, slowly and not at all."""

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard import low_rank
from fastguard.low_rank import OVERSAMPLED, PASSES, Products, best_part, difference, range_finder, top_svd


def orthonormal(n, k, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0]


def with_spectrum(m, n, s):
    """A matrix [m, n] in float64 with these singular values."""
    return (orthonormal(m, len(s), 1) * s) @ orthonormal(n, len(s), 2).mT


def assert_orthonormal(u, bound):
    assert float((u.mT.double() @ u.double() - torch.eye(u.shape[1])).abs().max()) < bound


def forms(matrix):
    """The same matrix as a tensor, as products, and as a difference that is exact."""
    return {
        "tensor": matrix,
        "products": Products(
            tuple(matrix.shape), lambda y: matrix @ y, lambda y: matrix.mT @ y, matrix.dtype, matrix.device
        ),
        "difference": difference(2 * matrix, matrix),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(150, 90), (90, 150), (400, 300)], ids=str)
@pytest.mark.parametrize("form", ["tensor", "products", "difference"])
def test_a_matrix_of_the_rank_is_found_exactly(shape, dtype, form, monkeypatch):
    """LAPACK takes the two smaller ones with k = 40, of which 2 (k + 16) > 90, and the range finder the others."""
    monkeypatch.setattr(low_rank, "TILE_ELEMENTS", 7 * shape[1])  # several tiles, the last one shorter
    for k in (6, 40):
        s = torch.linspace(3, 0.1, k, dtype=torch.float64)
        exact = with_spectrum(*shape, s)
        given = forms(exact.to(dtype))[form]
        u, found, vh = top_svd(given, k)
        assert u.dtype == found.dtype == vh.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        if 2 * (k + OVERSAMPLED) < min(shape) or dtype == torch.float64:
            assert_orthonormal(u, tolerance)
            assert_orthonormal(vh.mT, tolerance)
        assert_agrees("singular values", found, s, ratio=100 * tolerance)
        assert_catches_spoiled(
            lambda part, exact=exact: assert_agrees("matrix", part, exact, ulps=300), (u * found) @ vh
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("fall", [0.5, 0.9, 0.97])
def test_singular_values_are_within_the_stated_error(fall, dtype):
    s = fall ** torch.arange(200, dtype=torch.float64)
    matrix = with_spectrum(300, 200, s).to(dtype)
    k, seen = 8, []
    for passes in (0, 1, PASSES):
        u, found, vh = top_svd(matrix, k, passes=passes)
        assert_orthonormal(u, 1e-6 if dtype == torch.float32 else 1e-13)
        assert_orthonormal(vh.mT, 1e-6 if dtype == torch.float32 else 1e-13)
        off = (found.double() - s[:k]).abs()
        stated = s[:k] * (s[k + OVERSAMPLED] / s[:k]) ** (4 * passes + 2)
        assert (off <= 3 * stated + 20 * torch.finfo(dtype).eps).all()
        seen.append(float(off.max()))
    assert seen[0] > 1e-4 or fall == 0.5, "the passes are of no use here: the bound is not tested"
    assert seen[-1] < 5e-5


def test_the_best_part_is_no_farther_than_the_nearest():
    s = 0.9 ** torch.arange(90, dtype=torch.float64)
    matrix = with_spectrum(150, 90, s)
    u, full, vh = torch.linalg.svd(matrix, full_matrices=False)
    exact = (u[:, :8] * full[:8]) @ vh[:8]
    found = best_part(matrix, 8)
    assert float(torch.linalg.svdvals(found)[8]) < 1e-12
    assert float((matrix - found).norm()) < (1 + 1e-5) * float((matrix - exact).norm())
    torch.testing.assert_close(best_part(matrix.mT, 8), found.mT, rtol=0, atol=2e-2)
    assert torch.equal(best_part(matrix, 90), matrix)
    assert best_part(matrix, 0).shape == matrix.shape and not best_part(matrix, 0).any()


def test_the_range_holds_the_leading_directions_and_follows_the_seed():
    s = torch.cat([torch.tensor([5.0, 4, 3]), torch.full((97,), 0.5)]).double()  # a flat tail
    matrix = with_spectrum(200, 100, s)
    q = range_finder(matrix, 5, seed=3)
    assert_orthonormal(q, 1e-13)
    leading = torch.linalg.svd(matrix)[0][:, :3]
    assert float((leading - q @ (q.mT @ leading)).norm()) < 1e-6
    assert torch.equal(q, range_finder(matrix, 5, seed=3))
    assert not torch.allclose(q, range_finder(matrix, 5, seed=4), atol=1e-3)


def test_a_difference_of_narrow_weights_is_not_rounded_to_them():
    """bf16 weights whose difference has no bf16 form, here and there: the products are those of the fp32 one."""
    base = torch.randn(300, 200)
    a, b = (base + 0.05 * torch.randn(300, 3) @ torch.randn(3, 200)).bfloat16(), base.half()
    exact = a.double() - b.double()
    y = torch.randn(200, 4)
    products = difference(a, b)
    assert products.dtype == torch.float32 and difference(a, b.double()).dtype == torch.float64
    assert_agrees("product", products.times(y), exact @ y.double())
    assert_agrees("transposed", products.transposed(y.new_ones(300, 2)), exact.mT @ torch.ones(300, 2).double())
    want = torch.linalg.svdvals(exact)[:3]
    assert_agrees("singular values", top_svd(products, 3)[1], want, ratio=1e-5)


def test_errors_name_the_argument():
    matrix = torch.randn(6, 4)
    for k in (-1, 5):
        with pytest.raises(ValueError, match="k: expected 0 to 4"):
            top_svd(matrix, k)
    with pytest.raises(ValueError, match=r"matrix: expected \[m, n\]"):
        top_svd(matrix.bfloat16(), 2)
    with pytest.raises(ValueError, match=r"matrix: expected \[m, n\]"):
        range_finder(matrix[0], 2)
    with pytest.raises(ValueError, match="b: expected a matrix of the shape of a"):
        difference(matrix, matrix.mT)
