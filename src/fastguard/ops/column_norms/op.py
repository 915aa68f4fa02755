"""``column_norms_``: streaming sums of squares of each input feature, over chosen tokens.

Checks and the schema live here, once; the sums of a batch live in the backend modules beside this file, which expose
``squares`` with the signature of ``portable.py``.

Cost: the chosen rows of x are read once; the state is read and written, I numbers (3 I with both bounds of a sample),
besides I numbers a sample where those are asked for. Two flops an element read.
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
def column_norms_(
    sums: Tensor,
    x: Tensor,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    offsets: Tensor | Sequence[int] | None = None,
    bounds: Tensor | None = None,
    least: Tensor | None = None,
    greatest: Tensor | None = None,
) -> None:
    """Add the squares of a batch of activations to the sums of each feature, in place: sums[i] += sum x[row, i]^2.

    Wanda's activation norm (Sun et al. 2023, arXiv 2306.11695): a weight's score is |W[o, i]| sqrt(sums[i] / n) after
    n tokens, which the caller counts. A batch is summed in float64 and rounded once, when it joins ``sums``: in a
    float64 state a stream of any length loses nothing; in an fp32 state every call costs half a unit in the last
    place, which some thousands of calls add up to a few 1e-6. Records no gradient.

    Args:
        sums: [I], float32 or float64 (float64 where x is); written. Begins as zeros.
        x: [B, T, I], or packed rows [N, I] with ``offsets`` or ``bounds``; any strides (no copy is made if rows are
            evenly spaced and features contiguous); float64, float32, bfloat16 or float16.
        lengths: [B] integers, tokens of each sample; those behind are never read. None: all T.
        offsets: [B + 1] integers, ascending from 0 to N: where each packed sample begins and the last one ends.
        bounds: [B, 2] integers, the rows of each sample, as ``fastguard.ops.segments.runs`` makes them of a mask.
        least: [I], as sums; written. The least sum of squares that one sample had, over all samples with a token.
            Begins as inf. What RSN-Tune asks of a neuron: that every sample excites it.
        greatest: [I], as sums; written. The greatest one. Begins as -inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a DTensor, rows out of range, more than one of lengths,
            offsets and bounds.
    """
    transforms.check_plain(sums=sums, x=x, least=least, greatest=greatest)
    _check(sums, x, least, greatest)
    _add._opoverload(sums, least, greatest, x, bounds_of(x, lengths, offsets, bounds))


def _check(sums: Tensor, x: Tensor, least: Tensor | None, greatest: Tensor | None) -> None:
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected [B, T, I] or [N, I], got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected a dtype of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    wide = (torch.float64,) if x.dtype == torch.float64 else (torch.float32, torch.float64)
    if sums.dtype not in wide:
        expected = " or ".join(map(str, wide))
        raise ValueError(f"sums: expected {expected} beside x of {x.dtype}, got {sums.dtype}")
    for name, state in (("sums", sums), ("least", least), ("greatest", greatest)):
        if state is None:
            continue
        if state.dtype != sums.dtype or state.shape != x.shape[-1:]:
            raise ValueError(f"{name}: expected {sums.dtype} [{x.shape[-1]}], got {state.dtype} {list(state.shape)}")
        if state.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, got {state.device}")


@torch.library.custom_op("fastguard::column_norms_", mutates_args=("sums", "least", "greatest"))
@transforms.without_autocast
def _add(sums: Tensor, least: Tensor | None, greatest: Tensor | None, x: Tensor, bounds: Tensor) -> None:
    if x.numel() == 0 or bounds.numel() == 0:
        return
    rows = x.reshape(-1, x.shape[-1])
    dense = rows if rows.stride(1) == 1 else rows.contiguous()
    each = least is not None or greatest is not None
    out = torch.zeros(bounds.shape[0] if each else 1, x.shape[-1], dtype=torch.float64, device=x.device)
    backend.choose("column_norms", x.device).squares(dense, bounds.contiguous(), out)
    sums.copy_(out.sum(0).add_(sums))
    without = bounds[:, :1] == bounds[:, 1:]  # samples without a token
    if least is not None:
        least.copy_(torch.minimum(out.masked_fill(without, torch.inf).amin(0), least.double()))
    if greatest is not None:
        greatest.copy_(torch.maximum(out.masked_fill(without, -torch.inf).amax(0), greatest.double()))


@_add.register_fake
def _(sums, least, greatest, x, bounds):  # type: ignore[no-untyped-def]
    return None
