"""``project_out``: rows without their components along a few orthonormal directions.

The schema, the fakes and the autograd formula live here, once; the arithmetic lives in the backend modules
beside this file, which expose ``forward`` and ``backward`` with the signatures of ``portable.py``.

Cost: x is read once and written once, 2 N D elements, and 4 N K D flops; for few directions the traffic is what
counts. The linear form with a constant basis keeps nothing for its backward, which is the forward of the gradient. The
norm-preserving form keeps x, and reads x and the gradient; a basis that is trained adds two products of 2 N K D flops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastguard import backend
from fastguard.ops import transforms
from fastguard.ops.orthonormal import check_basis, check_index, check_range
from fastguard.ops.precision import DTYPES, accumulation_dtype
from fastguard.ops.project_out import portable


def project_out(
    x: Tensor,
    basis: Tensor,
    scale: float = 1.0,
    *,
    basis_index: Tensor | None = None,
    preserve_norm: bool = False,
) -> Tensor:
    """x - scale (x Q^T) Q: the rows of ``x`` without their part in the span of Q's rows.

    Directional ablation (Arditi et al. 2024) with scale 1; a reflection with 2; part of it with less.

    Args:
        x: [..., D], any strides (no copy is made if rows are evenly spaced and features contiguous); float64, float32,
            bfloat16 or float16.
        basis: Q [K, D] with orthonormal rows, K <= 64, fp32 or float64 whatever x is: a direction rounded to bf16 has
            not length 1. ``fastguard.directions.orthonormalise`` makes one. Rows are looked at once for each version
            of a tensor (and not at all under ``torch.compile`` and ``torch.func``), so keep the tensor, not a new view
            of it in every call. Where it requires grad it gets one, of the formula as it stands.
        scale: how much of the part is taken away.
        basis_index: integers for leading dimensions of x, such as [B] for x [B, T, D], each the basis of its rows out
            of ``basis`` [G, K, D]; -1 leaves them as they are.
        preserve_norm: bring each row back to its length; a row of which nothing is left is 0, with gradient 0. What
            is left of a row nearly parallel to the basis is mostly rounding, and is enlarged with it.

    Returns:
        [..., D], in the dtype of x, contiguous. Arithmetic is in fp32 (float64 where x is), rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a DTensor, rows that are not orthonormal, an index out
            of range.
        RuntimeError: a forward-mode derivative, or a second one, which only the linear form in a constant basis has.
    """
    groups, index = _check(x, basis, basis_index)
    trained = basis.requires_grad and torch.is_grad_enabled()
    out: Tensor = _call_forward(  # type: ignore[assignment]
        x, groups, index, float(scale), preserve_norm, trained or transforms.under_func()
    )
    return out


def project_out_(
    x: Tensor,
    basis: Tensor,
    scale: float = 1.0,
    *,
    basis_index: Tensor | None = None,
    preserve_norm: bool = False,
) -> Tensor:
    """``project_out`` written over ``x``, which is returned; where no gradient is recorded.

    Raises:
        ValueError: as ``project_out``; also where x or basis requires grad and grad mode is on, since what made x may
            need it as it was, and where elements of x share memory.
    """
    groups, index = _check(x, basis, basis_index)
    if torch.is_grad_enabled():
        for name, tensor in (("x", x), ("basis", basis)):
            if tensor.requires_grad:
                raise ValueError(
                    f"{name}: expected no gradient to be recorded, got a tensor that requires grad; use project_out, "
                    "or torch.no_grad()"
                )
    if any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"x: expected memory of its own for each element, got strides {x.stride()}")
    with torch.no_grad():
        _in_place._opoverload(x, groups, index, float(scale), preserve_norm)
    return x


def _check(x: Tensor, basis: Tensor, basis_index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The bases [G, K, D] in the dtype of the arithmetic, and the index as int64 [I]."""
    transforms.check_plain(x=x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., D], got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected a dtype of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    check_basis(basis, x.shape[-1], x.device, basis_index)
    if basis_index is not None:
        check_index(basis_index, x.shape, x.device)
    return prepared(x, basis, basis_index)


def prepared(x: Tensor, basis: Tensor, basis_index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A checked basis as [G, K, D] in the dtype in which x is worked on, and the index as int64 [I]."""
    wide = basis.to(accumulation_dtype(x.dtype))
    groups = wide[None] if basis.dim() == 2 else wide
    return groups, None if basis_index is None else basis_index.reshape(-1).long()


def rows_of(x: Tensor) -> Tensor:
    """x as [N, D] with contiguous features; a view where there is one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@torch.library.custom_op("fastguard::project_out", mutates_args=())
@transforms.without_autocast
def _forward(x: Tensor, basis: Tensor, index: Tensor | None, scale: float, preserve: bool, trained: bool) -> Tensor:
    check_range(index, basis.shape[0])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        impl = backend.choose("project_out", x.device)
        impl.forward(rows_of(x), basis.contiguous(), index, scale, preserve, rows_of(out))
    return out


@_forward.register_fake
def _(x, basis, index, scale, preserve, trained):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.custom_op("fastguard::project_out_", mutates_args=("x",))
@transforms.without_autocast
def _in_place(x: Tensor, basis: Tensor, index: Tensor | None, scale: float, preserve: bool) -> None:
    check_range(index, basis.shape[0])
    if x.numel() == 0:
        return
    rows = rows_of(x)
    backend.choose("project_out", x.device).forward(rows, basis.contiguous(), index, scale, preserve, rows)
    if rows.data_ptr() != x.data_ptr():  # rows are not evenly spaced: that was a copy
        x.copy_(rows.view(x.shape))


@_in_place.register_fake
def _(x, basis, index, scale, preserve):  # type: ignore[no-untyped-def]
    return None


@torch.library.custom_op("fastguard::project_out_backward", mutates_args=())
@transforms.without_autocast
def _backward(
    grad: Tensor,
    x: Tensor,
    basis: Tensor,
    index: Tensor | None,
    scale: float,
    preserve: bool,
    need_x: bool,
    need_basis: bool,
) -> tuple[Tensor, Tensor]:
    impl = backend.choose("project_out", x.device)
    dx = torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device)
    dense = basis.contiguous()
    if need_x and x.numel():
        if preserve:
            impl.backward(rows_of(grad), rows_of(x), dense, index, scale, rows_of(dx))
        else:
            impl.forward(rows_of(grad), dense, index, scale, False, rows_of(dx))
    if not need_basis:
        return dx, basis.new_empty(0)
    return dx, portable.basis_gradient(rows_of(grad), rows_of(x), dense, index, scale, preserve)


@_backward.register_fake
def _(grad, x, basis, index, scale, preserve, need_x, need_basis):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape if need_x else 0), basis.new_empty(basis.shape if need_basis else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, basis, index, ctx.scale, ctx.preserve, ctx.trained = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if ctx.preserve or ctx.trained else None, basis, index)


def _autograd(ctx, grad):  # type: ignore[no-untyped-def]
    x, basis, index = ctx.saved_tensors
    need_x, need_basis = ctx.needs_input_grad[:2]
    dx = dbasis = None
    if grad is not None and not ctx.preserve and not need_basis:
        dx = _call_forward(grad, basis, index, ctx.scale, False, False) if need_x else None
    elif grad is not None and (need_x or need_basis):
        dx, dbasis = _call_backward(grad, x, basis, index, ctx.scale, ctx.preserve, need_x, need_basis)
    return (dx if need_x else None), (dbasis if need_basis else None), None, None, None, None


_call_forward = transforms.bind("project_out", _forward, _setup_context, _autograd)
_call_backward = transforms.bind_backward("project_out", _backward)
