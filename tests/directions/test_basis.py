"""orthonormalise: Gram-Schmidt in the order given, to float64's precision."""

import pytest
import torch

from fastguard.directions import orthonormalise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (5, 40), (3, 4, 40), (12, 12)], ids=str)
def test_rows_are_orthonormal_and_in_order(shape, dtype):
    given = (torch.randn(shape, dtype=torch.float64) * torch.logspace(-6, 6, shape[-2]).double()[:, None]).to(dtype)
    basis = orthonormalise(given)
    assert basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and basis.is_contiguous()
    eye = torch.eye(shape[-2], dtype=torch.float64)
    worst = float((basis.double() @ basis.double().mT - eye).abs().max())
    assert worst < (1e-13 if dtype == torch.float64 else 5e-7)
    # Direction k lies in the span of the first k + 1 rows, with a positive part along row k: Gram-Schmidt.
    along = given.double() @ basis.double().mT / given.double().norm(dim=-1, keepdim=True)
    assert float(along.triu(1).abs().max()) < 1e-6 and (along.diagonal(dim1=-2, dim2=-1) > 0).all()
    if shape[-2] < shape[-1]:
        assert float((along.norm(dim=-1) - 1).abs().max()) < 1e-6


def test_one_direction_and_nearly_equal_ones():
    one = torch.randn(30)
    assert torch.allclose(orthonormalise(one)[0], one / one.norm())
    near = torch.stack([one, one + 1e-4 * torch.randn(30)])
    basis = orthonormalise(near).double()
    assert float((basis @ basis.T - torch.eye(2)).abs().max()) < 5e-7


def test_is_differentiable():
    given = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthonormalise, (given,))


@pytest.mark.parametrize("given, says", [
    (torch.ones(2, 3, dtype=torch.int64), "floating dtype"),
    (torch.randn(4, 3), r"1 <= K <= D, or \[D\], got shape \(4, 3\)"),
    (torch.randn(2, 2, 2, 2), "got shape"),
    (torch.randn(0, 3), "got shape"),
    (torch.tensor([[1.0, 0, 0], [0, float("nan"), 0]]), "finite"),
    (torch.tensor([[1.0, 0, 0], [0, 0, 0]]), r"no zero row, got one at \[1\]"),
    (torch.tensor([[1.0, 2, 3], [0, 1, 0], [2, 0, 6]]), r"linearly independent rows, got one at \[2\]"),
])  # fmt: skip
def test_errors_say_what_was_given(given, says):
    with pytest.raises(ValueError, match=rf"^directions: expected .*{says}"):
        orthonormalise(given)
