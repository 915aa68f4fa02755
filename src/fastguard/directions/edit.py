"""Cut directions out of one weight: what ablation at the residual stream is when it is written into the weights.

A weight W [D, n] writes W x into the stream of width D; ``basis`` is Q [K, D] with orthonormal rows. Three forms, all
of which compute in fp32 (float64 for float64) in strips, store in the weight's own dtype, and need beside the weight
a few MiB:

``orthogonalise``: W' = W - Q^T Q W. Q W' = 0, so that W' x = (I - Q^T Q) W x: the same as projecting what is written.
Columns lose what they had along Q. (Arditi et al., arXiv 2406.11717, for one direction.)

``norm_columns``: the same, and every column is given back its norm: W' = (I - Q^T Q) W diag(n / sqrt(n^2 - s^2)) with n
the columns' norms and s those of Q W. Q W' = 0 still. (Norm-preserving ablation in closed form.)

``norm_rows``: heretic's. The removal is done on the weight with normalised rows, whose rows are then normalised again
and given the old norms: W^ = diag(1/m) W, V = W^ - Q^T Q W^, W' = diag(m / |V_i|) V with m the rows' norms. **Q W' is
not 0**: V is orthogonal to Q, but rows of different norms scale it by different numbers, so that Q W' = Q diag(m /
|V_i|) V. Of rows of one norm, only 1 / |V_i| spoils it.

In stored bf16 all three leave of Q W about 1e-2, which is the rounding of W itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastguard.ops.orthonormal import TOLERANCE, deviation

STRIP = 2**20
"""Elements that are computed on at a time."""


def orthogonalise(weight: Tensor, basis: Tensor, *, axis: int = 0, out: Tensor | None = None) -> Tensor:
    """W - Q^T Q W, with the stream on ``axis``.

    Args:
        weight: [D, n], or [n, D] with ``axis=1`` (embeddings, GPT-2's Conv1D), or a bias [D], or experts' [E, D, n] and
            [E, n, D] with ``axis`` 1 and 2; floating, of 16 bits or more.
        basis: [K, D], orthonormal rows, K <= D.
        axis: which axis of ``weight`` is the stream's.
        out: where to write, which may be ``weight`` itself; otherwise a new tensor.

    Raises:
        ValueError: shapes do not fit, or the rows of ``basis`` are not orthonormal.
        TypeError: ``weight`` is no floating tensor, or of 8 bits.
    """
    return _edited(_orthogonalise, weight, basis, axis, out)


def norm_columns(weight: Tensor, basis: Tensor, *, axis: int = 0, out: Tensor | None = None) -> Tensor:
    """(I - Q^T Q) W with every column's norm put back; arguments and errors as in `orthogonalise`.

    The norm of what is left is computed from what is left, not as sqrt(n^2 - s^2), which cancels. A column that lies in
    the span of Q, so that what is left is below the rounding of the stored weight (4 eps of its norm), has no direction
    that could be given its norm, and becomes zero. A bias is a column.
    """
    return _edited(_norm_columns, weight, basis, axis, out)


def norm_rows(weight: Tensor, basis: Tensor, *, axis: int = 0, out: Tensor | None = None) -> Tensor:
    """Heretic's form, which keeps the norms of rows (one a feature of the stream); arguments and errors as above.

    Q W' is not zero: see the top of this file. A row of which the removal leaves less than rounding becomes zero.
    """
    return _edited(_norm_rows, weight, basis, axis, out)


FORMS: dict[str, Callable[..., Tensor]] = {
    "orthogonal": orthogonalise, "norm_columns": norm_columns, "norm_rows": norm_rows,
}  # fmt: skip
"""By the names that the command line has for them."""


def checked_basis(basis: Tensor, width: int | None = None) -> Tensor:
    """``basis`` in float64, orthonormal to the rounding of that, whatever dtype it was kept in.

    Raises ValueError unless it is [K, D], 1 <= K <= D = ``width``, with rows orthonormal within 1e-4.
    """
    if basis.dim() != 2 or not basis.is_floating_point() or not 1 <= basis.shape[0] <= basis.shape[1]:
        raise ValueError(f"basis: expected a floating [K, D] with 1 <= K <= D, got {basis.dtype} {tuple(basis.shape)}")
    if width is not None and basis.shape[1] != width:
        raise ValueError(f"basis: expected rows of {width} features, got {tuple(basis.shape)}")
    error = deviation(basis)
    if not error <= TOLERANCE:
        raise ValueError(f"basis: its rows are not orthonormal (Q Q^T differs from the identity by {error:.2g})")
    rows = basis.detach().double()
    one = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    for _ in range(2):  # the nearest orthonormal rows, of the same span
        rows = (1.5 * one - 0.5 * rows @ rows.T) @ rows
    return rows


def followed_by_norm(basis: Tensor, weight: Tensor) -> Tensor:
    """The basis to remove where an RMS norm of this ``weight`` [D] follows the write (Gemma 2 and 3, OLMo 2).

    The norm gives weight * y / rms(y), which is orthogonal to q exactly where y is orthogonal to weight * q. So the
    span of weight * q is what to remove, orthonormalised: [K', D], float64, K' <= K (fewer where the weight is zero).
    The stream is then free of q, but its other features are not those of projecting after the norm: rms(y) has
    changed.
    """
    scaled = checked_basis(basis, weight.shape[0]) * weight.detach().double()
    _, values, rows = torch.linalg.svd(scaled, full_matrices=False)
    return rows[values > 1e-12 * scaled.norm().clamp_min(1e-300)]


# ----------------------------------------------------------------------------------------------------------------------


def _edited(
    form: Callable[[Tensor, Tensor, Tensor], None], weight: Tensor, basis: Tensor, axis: int, out: Tensor | None
) -> Tensor:
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise TypeError(f"weight: expected a floating tensor of 16 bits or more, got {weight.dtype}")
    if not 1 <= weight.dim() <= 3 or not 0 <= axis < weight.dim() or (weight.dim() == 3 and axis == 0):
        raise ValueError(f"axis: got {axis} of a weight {tuple(weight.shape)}, expected that of the stream")
    rows = checked_basis(basis, weight.shape[axis])
    if out is None:
        out = torch.empty_like(weight)
    elif out.shape != weight.shape or out.dtype != weight.dtype:
        raise ValueError(f"out: expected {weight.dtype} {tuple(weight.shape)}, got {out.dtype} {tuple(out.shape)}")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = rows.to(dtype=dtype, device=weight.device)
    with torch.no_grad():
        for source, target in zip(_matrices(weight.detach(), axis), _matrices(out, axis), strict=True):
            form(source, rows, target)
    return out


def _matrices(weight: Tensor, axis: int) -> Iterator[Tensor]:
    """Views [D, n], one an expert."""
    if weight.dim() == 3:
        for one in weight:
            yield from _matrices(one, axis - 1)
    elif weight.dim() == 1:
        yield weight[:, None]
    else:
        yield weight if axis == 0 else weight.T


def _strips(weight: Tensor) -> Iterator[slice]:
    width = max(1, STRIP // weight.shape[0])
    for start in range(0, weight.shape[1], width):
        yield slice(start, start + width)


def _removed(strip: Tensor, basis: Tensor) -> Tensor:
    """(I - Q^T Q) of columns [D, c]."""
    return torch.addmm(strip, basis.T, basis @ strip, alpha=-1)


def _orthogonalise(weight: Tensor, basis: Tensor, out: Tensor) -> None:
    for part in _strips(weight):
        out[:, part] = _removed(weight[:, part].to(basis.dtype), basis)


def _norm_columns(weight: Tensor, basis: Tensor, out: Tensor) -> None:
    for part in _strips(weight):
        strip = weight[:, part].to(basis.dtype)
        # Twice, as in Gram-Schmidt: what once leaves is the rounding of what it took, which is then scaled up.
        left = _removed(_removed(strip, basis), basis)
        out[:, part] = left * _ratio(strip.norm(dim=0), left.norm(dim=0), weight.dtype)


def _norm_rows(weight: Tensor, basis: Tensor, out: Tensor) -> None:
    norms = weight.new_zeros(weight.shape[0], dtype=torch.float64)
    for part in _strips(weight):
        norms += weight[:, part].to(basis.dtype).square().sum(1)
    norms = norms.sqrt_()
    unit = torch.where(norms > 0, 1 / norms, 0.0).to(basis.dtype)[:, None]
    left = torch.zeros_like(norms)
    for part in _strips(weight):
        left += _removed(weight[:, part].to(basis.dtype) * unit, basis).square().sum(1)
    scale = (norms * _ratio((norms > 0).double(), left.sqrt_(), weight.dtype)).to(basis.dtype)[:, None]
    for part in _strips(weight):
        out[:, part] = _removed(weight[:, part].to(basis.dtype) * unit, basis) * scale


def _ratio(before: Tensor, after: Tensor, stored: torch.dtype) -> Tensor:
    """before / after; 0 where what is left is rounding."""
    return torch.where(after > 4 * torch.finfo(stored).eps * before, before / after, 0.0)
