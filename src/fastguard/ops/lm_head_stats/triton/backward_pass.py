"""The launches of the backward."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
from fastguard.ops.launch import chip, on_device, precision
from fastguard.ops.lm_head_stats import live, portable
from fastguard.ops.lm_head_stats.op import TILE, Grads, Saved
from fastguard.ops.lm_head_stats.triton.configs import COLUMNS, config
from fastguard.ops.lm_head_stats.triton.dlogit import dlogit_kernel
from fastguard.ops.lm_head_stats.triton.dweight import dweight_kernel
from fastguard.ops.lm_head_stats.triton.dx import dx_kernel
from fastguard.ops.lm_head_stats.triton.lists import _window
from fastguard.ops.lm_head_stats.triton.warm import _tail_mass, count_kernel, tail_kernel, warm_columns
from fastguard.ops.vocabulary import Head

WINDOW_ELEMENTS = 2**26
"""Most elements of dlogits alive at a time: 128 MB in bf16."""


@on_device
def backward(
    grads: Grads,
    x: Tensor,
    head: Head,
    target: Tensor,
    saved: Saved,
    columns: Tensor | None,
    need_hidden: bool,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> Tensor | None:
    """dx [N, D] in fp32 (None unless needed); adds to the fp32 buffers dweight [V, D] and dbias [V] if given.

    columns: [T, V] as the forward recorded them, or None for every column; the forward saw to it that they keep
    its ``filter_tol``. Signature and meaning of ``portable.backward``. dweight must be contiguous.
    """
    if x.dtype == torch.float64:
        return portable.backward(grads, x, head, target, saved, columns, need_hidden, dweight, dbias)
    if dweight is not None and not dweight.is_contiguous():
        raise ValueError(f"dweight: expected a contiguous tensor, got strides {dweight.stride()}")
    x, weight = x.contiguous(), head.weight.contiguous()
    (n, d), v = x.shape, weight.shape[0]
    dx = torch.empty(n, d, dtype=torch.float32, device=x.device) if need_hidden else None
    if not n:
        return dx
    tiles = triton.cdiv(n, TILE)
    blocks = config(x.dtype, d, chip(x.device))
    need_weight = dweight is not None or dbias is not None
    warm = share = tail_row = None
    most = v
    if columns is not None:
        counts = torch.empty(tiles, 256, dtype=torch.int32, device=x.device)
        count_kernel[tiles,](columns, counts, columns.stride(0), v, BLOCK=2048)
        most = int(counts[:, live.LIVE].max())  # the host synchronisation
        warm, share = warm_columns(columns, counts, saved.rest_lse, head.softcap)
        tail_row = share.to(weight.dtype) @ weight[warm]
    tail = None

    widest = max(WINDOW_ELEMENTS // (tiles * TILE), COLUMNS)
    width = v if most <= widest else widest // COLUMNS * COLUMNS
    n_places = triton.cdiv(min(most, width), COLUMNS) * COLUMNS
    dlogit = torch.empty(tiles, n_places, TILE, dtype=x.dtype, device=x.device)
    places = n_places // blocks.dlogit.outer
    kept_rest = torch.zeros(n, dtype=torch.float32, device=x.device)
    kept_mean = torch.zeros_like(kept_rest)
    for first in range(0, v, width):
        last = first + width >= v
        window = _window(columns, first, min(first + width, v), tiles, n_places, need_weight, x.device)
        stride_index = window.listed.stride(0)
        kept = kept_m = None
        if columns is not None:
            kept, kept_m = torch.zeros(2, places, n, device=x.device).unbind()
        dlogit_kernel[tiles, places](
            grads, x, weight, head.bias, target, saved, window.listed, window.n_listed, dlogit, kept, kept_m,
            n, d, n_places, stride_index, head.scale, head.softcap,
            TILE=TILE, BLOCK_C=blocks.dlogit.outer, BLOCK_K=blocks.dlogit.inner, EVEN=d % blocks.dlogit.inner == 0,
            PRECISION=precision(), num_warps=blocks.dlogit.warps, num_stages=blocks.dlogit.stages,
        )  # fmt: skip
        if kept is not None and kept_m is not None:
            kept_rest += kept.sum(0)
            kept_mean += kept_m.sum(0)
            if last:
                tail = head.scale * _tail_mass(grads, saved, kept_rest, kept_mean)
        if dx is not None:
            dx_kernel[tiles, triton.cdiv(d, blocks.dx.outer)](
                dlogit, weight, window.listed, window.n_listed, tail, tail_row, dx, n, d, n_places, stride_index,
                TILE=TILE, BLOCK_D=blocks.dx.outer, BLOCK_C=blocks.dx.inner, ADD=first > 0,
                PRECISION=precision(),
                num_warps=blocks.dx.warps, num_stages=blocks.dx.stages,
            )  # fmt: skip
        if need_weight:
            outer = triton.cdiv(d, blocks.dweight.outer) if dweight is not None else 1
            dweight_kernel[window.n_tiles.shape[0], outer](
                dlogit, x, window.column, window.slot, window.tile, window.n_tiles, dweight, dbias,
                n, d, n_places, window.column.shape[0], tiles, window.slot.stride(0), window.tile.stride(0),
                TILE=TILE, COLUMNS=COLUMNS, BLOCK_D=blocks.dweight.outer, BLOCK_N=blocks.dweight.inner,
                PRECISION=precision(), num_warps=blocks.dweight.warps, num_stages=blocks.dweight.stages,
            )  # fmt: skip
    if tail is not None and warm is not None and share is not None:
        if dweight is not None:
            tail_x = torch.empty(tiles, d, dtype=torch.float32, device=x.device)
            tail_kernel[tiles, triton.cdiv(d, 64)](tail, x, tail_x, n, d, TILE=TILE, BLOCK_D=64)
            dweight.index_add_(0, warm, share.t() @ tail_x)
        if dbias is not None:
            tail_sum = torch.nn.functional.pad(tail, (0, tiles * TILE - n)).view(tiles, TILE).sum(1)
            dbias.index_add_(0, warm, tail_sum @ share)
    return dx
