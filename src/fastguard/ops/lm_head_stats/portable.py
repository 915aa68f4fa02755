"""``lm_head_stats`` by tiles of rows: products by torch, element-wise code by torch.

The tile loop is shared: ``cpu.py`` runs it with C++ in place of the two element-wise functions
(`TileKernels`). At most one tile of logits ([TILE, V]) is alive at a time.

Shapes: N rows, R rows of one tile, V vocabulary, C live columns of a tile, D hidden size.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import torch
from torch import Tensor

from fastguard.ops.lm_head_stats import exact, packed
from fastguard.ops.lm_head_stats.live import CODES_PER_OCTAVE, encode, tile_columns
from fastguard.ops.lm_head_stats.op import TILE, Grads, Row, Saved, part
from fastguard.ops.precision import accumulation_dtype
from fastguard.ops.vocabulary import Head

DENSE = 0.5
"""Above this fraction of live and warm columns, gathering them costs more than computing all."""


class TileKernels(Protocol):
    """The element-wise work on one tile of logits."""

    def statistics(
        self, z: Tensor, head: Head, target: Tensor, filter_tol: float, with_mean: bool, columns: Tensor | None
    ) -> Row:
        """Reduce raw products z [R, V] and fill ``columns`` [V] if given; z may be overwritten only then."""

    def columns(self, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, int, Tensor | None]:
        """`tile_columns`, or None for all columns where these are more than DENSE of V."""

    def gradient(
        self, z: Tensor, head: Head, index: Tensor | None, target: Tensor, row: Saved, grads: Grads, out: Tensor
    ) -> Tensor:
        """Write the gradient at the raw products z [R, C] of the columns ``index`` to out, which may be z.

        index: None for the head's own columns, of which a target need not be one.
        Returns the tail mass [R]: what the absent columns would add to the row's gradient before softcap and scale.
        """


def _transform(z: Tensor, head: Head, index: Tensor | None = None) -> Tensor:
    z = z.to(accumulation_dtype(z.dtype))
    if head.bias is not None:
        z = z + (head.bias if index is None else head.bias[index])
    if head.scale != 1.0:
        z = z * head.scale
    return head.softcap * torch.tanh(z / head.softcap) if head.softcap else z


class TorchKernels:
    """`TileKernels` in plain torch: any device."""

    def statistics(
        self, z: Tensor, head: Head, target: Tensor, filter_tol: float, with_mean: bool, columns: Tensor | None
    ) -> Row:
        """See `TileKernels.statistics`."""
        z = _transform(z, head)
        target_logit = z.gather(1, target[:, None])[:, 0]
        lse = torch.logsumexp(z, 1)
        mean = (torch.softmax(z, 1) * z).sum(1) if with_mean else torch.zeros_like(lse)
        rest = z.scatter(1, target[:, None], -math.inf)
        rest_lse = torch.logsumexp(rest, 1)
        if columns is not None:
            mass = torch.exp(rest - rest_lse[:, None])
            if with_mean:
                mass *= (1 + z - mean[:, None]).abs().clamp_min(1.0)
            columns.copy_(encode(mass.nan_to_num_(0.0), target, filter_tol))  # V = 1 leaves no rest
        return Row(lse, rest_lse, target_logit, mean)

    def columns(self, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, int, Tensor | None]:
        """See `TileKernels.columns`."""
        index, live, share = tile_columns(codes, dtype)
        return (index, live, share) if index.numel() <= DENSE * codes.numel() else (None, codes.numel(), None)

    def gradient(
        self, z: Tensor, head: Head, index: Tensor | None, target: Tensor, row: Saved, grads: Grads, out: Tensor
    ) -> Tensor:
        """See `TileKernels.gradient`."""
        g_lse, g_rest, g_target, g_mean = (None if g is None else g[:, None] for g in grads)
        z = _transform(z, head, index)
        columns = torch.arange(z.shape[1], device=z.device) if index is None else index
        is_target = columns[None] == target[:, None]
        d = torch.zeros_like(z)
        tail = z.new_zeros(z.shape[0])
        rest = torch.exp(z - row.rest_lse[:, None]).masked_fill(is_target, 0.0)
        dropped = (1 - rest.sum(1)).clamp_min(0.0)  # of the rest mass; times 1 - p_t it is of the softmax
        rest_share = torch.exp(row.rest_lse - row.lse)
        if g_lse is not None:
            d += g_lse * torch.exp(z - row.lse[:, None])
            tail += g_lse[:, 0] * rest_share * dropped
        if g_mean is not None:
            m = torch.exp(z - row.lse[:, None]) * (1 + z - row.mean_logit[:, None])  # type: ignore[index]
            d += g_mean * m
            tail += g_mean[:, 0] * (1 - m.sum(1))
        if g_rest is not None:
            d += g_rest * rest
            tail += g_rest[:, 0] * dropped
        if g_target is not None:
            d += g_target * is_target
        if head.softcap:
            d *= 1 - (z / head.softcap).square()
        out.copy_(d * head.scale)
        return tail


def forward(
    x: Tensor,
    head: Head,
    target: Tensor,
    filter_tol: float,
    with_mean: bool,
    columns: Tensor,
    kernels: TileKernels | None = None,
) -> Row:
    """The statistics of x [N, D]; fills ``columns`` [tiles, V] unless empty."""
    kernels = kernels or TorchKernels()
    x = x.contiguous()
    n = x.shape[0]
    out = Row(*(torch.zeros(n, dtype=accumulation_dtype(x.dtype), device=x.device) for _ in Row._fields))
    buffer = torch.empty(min(TILE, n), head.weight.shape[0], dtype=x.dtype, device=x.device)
    for i, start in enumerate(range(0, n, TILE)):
        rows = slice(start, min(start + TILE, n))
        z = packed.product(x[rows], head.weight, buffer[: rows.stop - start])
        code = columns[i] if columns.numel() else None
        stats = kernels.statistics(z, head, target[rows], filter_tol, with_mean, code)
        for o, s in zip(out, stats, strict=True):
            o[rows] = s
        del z  # before the next tile's: one is alive at a time
    return out


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
    kernels: TileKernels | None = None,
) -> Tensor | None:
    """dx [N, D] in the accumulation dtype (None unless needed); adds to dweight [V, D] and dbias [V] if given.

    columns: [tiles, V] as the forward recorded them, or None for every column.
    """
    kernels = kernels or TorchKernels()
    if columns is None:
        return exact.backward(grads, x, head, target, saved, None, need_hidden, dweight, dbias, kernels=kernels)
    x = x.contiguous()
    n, wide = x.shape[0], accumulation_dtype(x.dtype)
    dx = torch.empty(x.shape, dtype=wide, device=x.device) if need_hidden else None
    for i, start in enumerate(range(0, n, TILE)):
        rows = slice(start, min(start + TILE, n))
        # The tile's columns: live ones, computed exactly, then warm ones, which stand for all that was dropped.
        index, live, share = kernels.columns(columns[i], wide)
        w = head.weight if index is None else head.weight.index_select(0, index)
        d = x[rows] @ w[:live].t()
        row = part(saved, rows)
        computed = None if index is None else index[:live]
        tail = kernels.gradient(d, head, computed, target[rows], row, part(grads, rows), d) * head.scale
        if index is not None and share is not None and head.softcap:
            share = share * slope_of_codes(columns[i][index[live:]], row.rest_lse.mean(), head.softcap)
        if dx is not None:
            dx[rows] = d @ w[:live]
            if share is not None:
                dx[rows].addr_(tail, (share.to(w.dtype) @ w[live:]).to(wide))
        if dweight is not None:
            if index is None:
                exact.add_product(dweight, d.t(), x[rows])
            else:
                grown = torch.zeros(index.numel(), x.shape[1], dtype=wide, device=x.device)
                exact.add_product(grown[:live], d.t(), x[rows])
                if share is not None:
                    grown[live:].addr_(share, tail @ x[rows].to(wide))
                dweight.index_add_(0, index, grown)
        if dbias is not None:
            summed = d.sum(0, dtype=wide)
            if share is not None:
                summed = torch.cat([summed, share * tail.sum()])
            dbias.add_(summed) if index is None else dbias.index_add_(0, index, summed)
    return dx


keep = functools.partial(exact.forward, kernels=TorchKernels())
read_kept = functools.partial(exact.backward, kernels=TorchKernels())


def slope_of_tiles(columns: Tensor, rest_lse: Tensor, softcap: float) -> Tensor:
    """`slope_of_codes` for columns [tiles, V], each tile with the mean rest of its rows."""
    rests = [rest_lse[i * TILE : (i + 1) * TILE].mean() for i in range(columns.shape[0])]
    return slope_of_codes(columns, torch.stack(rests)[:, None], softcap)


def slope_of_codes(codes: Tensor, mean_rest: Tensor, softcap: float) -> Tensor:
    """Slope 1 - (z / cap)^2 of dropped columns from their codes, whose mass exp(z - rest) gives back a mean logit."""
    z = (codes.to(mean_rest.dtype) - 254) / CODES_PER_OCTAVE * math.log(2.0) + mean_rest
    return 1 - (z / softcap).clamp(-1, 1).square()
