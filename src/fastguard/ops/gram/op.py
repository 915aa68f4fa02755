"""``gram_``: streaming Gram matrices of activations, sum x^T x over chosen tokens.

Checks and the schema live here, once; the arithmetic lives in the backend modules beside this file, which expose
``add`` with the signature of ``portable.py``.

Cost: N I (I + 1) flops, half of a product's, since the matrix is symmetric; the chosen rows of x are read, and the
matrix is read and written once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard import backend
from fastguard.ops import transforms
from fastguard.ops.precision import DTYPES
from fastguard.ops.segments import bounds_of


@torch.no_grad()
def gram_(
    gram: Tensor,
    x: Tensor,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    offsets: Tensor | Sequence[int] | None = None,
    bounds: Tensor | None = None,
) -> None:
    """Add a batch of activations to their Gram matrix, in place: gram += sum x[row]^T x[row].

    All that ActSVD (Wei et al. 2024, arXiv 2402.05162) needs of a layer's inputs, without keeping them. Products and
    sums are in the dtype of ``gram``: narrower x is read as it is and never rounded again. One half is computed and
    the other copied, so that a symmetric matrix stays so to the bit. Records no gradient.

    Args:
        gram: [I, I], symmetric (the upper half is not read), float32 or float64 (float64 where x is), contiguous;
            written. Begins as zeros.
        x: [B, T, I], or packed rows [N, I] with ``offsets`` or ``bounds``; any strides (no copy is made if rows are
            evenly spaced and features contiguous); float64, float32, bfloat16 or float16.
        lengths, offsets, bounds: which rows are a sample's, as ``column_norms_`` takes them. Other rows are never read.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a DTensor, rows out of range, more than one of lengths,
            offsets and bounds.
    """
    transforms.check_plain(gram=gram, x=x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected [B, T, I] or [N, I], got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected a dtype of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    wide = (torch.float64,) if x.dtype == torch.float64 else (torch.float32, torch.float64)
    if gram.dtype not in wide:
        raise ValueError(f"gram: expected {' or '.join(map(str, wide))} beside x of {x.dtype}, got {gram.dtype}")
    if gram.shape != (x.shape[-1], x.shape[-1]):
        raise ValueError(f"gram: expected [{x.shape[-1]}, {x.shape[-1]}], got {list(gram.shape)}")
    if not gram.is_contiguous():
        raise ValueError(f"gram: expected contiguous memory, got strides {gram.stride()}")
    if gram.device != x.device:
        raise ValueError(f"gram: expected device {x.device}, got {gram.device}")
    _add._opoverload(gram, x, bounds_of(x, lengths, offsets, bounds))


@torch.library.custom_op("fastguard::gram_", mutates_args=("gram",))
@transforms.without_autocast
def _add(gram: Tensor, x: Tensor, bounds: Tensor) -> None:
    if x.numel() == 0 or bounds.numel() == 0:
        return
    rows = x.reshape(-1, x.shape[-1])
    dense = rows if rows.stride(1) == 1 else rows.contiguous()
    backend.choose("gram", x.device).add(gram, dense, bounds.contiguous())


@_add.register_fake
def _(gram, x, bounds):  # type: ignore[no-untyped-def]
    return None
