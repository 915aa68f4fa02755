"""``add_project_rms_norm``: the residual add, a projection and the norm that follows it, in one pass over the stream.

The schema, the fakes and the autograd formula live here, once; the arithmetic lives in the backend modules
beside this file, which expose ``forward`` and ``backward`` with the signatures of ``portable.py``.

Cost: residual and update are read once, the stream and its norm written once: 4 N D elements, as without a projection,
and 4 N K D flops for it. The backward reads the stream and two gradients and writes one, 4 N D. Kept for it: the
stream, which is an output anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastguard import backend
from fastguard.ops import transforms
from fastguard.ops.orthonormal import check_basis, check_index, check_range
from fastguard.ops.precision import DTYPES, accumulation_dtype
from fastguard.ops.project_out.op import prepared, rows_of

KINDS = ("rms", "rms_offset", "layer")


def add_project_rms_norm(
    residual: Tensor,
    update: Tensor,
    basis: Tensor | None,
    weight: Tensor | None,
    eps: float,
    *,
    scale: float = 1.0,
    kind: str = "rms",
    bias: Tensor | None = None,
    basis_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(h, norm(h)) with h = x - scale (x Q^T) Q, x = residual + update: what a decoder layer does twice, ablated.

    Args:
        residual: [..., D], any strides (no copy is made if rows are evenly spaced and features contiguous); float64,
            float32, bfloat16 or float16.
        update: what attention or MLP adds, of the same shape, in a dtype that residual's holds (bf16 under autocast).
        basis: Q [K, D] with orthonormal rows as ``project_out`` takes it, or None for a plain add and norm. It is a
            constant: no gradient goes to it.
        weight: [D], or None for a norm without one. eps: added to the mean square or the variance.
        scale: how much of the part in the basis is taken away.
        kind: ``rms``: weight h / sqrt(mean h^2 + eps). ``rms_offset``: 1 + weight in the place of weight (Gemma).
            ``layer``: h less its mean in the place of h.
        bias: [D] that is added to the norm, or None.
        basis_index: integers for leading dimensions of residual, each the basis of its rows out of ``basis``
            [G, K, D]; -1 leaves them as they are.

    Returns:
        The new stream and its norm, [..., D], in the dtype of residual, contiguous. Arithmetic is in fp32 (float64
        where residual is); each is rounded once, and the norm is of the stream as it is stored, taken from its own
        elements: sqrt(|x|^2 - s^2) would cancel where a massive activation lies along the basis.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a DTensor, rows that are not orthonormal, a basis that
            requires grad, an index out of range.
        RuntimeError: a forward-mode or a second derivative, which the op does not have.
    """
    _check(residual, update, weight, bias, eps, kind)
    groups = index = None
    if basis is not None:
        check_basis(basis, residual.shape[-1], residual.device, basis_index)
        if basis.requires_grad and torch.is_grad_enabled():
            raise ValueError("basis: expected a constant, got one that requires grad; detach it, or use project_out")
        if basis_index is not None:
            check_index(basis_index, residual.shape, residual.device)
        groups, index = prepared(residual, basis.detach(), basis_index)
    elif basis_index is not None:
        raise ValueError("basis_index: expected None without a basis, got a tensor")
    stream, normed = _call_forward(
        residual, update, groups, index, weight, bias, float(eps), float(scale), KINDS.index(kind)
    )
    return stream, normed


def _check(residual: Tensor, update: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> None:
    transforms.check_plain(residual=residual, update=update, weight=weight, bias=bias)
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if residual.dim() < 1 or residual.shape[-1] == 0:
        raise ValueError(f"residual: expected [..., D], got shape {tuple(residual.shape)}")
    if update.shape != residual.shape:
        raise ValueError(f"update: expected the shape of residual {tuple(residual.shape)}, got {tuple(update.shape)}")
    given = {"residual": residual, "update": update, "weight": weight, "bias": bias}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: expected a dtype of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
        if tensor.device != residual.device:
            raise ValueError(f"{name}: expected device {residual.device}, got {tensor.device}")
        if name in ("weight", "bias") and tensor.shape != residual.shape[-1:]:
            raise ValueError(f"{name}: expected [{residual.shape[-1]}], got shape {tuple(tensor.shape)}")
    if torch.promote_types(residual.dtype, update.dtype) != residual.dtype:
        raise ValueError(f"update: expected a dtype that {residual.dtype} of residual holds, got {update.dtype}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")


@torch.library.custom_op("fastguard::add_project_rms_norm", mutates_args=())
@transforms.without_autocast
def _forward(
    residual: Tensor,
    update: Tensor,
    basis: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    kind: int,
) -> tuple[Tensor, Tensor]:
    check_range(index, 0 if basis is None else basis.shape[0])
    stream, normed = (torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) for _ in range(2))
    if residual.numel():
        impl = backend.choose("add_project_rms_norm", residual.device)
        impl.forward(
            rows_of(residual), rows_of(update), _dense(basis), index, _dense(weight), _dense(bias), eps, scale, kind,
            rows_of(stream), rows_of(normed),
        )  # fmt: skip
    return stream, normed


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@_forward.register_fake
def _(residual, update, basis, index, weight, bias, eps, scale, kind):  # type: ignore[no-untyped-def]
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


@torch.library.custom_op("fastguard::add_project_rms_norm_backward", mutates_args=())
@transforms.without_autocast
def _backward(
    grad_stream: Tensor | None,
    grad_normed: Tensor | None,
    stream: Tensor,
    basis: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    eps: float,
    scale: float,
    kind: int,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dh = torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
    if stream.numel() == 0:
        none = stream.new_zeros(stream.shape[-1], dtype=accumulation_dtype(stream.dtype))
        return dh, none, none.clone()
    impl = backend.choose("add_project_rms_norm", stream.device)
    grads = (None if g is None else rows_of(g) for g in (grad_stream, grad_normed))
    dweight, dbias = impl.backward(
        *grads, rows_of(stream), _dense(basis), index, _dense(weight), eps, scale, kind, need_weight, rows_of(dh)
    )
    return dh, dweight.clone(), dbias.clone()


@_backward.register_fake
def _(grad_stream, grad_normed, stream, basis, index, weight, eps, scale, kind, need_weight):  # type: ignore[no-untyped-def]
    wide = accumulation_dtype(stream.dtype)
    width = stream.shape[-1]
    return stream.new_empty(stream.shape), stream.new_empty(width, dtype=wide), stream.new_empty(width, dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    residual, update, basis, index, weight, bias, *ctx.numbers = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (residual, update, weight, bias)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], basis, index, weight)


def _autograd(ctx, grad_stream, grad_normed):  # type: ignore[no-untyped-def]
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4, 5)]
    if not any(needs) or (grad_stream is None and grad_normed is None):
        return (None,) * 9
    stream, basis, index, weight = ctx.saved_tensors
    dh, dweight, dbias = _call_backward(
        grad_stream, grad_normed, stream, basis, index, weight, *ctx.numbers, needs[2] or needs[3]
    )
    found = [
        grad.to(dtype) if needed else None
        for grad, dtype, needed in zip((dh, dh, dweight, dbias), ctx.dtypes, needs, strict=True)
    ]
    return found[0], found[1], None, None, found[2], found[3], None, None, None


_call_forward = transforms.bind("add_project_rms_norm", _forward, _setup_context, _autograd)
_call_backward = transforms.bind_backward("add_project_rms_norm", _backward)
