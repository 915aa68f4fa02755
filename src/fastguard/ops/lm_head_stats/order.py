"""Rows of like spread share a tile, so that a flat row does not make columns live for peaked ones.

A tile's live columns are what its flattest rows need. In a batch they are few and lie anywhere: one is the first
position of every sequence (an attention sink), which reads almost evenly through the lens. Sorted by the standard
deviation of their logits over SAMPLE columns of W, rows fall into tiles that need much and tiles that need little. The
backends do not know of it: they get the rows in the order of the tiles, which the columns' record carries.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastguard.ops.precision import accumulation_dtype
from fastguard.ops.vocabulary import Head

if TYPE_CHECKING:
    from fastguard.ops.lm_head_stats.op import Grads, Row, Saved

SAMPLE = 512
"""Columns, evenly spaced, whose logits' spread orders the rows: 1% of V = 49152."""


def by_spread(x: Tensor, head: Head) -> Tensor:
    """Rows [N] int64 of x [N, D] from flat to peaked; of equals, the first."""
    columns = slice(None, None, -(-head.weight.shape[0] // SAMPLE))
    z = x @ head.weight[columns].t()
    if head.bias is not None:
        z = z + head.bias[columns]
    return z.to(accumulation_dtype(z.dtype)).std(1, correction=0).argsort(stable=True)


def forward(
    backend: ModuleType, x: Tensor, head: Head, target: Tensor, filter_tol: float, with_mean: bool, record: Tensor
) -> Row:
    """``backend.forward`` over rows in order; fills ``record`` [T, V + 4 TILE] unless empty: codes, then the order."""
    codes = record[:, : head.weight.shape[0]]
    if len(record) < 2:
        return backend.forward(x, head, target, filter_tol, with_mean, codes)
    rows = by_spread(x, head)
    bytes_ = record[:, codes.shape[1] :]
    room = torch.nn.functional.pad(rows.int(), (0, bytes_.numel() // 4 - len(rows)))
    bytes_.copy_(room.view(torch.uint8).view(bytes_.shape))
    stats = backend.forward(x[rows], head, target[rows], filter_tol, with_mean, codes)
    back = rows.argsort()
    return type(stats)(*(s[back] for s in stats))


def backward(
    backend: ModuleType,
    grads: Grads,
    x: Tensor,
    head: Head,
    target: Tensor,
    saved: Saved,
    record: Tensor | None,
    need_hidden: bool,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> Tensor | None:
    """``backend.backward`` over rows in the order that ``forward`` left in ``record``."""
    codes = None if record is None else record[:, : head.weight.shape[0]]
    if record is None or codes is None or len(record) < 2:
        return backend.backward(grads, x, head, target, saved, codes, need_hidden, dweight, dbias)
    rows = record[:, codes.shape[1] :].reshape(-1).view(torch.int32)[: len(x)].long()

    def ordered(bundle: Any) -> Any:
        return type(bundle)(*(None if s is None else s[rows] for s in bundle))

    dx = backend.backward(
        ordered(grads), x[rows], head, target[rows], ordered(saved), codes, need_hidden, dweight, dbias
    )
    return None if dx is None else dx[rows.argsort()]
