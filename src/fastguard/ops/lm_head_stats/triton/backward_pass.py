"""The launches of the backward."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
from fastguard.ops.launch import chip, on_device, precision, processors
from fastguard.ops.lm_head_stats import exact, half, portable
from fastguard.ops.lm_head_stats.op import TILE, Grads, Saved
from fastguard.ops.lm_head_stats.triton.configs import COLUMNS, config
from fastguard.ops.lm_head_stats.triton.dlogit import dlogit_kernel
from fastguard.ops.lm_head_stats.triton.dweight import dweight_kernel
from fastguard.ops.lm_head_stats.triton.dx import dx_kernel
from fastguard.ops.lm_head_stats.triton.gradient import Kernels
from fastguard.ops.lm_head_stats.triton.lists import in_order, lists_of, wanted_kernel
from fastguard.ops.lm_head_stats.triton.tail import add_rows_kernel, tail_kernel
from fastguard.ops.lm_head_stats.triton.warm import warm_columns
from fastguard.ops.vocabulary import Head

WINDOW_ELEMENTS = 2**26
"""Elements of dlogits alive at a time: 128 MB in bf16."""

NARROWEST = 1024
"""Places of a window at least, however many tiles there are."""

PROGRAMS = 16
"""Programs of a tile in ``dlogit_kernel``: enough to fill a device, few where a window is empty."""


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
    its ``filter_tol``. Signature and meaning of ``portable.backward``. With columns, dweight must be contiguous.

    Nothing waits for the device: how long the lists are is not known here. They are gone through in as many windows of
    places as the longest possible list has, of a width that the memory gives (8192 at 8192 rows: sixteen at V = 128256,
    one up to 512 rows). Where no list comes so far, the four launches of a window end with a load in each program:
    about 30 us on paper, against some milliseconds that the first window takes.
    """
    if x.dtype == torch.float64:
        return portable.backward(grads, x, head, target, saved, columns, need_hidden, dweight, dbias)
    if columns is None:
        return exact.backward(grads, x, head, target, saved, None, need_hidden, dweight, dbias, kernels=Kernels())
    if dweight is not None and not dweight.is_contiguous():
        raise ValueError(f"dweight: expected a contiguous tensor, got strides {dweight.stride()}")
    x, weight = x.contiguous(), head.weight.contiguous()
    (n, d), v = x.shape, weight.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    dx = empty(n, d) if need_hidden else None
    if not n:
        return dx
    tiles = triton.cdiv(n, TILE)
    blocks = config(x.dtype, d, chip(x.device))
    need_weight = dweight is not None or dbias is not None
    grads, shrink = half.raised(grads, head.scale, x.dtype)
    lists = lists_of(columns, need_weight)
    warm, share = warm_columns(columns, saved.rest_lse, head.softcap)
    tail_row = share.to(weight.dtype) @ weight.index_select(0, warm)

    n_blocks = triton.cdiv(v, COLUMNS)
    n_places = min(max(WINDOW_ELEMENTS // (tiles * TILE), NARROWEST) // COLUMNS, n_blocks) * COLUMNS
    programs = min(n_places // blocks.dlogit.outer, PROGRAMS)
    dlogit = empty(tiles, n_places, TILE, dtype=x.dtype)
    kept = torch.zeros(programs, n, device=x.device)
    kept_mean = None if grads.mean_logit is None else torch.zeros_like(kept)
    if lists.place is not None:
        column = in_order(lists.place)
        tile, n_tiles = empty(n_blocks, tiles, dtype=torch.int32), empty(n_blocks, dtype=torch.int32)
    for first in range(0, v, n_places):
        dlogit_kernel[tiles, programs](
            grads, x, weight, head.bias, target, saved, lists.listed, lists.n_listed, dlogit, kept, kept_mean,
            n, d, n_places, v, first, head.scale, head.softcap,
            TILE=TILE, BLOCK_C=blocks.dlogit.outer, BLOCK_K=blocks.dlogit.inner, EVEN=d % blocks.dlogit.inner == 0,
            PRECISION=precision(), num_warps=blocks.dlogit.warps, num_stages=blocks.dlogit.stages,
        )  # fmt: skip
        if dx is not None:
            dx_kernel[tiles, triton.cdiv(d, blocks.dx.outer)](
                grads, saved, dlogit, weight, lists.listed, lists.n_listed, kept, kept_mean, tail_row, shrink, dx,
                n, d, n_places, v, first, programs, head.scale,
                TILE=TILE, BLOCK_D=blocks.dx.outer, BLOCK_C=blocks.dx.inner, PRECISION=precision(),
                num_warps=blocks.dx.warps, num_stages=blocks.dx.stages,
            )  # fmt: skip
        if lists.place is not None:
            wanted_kernel[n_blocks,](
                lists.place, column, lists.most, tile, n_tiles, v, n_places, tiles, first, COLUMNS=COLUMNS, BLOCK_T=16
            )
            outer = triton.cdiv(d, blocks.dweight.outer) if dweight is not None else 1
            dweight_kernel[min(n_blocks, processors(x.device)), outer](
                dlogit, x, column, lists.place, lists.most, tile, n_tiles, shrink, dweight, dbias,
                n, v, d, n_places, tiles, first,
                TILE=TILE, COLUMNS=COLUMNS, BLOCK_D=blocks.dweight.outer, BLOCK_N=blocks.dweight.inner,
                PRECISION=precision(), num_warps=blocks.dweight.warps, num_stages=blocks.dweight.stages,
            )  # fmt: skip
    if need_weight:
        tail_x, tail_sum = empty(tiles, d), empty(tiles, 1)
        tail_kernel[tiles, triton.cdiv(d, 64)](
            grads, saved, kept, kept_mean, x, shrink, tail_x, tail_sum, n, d, programs, head.scale, TILE=TILE,
            BLOCK_D=64,
        )  # fmt: skip
        for total, rows in ((dweight, tail_x), (dbias, tail_sum)):
            if total is not None:
                width = rows.shape[1]
                grown = share.t() @ rows
                add_rows_kernel[len(warm), triton.cdiv(width, 1024)](grown, warm, total, width, BLOCK_D=1024)
    return dx
