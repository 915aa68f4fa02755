"""``representation_distance``: how far each row of a stack of hidden states is from a reference's.

The schema, the fakes and the autograd formula live here, once; the arithmetic lives in the backend modules
beside this file, which expose ``forward`` and ``backward`` with the signatures of ``portable.py``.

Cost: memory traffic alone. a and b are read once in the forward and once in the backward, the gradient is written
once: 5 L N D elements. Kept for the backward: a, b, the mask, the distance and two norms of each row. A cosine's
rows are gone through twice, the second time out of the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastguard import backend
from fastguard.ops import transforms
from fastguard.ops.precision import DTYPES, accumulation_dtype

KINDS = ("l2", "cosine")


def representation_distance(a: Tensor, b: Tensor, mask: Tensor | None = None, *, kind: str = "l2") -> Tensor:
    """The distance of each row of ``a`` from the same row of ``b``.

    What TAR's retain loss, circuit breakers, SEAM and CRL measure between a live model and a frozen one.

    Args:
        a: [L, N, D], the live model's, any strides (no copy is made if features are contiguous); float64, float32,
            bfloat16 or float16.
        b: [L, N, D], the reference, in any of these dtypes and with strides of its own; it gets no gradient.
        mask: [N] bool, in every layer; the distance of other rows is 0, and so is their gradient, and they are not
            read. None keeps all.
        kind: ``l2``: the norm of a - b, whose gradient where a = b is 0 (a live model that starts as its reference).
            ``cosine``: 1 - cos(a, b), half the squared distance of the unit vectors, exact where the two are
            nearly parallel; 1, with gradient 0, where either row is zero.

    Returns:
        [L, N], fp32 (float64 where ``a`` is).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a DTensor, or an unknown kind.
        RuntimeError: a forward-mode or a second derivative, which the op does not have.
    """
    _check(a, b, mask, kind)
    distance, _ = _call_forward(a, b.detach(), mask, kind == "cosine")
    return distance


def _check(a: Tensor, b: Tensor, mask: Tensor | None, kind: str) -> None:
    transforms.check_plain(a=a, b=b, mask=mask)
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if a.dim() != 3:
        raise ValueError(f"a: expected [L, N, D], got shape {tuple(a.shape)}")
    if b.shape != a.shape:
        raise ValueError(f"b: expected the shape of a {tuple(a.shape)}, got {tuple(b.shape)}")
    for name, x in (("a", a), ("b", b)):
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: expected a dtype of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != a.shape[1:2]):
        raise ValueError(f"mask: expected bool [{a.shape[1]}], got {mask.dtype} {tuple(mask.shape)}")
    for name, tensor in (("b", b), ("mask", mask)):
        if tensor is not None and tensor.device != a.device:
            raise ValueError(f"{name}: expected device {a.device}, got {tensor.device}")


def _dense_features(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("fastguard::representation_distance", mutates_args=())
@transforms.without_autocast
def _forward(a: Tensor, b: Tensor, mask: Tensor | None, cosine: bool) -> tuple[Tensor, Tensor]:
    impl = backend.choose("representation_distance", a.device)
    keep = None if mask is None else mask.contiguous()
    return impl.forward(_dense_features(a), _dense_features(b), keep, cosine)  # type: ignore[no-any-return]


@_forward.register_fake
def _(a, b, mask, cosine):  # type: ignore[no-untyped-def]
    layers, n, _ = a.shape
    wide = accumulation_dtype(a.dtype)
    return a.new_empty(layers, n, dtype=wide), a.new_empty(2 if cosine else 0, layers, n, dtype=wide)


@torch.library.custom_op("fastguard::representation_distance_backward", mutates_args=())
@transforms.without_autocast
def _backward(
    grad: Tensor, a: Tensor, b: Tensor, mask: Tensor | None, distance: Tensor, inverse: Tensor, cosine: bool
) -> Tensor:
    impl = backend.choose("representation_distance", a.device)
    keep = None if mask is None else mask.contiguous()
    wide = grad.to(distance.dtype).contiguous()
    return impl.backward(  # type: ignore[no-any-return]
        wide, _dense_features(a), _dense_features(b), keep, distance, inverse, cosine
    )


@_backward.register_fake
def _(grad, a, b, mask, distance, inverse, cosine):  # type: ignore[no-untyped-def]
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, mask, ctx.cosine = inputs
    distance, inverse = output
    ctx.mark_non_differentiable(inverse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, mask, distance, inverse)


def _autograd(ctx, grad, _inverse):  # type: ignore[no-untyped-def]
    da = None
    if grad is not None and ctx.needs_input_grad[0]:
        da = _call_backward(grad, *ctx.saved_tensors, ctx.cosine)
    return da, None, None, None


_call_forward = transforms.bind("representation_distance", _forward, _setup_context, _autograd)
_call_backward = transforms.bind_backward("representation_distance", _backward)
